//! Access modes with real mounts: who may read, who may write, and what readers see.

mod csi_driver;

use std::fs;
use std::io::ErrorKind;

use ballast_csi_shim::v1::volume_capability::AccessType;
use ballast_csi_shim::v1::volume_capability::access_mode::Mode;
use ballast_e2e::process::{self, run};
use csi_driver::{Csi, Driver, Used, block, code, is_mounted, mounted};
use tonic::Code;

/// Both file systems, and a size that they take, in MiB.
const FILE_SYSTEMS: [(&str, i64); 2] = [("ext4", 32), ("xfs", 320)];

/// A driver of another host: it is on the same machine, and shares nothing with the first.
#[track_caller]
fn second_host(csi: &Csi) -> Driver {
    let mut second = Driver::new(&csi.cluster.scratch, "second", "all", "node-2");
    second.start(&csi.cluster.nodes(), None);
    second
}

/// The volume, used in another way by a host.
#[track_caller]
fn used_by(driver: &Driver, used: &Used, mode: Mode) -> Used {
    let mut used = used.clone();
    if let Some(access) = &mut used.capability.access_mode {
        access.mode = mode as i32;
    }
    if let Some(AccessType::Mount(mount)) = &mut used.capability.access_type
        && mount.fs_type == "xfs"
    {
        // Two hosts on one kernel, which mounts no xfs twice without being told to.
        mount.mount_flags = vec!["nouuid".to_owned()];
    }
    used.staging = driver.file("staging");
    fs::create_dir_all(&used.staging).expect("a folder can be made");
    used.context = driver.attach(&used).expect("it is published");
    used
}

#[track_caller]
fn assert_reads(folder: &str, text: &str) {
    let kept = fs::read_to_string(format!("{folder}/file")).expect("the file is there");
    assert_eq!(kept, text);
    let refused = fs::write(format!("{folder}/more"), "").expect_err("it is for reading only");
    assert_eq!(refused.kind(), ErrorKind::ReadOnlyFilesystem);
}

#[test]
fn readers_of_several_hosts_see_what_was_written_and_write_nothing() {
    let csi = Csi::start("csi-readers");
    let second = second_host(&csi);
    let hosts: [&Driver; 2] = [&csi, &second];
    for (fs_type, mib) in FILE_SYSTEMS {
        let writer = csi.create(fs_type, mib, mounted(Mode::SingleNodeWriter, fs_type));
        csi.stage(&writer).expect("it is staged");
        fs::write(format!("{}/file", writer.staging), "of the writer").expect("it can be written");
        csi.unstage(&writer).expect("it is unstaged");
        csi.release(&writer).expect("the lease is given back");

        let readers = hosts.map(|host| used_by(host, &writer, Mode::MultiNodeReaderOnly));
        for (host, reader) in hosts.iter().zip(&readers) {
            for _ in 0..2 {
                host.stage(reader).expect("it is staged");
            }
            let target = host.publish(reader, "pod").expect("it is published");
            for folder in [&reader.staging, &target] {
                assert_reads(folder, "of the writer");
            }
            let device = run("findmnt", &["-no", "SOURCE", &reader.staging]);
            assert_eq!(run("blockdev", &["--getro", device.trim()]).trim(), "1");
        }
        for (host, reader) in hosts.iter().zip(&readers) {
            host.unpublish(reader, "pod").expect("it is unpublished");
            host.unstage(reader).expect("it is unstaged");
            host.release(reader).expect("the lease is given back");
        }

        let one = used_by(&csi, &writer, Mode::SingleNodeReaderOnly);
        csi.stage(&one).expect("it is staged");
        assert_reads(&one.staging, "of the writer");
        csi.unstage(&one).expect("it is unstaged");
        csi.release(&one).expect("the lease is given back");

        let mut again = writer.clone();
        again.context = csi.attach(&again).expect("it may be written again");
        csi.stage(&again).expect("it is staged");
        fs::write(format!("{}/more", again.staging), "").expect("it can be written");
        csi.finish(&again);
    }
    second.assert_nothing_left();
    csi.assert_nothing_left();
}

