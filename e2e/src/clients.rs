//! What other projects' NBD clients must see, each as a function of the address.
//!
//! Proven on nbdkit and qemu-nbd (`tests/peers.rs`), then asked of Ballast.

use std::fs::File;
use std::io::Read;

use serde_json::Value;

use crate::process::run;
use crate::scratch::Scratch;

const MIB: u64 = 1 << 20;
/// The image of a real file system that is copied in and out, in MiB.
const IMAGE_MIB: u64 = 192;

/// A file with an ext4 file system that holds files of this machine.
///
/// # Panics
/// When it cannot be made.
pub fn file_system_image(scratch: &Scratch) -> String {
    let image = scratch.file("image.raw");
    let file = File::create(&image).expect("a file can be made");
    file.set_len(IMAGE_MIB * MIB).expect("a sparse file can be long");
    drop(file);
    run("mkfs.ext4", &["-q", "-F", "-d", "/usr/share/perl", &image]);
    image
}

/// `qemu-img convert` of an image into the volume and back is byte-identical.
///
/// # Panics
/// When it is not, or a client fails.
#[track_caller]
pub fn qemu_img_round_trip(uri: &str, scratch: &Scratch) {
    let image = file_system_image(scratch);
    let out = scratch.file("qemu-img.out");
    run("qemu-img", &["convert", "-n", "-f", "raw", "-O", "raw", &image, uri]);
    run("qemu-img", &["convert", "-f", "raw", "-O", "raw", uri, &out]);
    assert_begins_with(&out, &image);
}

/// `nbdcopy` of an image into the volume and back is byte-identical, with many connections.
///
/// # Panics
/// When it is not, or a client fails.
#[track_caller]
pub fn nbdcopy_round_trip(uri: &str, scratch: &Scratch) {
    let image = file_system_image(scratch);
    let out = scratch.file("nbdcopy.out");
    run("nbdcopy", &["--flush", &image, uri]);
    run("nbdcopy", &[uri, &out]);
    assert_begins_with(&out, &image);
}

/// The first file holds the second, then only zeroes.
#[track_caller]
fn assert_begins_with(long: &str, short: &str) {
    let mut long_file = File::open(long).expect("the copy is there");
    let mut short_file = File::open(short).expect("the original is there");
    let (mut left, mut right) = (vec![0; MIB as usize], vec![0; MIB as usize]);
    let mut offset = 0u64;
    loop {
        let read = read_up_to(&mut long_file, &mut left);
        if read == 0 {
            break;
        }
        let expected = read_up_to(&mut short_file, &mut right);
        right[expected..].fill(0);
        if left[..read] != right[..read] {
            let at = left.iter().zip(&right).position(|(a, b)| a != b).unwrap_or(0);
            panic!("{long} differs from {short} at byte {}", offset + at as u64);
        }
        offset += read as u64;
    }
    let length = short_file.metadata().expect("a file has a size").len();
    assert!(offset >= length, "{long} ends at {offset}, {short} at {length}");
}

fn read_up_to(file: &mut File, buffer: &mut [u8]) -> usize {
    let mut filled = 0;
    while filled < buffer.len() {
        match file.read(&mut buffer[filled..]).expect("a local file can be read") {
            0 => break,
            n => filled += n,
        }
    }
    filled
}

/// An extent as `nbdinfo --map` shows it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Extent {
    /// First byte.
    pub offset: u64,
    /// Bytes.
    pub length: u64,
    /// Whether nothing is stored there, and it reads as zeroes.
    pub hole: bool,
}

/// The allocation map.
///
/// # Panics
/// When the client fails or prints something else.
#[track_caller]
pub fn map(uri: &str) -> Vec<Extent> {
    let json: Value = serde_json::from_str(&run("nbdinfo", &["--map", "--json", uri]))
        .expect("nbdinfo prints JSON");
    let extents = json.as_array().expect("a list of extents").iter();
    let number = |extent: &Value, name: &str| extent[name].as_u64().expect("a number");
    extents
        .map(|extent| Extent {
            offset: number(extent, "offset"),
            length: number(extent, "length"),
            // base:allocation: bit 0 hole, bit 1 zero
            hole: number(extent, "type") == 3,
        })
        .collect()
}

