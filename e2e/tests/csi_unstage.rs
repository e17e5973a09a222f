//! A device is taken away from under nothing: unstaging while what was written is on its way, while
//! the volume is mounted elsewhere, and by other names of the staging path.

mod csi_driver;

use std::fs;
use std::io::Write;
use std::os::unix::fs::symlink;
use std::time::{Duration, Instant};

use ballast_csi_shim::v1::volume_capability::AccessType;
use ballast_csi_shim::v1::volume_capability::access_mode::Mode;
use ballast_e2e::process::{self, run};
use ballast_e2e::wait::until_true;
use csi_driver::{Csi, Driver, HOST, Used, code, is_mounted, mounted};
use nix::sys::signal::Signal;
use tonic::Code;

/// Files of 4 MiB, together far more than a link gets through in the moments that it is let go on for:
/// one moment is up to some 40 MiB on a machine that has other things to do.
const FILES: usize = 64;

/// Unstages as an orchestrator does: again, while the driver says that it is not done.
#[track_caller]
fn unstage_patiently(driver: &Driver, used: &Used) {
    for _ in 0..10 {
        match driver.unstage(used) {
            Ok(()) => return,
            Err(status) => assert_eq!(status.code(), Code::Unavailable, "{status:?}"),
        }
    }
    panic!("it is never unstaged");
}

fn content(file: usize) -> Vec<u8> {
    let word = |at: usize| ((at as u64) ^ ((file as u64) << 32)).to_le_bytes();
    (0..(4 << 20) / 8).flat_map(word).collect()
}

/// Stops the link, and then writes over files that are there and on the servers: what is new of them is
/// in this host's memory only, all of it.
#[track_caller]
fn write_behind_a_stopped_link(used: &Used, link: u32) {
    let write = |file: usize, content: &[u8]| {
        let path = format!("{}/{file}", used.staging);
        let file = fs::OpenOptions::new().create(true).write(true).truncate(false).open(path);
        file.and_then(|mut file| file.write_all(content)).expect("a file can be written");
    };
    (0..FILES).for_each(|file| write(file, &content(file + FILES)));
    run("sync", &["--file-system", &used.staging]);
    process::send(link, Signal::SIGSTOP);
    (0..FILES).for_each(|file| write(file, &content(file)));
}

#[track_caller]
fn assert_files(used: &Used) {
    let is_lost = |file: &usize| {
        let kept = fs::read(format!("{}/{file}", used.staging));
        kept.ok() != Some(content(*file))
    };
    let lost: Vec<usize> = (0..FILES).filter(is_lost).collect();
    assert!(lost.is_empty(), "lost: {lost:?}");
}

/// Servers that are very slow: a link that is stopped is let go on for a moment every six seconds, as
/// long as it takes to complete a write, and is stopped again when this returns. The moments are
/// short beside what there is to write, or a fast machine is through with it before the end.
#[track_caller]
fn trickle(link: u32, device: &str, seconds: u64) {
    let stat = format!("/sys/block/{}/stat", device.trim_start_matches("/dev/"));
    let writes = || {
        let text = fs::read_to_string(&stat).expect("the device is there");
        text.split_whitespace().nth(4).map(str::to_owned)
    };
    let alive = || assert!(process::is_alive(link), "the link was ended while it was needed");
    let start = Instant::now();
    while start.elapsed() < Duration::from_secs(seconds) {
        std::thread::sleep(Duration::from_secs(6));
        alive();
        let (before, moment) = (writes(), Instant::now());
        process::send(link, Signal::SIGCONT);
        while writes() == before {
            assert!(moment.elapsed() < Duration::from_secs(60), "no write ends");
        }
        process::send(link, Signal::SIGSTOP);
    }
    alive();
}

fn device_of(path: &str) -> String {
    run("findmnt", &["--noheadings", "--output", "SOURCE", path]).trim().to_owned()
}

#[test]
fn what_is_on_its_way_to_slow_servers_is_waited_for() {
    let csi = Csi::start("csi-slow");
    let used = csi.create("data", 640, mounted(Mode::SingleNodeWriter, "ext4"));
    csi.stage(&used).expect("it is staged");
    let (device, link) = (device_of(&used.staging), csi.links()[0]);
    write_behind_a_stopped_link(&used, link);
    std::thread::scope(|scope| {
        let unstaged = scope.spawn(|| unstage_patiently(&csi, &used));
        until_true("the unmount", 20, || !is_mounted(&used.staging));
        // Longer than a device that nobody cares about takes to be taken away.
        trickle(link, &device, 40);
        assert!(!unstaged.is_finished(), "there was more to write");
        process::send(link, Signal::SIGCONT);
        unstaged.join().expect("it is unstaged");
    });
    csi.stage(&used).expect("it is staged again");
    assert_files(&used);
    csi.finish(&used);
    csi.assert_nothing_left();
}

