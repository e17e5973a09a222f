//! Tests of the map against a dumb model, its formats, its bounds.

mod disk;
mod formats;
mod model;
mod random;
mod resync;
