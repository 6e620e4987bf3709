//! What agent and guardian of a node say to each other, over a socket that only they see.
//!
//! The agent asks for what a task says. If that is a stream, it hears that the command runs, what it prints, and how it ended; or it
//! sends what the command is to read. If it is a block device, it is handed the open device, or hears why not. A connection
//! that ends before the guardian's last word means that nothing is known: for a dump, that it is worthless.

use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::path::Path;
use std::time::{Duration, Instant};

use lifeboat_crds::VolumeTask;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer, SendAncillaryMessage,
    SendFlags, recvmsg, sendmsg,
};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, Interest};
use tokio::net::UnixStream;
use tokio::time::sleep;

/// Bytes of data that one frame carries at most.
pub(crate) const PART: usize = 256 << 10;
/// No frame is longer.
const LONGEST: u32 = 1 << 20;
/// Bytes of a frame's kind and length.
const HEAD: usize = 5;
/// A guardian that was restarted listens again within this time.
const PATIENCE: Duration = Duration::from_secs(20);
const AGAIN: Duration = Duration::from_millis(500);

/// The kinds of frames.
mod kind {
    pub(super) const ASK: u8 = 1;
    pub(super) const STARTED: u8 = 2;
    pub(super) const DATA: u8 = 3;
    pub(super) const INPUT_ENDS: u8 = 4;
    pub(super) const END: u8 = 5;
    /// Comes with the open device.
    pub(super) const DEVICE: u8 = 6;
}

/// The task whose command is to run, or whose device is to be opened.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Ask {
    pub(crate) task: String,
    pub(crate) uid: String,
}

/// How a command ended, or why a device is not handed over, in kinds that the agent tells apart.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum How {
    /// With exit code 0, and all of its output was sent.
    Done,
    /// Badly, or it could not be run or opened.
    Failed,
    TimedOut,
    /// The container or the device is not there, or went while the command ran.
    Gone,
    /// Something is in the way that may pass.
    Trouble,
}

/// How a command ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct End {
    pub(crate) how: How,
    /// Why; empty when it is done.
    pub(crate) message: String,
}

impl End {
    pub(crate) fn new(how: How, message: impl Into<String>) -> Self {
        Self { how, message: message.into() }
    }
}

/// One thing that is said.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Frame {
    Ask(Ask),
    Started,
    Data(Vec<u8>),
    InputEnds,
    End(End),
}

/// Connects to the guardian as soon as it listens, and asks it for what this task says.
pub(crate) async fn ask(socket: &Path, task: &VolumeTask) -> io::Result<UnixStream> {
    let began = Instant::now();
    let mut guardian = loop {
        match UnixStream::connect(socket).await {
            Ok(guardian) => break guardian,
            Err(_) if began.elapsed() < PATIENCE => sleep(AGAIN).await,
            Err(error) => return Err(error),
        }
    };
    let name = |name: &Option<String>| name.clone().unwrap_or_default();
    let ask = Ask { task: name(&task.metadata.name), uid: name(&task.metadata.uid) };
    say(&mut guardian, &Frame::Ask(ask)).await?;
    Ok(guardian)
}

/// Hands an open device over.
pub(crate) async fn hand_over(to: &UnixStream, device: BorrowedFd<'_>) -> io::Result<()> {
    to.async_io(Interest::WRITABLE, || {
        let devices = [device];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        control.push(SendAncillaryMessage::ScmRights(&devices));
        let head = [kind::DEVICE, 0, 0, 0, 0];
        sendmsg(to, &[IoSlice::new(&head)], &mut control, SendFlags::NOSIGNAL)?;
        Ok(())
    })
    .await
}

/// Takes a device that is handed over; `Err` inside: why there is none.
pub(crate) async fn take_over(from: &mut UnixStream) -> io::Result<Result<OwnedFd, End>> {
    let (head, device) = from.async_io(Interest::READABLE, || receive(from)).await?;
    if head[0] == kind::DEVICE {
        return device.map(Ok).ok_or_else(|| malformed("a device without a device"));
    }
    match rest(head, from).await? {
        Some(Frame::End(end)) => Ok(Err(end)),
        Some(_) => Err(malformed("not what was asked for")),
        None => Err(io::ErrorKind::UnexpectedEof.into()),
    }
}