/// A fresh volume is one hole; a write makes data of it and nothing else; a trim a hole again.
///
/// # Panics
/// When the map shows otherwise. `granularity`: bytes that the server may round to.
#[track_caller]
pub fn map_shows_holes(uri: &str, granularity: u64) {
    assert!(map(uri).iter().all(|extent| extent.hole), "a fresh volume: {:?}", map(uri));
    run("qemu-io", &["-f", "raw", "-c", "write -P 0x5a 10M 1M", uri]);
    let data: Vec<Extent> = map(uri).into_iter().filter(|extent| !extent.hole).collect();
    let begin = data.first().expect("data after a write").offset;
    let end = data.last().map(|extent| extent.offset + extent.length).unwrap_or(0);
    let rounded = |bytes: u64| bytes <= granularity;
    assert!(begin <= 10 * MIB && rounded(10 * MIB - begin), "data begins at {begin}");
    assert!(end >= 11 * MIB && rounded(end - 11 * MIB), "data ends at {end}");
    run("qemu-io", &["-f", "raw", "-d", "unmap", "-c", "discard 10M 1M", uri]);
    assert!(map(uri).iter().all(|extent| extent.hole), "after a trim: {:?}", map(uri));
    let total: u64 = map(uri).iter().map(|extent| extent.length).sum();
    let size: u64 = run("nbdinfo", &["--size", uri]).trim().parse().expect("nbdinfo prints a size");
    assert_eq!(total, size, "the map covers the volume");
}

/// Patterns at odd offsets and of odd sizes read back, with what lies around them intact.
///
/// # Panics
/// When they do not, or `qemu-io` fails.
#[track_caller]
pub fn qemu_io_odd_patterns(uri: &str) {
    let script = [
        // (pattern, offset, length): inside a block, over a block's end, over a map page's end
        "write -P 0x11 0 64k",
        "write -P 0x22 513 1000",
        "write -P 0x33 4095 2",
        "write -P 0x44 8191 12289",
        "write -P 0x55 1048575 3",
        "write -P 0x66 1044480 131073",
        "write -z 12345 6789",
        "write -f -P 0x77 20481 511",
        "flush",
        "read -P 0x11 0 513",
        "read -P 0x22 513 1000",
        "read -P 0x11 1513 2582",
        "read -P 0x33 4095 2",
        "read -P 0x11 4097 4094",
        "read -P 0x44 8191 4154",
        "read -P 0x00 12345 6789",
        "read -P 0x44 19134 1346",
        "read -P 0x77 20481 511",
        "read -P 0x11 20992 44544",
        "read -P 0x66 1044480 131073",
        "read -P 0x00 1175553 1000",
    ];
    let mut arguments = vec!["-f", "raw"];
    for line in &script {
        arguments.extend(["-c", line]);
    }
    arguments.push(uri);
    let printed = run("qemu-io", &arguments);
    // qemu-io of this version says so and exits 0.
    assert!(!printed.contains("verification failed"), "{printed}");
}

/// fio writes 4 KiB to 1 MiB at random with trims among them, and finds all of it again.
///
/// # Panics
/// When a byte is wrong or fio fails.
#[track_caller]
pub fn fio_verifies(uri: &str, scratch: &Scratch) {
    let job = scratch.file("verify.fio");
    let text = format!(
        "[global]\nioengine=nbd\nuri={uri}\nsize=256m\nverify=crc32c\nverify_fatal=1\n\
         verify_dump=0\nrandrepeat=0\n\
         [mixed]\nrw=randwrite\nbsrange=4k-1m\nblockalign=4k\niodepth=16\nverify_backlog=64\n\
         [trims]\nstonewall\nrw=randtrimwrite\nbs=64k\niodepth=8\nnumjobs=1\nverify=0\n\
         [after]\nstonewall\nrw=write\nbs=128k\niodepth=8\ndo_verify=1\n\
         [mixed-reads]\nstonewall\nrw=randrw\nrwmixread=40\nbsrange=4k-256k\nblockalign=4k\n\
         iodepth=16\n"
    );
    std::fs::write(&job, text).expect("a file can be written");
    let printed = run("fio", &["--output-format=json", &job]);
    let json: Value = serde_json::from_str(&printed[printed.find('{').expect("fio prints JSON")..])
        .expect("fio prints JSON");
    for result in json["jobs"].as_array().expect("jobs") {
        let name = &result["jobname"];
        assert_eq!(result["error"], 0, "{name}: {result}");
        assert!(result["write"]["total_ios"].as_u64() > Some(0), "{name} wrote nothing");
        let trims = result["trim"]["total_ios"].as_u64() > Some(0);
        assert_eq!(trims, name == "trims", "{name}: trims");
    }
}
