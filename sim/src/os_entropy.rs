//! The operating system's random numbers, replaced for the whole process.
//!
//! The standard library keys its hash maps, and tokio picks the order in which waiters of a watch
//! channel wake, with numbers from `getrandom(2)`. Linked into a simulator binary, this definition
//! of the symbol takes the place of the C library's, so that such numbers come from the seed too.

use std::cell::Cell;

thread_local! {
    static STATE: Cell<u64> = const { Cell::new(0) };
}

/// From now on this thread's numbers are those of `seed`. What it drew before stays drawn.
pub(crate) fn seed(seed: u64) {
    STATE.set(seed);
}

/// `getrandom(2)`: fills `length` bytes at `buffer`; never fails.
///
/// # Safety
/// As the system call: `buffer` is valid for writes of `length` bytes.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn getrandom(buffer: *mut u8, length: usize, _flags: u32) -> isize {
    for offset in 0..length {
        let state = STATE.get().wrapping_add(0x9e37_79b9_7f4a_7c15);
        STATE.set(state);
        let mixed = (state ^ (state >> 31)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        // SAFETY: `offset` is below `length`, for which the caller vouches.
        unsafe { buffer.add(offset).write((mixed >> 56) as u8) };
    }
    isize::try_from(length).expect("a buffer is smaller than half of the address space")
}

#[cfg(test)]
mod tests {
    use std::hash::{BuildHasher, RandomState};

    #[test]
    fn hash_maps_are_keyed_by_the_seed() {
        let key = |seed| {
            let draw = move || {
                super::seed(seed);
                RandomState::new().hash_one(1)
            };
            std::thread::spawn(draw).join().unwrap()
        };
        assert_eq!(key(5), key(5));
        assert_ne!(key(5), key(6));
    }
}
