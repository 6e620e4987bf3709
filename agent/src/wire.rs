//! What agent and guardian of a node say to each other about a stream, over a socket that only they see.
//!
//! The agent asks for what a task says, and hears that the command runs, what it prints, and how it ended; or it sends what
//! the command is to read. A connection that ends before the guardian's last word means that nothing is known: for a dump,
//! that it is worthless.

use std::io;

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

/// Bytes of data that one frame carries at most.
pub(crate) const PART: usize = 256 << 10;
/// No frame is longer.
const LONGEST: u32 = 1 << 20;

/// The kinds of frames.
mod kind {
    pub(super) const ASK: u8 = 1;
    pub(super) const STARTED: u8 = 2;
    pub(super) const DATA: u8 = 3;
    pub(super) const INPUT_ENDS: u8 = 4;
    pub(super) const END: u8 = 5;
}

/// The task whose command is to run.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Ask {
    pub(crate) task: String,
    pub(crate) uid: String,
}

/// How a command ended, in kinds that the agent tells apart.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum How {
    /// With exit code 0, and all of its output was sent.
    Done,
    /// Badly, or it could not be run.
    Failed,
    TimedOut,
    /// The container is not there, or went while it ran.
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
    let mut head = [kind, 0, 0, 0, 0];
    head[1..].copy_from_slice(&len.to_le_bytes());
    to.write_all(&head).await?;
    to.write_all(payload).await
}

fn malformed(what: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, format!("what came over the socket is {what}"))
}

/// Hears the next frame; `None` when the other side is gone. Must not be dropped half-way.
pub(crate) async fn hear(from: &mut (impl AsyncRead + Unpin)) -> io::Result<Option<Frame>> {
    let mut head = [0; 5];
    match from.read_exact(&mut head).await {
        Ok(_) => {}
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(None),
        Err(error) => return Err(error),
    }
    let [kind, len @ ..] = head;
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
