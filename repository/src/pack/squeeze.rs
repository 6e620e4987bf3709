//! Compression with contexts that are kept: making one for each chunk costs as much as compressing a small one.
//!
//! A few contexts are kept for the process, not one for each thread: threads come and go, and memory is bounded.

use std::io;
use std::sync::{Mutex, PoisonError};

use zstd::bulk::{Compressor, Decompressor};
use zstd::zstd_safe::CParameter;

/// Contexts of each kind that are kept; more may be in use at a time.
const KEPT: usize = 4;
/// An output buffer that grew over this is not kept.
const KEPT_BYTES: usize = 4 << 20;

/// How hard data is compressed: by a level of zstd from 1 to 19, or 0: not at all. Manifests always are, by level 1.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Compression(u8);

impl Compression {
    /// Level 1.
    pub const FAST: Self = Self(1);
    const MOST: u8 = 19;

    /// By this level; `None`: there is no such.
    pub fn level(level: u8) -> Option<Self> {
        (level <= Self::MOST).then_some(Self(level))
    }

    /// For zstd; `None`: it is not to be tried.
    pub(crate) fn zstd_level(self) -> Option<i32> {
        (self.0 > 0).then_some(i32::from(self.0))
    }
}

impl Default for Compression {
    fn default() -> Self {
        Self::FAST
    }
}

impl std::str::FromStr for Compression {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let level = text.parse().ok().and_then(Self::level);
        level.ok_or_else(|| format!("write a level from 0 (none) to {}", Self::MOST))
    }
}

/// What level 1 is given instead of its own: a table of 128 KiB instead of 64, still within a core's own cache, and shorter
/// matches. That is 3% fewer bytes of text and 4% of database pages, in the same time.
const FAST: [CParameter; 2] = [CParameter::HashLog(15), CParameter::MinMatch(6)];

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
        _ => Squeezer { level, compressor: compressor(level)?, out: Vec::new() },
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

fn compressor(level: i32) -> io::Result<Compressor<'static>> {
    let mut compressor = Compressor::new(level)?;
    if Compression::FAST.zstd_level() == Some(level) {
        for parameter in FAST {
            compressor.set_parameter(parameter)?;
        }
    }
    Ok(compressor)
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
