//! Real clients against a session: libnbd's tools, qemu's, and fio.
//!
//! A missing tool is a failure that names its package: these tests are what says that the
//! protocol is spoken as others understand it.

#![allow(
    clippy::disallowed_methods,
    clippy::disallowed_types,
    reason = "runs real programs on real sockets and files"
)]

mod server;

use std::io::{Read, Write};
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};

use server::Server;

const SIZE: u64 = 16 << 20;

/// Runs a tool, gives its standard output.
fn run(package: &str, tool: &str, arguments: &[&str]) -> String {
    let (success, out, error) = try_run(package, tool, arguments);
    assert!(success, "{tool} {arguments:?} failed\n{out}\n{error}");
    out
}

fn try_run(package: &str, tool: &str, arguments: &[&str]) -> (bool, String, String) {
    let output = Command::new(tool).args(arguments).output().unwrap_or_else(|error| {
        panic!("can't run {tool}: {error}; install the package {package}");
    });
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    (output.status.success(), text(&output.stdout), text(&output.stderr))
}

fn libnbd(tool: &str, arguments: &[&str]) -> String {
    run("libnbd-bin", tool, arguments)
}

fn qemu(tool: &str, arguments: &[&str]) -> String {
    run("qemu-utils", tool, arguments)
}

/// A folder of one test, gone with it.
struct Folder(PathBuf);

impl Folder {
    fn new() -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let number = NEXT.fetch_add(1, Ordering::SeqCst);
        let name = format!("ballast-nbd-test-{}-{number}", std::process::id());
        let path = std::env::temp_dir().join(name);
        std::fs::create_dir(&path).expect("a folder for the test");
        Self(path)
    }

    fn file(&self, name: &str) -> String {
        self.0.join(name).to_str().expect("plain path").to_owned()
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let removed = std::fs::remove_dir_all(&self.0);
        assert!(removed.is_ok() || std::thread::panicking(), "test folder stays: {removed:?}");
    }
}

/// Some data, some holes, some zeroes that are data, an odd part at the end.
fn sample() -> Vec<u8> {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let mut noise = move || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state as u8
    };
    let mut all = vec![0; SIZE as usize];
    for start in [0, 1 << 20, (5 << 20) + 512, (9 << 20) + 4096, (16 << 20) - 8192] {
        let length = if start == 1 << 20 { 3 << 20 } else { 8192 };
        all[start..start + length].fill_with(&mut noise);
    }
    all
}

fn write_sample(path: &str) -> Vec<u8> {
    let bytes = sample();
    std::fs::write(Path::new(path), &bytes).expect("the sample is written");
    bytes
}

#[test]
fn nbdinfo() {
    let server = Server::start(SIZE);
    let info = libnbd("nbdinfo", &[&server.uri("disk")]);
    for line in [
        "protocol: newstyle-fixed without TLS, using structured packets",
        "export=\"disk\":",
        "export-size: 16777216",
        "base:allocation",
        "is_read_only: false",
        "can_cache: true",
        "can_df: true",
        "can_fast_zero: true",
        "can_flush: true",
        "can_fua: true",
        "can_multi_conn: false",
        "can_trim: true",
        "can_zero: true",
        "block_size_minimum: 512",
        "block_size_preferred: 4096",
        "block_size_maximum: 1048576",
    ] {
        assert!(info.contains(line), "{line:?} is missing in\n{info}");
    }
    let info = libnbd("nbdinfo", &[&server.uri("disk@ro")]);
    assert!(info.contains("is_read_only: true"), "{info}");
    assert!(info.contains("can_multi_conn: true"), "{info}");
    let info = libnbd("nbdinfo", &[&server.uri("")]);
    assert!(info.contains("export-size: 16777216"), "{info}");
}

#[test]
fn nbdinfo_map() {
    let server = Server::start(SIZE);
    server.volume().write(1 << 20, &[7; 8192]);
    server.volume().write((2 << 20) + 100, &[7; 10]);
    let map = libnbd("nbdinfo", &["--map", &server.uri("disk")]);
    let rows: Vec<Vec<&str>> = map.lines().map(|line| line.split_whitespace().collect()).collect();
    assert_eq!(
        rows,
        [
            ["0", "1048576", "3", "hole,zero"],
            ["1048576", "8192", "0", "data"],
            ["1056768", "1040384", "3", "hole,zero"],
            ["2097152", "4096", "0", "data"],
            ["2101248", "14675968", "3", "hole,zero"],
        ]
    );
}

