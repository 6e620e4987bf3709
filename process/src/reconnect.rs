//! How soon a watch is opened again.

use std::time::Duration;

use kube::runtime::utils::Backoff;
use kube::runtime::watcher::ExponentialBackoff;

const SHORTEST: Duration = Duration::from_millis(200);
/// The longest pause where nobody waits for what the watch tells.
pub const LONGEST: Duration = Duration::from_secs(5);

/// Pauses between attempts to open a watch that has failed: longer each time, from 0.2 s to `longest`, each up to doubled by chance.
///
/// Those that are usual in Kubernetes grow to a minute: for so long nothing would be done after the API server was away for some
/// seconds.
pub fn backoff(longest: Duration) -> impl Backoff {
    ExponentialBackoff::from(
        backon::ExponentialBuilder::default()
            .with_min_delay(SHORTEST)
            .with_max_delay(longest)
            .with_factor(2.0)
            .without_max_times()
            .with_jitter(),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_grow_to_their_limit_never_end_and_begin_anew() {
        let mut pauses = backoff(LONGEST);
        let first = pauses.next().expect("a pause");
        assert!((SHORTEST..=2 * SHORTEST).contains(&first), "{first:?}");
        assert!(pauses.by_ref().take(1000).all(|pause| pause <= 2 * LONGEST));
        assert!(pauses.next().is_some_and(|pause| pause >= LONGEST));
        pauses.reset();
        assert!(pauses.next().is_some_and(|pause| pause <= 2 * SHORTEST));
    }
}
