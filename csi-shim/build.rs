//! Compiles the proto file. Needs no `protoc`.

use std::error::Error;

fn main() -> Result<(), Box<dyn Error>> {
    println!("cargo::rerun-if-changed=proto");
    let files = protox::compile(["csi.proto"], ["proto"])?;
    // Segments, contexts and parameters come out in this order.
    tonic_prost_build::configure().btree_map(".").compile_fds(files)?;
    Ok(())
}
