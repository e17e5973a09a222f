//! Other projects' NBD clients on three nodes: bytes in, the same bytes out.

use ballast_e2e::cluster::Cluster;
use ballast_e2e::filesystem::{self, EXT4, XFS};
use ballast_e2e::{clients, process};

#[test]
fn qemu_img_copies_are_identical() {
    let cluster = Cluster::start("qemu-img");
    clients::qemu_img_round_trip(&cluster.uri(1), &cluster.scratch);
}

#[test]
fn nbdcopy_copies_are_identical() {
    let cluster = Cluster::start("nbdcopy");
    clients::nbdcopy_round_trip(&cluster.uri(2), &cluster.scratch);
}

#[test]
fn nbdinfo_shows_holes() {
    let cluster = Cluster::start("nbdinfo");
    clients::map_shows_holes(&cluster.uri(1), 4096);
    let listed = process::run("nbdinfo", &["--list", &cluster.node(3).nbd]);
    assert!(listed.contains("demo"), "{listed}");
}

#[test]
fn qemu_io_patterns_at_odd_offsets_read_back() {
    let cluster = Cluster::start("qemu-io");
    clients::qemu_io_odd_patterns(&cluster.uri(3));
}

#[test]
fn fio_verifies_4k_to_1m_mixed_with_trims() {
    let cluster = Cluster::start("fio");
    clients::fio_verifies(&cluster.uri(1), &cluster.scratch);
}

#[test]
fn ext4_is_clean_after_it_was_filled() {
    let cluster = Cluster::start("ext4");
    let (make, check) = EXT4;
    filesystem::holds_files(&cluster.scratch, &cluster.uri(1), make, check);
}

#[test]
fn xfs_is_clean_after_it_was_filled() {
    let cluster = Cluster::start("xfs");
    let (make, check) = XFS;
    filesystem::holds_files(&cluster.scratch, &cluster.uri(2), make, check);
}

#[test]
fn a_single_node_serves_too() {
    let options = ballast_e2e::cluster::Options { nodes: 1, ..Default::default() };
    let cluster = Cluster::with("single", &options);
    clients::qemu_io_odd_patterns(&cluster.uri(1));
}
