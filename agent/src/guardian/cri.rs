//! The container runtime of this node, by the two calls of its CRI that the guardian needs. `containerd` has those beyond it.
//!
//! Field numbers are those of `k8s.io/cri-api/pkg/apis/runtime/v1/api.proto`; fields that are not used are left out.

use std::collections::HashMap;
use std::future::Future;
use std::path::PathBuf;

use hyper_util::rt::TokioIo;
use thiserror::Error;
use tokio::net::UnixStream;
use tonic::metadata::MetadataValue;
use tonic::transport::{Channel, Endpoint};
use tonic::{Code, Request, Status};

use super::containerd::{Pipes, Process};

const RUNNING: i32 = 1;
/// Standard output and error of a command are kept in memory by the runtime too, which allows 16 MiB.
const MAX_MESSAGE: usize = 40 << 20;

#[derive(Clone, PartialEq, prost::Message)]
struct ExecSyncRequest {
    #[prost(string, tag = "1")]
    container_id: String,
    #[prost(string, repeated, tag = "2")]
    cmd: Vec<String>,
    /// Seconds; 0: none.
    #[prost(int64, tag = "3")]
    timeout: i64,
}

#[derive(Clone, PartialEq, prost::Message)]
struct ExecSyncResponse {
    #[prost(bytes = "vec", tag = "1")]
    stdout: Vec<u8>,
    #[prost(bytes = "vec", tag = "2")]
    stderr: Vec<u8>,
    #[prost(int32, tag = "3")]
    exit_code: i32,
}

#[derive(Clone, PartialEq, prost::Message)]
struct ListContainersRequest {
    #[prost(message, optional, tag = "1")]
    filter: Option<ContainerFilter>,
}

#[derive(Clone, PartialEq, prost::Message)]
struct ContainerFilter {
    #[prost(message, optional, tag = "2")]
    state: Option<ContainerStateValue>,
    #[prost(map = "string, string", tag = "4")]
    label_selector: HashMap<String, String>,
}

#[derive(Clone, PartialEq, prost::Message)]
struct ContainerStateValue {
    #[prost(int32, tag = "1")]
    state: i32,
}

#[derive(Clone, PartialEq, prost::Message)]
struct ListContainersResponse {
    #[prost(message, repeated, tag = "1")]
    containers: Vec<Container>,
}

#[derive(Clone, PartialEq, prost::Message)]
struct Container {
    #[prost(string, tag = "1")]
    id: String,
}

/// A call that failed.
#[derive(Debug, Error)]
pub(crate) enum CriError {
    #[error("the container is gone")]
    Gone,
    #[error("the container has no `{0}`")]
    NoProgram(String),
    #[error("the container runtime does not answer: {0}")]
    Unreachable(String),
    #[error("the container runtime refused: {0}")]
    Refused(String),
    #[error("the container runtime is not containerd, which streams need")]
    NotContainerd,
}

/// How a command in a container ended.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Ended {
    pub(crate) code: i32,
    pub(crate) stdout: Vec<u8>,
    pub(crate) stderr: Vec<u8>,
}

