//! Commands in containers whose standard streams are pipes, by containerd's own interface.
//!
//! CRI has no way for this that a pod can use: its `ExecSync` keeps all output in memory and has no input, and the streams of its
//! `Exec` are served on the node's loopback. The pipes lie beside the runtime's socket, where both sides see them under the same
//! path. Field numbers are those of `containerd/api/services/{containers,tasks}/v1`; fields that are not used are left out.

use std::convert::Infallible;
use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::fs::{CWD, Mode, OFlags, mkfifoat};
use serde_json::Value;
use tokio::io::AsyncReadExt;
use tokio::net::unix::pipe::{self, Receiver, Sender};
use tokio::time::Instant;
use tonic::{Code, Status};

use super::cri::{CriError, Runtime, error_of};

/// The namespace in which containerd keeps the containers of Kubernetes.
pub(super) const NAMESPACE: &str = "k8s.io";
/// How [`ExecProcessRequest::spec`] is written.
const PROCESS_TYPE: &str = "types.containerd.io/opencontainers/runtime-spec/1/Process";
const KILL: u32 = 9;
/// Between attempts to forget a process that was killed and is not dead yet.
const AGAIN: Duration = Duration::from_millis(100);
const ATTEMPTS: u32 = 50;
/// The runtime may be away for this long while a command runs, as when it is restarted.
const AWAY: Duration = Duration::from_mins(1);
/// A call that lasted this long had been taken: it broke off, and was not refused.
const TAKEN: Duration = Duration::from_secs(1);

/// A command in a container: the container's id and the command's own.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Process<'a> {
    pub(crate) container: &'a str,
    pub(crate) id: &'a str,
}

/// The standard streams of a command that was started.
#[derive(Debug)]
pub(crate) struct Pipes {
    /// Only if it takes input. Its end is told by `close_input`.
    pub(crate) input: Option<Sender>,
    /// At its end when the command, and all that inherited it, have closed it.
    pub(crate) output: Receiver,
    pub(crate) errors: Receiver,
}

#[derive(Clone, PartialEq, prost::Message)]
struct Any {
    #[prost(string, tag = "1")]
    type_url: String,
    #[prost(bytes = "vec", tag = "2")]
    value: Vec<u8>,
}

#[derive(Clone, PartialEq, prost::Message)]
struct GetContainerRequest {
    #[prost(string, tag = "1")]
    id: String,
}

#[derive(Clone, PartialEq, prost::Message)]
struct GetContainerResponse {
    #[prost(message, optional, tag = "1")]
    container: Option<Container>,
}

#[derive(Clone, PartialEq, prost::Message)]
struct Container {
    #[prost(message, optional, tag = "5")]
    spec: Option<Any>,
}

#[derive(Clone, PartialEq, prost::Message)]
struct ExecProcessRequest {
    #[prost(string, tag = "1")]
    container_id: String,
    #[prost(string, tag = "2")]
    stdin: String,
    #[prost(string, tag = "3")]
    stdout: String,
    #[prost(string, tag = "4")]
    stderr: String,
    #[prost(message, optional, tag = "6")]
    spec: Option<Any>,
    #[prost(string, tag = "7")]
    exec_id: String,
}

/// Start, wait and delete ask alike.
#[derive(Clone, PartialEq, prost::Message)]
struct ProcessRequest {
    #[prost(string, tag = "1")]
    container_id: String,
    #[prost(string, tag = "2")]
    exec_id: String,
}

#[derive(Clone, PartialEq, prost::Message)]
struct KillRequest {
    #[prost(string, tag = "1")]
    container_id: String,
    #[prost(string, tag = "2")]
    exec_id: String,
    #[prost(uint32, tag = "3")]
    signal: u32,
}

#[derive(Clone, PartialEq, prost::Message)]
struct CloseInputRequest {
    #[prost(string, tag = "1")]
    container_id: String,
    #[prost(string, tag = "2")]
    exec_id: String,
    #[prost(bool, tag = "3")]
    stdin: bool,
}

