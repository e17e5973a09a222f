//! How the C library's allocator keeps memory.
//!
//! Owns its settings, nothing else. A storage node gives back and takes again the same memory all
//! the time: handed to the kernel meanwhile, every page of it costs a fault and a clearing. That
//! was a tenth of the CPU of a 4 KiB write.

/// Free memory at the top of the heap that is kept from the kernel, in bytes: more than buffers
/// and caches go up and down under load.
#[cfg(target_env = "gnu")]
const KEPT_BYTES: libc::c_int = 64 << 20;

/// Heap taken from the kernel at a time, in bytes.
#[cfg(target_env = "gnu")]
const STEP_BYTES: libc::c_int = 4 << 20;

/// Allocations from this size on, in bytes, have pages of their own: beyond the largest buffer
/// that is pooled.
#[cfg(target_env = "gnu")]
const OWN_PAGES_BYTES: libc::c_int = 4 << 20;

/// Tells the allocator to keep memory for the next use. Call it once, before there are threads.
///
/// One heap for all threads: the shard's thread does nearly all allocations, and only the first
/// heap grows and shrinks in place. With another C library than glibc this does nothing.
pub fn keep_memory() {
    #[cfg(target_env = "gnu")]
    for (parameter, value) in [
        (libc::M_ARENA_MAX, 1),
        (libc::M_TRIM_THRESHOLD, KEPT_BYTES),
        (libc::M_TOP_PAD, STEP_BYTES),
        (libc::M_MMAP_THRESHOLD, OWN_PAGES_BYTES),
    ] {
        // SAFETY: two numbers; the allocator refuses (0) what it does not know.
        let accepted = unsafe { libc::mallopt(parameter, value) };
        debug_assert_eq!(accepted, 1, "glibc has had these parameters since 2.10");
    }
}