/// Runs commands in containers of this node. Dropping the future of `exec` ends the command's first process.
pub(crate) trait Containers: Send + Sync + 'static {
    /// The id of the running container of this pod and name.
    fn find(&self, pod_uid: &str, container: &str) -> impl Future<Output = Result<String, CriError>> + Send;
    /// Runs a command to its end.
    fn exec(&self, container: &str, command: &[String]) -> impl Future<Output = Result<Ended, CriError>> + Send;
    /// Starts a command whose standard streams are pipes. It runs until it ends by itself or by `end`, whoever dies meanwhile.
    fn start(
        &self,
        process: &Process<'_>,
        command: &[String],
        takes_input: bool,
    ) -> impl Future<Output = Result<Pipes, CriError>> + Send;
    /// The exit code of a command that was started, once it has ended.
    fn wait(&self, process: &Process<'_>) -> impl Future<Output = Result<i32, CriError>> + Send;
    /// Tells a command that was started that its input is at its end.
    fn close_input(&self, process: &Process<'_>) -> impl Future<Output = Result<(), CriError>> + Send;
    /// Ends a command that was started, and removes what was made for it. Well also when there is nothing.
    fn end(&self, process: &Process<'_>) -> impl Future<Output = Result<(), CriError>> + Send;
}

/// The runtime behind a socket.
pub(crate) struct Runtime {
    channel: Channel,
    /// Where the pipes of commands lie.
    pub(super) folder: PathBuf,
}

impl Runtime {
    /// Connects when it is first used, and again whenever the runtime was restarted.
    pub(crate) fn new(socket: PathBuf) -> Self {
        let folder = socket.with_file_name("lifeboat");
        let connect = tower::service_fn(move |_| {
            let socket = socket.clone();
            async move { UnixStream::connect(socket).await.map(TokioIo::new) }
        });
        // The address is required and not used.
        Self { channel: Endpoint::from_static("http://localhost").connect_with_connector_lazy(connect), folder }
    }

    async fn call<Q, A>(&self, path: &'static str, request: Q) -> Result<A, Status>
    where
        Q: prost::Message + Default + Send + Sync + 'static,
        A: prost::Message + Default + Send + Sync + 'static,
    {
        self.call_in(None, path, request).await
    }

    /// A call in one of containerd's namespaces; CRI has its own.
    pub(super) async fn call_in<Q, A>(
        &self,
        namespace: Option<&'static str>,
        path: &'static str,
        request: Q,
    ) -> Result<A, Status>
    where
        Q: prost::Message + Default + Send + Sync + 'static,
        A: prost::Message + Default + Send + Sync + 'static,
    {
        let mut client = tonic::client::Grpc::new(self.channel.clone()).max_decoding_message_size(MAX_MESSAGE);
        client.ready().await.map_err(|error| Status::unavailable(error.to_string()))?;
        let codec = tonic_prost::ProstCodec::<Q, A>::default();
        let path = tonic::codegen::http::uri::PathAndQuery::from_static(path);
        let mut request = Request::new(request);
        if let Some(namespace) = namespace {
            request.metadata_mut().insert("containerd-namespace", MetadataValue::from_static(namespace));
        }
        client.unary(request, path, codec).await.map(tonic::Response::into_inner)
    }
}

pub(super) fn error_of(status: &Status, program: Option<&String>) -> CriError {
    let said = status.message();
    match status.code() {
        Code::NotFound => CriError::Gone,
        Code::Unimplemented => CriError::NotContainerd,
        Code::Unavailable | Code::Cancelled | Code::DeadlineExceeded => CriError::Unreachable(said.to_owned()),
        _ if said.contains("CONTAINER_EXITED") || said.contains("container not running") => CriError::Gone,
        _ if said.contains("executable file not found") || said.contains("no such file or directory") => {
            CriError::NoProgram(program.cloned().unwrap_or_default())
        }
        _ => CriError::Refused(said.chars().filter(|c| !c.is_control()).take(300).collect()),
    }
}

impl Containers for Runtime {
    async fn find(&self, pod_uid: &str, container: &str) -> Result<String, CriError> {
        let labels = [("io.kubernetes.pod.uid", pod_uid), ("io.kubernetes.container.name", container)];
        let filter = ContainerFilter {
            state: Some(ContainerStateValue { state: RUNNING }),
            label_selector: labels.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect(),
        };
        let request = ListContainersRequest { filter: Some(filter) };
        let found: ListContainersResponse = self
            .call("/runtime.v1.RuntimeService/ListContainers", request)
            .await
            .map_err(|status| error_of(&status, None))?;
        found.containers.into_iter().next().map(|container| container.id).ok_or(CriError::Gone)
    }

    async fn exec(&self, container: &str, command: &[String]) -> Result<Ended, CriError> {
        let request = ExecSyncRequest { container_id: container.to_owned(), cmd: command.to_vec(), timeout: 0 };
        let ended: ExecSyncResponse = self
            .call("/runtime.v1.RuntimeService/ExecSync", request)
            .await
            .map_err(|status| error_of(&status, command.first()))?;
        Ok(Ended { code: ended.exit_code, stdout: ended.stdout, stderr: ended.stderr })
    }

    async fn start(&self, process: &Process<'_>, command: &[String], takes_input: bool) -> Result<Pipes, CriError> {
        self.start_command(process, command, takes_input).await
    }

    async fn wait(&self, process: &Process<'_>) -> Result<i32, CriError> {
        self.wait_for_command(process).await
    }

    async fn close_input(&self, process: &Process<'_>) -> Result<(), CriError> {
        Self::close_input(self, process).await
    }

    async fn end(&self, process: &Process<'_>) -> Result<(), CriError> {
        self.end_command(process).await
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use prost::Message;

    #[test]
    fn messages_are_as_the_interface_numbers_them() {
        let request = ExecSyncRequest { container_id: "c".into(), cmd: vec!["a".into(), "b".into()], timeout: 1 };
        assert_eq!(request.encode_to_vec(), [10, 1, b'c', 18, 1, b'a', 18, 1, b'b', 24, 1]);
        let list = ListContainersRequest {
            filter: Some(ContainerFilter {
                state: Some(ContainerStateValue { state: RUNNING }),
                label_selector: HashMap::from([("k".into(), "v".into())]),
            }),
        };
        assert_eq!(list.encode_to_vec(), [10, 12, 18, 2, 8, 1, 34, 6, 10, 1, b'k', 18, 1, b'v']);
        // What is not used (state, 6) is passed over.
        let container = Container::decode(&[10, 1, b'i', 48, 1][..]).unwrap();
        assert_eq!(container.id, "i");
    }

    #[test]
    fn what_the_runtime_says_is_understood() {
        let program = "sh".to_owned();
        let missing = Status::unknown("OCI runtime exec failed: exec: \"sh\": executable file not found in $PATH");
        assert!(matches!(error_of(&missing, Some(&program)), CriError::NoProgram(name) if name == "sh"));
        let exited = Status::unknown("failed to exec in container: container is in CONTAINER_EXITED state");
        assert!(matches!(error_of(&exited, None), CriError::Gone));
        assert!(matches!(error_of(&Status::unavailable("x"), None), CriError::Unreachable(_)));
        assert!(matches!(error_of(&Status::unimplemented("unknown service"), None), CriError::NotContainerd));
    }
}
