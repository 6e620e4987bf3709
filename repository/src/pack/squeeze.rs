//! Compression with contexts that are kept: making one for each chunk costs as much as compressing a small one.
//!
//! A few contexts are kept for the process, not one for each thread: threads come and go, and memory is bounded.

use std::io;
use std::sync::{Mutex, PoisonError};

use zstd::bulk::{Compressor, Decompressor};

/// Contexts of each kind that are kept; more may be in use at a time.
const KEPT: usize = 4;
/// An output buffer that grew over this is not kept.
const KEPT_BYTES: usize = 4 << 20;

struct Squeezer {
    level: i32,
    compressor: Compressor<'static>,
    out: Vec<u8>,
}

static SQUEEZERS: Mutex<Vec<Squeezer>> = Mutex::new(Vec::new());
static UNFOLDERS: Mutex<Vec<Decompressor<'static>>> = Mutex::new(Vec::new());

fn take<T>(kept: &Mutex<Vec<T>>) -> Option<T> {
    kept.lock().unwrap_or_else(PoisonError::into_inner).pop()
}

fn keep<T>(kept: &Mutex<Vec<T>>, context: T) {
    let mut kept = kept.lock().unwrap_or_else(PoisonError::into_inner);
    if kept.len() < KEPT {
        kept.push(context);
    }
}

/// Compresses, and gives the compressed bytes to `with` without a copy of its own.
pub(super) fn compress<T>(plain: &[u8], level: i32, with: impl FnOnce(&[u8]) -> T) -> io::Result<T> {
    let mut squeezer = match take(&SQUEEZERS) {
        Some(squeezer) if squeezer.level == level => squeezer,
        _ => Squeezer { level, compressor: Compressor::new(level)?, out: Vec::new() },
    };
    squeezer.out.clear();
    squeezer.out.reserve(zstd::zstd_safe::compress_bound(plain.len()));
    squeezer.compressor.compress_to_buffer(plain, &mut squeezer.out)?;
    let result = with(&squeezer.out);
    if squeezer.out.capacity() <= KEPT_BYTES {
        keep(&SQUEEZERS, squeezer);
    }
    Ok(result)
}

/// Decompresses to at most `limit` bytes.
pub(super) fn decompress(bytes: &[u8], limit: usize) -> io::Result<Vec<u8>> {
    let mut unfolder = match take(&UNFOLDERS) {
        Some(unfolder) => unfolder,
        None => Decompressor::new()?,
    };
    let plain = unfolder.decompress(bytes, limit);
    keep(&UNFOLDERS, unfolder);
    plain
}
