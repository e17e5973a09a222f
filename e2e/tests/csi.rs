//! The CSI driver as an orchestrator uses it: real processes, real mounts.

mod csi_driver;

use std::fs;

use ballast_csi_shim::v1::volume_capability::access_mode::Mode;
use ballast_csi_shim::v1::volume_usage::Unit;
use ballast_e2e::process::{output, run};
use csi_driver::{Csi, MIB, Used, block, bytes_of, code, is_mounted, may_grow_ext4, mounted};
use nix::sys::signal::Signal;
use tonic::{Code, Status};

/// What csi-sanity may skip, by what its names hold: exactly what the driver does not advertise, and
/// two tests that need csi-sanity to know more than a driver tells.
const NOT_ADVERTISED: [&str; 7] = [
    "napshot",
    "source volume",
    "volume attribute class",
    "ModifyVolume",
    "GroupController",
    "VolumeGroupSnapshot",
    "node max attach limit",
];

#[test]
fn csi_sanity_passes_and_skips_only_what_is_not_advertised() {
    let csi = Csi::start("csi-sanity");
    let report = csi.file("sanity.xml");
    let (endpoint, staging, target) = (csi.endpoint(), csi.file("staging"), csi.file("target"));
    let arguments = [
        "--csi.endpoint",
        &endpoint,
        "--csi.stagingdir",
        &staging,
        "--csi.mountdir",
        &target,
        "--csi.testvolumesize",
        "67108864",
        "--csi.testvolumeexpandsize",
        "100663296",
        "--csi.junitfile",
        &report,
        "--ginkgo.v",
    ];
    let ended = output("csi-sanity", &arguments);
    let text = String::from_utf8_lossy(&ended.stdout);
    let tail: Vec<&str> = text.lines().rev().take(150).collect();
    let tail: Vec<&str> = tail.into_iter().rev().collect();
    assert!(ended.status.success(), "csi-sanity: {}", tail.join("\n"));
    let summary = text.lines().rev().find(|line| line.contains("Passed"));
    println!("csi-sanity: {}", summary.unwrap_or("no summary"));
    let report = fs::read_to_string(report).expect("csi-sanity writes a report");
    let mut skipped = Vec::new();
    for case in report.split("<testcase ").skip(1) {
        let name = case.split("name=\"").nth(1).and_then(|rest| rest.split('"').next());
        let name = name.expect("a case has a name");
        if case.contains("<skipped") {
            skipped.push(name.to_owned());
        }
    }
    for name in &skipped {
        println!("skipped: {name}");
    }
    let unknown: Vec<&String> = skipped
        .iter()
        .filter(|name| !NOT_ADVERTISED.iter().any(|what| name.contains(what)))
        // Specs that csi-sanity itself marks as pending.
        .filter(|name| !name.contains("pagination should detect volumes added between pages"))
        .collect();
    assert!(unknown.is_empty(), "advertised and skipped: {unknown:?}");
    csi.assert_nothing_left();
}

#[test]
fn a_file_system_lives_through_the_loss_of_its_node_and_grows_while_mounted() {
    for (fs_type, mib) in [("ext4", 64), ("xfs", 320)] {
        let mut csi = Csi::start(&format!("csi-{fs_type}"));
        let used = csi.create("data", mib, mounted(Mode::SingleNodeMultiWriter, fs_type));
        for _ in 0..2 {
            csi.stage(&used).expect("it is staged");
        }
        let target = csi.publish(&used, "pod-1").expect("it is published");
        assert_eq!(csi.publish(&used, "pod-1").expect("again"), target);
        let second = csi.publish(&used, "pod-2").expect("a second pod of this host");
        assert_eq!(code(csi.unstage(&used)), Code::FailedPrecondition, "it is in use");

        let file = format!("{target}/file");
        run("dd", &["if=/dev/urandom", &format!("of={file}"), "bs=1M", "count=20", "status=none"]);
        let sum = run("sha256sum", &[&file]);
        csi.cluster.kill(1);
        let more = format!("{second}/more");
        let write = ["if=/dev/zero", &format!("of={more}"), "bs=1M", "count=10", "conv=fsync"];
        run("dd", &write);
        csi.cluster.restart(1);

        if fs_type == "ext4" && !may_grow_ext4() {
            println!("ext4 is not grown: this machine gives root no CAP_SYS_RESOURCE");
        } else {
            grows_twice(&csi, &used, mib, &target);
        }

        for target in ["pod-1", "pod-2", "pod-2"] {
            csi.unpublish(&used, target).expect("it is unpublished");
        }
        csi.unstage(&used).expect("it is unstaged");
        csi.stage(&used).expect("it is staged once more");
        let target = csi.publish(&used, "pod-1").expect("it is published once more");
        assert_eq!(run("sha256sum", &[&format!("{target}/file")]), sum);
        csi.unpublish(&used, "pod-1").expect("it is unpublished");
        for _ in 0..2 {
            csi.finish(&used);
        }
        csi.assert_nothing_left();
        csi.driver().signal(Signal::SIGTERM);
        assert_eq!(csi.driver().wait(30), 0, "a clean end");
    }
}

#[track_caller]
fn grows_twice(csi: &Csi, used: &Used, mib: i64, target: &str) {
    let before = csi.stats(used, target);
    assert_eq!(csi.expand(used, mib + 32, target), (mib + 32) * MIB);
    assert_eq!(csi.expand(used, mib + 64, target), (mib + 64) * MIB);
    let after = csi.stats(used, target);
    let grown = bytes_of(&after) - bytes_of(&before);
    assert!(grown > 50 * MIB, "{before:?} {after:?}");
    assert!(after.iter().any(|usage| usage.unit == Unit::Inodes as i32 && usage.total > 0));
}