#[derive(Clone, PartialEq, prost::Message)]
struct WaitResponse {
    #[prost(uint32, tag = "1")]
    exit_status: u32,
}

/// Answers of which nothing is used.
#[derive(Clone, PartialEq, prost::Message)]
struct Nothing {}

fn request(process: &Process<'_>) -> ProcessRequest {
    ProcessRequest { container_id: process.container.to_owned(), exec_id: process.id.to_owned() }
}

/// Pipes that nobody else has opened yet.
struct Made {
    folder: PathBuf,
    pipes: Pipes,
    /// Until the runtime has opened an output, it would seem to be at its end.
    _open: [File; 2],
}

impl Made {
    fn in_folder(folder: PathBuf, takes_input: bool) -> io::Result<Self> {
        forget(&folder)?;
        fs::DirBuilder::new().recursive(true).mode(0o700).create(&folder)?;
        let make = |name| {
            let path = folder.join(name);
            mkfifoat(CWD, &path, Mode::RUSR | Mode::WUSR).map(|()| path)
        };
        let outgoing = |name| -> io::Result<(Receiver, File)> {
            let path = make(name)?;
            let receiver = pipe::OpenOptions::new().open_receiver(&path)?;
            let nonblocking = i32::try_from(OFlags::NONBLOCK.bits()).unwrap_or_default();
            Ok((receiver, OpenOptions::new().write(true).custom_flags(nonblocking).open(&path)?))
        };
        let (output, open_output) = outgoing("out")?;
        let (errors, open_errors) = outgoing("err")?;
        let input = if takes_input {
            let path = make("in")?;
            Some(pipe::OpenOptions::new().read_write(true).open_sender(&path)?)
        } else {
            None
        };
        Ok(Self { folder, pipes: Pipes { input, output, errors }, _open: [open_output, open_errors] })
    }

    fn path(&self, name: &str) -> String {
        self.folder.join(name).to_string_lossy().into_owned()
    }
}

