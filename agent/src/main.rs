//! `lifeboat-agent`: moves data between the volumes and streams of one node and repositories; guards workloads that are frozen.

mod device;
mod guardian;
mod image;
mod lists;
mod maintain;
mod metrics;
mod outcome;
mod report;
mod stream;
mod task;
mod tasks;
mod volume;
mod wire;

use std::io::Write as _;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;

use anyhow::{Context, Result};
use clap::{Args, Parser, Subcommand};
use lifeboat_process::access::RepositoryAccess;
use lifeboat_process::server::{self, Readiness};
use lifeboat_process::telemetry::{self, LogFormat};
use tokio::signal::unix::{SignalKind, signal};
use tracing::info;

/// Where agent and guardian of a node meet: in a folder that only their pod has.
pub(crate) const STREAMS_SOCKET: &str = "/streams/guardian.sock";

/// Moves data between the volumes of one node and repositories.
#[derive(Debug, Parser)]
#[command(version)]
struct Options {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Does the volume tasks of this node.
    Run(RunOptions),
    /// Holds workloads of this node at rest when the controller asks, and thaws them whatever dies.
    Guard(guardian::GuardOptions),
    /// Prints the steps that a task takes, as the log has them at the level `debug`.
    Steps,
    /// Does nothing until it is told to end: keeps a volume mounted that is being read or restored.
    Hold,
}

#[derive(Debug, Args)]
struct RunOptions {
    /// The node whose tasks are done.
    #[arg(long, env = "NODE_NAME")]
    node: String,
    /// The namespace that Lifeboat is installed in.
    #[arg(long, env = "POD_NAMESPACE")]
    namespace: String,
    /// The UID of this agent's pod.
    #[arg(long, env = "POD_UID")]
    pod_uid: String,
    /// The account that this agent runs as. It asks for tokens of it.
    #[arg(long, env = "SERVICE_ACCOUNT", default_value = "lifeboat-agent")]
    service_account: String,
    /// kubelet's directory.
    #[arg(long, default_value = "/var/lib/kubelet")]
    kubelet_dir: PathBuf,
    /// Where small objects of repositories are kept between tasks.
    #[arg(long, env = "LIFEBOAT_CACHE_DIR")]
    cache_dir: Option<PathBuf>,
    /// Where the guardian of this node runs the commands of streams and opens block devices.
    #[arg(long, default_value = STREAMS_SOCKET)]
    streams_socket: PathBuf,
    /// Tasks done at once.
    #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u16).range(1..=64))]
    max_tasks: u16,
    /// Where metrics are served.
    #[arg(long, default_value = "0.0.0.0:8080")]
    metrics_addr: SocketAddr,
    /// Where health is served.
    #[arg(long, default_value = "0.0.0.0:8081")]
    health_addr: SocketAddr,
    /// The form of log lines.
    #[arg(long, value_enum, default_value_t = LogFormat::Json)]
    log_format: LogFormat,
}

fn main() -> Result<()> {
    lifeboat_repository::allocator::few_arenas();
    let options = Options::parse();
    let runtime =
        tokio::runtime::Builder::new_multi_thread().enable_all().build().context("cannot start worker threads")?;
    runtime.block_on(async {
        match options.command {
            Command::Run(options) => run(options).await,
            Command::Guard(options) => guardian::run(options).await,
            Command::Steps => print_steps(),
            Command::Hold => until_told_to_end().await,
        }
    })
}

fn print_steps() -> Result<()> {
    let mut out = std::io::stdout().lock();
    for step in task::STEPS {
        writeln!(out, "{step}")?;
    }
    Ok(())
}

/// Waits for SIGTERM or SIGINT.
async fn until_told_to_end() -> Result<()> {
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    tokio::select! {
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
    }
    Ok(())
}

async fn run(options: RunOptions) -> Result<()> {
    telemetry::start(options.log_format);
    let client = kube::Client::try_default().await.context("cannot speak to the API server")?;
    let mut registry = prometheus_client::registry::Registry::default();
    let metrics = metrics::Metrics::register(registry.sub_registry_with_prefix("lifeboat_agent"));
    let readiness = Readiness::default();
    let access = RepositoryAccess::new(client.clone(), options.namespace.clone(), options.cache_dir);
    let lister = lists::Lister {
        accounts: kube::Api::namespaced(client.clone(), &options.namespace),
        account: options.service_account,
        namespace: options.namespace.clone(),
    };
    let worker = Arc::new(task::Worker {
        tasks: kube::Api::namespaced(client, &options.namespace),
        access,
        lister,
        agent: options.pod_uid,
        node: options.node.clone(),
        kubelet_dir: options.kubelet_dir,
        streams_socket: options.streams_socket,
        metrics,
    });
    info!(node = options.node, version = env!("CARGO_PKG_VERSION"), "agent started");
    tokio::select! {
        ended = tasks::work(worker, usize::from(options.max_tasks), readiness.clone()) => ended,
        ended = server::serve(options.health_addr, options.metrics_addr, readiness, registry) => ended,
        // Running tasks end here without a word: their sessions are aborted by this agent's successor.
        ended = until_told_to_end() => ended,
    }
}
