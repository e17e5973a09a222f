//! Memory for I/O: owned while it is filled, shared and immutable afterwards.
//!
//! Every buffer starts on a block border, so that it can go to an O_DIRECT file without a copy.
//! Buffers come from a [`BufferPool`] and return to it when the last reference is dropped.

use std::alloc::{Layout, alloc_zeroed, dealloc, handle_alloc_error};
use std::ops::{Deref, DerefMut};
use std::ptr::NonNull;
use std::sync::{Arc, Mutex};

use bytes::Bytes;

use crate::geometry::BLOCK_SIZE;
use crate::limits::{BUFFER_POOL_BYTES_MAX, BUFFER_SIZE_CLASSES};

/// Owned memory, block-aligned, a whole number of blocks in capacity, `len` bytes in use.
pub struct AlignedBuf {
    /// Present until drop.
    memory: Option<Memory>,
    len: usize,
    home: Option<Arc<Shelves>>,
}

/// Whole blocks of a write: shared, immutable, block-aligned.
pub type Payload = Bytes;

struct Memory {
    pointer: NonNull<u8>,
    capacity: usize,
}

// SAFETY: `Memory` is uniquely owned plain memory; no interior sharing.
unsafe impl Send for Memory {}
// SAFETY: through a shared reference the memory is only read.
unsafe impl Sync for Memory {}

impl Memory {
    fn layout(capacity: usize) -> Layout {
        Layout::from_size_align(capacity, BLOCK_SIZE).expect("capacity is a small multiple")
    }

    fn new(capacity: usize) -> Self {
        assert!(capacity > 0 && capacity.is_multiple_of(BLOCK_SIZE));
        let layout = Self::layout(capacity);
        // SAFETY: the layout has a non-zero size (asserted above).
        let raw = unsafe { alloc_zeroed(layout) };
        let Some(pointer) = NonNull::new(raw) else { handle_alloc_error(layout) };
        Self { pointer, capacity }
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        // SAFETY: allocated in `new` with the same layout, freed once.
        unsafe { dealloc(self.pointer.as_ptr(), Self::layout(self.capacity)) }
    }
}

impl AlignedBuf {
    /// `len` zero bytes that belong to no pool.
    pub fn zeroed(len: usize) -> Self {
        let capacity = len.next_multiple_of(BLOCK_SIZE).max(BLOCK_SIZE);
        Self { memory: Some(Memory::new(capacity)), len, home: None }
    }

    /// A copy of `bytes` that belongs to no pool.
    pub fn copy_of(bytes: &[u8]) -> Self {
        let mut buffer = Self::zeroed(bytes.len());
        buffer.copy_from_slice(bytes);
        buffer
    }

    /// Bytes in use.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether no byte is in use.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Bytes that fit.
    pub fn capacity(&self) -> usize {
        self.memory().capacity
    }

    fn memory(&self) -> &Memory {
        self.memory.as_ref().expect("present until drop")
    }

    /// Changes how many bytes are in use; what is new in sight holds old contents.
    ///
    /// # Panics
    /// When `len` is above the capacity: a bug of the caller.
    pub fn set_len(&mut self, len: usize) {
        assert!(len <= self.capacity());
        self.len = len;
    }

    /// Shares it, immutable from now on; its memory returns to its pool with the last reference.
    pub fn freeze(self) -> Bytes {
        Bytes::from_owner(self)
    }
}

impl Deref for AlignedBuf {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        // SAFETY: `len <= capacity` and the memory is initialised (zeroed at allocation).
        unsafe { std::slice::from_raw_parts(self.memory().pointer.as_ptr(), self.len) }
    }
}

impl DerefMut for AlignedBuf {
    fn deref_mut(&mut self) -> &mut [u8] {
        // SAFETY: as in `deref`, and `&mut self` is unique.
        unsafe { std::slice::from_raw_parts_mut(self.memory().pointer.as_ptr(), self.len) }
    }
}

impl AsRef<[u8]> for AlignedBuf {
    fn as_ref(&self) -> &[u8] {
        self
    }
}