#[test]
fn a_raw_device_grows_and_a_single_publisher_is_single() {
    let csi = Csi::start("csi-raw");
    let used = csi.create("raw", 64, block(Mode::SingleNodeSingleWriter));
    csi.stage(&used).expect("it is staged");
    let device = csi.publish(&used, "device").expect("it is published");
    assert_eq!(code(csi.publish(&used, "device-2")), Code::FailedPrecondition);
    let size = || run("blockdev", &["--getsize64", &device]).trim().to_owned();
    assert_eq!(size(), (64 * MIB).to_string());
    run("dd", &["if=/dev/urandom", &format!("of={device}"), "bs=1M", "count=8", "oflag=direct"]);
    assert_eq!(csi.expand(&used, 96, &device), 96 * MIB);
    assert_eq!(size(), (96 * MIB).to_string());
    let stats = csi.stats(&used, &device);
    assert_eq!(stats.first().map(|usage| usage.total), Some(96 * MIB));
    csi.unpublish(&used, "device").expect("it is unpublished");
    csi.publish(&used, "device-2").expect("now it may be published elsewhere");
    csi.unpublish(&used, "device-2").expect("it is unpublished");
    csi.unstage(&used).expect("it is unstaged");

    // A raw device is never formatted, whatever it is staged as.
    let mut as_files = used.clone();
    as_files.capability = mounted(Mode::SingleNodeSingleWriter, "ext4");
    let refused = csi.stage(&as_files).expect_err("it holds data");
    assert_eq!(refused.code(), Code::FailedPrecondition);
    csi.finish(&used);
    csi.assert_nothing_left();
}

/// never-format-data, at the driver's end.
#[test]
fn a_volume_whose_superblock_is_destroyed_is_refused_and_never_formatted() {
    let zeroes = |_: &Csi, uri: &str| {
        run("qemu-io", &["-f", "raw", "-c", "write -z 0 64k", uri]);
    };
    let refused = refused_while_spoilt("csi-superblock", zeroes);
    assert_eq!(refused.code(), Code::FailedPrecondition, "{refused:?}");
    assert!(refused.message().contains("not formatted"), "{refused:?}");
}

/// A probe that can't tell is no reason to format either: here it sees two file systems.
#[test]
fn a_volume_whose_probe_fails_is_refused_and_never_formatted() {
    let refused = refused_while_spoilt("csi-probe", |csi, uri| {
        let other = csi.file("other");
        run("truncate", &["--size=320M", &other]);
        run("mkfs.xfs", &["-q", "-f", &other]);
        run("bash", &["-c", &format!("head -c 512 '{other}' | nbdcopy --flush - '{uri}'")]);
    });
    assert!(refused.message().contains("blkid"), "{refused:?}");
    assert!(refused.message().contains("more filesystems"), "{refused:?}");
}

/// Spoils the beginning of a file system between two stages, and returns the refusal of the second. What
/// was there is untouched.
#[track_caller]
fn refused_while_spoilt(test: &str, spoil: impl FnOnce(&Csi, &str)) -> Status {
    let csi = Csi::start(test);
    let used = csi.create("data", 64, mounted(Mode::SingleNodeWriter, "ext4"));
    csi.stage(&used).expect("it is staged");
    fs::write(format!("{}/precious", used.staging), "precious").expect("a file can be written");
    csi.unstage(&used).expect("it is unstaged");

    let epoch = &used.context["epoch"];
    let uri = format!("{}/data@lease={epoch}", csi.cluster.node(1).nbd.trim_end_matches('/'));
    let copy = csi.file("superblock");
    run("bash", &["-c", &format!("nbdcopy '{uri}' - | head -c 65536 >'{copy}'")]);
    spoil(&csi, &uri);
    let refused = csi.stage(&used).expect_err("nobody can tell what it is");
    let again = csi.stage(&used).expect_err("nor the second time");
    assert_eq!((again.code(), again.message()), (refused.code(), refused.message()));
    assert!(!is_mounted(&used.staging));
    csi.unstage(&used).expect("half a stage is undone");
    run("bash", &["-c", &format!("nbdcopy --flush '{copy}' '{uri}'")]);
    csi.stage(&used).expect("what was there is there again");
    let precious = fs::read_to_string(format!("{}/precious", used.staging));
    assert_eq!(precious.expect("it is there"), "precious");
    csi.finish(&used);
    csi.assert_nothing_left();
    refused
}

#[test]
fn a_volume_is_unstaged_although_no_server_answers() {
    let mut csi = Csi::start("csi-gone");
    let used = csi.create("data", 64, mounted(Mode::SingleNodeWriter, "ext4"));
    csi.stage(&used).expect("it is staged");
    csi.publish(&used, "pod").expect("it is published");
    fs::write(format!("{}/file", csi.file("pod")), "unwritten").expect("a file can be written");
    csi.cluster.kill_all();
    csi.unpublish(&used, "pod").expect("it is unpublished");
    csi.unstage(&used).expect("it is unstaged");
    assert!(!is_mounted(&used.staging));
    for id in 1..=3 {
        csi.cluster.start_node(id);
    }
    for id in 1..=3 {
        csi.cluster.wait_node(id);
    }
    csi.stage(&used).expect("it is staged when the servers are back");
    csi.finish(&used);
    csi.assert_nothing_left();
}
