//! `lifeboat-controller`: decides what is backed up and restored, when and in which order.

mod account;
mod backup;
mod changes;
mod child;
mod context;
mod dispatch;
mod holder;
mod hooks;
mod lease;
mod metrics;
mod object;
mod policy;
mod recovery_point;
mod related;
mod repository;
mod restore;
mod scope;
mod storage;
mod stream;
mod task;

use std::io::Write as _;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;

use anyhow::{Context as _, Result, anyhow};
use clap::{Args, Parser, Subcommand};
use lifeboat_process::access::RepositoryAccess;
use lifeboat_process::server::{self, Readiness};
use lifeboat_process::telemetry::{self, LogFormat};
use tokio::signal::unix::{SignalKind, signal};
use tracing::info;

use crate::context::Context;

/// Decides what is backed up and restored, when and in which order.
#[derive(Debug, Parser)]
#[command(version)]
struct Options {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Controls all kinds, as soon as it leads.
    Run(Box<RunOptions>),
    /// Prints the steps that a backup takes, as the log has them at the level `debug`.
    Steps,
}

#[derive(Debug, Args)]
struct RunOptions {
    /// The namespace that Lifeboat is installed in.
    #[arg(long, env = "POD_NAMESPACE")]
    namespace: String,
    /// The name of this controller's pod, by which it holds the Lease.
    #[arg(long, env = "POD_NAME")]
    pod: String,
    /// The image that restore pods run.
    #[arg(long, env = "LIFEBOAT_IMAGE")]
    image: String,
    /// How restore pods pull it.
    #[arg(long, default_value = "IfNotPresent")]
    image_pull_policy: String,
    /// Secrets of Lifeboat's namespace with which it is pulled; given once each.
    #[arg(long = "image-pull-secret")]
    image_pull_secrets: Vec<String>,
    /// What pods that hold volumes tolerate: a JSON list, as in a pod's spec.
    #[arg(long, default_value = "[]", value_parser = tolerations)]
    pod_tolerations: Tolerations,
    /// Volumes that are read or written on one node at once; a restore may be one more.
    #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u32).range(1..=64))]
    volumes_per_node: u32,
    /// Applications that are brought to rest at once.
    #[arg(long, default_value_t = 16, value_parser = clap::value_parser!(u32).range(1..=1024))]
    max_at_rest: u32,
    /// Where small objects of repositories are kept.
    #[arg(long, env = "LIFEBOAT_CACHE_DIR")]
    cache_dir: Option<PathBuf>,
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

/// Of pods, as they stand in a pod's spec.
type Tolerations = Vec<k8s_openapi::api::core::v1::Toleration>;

fn tolerations(text: &str) -> Result<Tolerations, serde_json::Error> {
    serde_json::from_str(text)
}

#[tokio::main]
async fn main() -> Result<()> {
    match Options::parse().command {
        Command::Run(options) => run(*options).await,
        Command::Steps => print_steps(),
    }
}

async fn run(options: RunOptions) -> Result<()> {
    telemetry::start(options.log_format);
    let config = kube::Config::infer().await.context("cannot tell how to reach the API server")?;
    let client = kube::Client::try_from(config.clone()).context("cannot speak to the API server")?;
    let mut registry = prometheus_client::registry::Registry::default();
    let context = Arc::new(Context {
        access: RepositoryAccess::new(client.clone(), options.namespace.clone(), options.cache_dir),
        events: context::Events::new(client.clone(), &options.pod),
        metrics: metrics::Metrics::register(registry.sub_registry_with_prefix("lifeboat")),
        namespace: options.namespace.clone(),
        image: options.image,
        image_pull_policy: options.image_pull_policy,
        image_pull_secrets: options.image_pull_secrets,
        dispatch: dispatch::Dispatch::new(options.volumes_per_node, options.max_at_rest, options.pod_tolerations),
        looked: repository::Looked::default(),
        watches: changes::Watches::new(client.clone(), options.namespace.clone()),
        cluster: tokio::sync::OnceCell::new(),
        client: client.clone(),
        config,
    });
    let readiness = Readiness::default();
    let leader = lease::Lease::new(client, &options.namespace, &options.pod);
    info!(version = env!("CARGO_PKG_VERSION"), "controller started");
    let serve = server::serve(options.health_addr, options.metrics_addr, readiness.clone(), registry);
    let lead = async {
        // A standby is ready: it answers health checks and takes over by itself.
        readiness.set(true);
        leader.acquire().await;
        info!("leading");
        tokio::select! {
            lost = leader.keep() => lost,
            () = control(&context) => Err(anyhow!("the controllers ended unexpectedly")),
        }
    };
    let ended = tokio::select! {
        ended = serve => ended,
        ended = lead => ended,
        ended = told_to_end() => ended,
    };
    leader.release().await;
    ended
}

fn print_steps() -> Result<()> {
    let mut out = std::io::stdout().lock();
    for step in backup::STEPS {
        writeln!(out, "{step}")?;
    }
    Ok(())
}

async fn told_to_end() -> Result<()> {
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    tokio::select! {
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
    }
    Ok(())
}

/// Runs one control loop a kind.
async fn control(context: &Arc<Context>) {
    tokio::join!(
        repository::control(Arc::clone(context)),
        policy::control(Arc::clone(context)),
        backup::control(Arc::clone(context)),
        restore::control(Arc::clone(context)),
    );
}
