//! ballastctl.
fn main() {}
