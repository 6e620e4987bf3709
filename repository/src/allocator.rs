//! What the allocator of the C library and the kernel are told about memory.
#![allow(unsafe_code)]

use rustix::mm::{Advice, madvise};

/// Huge pages are of this size on most machines; where they are larger, there are fewer of them or none.
const HUGE_PAGE: usize = 2 << 20;

/// Arenas of the allocator; glibc would make up to eight for each core.
#[cfg(target_env = "gnu")]
const ARENAS: libc::c_int = 2;

/// Makes glibc's allocator share few arenas among all threads; with other C libraries it does nothing. For the beginning
/// of `main`.
///
/// The engine hands buffers of up to 8 MiB from thread to thread. What is freed stays with the arena that it came from,
/// so that one arena for each thread held several times of what was in use: restoring 2 GiB of random data took 254 to
/// 276 MiB, with two arenas 81 MiB, and not more processor time.
pub fn few_arenas() {
    #[cfg(target_env = "gnu")]
    // SAFETY: `mallopt` may be called at any time; it changes how memory is given out from now on, and touches none.
    unsafe {
        libc::mallopt(libc::M_ARENA_MAX, ARENAS);
    }
}

/// Asks for huge pages for memory that is not written to yet, and is wholly used soon: each is one fault instead of 512. A kernel
/// that has none gives small ones.
pub(crate) fn huge_pages<T>(unwritten: &mut [std::mem::MaybeUninit<T>]) {
    let range = unwritten.as_mut_ptr_range();
    let start = range.start.addr().next_multiple_of(HUGE_PAGE);
    let end = range.end.addr() / HUGE_PAGE * HUGE_PAGE;
    if start < end {
        // SAFETY: the range lies within `unwritten`, which is borrowed for writing, and the advice changes no content.
        // An error is no harm.
        let _ =
            unsafe { madvise(range.start.cast::<u8>().with_addr(start).cast(), end - start, Advice::LinuxHugepage) };
    }
}
