//! Several requests to a store at once.

use futures::future::BoxFuture;
use futures::{StreamExt, TryStreamExt, stream};

/// Runs the work, at most `limit` at once, and gives the results in any order; ends at the first error.
///
/// The work is boxed beforehand: a closure that borrows and lives across an await would make the caller's future one that
/// no other thread may take.
pub(crate) async fn at_once<T: Send, E: Send>(
    limit: usize,
    work: Vec<BoxFuture<'_, Result<T, E>>>,
) -> Result<Vec<T>, E> {
    stream::iter(work).buffer_unordered(limit).try_collect().await
}
