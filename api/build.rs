//! Compiles the proto files. Needs no `protoc`.

use std::error::Error;

fn main() -> Result<(), Box<dyn Error>> {
    println!("cargo::rerun-if-changed=proto");
    let files = protox::compile(["ballast/v1/admin.proto"], ["proto"])?;
    // The labels go into tables and JSON in this order.
    tonic_prost_build::configure().btree_map(".").compile_fds(files)?;
    Ok(())
}
