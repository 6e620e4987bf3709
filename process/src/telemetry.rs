//! Logs of a program, and what must be set up once before anything else.

use clap::ValueEnum;
use tracing_subscriber::EnvFilter;

/// The form of log lines.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum LogFormat {
    /// One JSON object a line.
    Json,
    /// For people.
    Text,
}

/// Starts logging to standard error and installs the TLS provider. Call once, first.
///
/// `LIFEBOAT_LOG` sets the level, `info` unless given, by the rules of `tracing_subscriber::EnvFilter`.
pub fn start(format: LogFormat) {
    let filter = EnvFilter::try_from_env("LIFEBOAT_LOG").unwrap_or_else(|_| EnvFilter::new("info"));
    let logs = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr);
    match format {
        LogFormat::Json => logs.json().flatten_event(true).init(),
        LogFormat::Text => logs.init(),
    }
    if rustls::crypto::aws_lc_rs::default_provider().install_default().is_err() {
        tracing::debug!("a TLS provider was installed before");
    }
}

/// A line is cut to this many characters.
const MAX_CHARS: usize = 600;

/// An error and all its causes in one line, as it goes into conditions, events and logs.
///
/// What a server answered is left out: it may repeat credentials.
pub fn chain(error: &dyn std::error::Error) -> String {
    let mut line = without_answer(&error.to_string()).to_owned();
    let mut cause = error.source();
    while let Some(error) = cause {
        let text = error.to_string();
        let text = without_answer(&text);
        // Wrappers often repeat what they wrap.
        if !text.is_empty() && !line.contains(text) {
            line.push_str(": ");
            line.push_str(text);
        }
        cause = error.source();
    }
    if let Some((at, _)) = line.char_indices().nth(MAX_CHARS) {
        line.truncate(at);
        line.push('…');
    }
    line
}

/// The text before the first markup or line end.
fn without_answer(text: &str) -> &str {
    let end = [text.find('<'), text.find('\n')].into_iter().flatten().min().unwrap_or(text.len());
    text[..end].trim_end_matches([':', ' '])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, thiserror::Error)]
    #[error("outer")]
    struct Outer(#[source] std::io::Error);

    #[test]
    fn answers_of_servers_are_left_out() {
        let answer = std::io::Error::other("403 Forbidden: <Error><AWSAccessKeyId>nobody</AWSAccessKeyId></Error>");
        assert_eq!(chain(&Outer(answer)), "outer: 403 Forbidden");
        assert!(chain(&Outer(std::io::Error::other("x".repeat(5000)))).chars().count() <= MAX_CHARS + 1);
    }

    #[test]
    fn causes_are_joined_once() {
        assert_eq!(chain(&Outer(std::io::Error::other("inner"))), "outer: inner");
        assert_eq!(chain(&Outer(std::io::Error::other("outer"))), "outer");
    }
}
