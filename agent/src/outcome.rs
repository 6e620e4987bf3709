//! How a task ended, in the words of its status.

use std::fmt::Write as _;

use lifeboat_crds::backup::{SkippedFile, Transfer};
use lifeboat_crds::cluster_repository::Reclaimed;
use lifeboat_crds::conditions::Reason;
use lifeboat_crds::volume_task::TaskResult;
use lifeboat_process::access::AccessError;
use lifeboat_process::reasons;
use lifeboat_process::telemetry::chain;
use lifeboat_repository::error::{Classified, ErrorClass};

use crate::volume::VolumeError;

/// Files that a status lists by name; the repository has all.
const SAMPLE: usize = 20;
/// A path in a status is cut to this many characters.
const MAX_PATH_CHARS: usize = 512;

/// A task that ended badly.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Failure {
    pub(crate) reason: Reason,
    pub(crate) message: String,
    /// Whether another attempt may end well without anyone changing anything.
    pub(crate) may_pass: bool,
}

impl Failure {
    pub(crate) fn new(reason: Reason, message: impl Into<String>) -> Self {
        Self { reason, message: message.into(), may_pass: false }
    }

    /// From an error while reading or writing a repository or a volume; `local` is the reason for errors of the volume's side.
    pub(crate) fn of<E: Classified + std::error::Error>(error: &E, local: Reason) -> Self {
        let class = error.class();
        let reason = if matches!(class, ErrorClass::Local) { local } else { reasons::of_class(class) };
        Self { reason, message: format!("{}{}", chain(error), reasons::advice(reason)), may_pass: class.is_retryable() }
    }
}

impl From<AccessError> for Failure {
    fn from(error: AccessError) -> Self {
        Self { may_pass: error.reason == Reason::Unreachable, reason: error.reason, message: error.message }
    }
}

impl From<VolumeError> for Failure {
    fn from(error: VolumeError) -> Self {
        let reason = match &error {
            VolumeError::PodGone { .. } | VolumeError::NotMounted { .. } => Reason::PodVanished,
            VolumeError::Block { .. } => Reason::VolumeUnsupported,
            VolumeError::Look { .. } => Reason::ReadFailed,
        };
        Self::new(reason, chain(&error))
    }
}

/// Bytes of a path as text: what is not UTF-8 or would disturb a terminal is shown as `\xNN`.
pub(crate) fn shown_path(path: &[u8]) -> String {
    let mut shown = String::new();
    for chunk in path.utf8_chunks() {
        for character in chunk.valid().chars() {
            if character.is_control() || character == '\\' {
                escape(&mut shown, character.to_string().as_bytes());
            } else {
                shown.push(character);
            }
        }
        escape(&mut shown, chunk.invalid());
    }
    match shown.char_indices().nth(MAX_PATH_CHARS) {
        Some((at, _)) => format!("{}…", &shown[..at]),
        None => shown,
    }
}

fn escape(shown: &mut String, bytes: &[u8]) {
    for byte in bytes {
        // Writing into a String cannot fail.
        let _ = write!(shown, "\\x{byte:02x}");
    }
}

/// The first of the files that were left out, for a status.
pub(crate) fn sample<'a>(left_out: impl Iterator<Item = (&'a [u8], String)>) -> Vec<SkippedFile> {
    left_out.take(SAMPLE).map(|(path, reason)| SkippedFile { path: shown_path(path), reason }).collect()
}

/// The condition's message of a task that ended well.
pub(crate) fn message(result: &TaskResult) -> String {
    let Transfer { files, read_bytes, stored_bytes, .. } = result.transfer;
    if let Some(reclaimed) = &result.reclaimed {
        let Reclaimed { snapshots, deleted_bytes, waiting_for, .. } = reclaimed;
        return match waiting_for {
            0 => format!("{snapshots} expired snapshots removed, {deleted_bytes} bytes deleted"),
            _ => format!("{deleted_bytes} bytes deleted; {waiting_for} backups that began before are waited for"),
        };
    }
    let all = format!("{files} files, {read_bytes} bytes read, {stored_bytes} stored");
    match result.skipped_sample.first() {
        None if result.skipped == 0 => all,
        None => format!("{all}; {} files were left out", result.skipped),
        Some(first) => format!("{all}; {} left out, the first: {}: {}", result.skipped, first.path, first.reason),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn strange_paths_are_shown_harmlessly() {
        assert_eq!(shown_path("dir/ä".as_bytes()), "dir/ä");
        assert_eq!(shown_path(b"a\xff\n\x1b[31m\\"), "a\\xff\\x0a\\x1b[31m\\x5c");
        assert_eq!(shown_path(&[b'x'; 2000]).chars().count(), MAX_PATH_CHARS + 1);
    }

    #[test]
    fn unread_files_are_named_in_the_message() {
        let mut result = TaskResult { skipped: 2, ..TaskResult::default() };
        result.skipped_sample =
            sample([(&b"a"[..], "no right".to_owned()), (&b"b"[..], "gone".to_owned())].into_iter());
        assert!(message(&result).contains("2 left out, the first: a: no right"), "{}", message(&result));
    }
}