fn forget(folder: &Path) -> io::Result<()> {
    match fs::remove_dir_all(folder) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

/// Reads what a command that is being ended has left in its pipes: the runtime waits for somebody who does.
async fn drain(folder: &Path) -> Infallible {
    let one = |name: &str| {
        let path = folder.join(name);
        async move {
            // There may be none: it never started.
            let Ok(mut pipe) = pipe::OpenOptions::new().open_receiver(path) else { return };
            let mut buffer = vec![0; 64 << 10];
            while let Ok(1..) = pipe.read(&mut buffer).await {}
        }
    };
    tokio::join!(one("out"), one("err"));
    std::future::pending().await
}

/// The command as the container's own first process would be run: its user, environment, folder and limits.
fn process_spec(container: &[u8], command: &[String]) -> Option<Vec<u8>> {
    let mut spec: Value = serde_json::from_slice(container).ok()?;
    let process = spec.get_mut("process")?.as_object_mut()?;
    process.insert("args".to_owned(), command.into());
    process.insert("terminal".to_owned(), false.into());
    process.remove("consoleSize");
    process.remove("commandLine");
    serde_json::to_vec(process).ok()
}

/// Whether there is no such process, or no such container.
fn is_absent(status: &Status) -> bool {
    let said = status.message();
    status.code() == Code::NotFound || said.contains("process already finished") || said.contains("not found")
}

impl Runtime {
    async fn ask<Q, A>(&self, path: &'static str, request: Q) -> Result<A, Status>
    where
        Q: prost::Message + Default + Send + Sync + 'static,
        A: prost::Message + Default + Send + Sync + 'static,
    {
        self.call_in(Some(NAMESPACE), path, request).await
    }

    /// The folder of a command's pipes.
    fn pipes_of(&self, process: &Process<'_>) -> PathBuf {
        self.folder.join(process.id)
    }

    /// Starts a command. It runs until it ends by itself or by [`Runtime::end_command`], whoever dies meanwhile.
    pub(super) async fn start_command(
        &self,
        process: &Process<'_>,
        command: &[String],
        takes_input: bool,
    ) -> Result<Pipes, CriError> {
        let get = GetContainerRequest { id: process.container.to_owned() };
        let found: GetContainerResponse = self
            .ask("/containerd.services.containers.v1.Containers/Get", get)
            .await
            .map_err(|status| error_of(&status, None))?;
        let spec = found.container.and_then(|container| container.spec);
        let refused = |what: &str| CriError::Refused(what.to_owned());
        let spec = spec.and_then(|spec| process_spec(&spec.value, command));
        let spec = spec.ok_or_else(|| refused("it does not tell how the container runs"))?;
        // What an earlier life of the guardian started and could not write down.
        self.end_command(process).await?;
        let made = Made::in_folder(self.pipes_of(process), takes_input)
            .map_err(|error| CriError::Refused(format!("pipes cannot be made beside its socket: {error}")))?;
        let exec = ExecProcessRequest {
            container_id: process.container.to_owned(),
            stdin: if takes_input { made.path("in") } else { String::new() },
            stdout: made.path("out"),
            stderr: made.path("err"),
            spec: Some(Any { type_url: PROCESS_TYPE.to_owned(), value: spec }),
            exec_id: process.id.to_owned(),
        };
        let started = async {
            let _: Nothing = self.ask("/containerd.services.tasks.v1.Tasks/Exec", exec).await?;
            self.ask::<_, Nothing>("/containerd.services.tasks.v1.Tasks/Start", request(process)).await
        };
        match started.await {
            Ok(Nothing {}) => Ok(made.pipes),
            Err(status) => {
                // What was made is taken away again; the first error is the one to show.
                let _ = self.end_command(process).await;
                Err(error_of(&status, command.first()))
            }
        }
    }

    /// The exit code of a command that was started, once it has ended.
    pub(super) async fn wait_for_command(&self, process: &Process<'_>) -> Result<i32, CriError> {
        let mut answered = Instant::now();
        loop {
            let asked = Instant::now();
            match self.ask::<_, WaitResponse>("/containerd.services.tasks.v1.Tasks/Wait", request(process)).await {
                Ok(ended) => return Ok(i32::try_from(ended.exit_status).unwrap_or(i32::MAX)),
                Err(status) if is_absent(&status) => return Err(CriError::Gone),
                Err(status) => match error_of(&status, None) {
                    CriError::Unreachable(why) => {
                        if asked.elapsed() > TAKEN {
                            answered = Instant::now();
                        }
                        if answered.elapsed() > AWAY {
                            return Err(CriError::Unreachable(why));
                        }
                        tokio::time::sleep(AGAIN).await;
                    }
                    error => return Err(error),
                },
            }
        }
    }

    /// Tells a command that its input is at its end. What was written before is still read.
    pub(super) async fn close_input(&self, process: &Process<'_>) -> Result<(), CriError> {
        let close = CloseInputRequest {
            container_id: process.container.to_owned(),
            exec_id: process.id.to_owned(),
            stdin: true,
        };
        match self.ask::<_, Nothing>("/containerd.services.tasks.v1.Tasks/CloseIO", close).await {
            Ok(Nothing {}) => Ok(()),
            // It has ended without having read everything.
            Err(status) if is_absent(&status) => Ok(()),
            Err(status) => Err(error_of(&status, None)),
        }
    }

    /// Ends a command that may still run, and removes what was made for it. Well also when there is nothing.
    pub(super) async fn end_command(&self, process: &Process<'_>) -> Result<(), CriError> {
        let kill =
            KillRequest { container_id: process.container.to_owned(), exec_id: process.id.to_owned(), signal: KILL };
        let folder = self.pipes_of(process);
        tokio::select! {
            ended = self.kill_and_delete(process, kill) => ended?,
            never = drain(&folder) => match never {},
        }
        forget(&folder).map_err(|error| CriError::Refused(format!("pipes are left behind: {error}")))
    }

    async fn kill_and_delete(&self, process: &Process<'_>, kill: KillRequest) -> Result<(), CriError> {
        let mut attempts = 0;
        loop {
            let killed = self.ask::<_, Nothing>("/containerd.services.tasks.v1.Tasks/Kill", kill.clone()).await;
            // What its children still write gets nobody any more: the runtime closes their pipe.
            let deleted: Result<Nothing, _> =
                self.ask("/containerd.services.tasks.v1.Tasks/DeleteProcess", request(process)).await;
            let error = match deleted {
                Ok(Nothing {}) => return Ok(()),
                Err(status) if is_absent(&status) => return Ok(()),
                Err(status) => status,
            };
            attempts += 1;
            if attempts >= ATTEMPTS {
                return Err(error_of(killed.as_ref().err().unwrap_or(&error), None));
            }
            tokio::time::sleep(AGAIN).await;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use prost::Message;
    use serde_json::json;

    #[test]
    fn messages_are_as_the_interface_numbers_them() {
        let exec = ExecProcessRequest {
            container_id: "c".into(),
            stdin: "i".into(),
            stdout: "o".into(),
            stderr: "e".into(),
            spec: Some(Any { type_url: "t".into(), value: vec![1] }),
            exec_id: "x".into(),
        };
        let spec = [50, 6, 10, 1, b't', 18, 1, 1];
        let streams = [10, 1, b'c', 18, 1, b'i', 26, 1, b'o', 34, 1, b'e'];
        assert_eq!(exec.encode_to_vec(), [&streams[..], &spec, &[58, 1, b'x']].concat());
        let kill = KillRequest { container_id: "c".into(), exec_id: "x".into(), signal: KILL };
        assert_eq!(kill.encode_to_vec(), [10, 1, b'c', 18, 1, b'x', 24, 9]);
        // The time of the exit (2) is passed over.
        assert_eq!(WaitResponse::decode(&[8, 3, 18, 2, 8, 1][..]).unwrap().exit_status, 3);
    }

    #[test]
    fn a_command_runs_as_the_container_does() {
        let container = json!({"ociVersion": "1", "process": {
            "args": ["postgres"], "terminal": true, "consoleSize": {"height": 1, "width": 1}, "cwd": "/data",
            "user": {"uid": 70, "gid": 70}, "env": ["PGHOST=/tmp"], "noNewPrivileges": true
        }});
        let words = ["pg_dump".to_owned(), "shop".to_owned()];
        let found = process_spec(&serde_json::to_vec(&container).unwrap(), &words).unwrap();
        let found: Value = serde_json::from_slice(&found).unwrap();
        let wanted = json!({
            "args": ["pg_dump", "shop"], "terminal": false, "cwd": "/data",
            "user": {"uid": 70, "gid": 70}, "env": ["PGHOST=/tmp"], "noNewPrivileges": true
        });
        assert_eq!(found, wanted);
        assert_eq!(process_spec(b"\xff{", &words), None);
        assert_eq!(process_spec(b"{}", &words), None);
    }

    #[tokio::test]
    async fn an_output_is_at_its_end_only_after_the_runtime_had_it() {
        let folder = tempfile::tempdir().unwrap();
        let made = Made::in_folder(folder.path().join("s-1"), true).unwrap();
        let Made { folder, mut pipes, _open: open } = made;
        let mut byte = [0];
        let early = tokio::time::timeout(Duration::from_millis(50), pipes.output.read(&mut byte)).await;
        assert!(early.is_err(), "nobody has opened it yet");
        let runtime = OpenOptions::new().write(true).open(folder.join("out")).unwrap();
        drop(open);
        io::Write::write_all(&mut &runtime, b"x").unwrap();
        drop(runtime);
        assert_eq!(pipes.output.read(&mut byte).await.unwrap(), 1);
        assert_eq!(pipes.output.read(&mut byte).await.unwrap(), 0);
        // Those that are left are taken away before others are made.
        assert!(Made::in_folder(folder.clone(), false).is_ok() && !folder.join("in").exists());
    }
}