#[test]
fn a_raw_device_is_written_by_several_hosts_and_read_by_readers() {
    let csi = Csi::start("csi-writers");
    let second = second_host(&csi);
    let refused = csi.ask_for("files", 32, &mounted(Mode::MultiNodeMultiWriter, "ext4"));
    assert_eq!(code(refused), Code::InvalidArgument, "a file system has one host that writes");

    let volume = csi.create_volume("raw", 32, block(Mode::MultiNodeMultiWriter));
    let first = used_by(&csi, &volume, Mode::MultiNodeMultiWriter);
    let other = used_by(&second, &volume, Mode::MultiNodeMultiWriter);
    csi.stage(&first).expect("it is staged");
    second.stage(&other).expect("it is staged");
    let devices = [csi.publish(&first, "device"), second.publish(&other, "device")]
        .map(|device| device.expect("it is published"));
    let (from, there) = (csi.file("random"), csi.file("read"));
    run("dd", &["if=/dev/urandom", &format!("of={from}"), "bs=64k", "count=2", "status=none"]);
    for (at, (to, by)) in
        [(&devices[0], &devices[1]), (&devices[1], &devices[0])].iter().enumerate()
    {
        let place = |word: &str| format!("{word}={}", at * 2);
        let write =
            [&format!("if={from}"), &format!("of={to}"), "bs=64k", "oflag=direct", &place("seek")];
        run("dd", &write);
        let read = [
            &format!("if={by}"),
            &format!("of={there}"),
            "bs=64k",
            "count=2",
            "iflag=direct",
            &place("skip"),
        ];
        run("dd", &read);
        run("cmp", &[&from, &there]);
    }
    for (host, used) in [(&*csi, &first), (&second, &other)] {
        host.unpublish(used, "device").expect("it is unpublished");
        host.unstage(used).expect("it is unstaged");
        host.release(used).expect("the lease is given back");
    }

    let reader = used_by(&second, &volume, Mode::MultiNodeReaderOnly);
    second.stage(&reader).expect("it is staged");
    let device = second.publish(&reader, "device").expect("it is published");
    run("cmp", &["--bytes=131072", &from, &device]);
    let write = process::output("dd", &["if=/dev/zero", &format!("of={device}"), "count=1"]);
    assert!(!write.status.success(), "it is for reading only");
    second.unpublish(&reader, "device").expect("it is unpublished");
    second.finish(&reader);
    second.assert_nothing_left();
    csi.assert_nothing_left();
}

#[test]
fn readers_are_refused_what_would_lack_what_was_confirmed() {
    let csi = Csi::start("csi-journal");
    for (fs_type, mib) in FILE_SYSTEMS {
        let writer = csi.create(fs_type, mib, mounted(Mode::SingleNodeWriter, fs_type));
        csi.stage(&writer).expect("it is staged");
        let file = format!("{}/file", writer.staging);
        run(
            "bash",
            &["-c", &format!("printf confirmed >'{file}' && sync '{file}' '{}'", writer.staging)],
        );
        // The host dies: what it confirmed is in the journal.
        csi.links().into_iter().for_each(process::kill_and_wait);
        csi.unstage(&writer).expect("it is unstaged");
        csi.release(&writer).expect("the lease is given back");

        for mode in [Mode::MultiNodeReaderOnly, Mode::SingleNodeReaderOnly] {
            let reader = used_by(&csi, &writer, mode);
            let refused = csi.stage(&reader).expect_err("it would lack the file");
            assert_eq!(refused.code(), Code::FailedPrecondition, "{refused:?}");
            assert!(refused.message().contains("mount it once for writing"), "{refused:?}");
            assert!(!is_mounted(&reader.staging));
            csi.unstage(&reader).expect("it is unstaged");
            csi.release(&reader).expect("the lease is given back");
        }

        let writer = used_by(&csi, &writer, Mode::SingleNodeWriter);
        csi.stage(&writer).expect("it is staged");
        csi.unstage(&writer).expect("it is unstaged");
        csi.release(&writer).expect("the lease is given back");
        let reader = used_by(&csi, &writer, Mode::MultiNodeReaderOnly);
        csi.stage(&reader).expect("now it is whole");
        assert_reads(&reader.staging, "confirmed");
        csi.finish(&reader);
    }
    csi.assert_nothing_left();
}

#[test]
fn a_volume_that_was_never_written_to_is_not_said_to_have_been() {
    let csi = Csi::start("csi-blank");
    let used = csi.create("data", 32, mounted(Mode::SingleNodeReaderOnly, "ext4"));
    let refused = csi.stage(&used).expect_err("there is nothing to read");
    assert_eq!(refused.code(), Code::FailedPrecondition, "{refused:?}");
    assert!(refused.message().contains("nothing was ever written to it"), "{refused:?}");
    csi.finish(&used);
    csi.assert_nothing_left();
}
