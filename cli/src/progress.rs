//! Progress bars: what is done, how fast, how long it will take.

use std::{io::IsTerminal, sync::Arc, time::Duration};

use indicatif::{ProgressBar, ProgressStyle};
use lifeboat_repository::progress::Progress;
use tokio::task::JoinHandle;

use crate::options::Global;
use crate::output::complain;

/// Shows a [`Progress`] until it is dropped. Nothing is shown when output is quiet, JSON, or not a terminal.
pub(crate) struct Display {
    bar: ProgressBar,
    task: Option<JoinHandle<()>>,
}

impl Display {
    /// Begins to show `progress`.
    pub(crate) fn new(global: &Global, progress: &Arc<Progress>) -> Self {
        if global.quiet || global.json || !std::io::stderr().is_terminal() {
            return Self { bar: ProgressBar::hidden(), task: None };
        }
        let bar = ProgressBar::new(0);
        bar.enable_steady_tick(Duration::from_millis(200));
        let (shown, progress) = (bar.clone(), Arc::clone(progress));
        let task = tokio::spawn(async move {
            let mut tick = tokio::time::interval(Duration::from_millis(200));
            loop {
                tick.tick().await;
                let seen = progress.snapshot();
                if seen.bytes_total > 0 {
                    shown.set_style(style("{spinner} [{bar:30}] {bytes}/{total_bytes} {bytes_per_sec} {eta} {msg}"));
                    shown.set_length(seen.bytes_total);
                } else {
                    shown.set_style(style("{spinner} {bytes} {bytes_per_sec} {elapsed} {msg}"));
                }
                shown.set_position(seen.bytes_done);
                shown.set_message(format!("{} entries {}", seen.entries_done, seen.current));
            }
        });
        Self { bar, task: Some(task) }
    }
}

fn style(template: &str) -> ProgressStyle {
    ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar())
}

impl Drop for Display {
    fn drop(&mut self) {
        if let Some(task) = self.task.take() {
            task.abort();
        }
        self.bar.finish_and_clear();
    }
}

/// Cancels the work at the first Ctrl-C or SIGTERM, so that the session is aborted cleanly; the second ends the program.
pub(crate) fn cancel_on_signal(progress: &Arc<Progress>) {
    let progress = Arc::clone(progress);
    tokio::spawn(async move {
        use tokio::signal::unix::{SignalKind, signal};
        let Ok(mut terminate) = signal(SignalKind::terminate()) else { return };
        let Ok(mut interrupt) = signal(SignalKind::interrupt()) else { return };
        tokio::select! { _ = terminate.recv() => {}, _ = interrupt.recv() => {} }
        complain!("lifeboat: stopping; press Ctrl-C again to stop at once");
        progress.cancel();
        tokio::select! { _ = terminate.recv() => {}, _ = interrupt.recv() => {} }
        std::process::exit(130);
    });
}