#[test]
fn nbdinfo_list() {
    let server = Server::start(SIZE);
    let list = libnbd("nbdinfo", &["--list", &server.uri("")]);
    assert!(list.contains("export=\"disk\":"), "{list}");
    assert!(list.contains("export-size: 16777216"), "{list}");
    let (listed, _, error) =
        try_run("libnbd-bin", "nbdinfo", &["--list", "--json", &server.uri("")]);
    assert!(listed, "{error}");
}

#[test]
fn nbdinfo_of_what_is_not_there() {
    let server = Server::start(SIZE);
    let (found, _, error) = try_run("libnbd-bin", "nbdinfo", &[&server.uri("nosuch")]);
    assert!(!found);
    assert!(error.contains("No such file or directory for export: nosuch"), "{error}");
}

#[test]
fn nbdcopy_in_and_out() {
    let server = Server::start(SIZE);
    let folder = Folder::new();
    let (from, to) = (folder.file("from"), folder.file("to"));
    let bytes = write_sample(&from);
    libnbd("nbdcopy", &["--flush", &from, &server.uri("disk")]);
    assert!(server.volume().contents() == bytes, "what nbdcopy wrote differs");
    // read-only exports of the test's server may be shared by connections
    libnbd("nbdcopy", &["--connections=4", &server.uri("disk@ro"), &to]);
    assert!(std::fs::read(&to).expect("a copy") == bytes, "what nbdcopy read differs");
}

#[test]
fn nbdcopy_with_large_requests() {
    let server = Server::start(SIZE);
    let folder = Folder::new();
    let (from, to) = (folder.file("from"), folder.file("to"));
    let bytes = write_sample(&from);
    let uri = server.uri("disk");
    let arguments = ["--request-size=1048576", "--requests=16", "--synchronous"];
    libnbd("nbdcopy", &[&arguments[..2], &[&from, &uri]].concat());
    assert!(server.volume().contents() == bytes, "what nbdcopy wrote differs");
    libnbd("nbdcopy", &[&arguments[..], &[&uri, &to]].concat());
    assert!(std::fs::read(&to).expect("a copy") == bytes, "what nbdcopy read differs");
}

#[test]
fn qemu_img_convert() {
    let server = Server::start(SIZE);
    let folder = Folder::new();
    let (from, to) = (folder.file("from"), folder.file("to"));
    let bytes = write_sample(&from);
    server.volume().write(0, &vec![0xee; SIZE as usize]);
    let uri = server.uri("disk");
    qemu("qemu-img", &["convert", "-n", "-f", "raw", "-O", "raw", &from, &uri]);
    assert!(server.volume().contents() == bytes, "what qemu-img wrote differs");
    qemu("qemu-img", &["convert", "-f", "raw", "-O", "raw", &server.uri("disk@ro"), &to]);
    assert!(std::fs::read(&to).expect("a copy") == bytes, "what qemu-img read differs");
    qemu("qemu-img", &["compare", "-f", "raw", "-F", "raw", &from, &uri]);
    let map = qemu("qemu-img", &["map", "-f", "raw", "--output=json", &uri]);
    assert!(map.contains("\"zero\": true"), "{map}");
}

