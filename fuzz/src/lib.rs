//! What fuzz targets of several crates' inputs share. Never part of the product.

#![deny(missing_docs)]

pub mod nbd;
pub mod peer;
pub mod store;
