//! The segments of a pool: which are free, what lives in the others, and when one may be reused
//! (hazard F3).

mod image;
mod reserves;
mod table;

pub use image::DecodeTableError;
pub use reserves::Reserves;
pub use table::{FrozenTable, SegmentCounts, SegmentPin, SegmentState, SegmentTable, Victim};
