//! The quiesce guardian: holds the workloads of its node at rest for a moment, and thaws them whatever dies. It also runs the
//! commands of streams and opens block devices for the agent, since it alone may do on the node what these need.
//!
//! A second guardian on the node (`--second`) freezes and starts nothing; it thaws and ends what the first one leaves when it dies.

mod container;
mod containerd;
mod cri;
mod devices;
mod fsfreeze;
mod intent;
mod keeper;
mod leases;
mod requests;
mod streams;
mod sweep;
#[cfg(test)]
mod testing;
mod voice;
mod volumes;

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;

use anyhow::{Context, Result};
use clap::Args;
use lifeboat_process::server::{self, Readiness};
use lifeboat_process::telemetry::{self, LogFormat};
use tracing::{info, warn};

use self::cri::Runtime;
use self::intent::Intents;
use self::keeper::Guardian;

/// How a guardian is started.
#[derive(Debug, Args)]
pub(crate) struct GuardOptions {
    /// The node whose workloads are held.
    #[arg(long, env = "NODE_NAME")]
    node: String,
    /// The namespace that Lifeboat is installed in.
    #[arg(long, env = "POD_NAMESPACE")]
    namespace: String,
    /// Freezes nothing: thaws what the first guardian leaves.
    #[arg(long)]
    second: bool,
    /// The socket of the node's container runtime.
    #[arg(long, default_value = "/run/containerd/containerd.sock")]
    cri_socket: PathBuf,
    /// A folder on the node's disk where it is written what may be frozen.
    #[arg(long, default_value = "/var/lib/lifeboat/intents")]
    intents_dir: PathBuf,
    /// kubelet's directory.
    #[arg(long, default_value = "/var/lib/kubelet")]
    kubelet_dir: PathBuf,
    /// Where the agent of this node asks for the commands of streams and for block devices.
    #[arg(long, default_value = crate::STREAMS_SOCKET)]
    streams_socket: PathBuf,
    /// Where the node's `/dev` is seen. Without it no block device is opened.
    #[arg(long)]
    devices_dir: Option<PathBuf>,
    /// Where metrics are served.
    #[arg(long, default_value = "0.0.0.0:8082")]
    metrics_addr: SocketAddr,
    /// Where health is served.
    #[arg(long, default_value = "0.0.0.0:8083")]
    health_addr: SocketAddr,
    /// The form of log lines.
    #[arg(long, value_enum, default_value_t = LogFormat::Json)]
    log_format: LogFormat,
}

/// Guards until it is told to end.
pub(crate) async fn run(options: GuardOptions) -> Result<()> {
    telemetry::start(options.log_format);
    let intents = Intents::in_folder(options.intents_dir).context("cannot use the folder of intents")?;
    let guardian =
        Arc::new(Guardian { containers: Runtime::new(options.cri_socket), intents, kubelet_dir: options.kubelet_dir });
    // Before anything else: what an earlier life of this process left is thawed.
    let failed = guardian.sweep().await;
    if failed > 0 {
        warn!(failed, "not everything could be thawed at the start; it is tried again");
    }
    info!(node = options.node, second = options.second, version = env!("CARGO_PKG_VERSION"), "guardian started");
    if options.second {
        tokio::select! {
            () = guardian.keep_sweeping() => {}
            ended = crate::until_told_to_end() => ended?,
        }
        return Ok(());
    }
    let client = kube::Client::try_default().await.context("cannot speak to the API server")?;
    let leases = kube::Api::namespaced(client.clone(), &options.namespace);
    let server = requests::Server {
        guardian: Arc::clone(&guardian),
        tasks: kube::Api::namespaced(client, &options.namespace),
        node: options.node.clone(),
        opener: devices::Opener { devices: options.devices_dir },
    };
    let readiness = Readiness::default();
    let registry = prometheus_client::registry::Registry::default();
    tokio::select! {
        ended = leases::work(Arc::clone(&guardian), leases, &options.node, readiness.clone()) => ended,
        () = guardian.keep_sweeping() => Ok(()),
        ended = server.serve(&options.streams_socket) => ended,
        ended = server::serve(options.health_addr, options.metrics_addr, readiness, registry) => ended,
        // What is held has lost its holder then: the second guardian and the watchdogs in the containers let go.
        ended = crate::until_told_to_end() => ended,
    }
}
