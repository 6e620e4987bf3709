//! Memory for writes past the page cache, which demand that it begins and ends where blocks of disks do.

use std::ops::{Deref, DerefMut};
use std::sync::{Mutex, PoisonError};

/// Memory, offsets and lengths are multiples of this: enough for all disks with blocks up to 4 KiB.
pub(crate) const ALIGNMENT: usize = 4 << 10;
/// Bytes that are written at once.
pub(crate) const RUN_BYTES: usize = 2 << 20;
/// Buffers that are kept; more may be in use at a time.
const KEPT: usize = 2;

/// Memory that was written to is worth keeping: a fresh page costs the kernel more than the copy into it.
static KEPT_BUFFERS: Mutex<Vec<Memory>> = Mutex::new(Vec::new());

struct Memory {
    bytes: Vec<u8>,
    start: usize,
}

/// [`RUN_BYTES`] of aligned memory, with whatever was written there before.
pub(crate) struct AlignedBuffer(Option<Memory>);

impl AlignedBuffer {
    pub(crate) fn take() -> Self {
        let kept = KEPT_BUFFERS.lock().unwrap_or_else(PoisonError::into_inner).pop();
        Self(Some(kept.unwrap_or_else(|| {
            let bytes = vec![0; RUN_BYTES + ALIGNMENT];
            let start = bytes.as_ptr().align_offset(ALIGNMENT).min(ALIGNMENT);
            Memory { bytes, start }
        })))
    }
}

impl Drop for AlignedBuffer {
    fn drop(&mut self) {
        let mut kept = KEPT_BUFFERS.lock().unwrap_or_else(PoisonError::into_inner);
        if kept.len() < KEPT {
            kept.extend(self.0.take());
        }
    }
}

impl Deref for AlignedBuffer {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        self.0.as_ref().map_or(&[], |memory| &memory.bytes[memory.start..memory.start + RUN_BYTES])
    }
}

impl DerefMut for AlignedBuffer {
    fn deref_mut(&mut self) -> &mut [u8] {
        self.0.as_mut().map_or(&mut [], |memory| &mut memory.bytes[memory.start..memory.start + RUN_BYTES])
    }
}