#[test]
fn qemu_io_odd_offsets_and_sizes() {
    let server = Server::start(SIZE);
    let uri = server.uri("disk");
    let mut commands = Vec::new();
    let mut model = vec![0_u8; SIZE as usize];
    let mut place = |start: usize, length: usize, pattern: u8| {
        model[start..start + length].fill(pattern);
        format!("write -P {pattern:#x} {start} {length}")
    };
    commands.push(place(0, SIZE as usize, 0x11));
    commands.push(place(1, 1, 0x22));
    commands.push(place(511, 2, 0x33));
    commands.push(place(4095, 8194, 0x44));
    commands.push(place((1 << 20) - 7, 3_000_013, 0x55));
    commands.push(place(SIZE as usize - 3, 3, 0x66));
    commands.push(format!("write -z {} {}", 5_000_001, 70_007));
    model[5_000_001..5_070_008].fill(0);
    commands.push(format!("write -z -u {} {}", 8 << 20, 1 << 20));
    commands.push(format!("discard {} {}", 10 << 20, 65_536));
    model[8 << 20..9 << 20].fill(0);
    model[10 << 20..(10 << 20) + 65_536].fill(0);
    commands.push("write -f -P 0x77 12345 678".into());
    model[12345..12345 + 678].fill(0x77);
    commands.push("flush".into());
    commands.push("read -P 0x33 511 2".into());
    commands.push("read -P 0x55 1048569 3000013".into());
    commands.push("read -P 0x66 16777213 3".into());
    commands.push("read -P 0 5000001 70007".into());
    let mut arguments = vec!["-f", "raw"];
    for command in &commands {
        arguments.extend(["-c", command]);
    }
    arguments.push(&uri);
    let out = qemu("qemu-io", &arguments);
    assert!(!out.contains("verification failed"), "{out}");
    let contents = server.volume().contents();
    let wrong = contents.iter().zip(&model).position(|(found, expected)| found != expected);
    assert_eq!(wrong, None, "first wrong byte");
}

#[test]
fn qemu_io_is_refused_with_words() {
    let server = Server::start(SIZE);
    let uri = server.uri("disk@ro");
    let write = ["-f", "raw", "-c", "write 0 512", &uri];
    let (opened, out, error) = try_run("qemu-utils", "qemu-io", &write);
    assert!(!opened);
    assert!(error.contains("Permission denied"), "{out}{error}");

    let uri = server.uri("disk@rw");
    let (opened, out, error) =
        try_run("qemu-utils", "qemu-io", &["-f", "raw", "-c", "read 0 512", &uri]);
    assert!(!opened);
    assert!(error.contains("use NAME, NAME@ro"), "{out}{error}");
}

/// Chooses the export `disk` and waits until the server says that it is attached.
fn attach(mut socket: &TcpStream) {
    let mut greeting = [0; 18];
    socket.read_exact(&mut greeting).expect("a greeting");
    socket.write_all(b"\0\0\0\x03IHAVEOPT\0\0\0\x01\0\0\0\x04disk").expect("taken");
    let mut answer = [0; 10];
    socket.read_exact(&mut answer).expect("size and flags");
}

#[test]
fn one_attachment_holds_a_volume_for_writing() {
    let server = Server::start(SIZE);
    let uri = server.uri("disk");
    let holder = TcpStream::connect(("127.0.0.1", server.port())).expect("listening");
    attach(&holder);
    let (opened, out, error) =
        try_run("qemu-utils", "qemu-io", &["-f", "raw", "-c", "read 0 512", &uri]);
    assert!(!opened);
    assert!(error.contains("attached for writing by another connection"), "{out}{error}");
    let uri = server.uri("disk@ro");
    qemu("qemu-io", &["-r", "-f", "raw", "-c", "read -P 0 0 512", &uri]);
}

#[test]
fn fio_verifies() {
    let server = Server::start(SIZE);
    let folder = Folder::new();
    let uri = server.uri("disk");
    let uri = format!("--uri={uri}");
    let aux = format!("--aux-path={}", folder.0.display());
    for arguments in [
        ["--rw=randwrite", "--bsrange=512-128k", "--bs_unaligned=0", "--iodepth=32"],
        ["--rw=write", "--bs=1m", "--iodepth=4", "--fsync=8"],
        ["--rw=randrw", "--bs=4k", "--iodepth=64", "--norandommap=0"],
        ["--rw=randtrimwrite", "--bs=4k", "--iodepth=8", "--norandommap=0"],
    ] {
        let common = [
            "--name=verify",
            "--ioengine=nbd",
            "--size=16m",
            "--verify=crc32c",
            "--verify_fatal=1",
            "--output-format=terse",
            &uri,
            &aux,
        ];
        run("fio", "fio", &[&common[..], &arguments[..]].concat());
    }
}
