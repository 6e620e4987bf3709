//! Keeps the memory that the C library's allocator holds back within bounds.
#![allow(unsafe_code)]

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
