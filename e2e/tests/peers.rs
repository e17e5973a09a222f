//! The clients' side of the tests, proven on servers that are known to be right, and the
//! verifier, proven on servers that are known to lie.

use ballast_e2e::filesystem::{self, BlockDevice, EXT4, Mounted, XFS};
use ballast_e2e::network::{Cut, Island};
use ballast_e2e::peer::{free_port, nbdkit, qemu_nbd};
use ballast_e2e::postgres::Postgres;
use ballast_e2e::process::Running;
use ballast_e2e::scratch::Scratch;
use ballast_e2e::verify::{Verify, unix_ms};
use ballast_e2e::wait::until_true;
use ballast_e2e::{clients, process};
use nix::sys::signal::Signal;

#[test]
fn images_go_in_and_out_of_nbdkit() {
    let scratch = Scratch::new("peer-images");
    let peer = nbdkit(&scratch, free_port(), &["memory", "1G"]);
    clients::map_shows_holes(&peer.uri, 64 << 10);
    clients::qemu_io_odd_patterns(&peer.uri);
    clients::qemu_img_round_trip(&peer.uri, &scratch);
    clients::nbdcopy_round_trip(&peer.uri, &scratch);
    clients::fio_verifies(&peer.uri, &scratch);
}

#[test]
fn file_systems_live_on_nbdkit() {
    let scratch = Scratch::new("peer-filesystems");
    for (make, check) in [EXT4, XFS] {
        let peer = nbdkit(&scratch, free_port(), &["memory", "1G"]);
        filesystem::holds_files(&scratch, &peer.uri, make, check);
    }
}

#[test]
fn postgresql_lives_on_nbdkit() {
    let scratch = Scratch::new("peer-postgres");
    let public = Scratch::public("peer-postgres");
    let peer = nbdkit(&scratch, free_port(), &["memory", "1G"]);
    let device = BlockDevice::attach(&scratch, &peer.uri);
    process::run("mkfs.ext4", &["-q", "-F", &device.path]);
    let mounted = Mounted::mount(&device.path, public.path());
    let log = scratch.path().join("postgres.log");
    let server = Postgres::start(public.path(), &log);
    let mut init = server.pgbench(&scratch.path().join("pgbench.log"), &["-i", "-q", "-s", "1"]);
    assert_eq!(init.wait(60), 0, "{}", init.log());
    assert_eq!(server.query("select count(*) from pgbench_accounts"), "100000");
    server.crash();
    let server = Postgres::start(public.path(), &log);
    assert_eq!(server.query("select count(*) from pgbench_accounts"), "100000");
    server.stop();
    mounted.unmount();
    device.detach();
}

#[test]
fn verifier_accepts_a_server_that_is_killed_and_keeps_its_data() {
    let scratch = Scratch::new("verify-good");
    let file = scratch.file("disk");
    std::fs::File::create(&file).and_then(|file| file.set_len(64 << 20)).expect("a sparse file");
    let port = free_port();
    let mut peer = qemu_nbd(&scratch, port, &file);
    // The kernel ends a killed process's write to the page cache between two pages, so such a
    // server may tear what it never answered: only one page is all there or not at all.
    let options = ["--expect-zeroes", "--span-mib", "64", "--max-kib", "4"];
    let mut verify = Verify::start(&scratch, &[&peer.uri], &options);
    for _ in 0..3 {
        verify.progress(500, 60);
        process::kill_and_wait(peer.process.pid());
        peer = qemu_nbd(&scratch, port, &file);
    }
    verify.progress(500, 60);
    let report = verify.finish();
    report.assert_ok();
}

#[test]
fn verifier_convicts_a_server_that_forgets() {
    let scratch = Scratch::new("verify-forgets");
    let port = free_port();
    let mut peer = nbdkit(&scratch, port, &["memory", "64M"]);
    let mut verify = Verify::start(&scratch, &[&peer.uri], &["--expect-zeroes"]);
    verify.progress(500, 60);
    process::kill_and_wait(peer.process.pid());
    peer = nbdkit(&scratch, port, &["memory", "64M"]);
    verify.progress(10, 60);
    let report = verify.finish();
    assert_eq!(report.json["ok"], false, "{:#}", report.json);
    let first = report.json["violations"][0].as_str().expect("a text");
    assert!(first.starts_with("lost: "), "{first}");
    drop(peer);
}

#[test]
fn verifier_reports_the_stall_of_a_server_that_hangs() {
    let scratch = Scratch::new("verify-hangs");
    let peer = nbdkit(&scratch, free_port(), &["memory", "64M"]);
    let mut verify = Verify::start(&scratch, &[&peer.uri], &[]);
    verify.progress(500, 60);
    let from = unix_ms();
    peer.process.signal(Signal::SIGSTOP);
    until_true("a stop of 600 ms", 5, || unix_ms() > from + 600);
    peer.process.signal(Signal::SIGCONT);
    verify.progress(500, 60);
    let report = verify.finish();
    report.assert_ok();
    let stall = report.longest_stall_between(from, unix_ms());
    assert!((550..5000).contains(&stall), "a stall of {stall} ms");
}

#[test]
fn a_process_on_an_island_is_cut_in_each_direction() {
    let scratch = Scratch::new("island");
    let island = Island::new("peer");
    let port = free_port();
    let text = port.to_string();
    let base = ["nbdkit", "-f", "-i", "127.0.0.1", "-p", &text, "-e", "demo", "memory", "64M"];
    let command = island.command(&base);
    let words: Vec<&str> = command.iter().map(String::as_str).collect();
    let mut server = Running::start(&scratch.path().join("peer.log"), &words, false);
    let uri = format!("nbd://127.0.0.1:{port}/demo");
    until_true("the peer", 10, || std::net::TcpStream::connect(("127.0.0.1", port)).is_ok());
    let mut verify = Verify::start(&scratch, &[&uri], &[]);
    let mut cuts = Vec::new();
    for cut in [Cut::Incoming, Cut::Outgoing, Cut::Both] {
        verify.progress(100, 60);
        let from = unix_ms();
        island.cut(cut, &[]);
        // From when it is in force: nft has to get its turn.
        let in_force = unix_ms();
        until_true("a cut of 500 ms", 5, || unix_ms() > in_force + 500);
        island.heal();
        cuts.push((cut, from));
    }
    verify.progress(100, 60);
    let to = unix_ms();
    let report = verify.finish();
    report.assert_ok();
    for (cut, from) in cuts {
        let stall = report.longest_stall_between(from, to);
        assert!(stall >= 400, "{cut:?}: longest stall {stall} ms");
    }
    assert!(server.is_running());
}