#[test]
fn a_driver_that_is_killed_while_it_unmounts_leaves_the_rest_to_the_next() {
    let mut csi = Csi::start("csi-unmounting");
    let used = csi.create("data", 640, mounted(Mode::SingleNodeWriter, "ext4"));
    csi.stage(&used).expect("it is staged");
    let (device, link) = (device_of(&used.staging), csi.links()[0]);
    // The dead one keeps its socket until its unmount ends.
    let mut next = Driver::new(&csi.cluster.scratch, "csi-next", "all", HOST);
    symlink(csi.file("state"), next.file("state")).expect("a link can be made");
    write_behind_a_stopped_link(&used, link);
    let first = csi.driver().pid();
    std::thread::scope(|scope| {
        scope.spawn(|| csi.unstage(&used));
        until_true("the unmount", 20, || !is_mounted(&used.staging));
        process::send(first, Signal::SIGKILL);
        next.start(&csi.cluster.nodes(), None);
        let next = &next;
        let unstaged = scope.spawn(|| unstage_patiently(next, &used));
        trickle(link, &device, 18);
        assert!(!unstaged.is_finished(), "there was more to write");
        process::send(link, Signal::SIGCONT);
        unstaged.join().expect("it is unstaged");
    });
    next.stage(&used).expect("it is staged again");
    assert_files(&used);
    next.finish(&used);
    csi.assert_nothing_left();
}

#[test]
fn a_volume_that_is_mounted_elsewhere_on_the_host_is_left_alone() {
    let csi = Csi::start("csi-elsewhere");
    let used = csi.create("data", 32, mounted(Mode::SingleNodeWriter, "ext4"));
    csi.stage(&used).expect("it is staged");
    let elsewhere = csi.file("elsewhere");
    fs::create_dir(&elsewhere).expect("a folder can be made");
    run("mount", &["--bind", &used.staging, &elsewhere]);
    let refused = csi.unstage(&used).expect_err("it is still used");
    assert_eq!(refused.code(), Code::Unavailable, "{refused:?}");
    assert!(refused.message().contains("mounted elsewhere"), "{refused:?}");
    // A check would find a file system that is in use, and a mount another one.
    assert_eq!(code(csi.stage(&used)), Code::Unavailable);
    let file = format!("{elsewhere}/file");
    run("dd", &["if=/dev/zero", &format!("of={file}"), "bs=1M", "count=1", "conv=fsync"]);
    run("umount", &[&elsewhere]);
    csi.unstage(&used).expect("it is unstaged");
    csi.finish(&used);
    csi.assert_nothing_left();
}

#[test]
fn a_path_with_links_in_it_is_the_path_that_they_lead_to() {
    let csi = Csi::start("csi-links");
    let real = csi.file("real");
    fs::create_dir_all(format!("{real}/data")).expect("a folder can be made");
    symlink(&real, csi.file("link")).expect("a link can be made");
    symlink("data", format!("{real}/last")).expect("a link can be made");
    let mut used = csi.create("data", 32, mounted(Mode::SingleNodeWriter, "ext4"));
    let names = ["link/data", "real/data", "link//last"];
    let at = |name: &str| csi.file(name);
    for (staged_as, again) in names.iter().flat_map(|name| names.map(|again| (name, again))) {
        used.staging = at(staged_as);
        csi.stage(&used).expect("it is staged");
        used.staging = at(again);
        csi.stage(&used).expect("it is staged already");
        let target = csi.publish(&used, "link/pod").expect("it is published");
        let text = format!("{staged_as} {again}");
        fs::write(format!("{target}/file"), &text).expect("it can be written");
        assert_eq!(code(csi.unstage(&used)), Code::FailedPrecondition, "it is in use");
        csi.unpublish(&used, "real/pod").expect("it is unpublished");
        let kept = fs::read_to_string(format!("{real}/data/file")).expect("it is mounted once");
        assert_eq!(kept, text);
        csi.unstage(&used).expect("it is unstaged");
        assert!(!is_mounted(&at("real/data")));
    }
    used.staging = at("link/data");
    csi.finish(&used);
    csi.assert_nothing_left();
}

/// A host that starts again has its records, and nothing else.
#[test]
fn a_record_of_what_a_restart_took_away_gives_way() {
    let csi = Csi::start("csi-restart");
    let mut used = csi.create("data", 32, mounted(Mode::SingleNodeWriter, "ext4"));
    csi.stage(&used).expect("it is staged");
    let record = format!("{}/volumes/{}.json", csi.file("state"), used.volume.volume_id);
    let kept = fs::read(&record).expect("there is a record");
    if let Some(AccessType::Mount(mount)) = &mut used.capability.access_type {
        mount.mount_flags = vec!["noatime".to_owned()];
    }
    assert_eq!(code(csi.stage(&used)), Code::AlreadyExists, "it is staged without the option");
    csi.unstage(&used).expect("it is unstaged");
    fs::write(&record, kept).expect("the record is as it was");
    csi.stage(&used).expect("nothing is left of the former use");
    let options = run("findmnt", &["-no", "OPTIONS", &used.staging]);
    assert!(options.contains("noatime"), "{options}");
    csi.finish(&used);
    csi.assert_nothing_left();
}