impl std::fmt::Debug for AlignedBuf {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "AlignedBuf({} of {} bytes)", self.len, self.capacity())
    }
}

impl Drop for AlignedBuf {
    fn drop(&mut self) {
        if let (Some(home), Some(memory)) = (self.home.take(), self.memory.take()) {
            home.put(memory);
        }
    }
}

/// Whether `bytes` can go to an O_DIRECT file as it is.
pub fn is_block_aligned(bytes: &[u8]) -> bool {
    bytes.as_ptr().addr().is_multiple_of(BLOCK_SIZE) && bytes.len().is_multiple_of(BLOCK_SIZE)
}

struct Shelf {
    size: usize,
    free: Vec<Memory>,
}

struct Shelves {
    shelves: Mutex<Vec<Shelf>>,
}

impl Shelves {
    fn put(&self, memory: Memory) {
        let mut shelves = self.shelves.lock().expect("no panic under this lock");
        if let Some(shelf) = shelves.iter_mut().find(|shelf| shelf.size == memory.capacity)
            && (shelf.free.len() + 1) * shelf.size
                <= BUFFER_POOL_BYTES_MAX / BUFFER_SIZE_CLASSES.len()
        {
            shelf.free.push(memory);
        }
    }
}

/// A pool of buffers in a few sizes; one per shard. Idle memory is bounded by
/// [`BUFFER_POOL_BYTES_MAX`]; what is in use is bounded by admission.
#[derive(Clone)]
pub struct BufferPool {
    shelves: Arc<Shelves>,
}

impl Default for BufferPool {
    fn default() -> Self {
        let shelves = BUFFER_SIZE_CLASSES.iter().map(|&size| Shelf { size, free: Vec::new() });
        Self { shelves: Arc::new(Shelves { shelves: Mutex::new(shelves.collect()) }) }
    }
}

impl BufferPool {
    /// Bytes of memory that a buffer of `len` bytes takes.
    pub fn capacity_of(len: usize) -> usize {
        let class = BUFFER_SIZE_CLASSES.iter().copied().find(|&size| size >= len);
        class.unwrap_or_else(|| len.next_multiple_of(BLOCK_SIZE))
    }

    /// A buffer of `len` bytes with undefined (but initialised) contents.
    pub fn get(&self, len: usize) -> AlignedBuf {
        let Some(size) = BUFFER_SIZE_CLASSES.iter().copied().find(|&size| size >= len) else {
            return AlignedBuf::zeroed(len);
        };
        let recycled = {
            let mut shelves = self.shelves.shelves.lock().expect("no panic under this lock");
            shelves.iter_mut().find(|shelf| shelf.size == size).and_then(|shelf| shelf.free.pop())
        };
        let memory = recycled.unwrap_or_else(|| Memory::new(size));
        AlignedBuf { memory: Some(memory), len, home: Some(self.shelves.clone()) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_returns_to_the_pool() {
        let pool = BufferPool::default();
        let first = pool.get(5000);
        let address = first.as_ptr();
        assert!(address.addr().is_multiple_of(BLOCK_SIZE));
        let shared = first.freeze();
        let slice = shared.slice(4096..);
        drop(shared);
        assert_ne!(pool.get(5000).as_ptr(), address, "a slice still holds it");
        drop(slice);
        let again = [pool.get(5000), pool.get(5000)];
        assert!(again.iter().any(|buffer| buffer.as_ptr() == address));
    }

    #[test]
    fn larger_than_every_class() {
        let pool = BufferPool::default();
        let largest = BUFFER_SIZE_CLASSES[BUFFER_SIZE_CLASSES.len() - 1];
        assert_eq!(pool.get(largest + 1).len(), largest + 1);
    }

    #[test]
    fn capacity_is_what_a_buffer_takes() {
        let pool = BufferPool::default();
        for len in [1, 4096, 4097, 17 << 10, 1 << 20, (1 << 20) + 1, 32 << 20] {
            assert_eq!(pool.get(len).capacity(), BufferPool::capacity_of(len), "{len}");
        }
    }
}
