//! Printing, and forms of what is printed: sizes, times, tables, errors.

use std::fmt::{self, Write as _};
use std::io::{self, ErrorKind, Write as _};
use std::process::ExitCode;
use std::sync::OnceLock;

use crate::options::FAILED;

/// Prints a line on the standard output. Unlike `println!` it does not panic when nobody reads on, as in
/// `lifeboat ls latest | head`: the command goes on to its end, which for a backup matters more than what it says.
macro_rules! say {
    ($($argument:tt)*) => {
        $crate::output::print(format_args!("{}\n", format_args!($($argument)*)))
    };
}

/// Prints a line on the standard error, or nothing where that cannot be written.
macro_rules! complain {
    ($($argument:tt)*) => {
        $crate::output::print_error(format_args!("{}\n", format_args!($($argument)*)))
    };
}

pub(crate) use {complain, say};

/// Why the standard output cannot be written any more.
static CLOSED: OnceLock<io::Error> = OnceLock::new();

/// Prints a text as it is; nothing once that failed.
pub(crate) fn print(text: fmt::Arguments<'_>) {
    if !is_closed()
        && let Err(error) = io::stdout().write_fmt(text)
    {
        CLOSED.get_or_init(|| error);
    }
}

pub(crate) fn print_error(text: fmt::Arguments<'_>) {
    // There is nobody left to tell.
    let _ = io::stderr().write_fmt(text);
}

/// Whether what is printed reaches nobody: lists may end.
pub(crate) fn is_closed() -> bool {
    CLOSED.get().is_some()
}

/// Whether all that was printed was written. A reader who had enough is no failure, a full disk is.
pub(crate) fn finish() -> anyhow::Result<()> {
    if let Err(error) = io::stdout().flush() {
        CLOSED.get_or_init(|| error);
    }
    match CLOSED.get() {
        Some(error) if error.kind() != ErrorKind::BrokenPipe => {
            Err(anyhow::anyhow!("cannot write to the standard output: {error}"))
        }
        _ => Ok(()),
    }
}

/// Prints an error with its causes, each once.
pub(crate) fn failure(error: &anyhow::Error) -> ExitCode {
    let mut said = error.to_string();
    complain!("lifeboat: {said}");
    for cause in error.chain().skip(1) {
        let cause = cause.to_string();
        if !said.contains(&cause) {
            complain!("  because: {cause}");
        }
        said = cause;
    }
    ExitCode::from(FAILED)
}

/// Bytes as people read them: `1.5 GiB`.
#[allow(clippy::cast_precision_loss)] // shown with one digit
pub(crate) fn bytes(count: u64) -> String {
    const UNITS: [&str; 5] = ["B", "KiB", "MiB", "GiB", "TiB"];
    let mut value = count as f64;
    let mut unit = 0;
    while value >= 1024.0 && unit < UNITS.len() - 1 {
        value /= 1024.0;
        unit += 1;
    }
    if unit == 0 { format!("{count} B") } else { format!("{value:.1} {}", UNITS[unit]) }
}

/// A path that may not be UTF-8; other bytes as `\xNN`, control characters escaped, so that no name can play with a terminal.
pub(crate) fn path(bytes: &[u8]) -> String {
    let mut text = String::new();
    for chunk in bytes.utf8_chunks() {
        for c in chunk.valid().chars() {
            if c.is_control() { text.extend(c.escape_default()) } else { text.push(c) }
        }
        for byte in chunk.invalid() {
            // Writing into a String cannot fail.
            let _ = write!(text, "\\x{byte:02x}");
        }
    }
    text
}

/// A table with its columns aligned; the first row is the head.
pub(crate) fn table(rows: &[Vec<String>]) -> String {
    let columns = rows.iter().map(Vec::len).max().unwrap_or(0);
    let width = |column: usize| rows.iter().filter_map(|r| r.get(column)).map(|c| c.chars().count()).max().unwrap_or(0);
    let widths: Vec<_> = (0..columns).map(width).collect();
    let mut text = String::new();
    for row in rows {
        let line: Vec<_> = row.iter().zip(&widths).map(|(cell, width)| format!("{cell:<width$}")).collect();
        text.push_str(line.join("  ").trim_end());
        text.push('\n');
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_read_well() {
        for (count, text) in [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (5 << 30, "5.0 GiB")] {
            assert_eq!(bytes(count), text);
        }
    }

    #[test]
    fn names_cannot_play_with_the_terminal() {
        assert_eq!(path(b"caf\xe9/\x1b[2J"), "caf\\xe9/\\u{1b}[2J");
    }

    #[test]
    fn columns_align() {
        let rows = [vec!["a".to_owned(), "bb".to_owned()], vec!["ccc".to_owned(), "d".to_owned()]];
        assert_eq!(table(&rows), "a    bb\nccc  d\n");
    }
}