/// The head of a frame, and the descriptor that comes with it.
fn receive(from: &UnixStream) -> io::Result<([u8; HEAD], Option<OwnedFd>)> {
    let mut head = [0; HEAD];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let got = recvmsg(from, &mut [IoSliceMut::new(&mut head)], &mut control, RecvFlags::CMSG_CLOEXEC)?;
    let device = control.drain().find_map(|message| match message {
        RecvAncillaryMessage::ScmRights(mut devices) => devices.next(),
        _ => None,
    });
    if got.bytes == 0 {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    if got.bytes != HEAD || got.flags.contains(ReturnFlags::CTRUNC) {
        return Err(malformed("no whole frame"));
    }
    Ok((head, device))
}

/// Says it.
pub(crate) async fn say(to: &mut (impl AsyncWrite + Unpin), frame: &Frame) -> io::Result<()> {
    match frame {
        Frame::Ask(ask) => send(to, kind::ASK, &serde_json::to_vec(ask)?).await,
        Frame::Started => send(to, kind::STARTED, &[]).await,
        Frame::Data(bytes) => say_data(to, bytes).await,
        Frame::InputEnds => send(to, kind::INPUT_ENDS, &[]).await,
        Frame::End(end) => send(to, kind::END, &serde_json::to_vec(end)?).await,
    }
}

/// Says [`Frame::Data`] without copying it, in frames of at most [`PART`].
pub(crate) async fn say_data(to: &mut (impl AsyncWrite + Unpin), bytes: &[u8]) -> io::Result<()> {
    for part in bytes.chunks(PART) {
        send(to, kind::DATA, part).await?;
    }
    Ok(())
}

async fn send(to: &mut (impl AsyncWrite + Unpin), kind: u8, payload: &[u8]) -> io::Result<()> {
    let len = u32::try_from(payload.len()).ok().filter(|len| *len <= LONGEST).ok_or_else(|| malformed("too long"))?;
    let mut head = [kind; HEAD];
    head[1..].copy_from_slice(&len.to_le_bytes());
    to.write_all(&head).await?;
    to.write_all(payload).await
}

fn malformed(what: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, format!("what came over the socket is {what}"))
}

/// Hears the next frame; `None` when the other side is gone. Must not be dropped half-way.
pub(crate) async fn hear(from: &mut (impl AsyncRead + Unpin)) -> io::Result<Option<Frame>> {
    let mut head = [0; HEAD];
    match from.read_exact(&mut head).await {
        Ok(_) => {}
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(None),
        Err(error) => return Err(error),
    }
    rest(head, from).await
}

/// The frame that begins with this head; `None` when the other side is gone.
async fn rest([kind, len @ ..]: [u8; HEAD], from: &mut (impl AsyncRead + Unpin)) -> io::Result<Option<Frame>> {
    let len = u32::from_le_bytes(len);
    if len > LONGEST {
        return Err(malformed("too long"));
    }
    let mut payload = vec![0; len as usize];
    match from.read_exact(&mut payload).await {
        Ok(_) => {}
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(None),
        Err(error) => return Err(error),
    }
    Ok(Some(match kind {
        kind::ASK => Frame::Ask(parse(&payload)?),
        kind::STARTED => Frame::Started,
        kind::DATA => Frame::Data(payload),
        kind::INPUT_ENDS => Frame::InputEnds,
        kind::END => Frame::End(parse(&payload)?),
        _ => return Err(malformed("of an unknown kind")),
    }))
}

fn parse<T: DeserializeOwned>(payload: &[u8]) -> io::Result<T> {
    serde_json::from_slice(payload).map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::AsFd;

    #[tokio::test]
    async fn what_is_said_is_heard_and_what_breaks_off_is_nothing() {
        let frames = [
            Frame::Ask(Ask { task: "s-1".into(), uid: "u".into() }),
            Frame::Started,
            Frame::Data(vec![0, 1, 255]),
            Frame::InputEnds,
            Frame::End(End::new(How::Failed, "exit code 1")),
        ];
        let mut bytes = Vec::new();
        for frame in &frames {
            say(&mut bytes, frame).await.unwrap();
        }
        let mut rest = bytes.as_slice();
        for frame in &frames {
            assert_eq!(hear(&mut rest).await.unwrap().as_ref(), Some(frame));
        }
        assert_eq!(hear(&mut rest).await.unwrap(), None);
        assert_eq!(hear(&mut &bytes[..bytes.len() - 1][bytes.len() - 20..]).await.ok().flatten(), None);
    }

    #[tokio::test]
    async fn an_open_device_is_handed_over_or_it_is_said_why_not() {
        let (mut agent, guardian) = UnixStream::pair().unwrap();
        let file = std::fs::File::open("/proc/self/cmdline").unwrap();
        hand_over(&guardian, file.as_fd()).await.unwrap();
        let mut bytes = [0; 8];
        let taken = take_over(&mut agent).await.unwrap().unwrap();
        assert!(rustix::io::read(taken, &mut bytes).unwrap() > 0, "what is open in one process is usable in another");

        let (mut agent, mut guardian) = UnixStream::pair().unwrap();
        let end = End::new(How::Gone, "the pod is gone");
        say(&mut guardian, &Frame::End(end.clone())).await.unwrap();
        assert_eq!(take_over(&mut agent).await.unwrap().unwrap_err(), end);
        say(&mut guardian, &Frame::Started).await.unwrap();
        assert!(take_over(&mut agent).await.is_err(), "a stream is no device");
        send(&mut guardian, kind::DEVICE, &[]).await.unwrap();
        assert!(take_over(&mut agent).await.is_err(), "the word alone is no device");
        drop(guardian);
        assert!(take_over(&mut agent).await.is_err());
    }

    #[tokio::test]
    async fn long_data_is_divided_and_nonsense_refused() {
        let mut bytes = Vec::new();
        say_data(&mut bytes, &vec![7; PART + 1]).await.unwrap();
        let mut rest = bytes.as_slice();
        for len in [PART, 1] {
            assert_eq!(hear(&mut rest).await.unwrap(), Some(Frame::Data(vec![7; len])));
        }
        for bad in [&[9, 0, 0, 0, 0][..], &[kind::DATA, 0, 0, 0, 0xff], &[kind::END, 1, 0, 0, 0, b'{']] {
            assert!(hear(&mut &*bad).await.is_err(), "{bad:?}");
        }
    }
}
