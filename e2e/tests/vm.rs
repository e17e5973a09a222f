//! The CSI driver with a real kernel's NBD client: the node's service in a guest with Debian's kernel
//! (`ballast_e2e::vm`), three nodes and the controller on this host. And what else wants such a kernel.

mod csi_driver;
mod guest_driver;

use ballast_csi_shim::steps::{OF_KERNEL, Step};
use ballast_csi_shim::v1::volume_capability::access_mode::Mode;
use ballast_csi_shim::v1::volume_usage::Unit;
use ballast_e2e::process;
use ballast_e2e::vm::Guest;
use ballast_e2e::wait::until_true;
use csi_driver::{HOST, MIB, Used, block, bytes_of, code, mounted};
use guest_driver::{InGuest, Writer};
use nix::sys::signal::Signal;
use tonic::Code;

#[test]
fn a_file_system_is_staged_published_written_grown_and_unstaged() {
    for (fs_type, mib) in [("ext4", 64), ("xfs", 320)] {
        let host = InGuest::start(&format!("vm-{fs_type}"));
        let used = host.create("data", mib, mounted(Mode::SingleNodeMultiWriter, fs_type));
        for _ in 0..2 {
            host.stage(&used).expect("it is staged");
        }
        let target = host.publish(&used, "pod-1").expect("it is published");
        host.publish(&used, "pod-2").expect("a second pod of this host");
        assert_eq!(code(host.unstage(&used)), Code::FailedPrecondition, "it is in use");

        let before = host.stats(&used, &target);
        let connections = host.connections();
        let writer = Writer::start(&host, &target);
        for more in [32, 64] {
            assert_eq!(host.expand(&used, mib + more, &target), (mib + more) * MIB);
            assert_eq!(host.expand_here(&used, mib + more, &target), (mib + more) * MIB);
        }
        writer.goes_on();
        assert_eq!(host.connections(), connections, "the kernel takes a size alone");
        writer.stop(&format!("growing {fs_type}"));
        let after = host.stats(&used, &target);
        let grown = bytes_of(&after) - bytes_of(&before);
        assert!(grown > 50 * MIB, "{before:?} {after:?}");
        assert!(after.iter().any(|usage| usage.unit == Unit::Inodes as i32 && usage.total > 0));

        let sum = host.run(&format!("sha256sum <{target}/blocks"));
        for target in ["pod-1", "pod-2", "pod-2"] {
            host.unpublish(&used, target).expect("it is unpublished");
        }
        host.unstage(&used).expect("it is unstaged");
        host.stage(&used).expect("it is staged once more");
        assert_eq!(host.run(&format!("sha256sum <{}/blocks", used.staging)), sum);
        for _ in 0..2 {
            host.finish(&used);
        }
        host.end();
    }
}

#[test]
fn a_raw_device_is_written_and_grown() {
    let host = InGuest::start("vm-raw");
    let used = host.create("raw", 64, block(Mode::SingleNodeSingleWriter));
    host.stage(&used).expect("it is staged");
    let device = host.publish(&used, "device").expect("it is published");
    assert_eq!(code(host.publish(&used, "device-2")), Code::FailedPrecondition);
    let size = || host.run(&format!("blockdev --getsize64 {device}")).trim().to_owned();
    assert_eq!(size(), (64 * MIB).to_string());
    host.run(&format!("dd if=/dev/urandom of={device} bs=1M count=4 conv=notrunc,fsync"));
    let read = format!("echo 3 >/proc/sys/vm/drop_caches\nhead -c 4194304 {device} | sha256sum");
    let sum = host.run(&read);
    let first = host.connections();
    assert_eq!(host.expand(&used, 96, &device), 96 * MIB);
    assert_eq!(size(), (96 * MIB).to_string());
    assert_eq!(host.connections(), first);
    // As an earlier version left it: then only a new connection tells what its server takes.
    host.run(&format!("sed -i 3d {}/attach/{}", host.file("state"), used.volume.volume_id));
    assert_eq!(host.expand(&used, 128, &device), 128 * MIB);
    assert_eq!(size(), (128 * MIB).to_string());
    assert!(!host.connections().iter().any(|it| first.contains(it)), "all are new");
    host.run(&format!("dd if=/dev/urandom of={device} bs=1M seek=127 count=1 conv=fsync,notrunc"));
    assert_eq!(host.run(&read), sum);
    host.unpublish(&used, "device").expect("it is unpublished");
    host.finish(&used);
    host.end();
}

/// As many as the guest has processors, or fewer if that is more than `--nbd-connections`.
const CONNECTIONS: usize = 4;

/// A mounted file system with a writer in it.
#[track_caller]
fn mounted_in_guest(host: &InGuest) -> Used {
    let used = host.create("data", 64, mounted(Mode::SingleNodeWriter, "ext4"));
    host.stage(&used).expect("it is staged");
    host.publish(&used, "pod").expect("it is published");
    used
}

#[track_caller]
fn take_down(host: InGuest, used: &Used) {
    host.unpublish(used, "pod").expect("it is unpublished");
    host.finish(used);
    host.end();
}

/// Of several devices at once, which the watcher repairs together.
#[test]
fn the_loss_of_the_serving_node_is_a_stall_and_no_error() {
    let mut host = InGuest::start("vm-loss");
    let names = ["data", "more", "most"];
    let all = names.map(|name| host.create(name, 64, mounted(Mode::SingleNodeWriter, "ext4")));
    for signal in [Signal::SIGKILL, Signal::SIGTERM] {
        // Anew, at the first of the nodes: a repair goes to whichever opens the export in time.
        for (used, name) in all.iter().zip(names) {
            host.stage(used).expect("it is staged");
            host.publish(used, name).expect("it is published");
        }
        loses_its_node(&mut host, &names, signal);
        for (used, name) in all.iter().zip(names) {
            host.unpublish(used, name).expect("it is unpublished");
            host.unstage(used).expect("it is unstaged");
        }
    }
    all.iter().for_each(|used| host.finish(used));
    host.end();
}

/// The node that serves these volumes, published by their names, ends by a signal, under a writer in
/// each, and comes back.
#[track_caller]
fn loses_its_node(host: &mut InGuest, names: &[&str], signal: Signal) {
    let start = |name: &&str| Writer::start(host, &host.file(name));
    let writers: Vec<Writer<'_>> = names.iter().map(start).collect();
    let lost = host.serving();
    assert_eq!(host.served_by(), [lost], "one node serves all");
    let pid = host.cluster.node(lost).pid;
    host.cluster.signal(lost, signal);
    until_true("the node's end", 30, || !process::is_alive(pid));
    writers.iter().for_each(Writer::goes_on);
    assert!(!host.served_by().contains(&lost));
    for (writer, name) in writers.iter().zip(names) {
        writer.stop(&format!("{signal} of the serving node: {name}"));
    }
    host.cluster.restart(lost);
    names.iter().for_each(|name| host.cluster.wait_in_sync(name));
}

/// Where only the kernel's client comes by, and around it: what is attached and kept must agree.
#[test]
fn a_driver_killed_at_the_kernels_steps_goes_on_where_it_was() {
    let mut host = InGuest::start("vm-steps");
    let rounds = [
        [Step::ConnectionKept, Step::SizeTold, Step::Unmounted],
        [Step::KernelConnected, Step::DeviceGrown, Step::KernelDisconnected],
        [Step::Attached, Step::GrowthStarted, Step::Detached],
    ];
    assert!(OF_KERNEL.iter().all(|step| rounds.as_flattened().contains(step)));
    for [staging, growing, unstaging] in rounds {
        let used = host.create("data", 64, mounted(Mode::SingleNodeWriter, "ext4"));
        let refused = "the driver was killed in it";
        host.killed_at(staging, |csi| drop(csi.stage(&used).expect_err(refused)));
        host.stage(&used).expect("it is staged");
        let target = host.publish(&used, "data").expect("it is published");
        if staging == Step::KernelConnected {
            // Who repairs it knows what the one knew that connected it.
            loses_its_node(&mut host, &["data"], Signal::SIGKILL);
        }
        host.run(&format!("dd if=/dev/urandom of={target}/kept bs=1M count=4 conv=fsync"));
        let read = format!("echo 3 >/proc/sys/vm/drop_caches\nsha256sum <{target}/kept");
        let sum = host.run(&read);
        host.expand_volume(&used, 96);
        host.killed_at(growing, |csi| drop(csi.try_expand_here(&used, 96, &target)));
        let before = bytes_of(&host.stats(&used, &target));
        assert_eq!(host.expand_here(&used, 96, &target), 96 * MIB);
        assert!(bytes_of(&host.stats(&used, &target)) >= before.max(80 * MIB));
        assert_eq!(host.run(&read), sum);
        host.unpublish(&used, "data").expect("it is unpublished");
        host.killed_at(unstaging, |csi| drop(csi.unstage(&used).expect_err(refused)));
        host.finish(&used);
    }
    host.end();
}

#[test]
fn the_loss_of_one_connection_of_several_is_a_stall_and_no_error() {
    let host = InGuest::start("vm-lanes");
    let used = mounted_in_guest(&host);
    assert_eq!(host.connections().len(), CONNECTIONS, "{:?}", host.connections());
    let writer = Writer::start(&host, &host.file("pod"));
    for _ in 0..2 {
        let before = host.connections();
        let (lost, _) = &before[before.len() / 2];
        host.run(&format!("ss --kill --tcp src {lost}"));
        // A request of one that is lost must not be asked again on another of the same session.
        until_true("a new connection in the place of all", 60, || {
            let now = host.connections();
            !now.is_empty() && !now.iter().any(|connection| before.contains(connection))
        });
        writer.goes_on();
    }
    writer.stop("loss of one connection of several");
    take_down(host, &used);
}

#[test]
fn a_driver_killed_while_its_node_is_lost_finds_the_device_again() {
    let mut host = InGuest::start("vm-driver");
    let used = mounted_in_guest(&host);
    let writer = Writer::start(&host, &host.file("pod"));
    let lost = host.serving();
    host.kill_node();
    process::kill_and_wait(host.cluster.node(lost).pid);
    until_true("the loss of the connection", 60, || host.served_by().is_empty());
    host.start_node();
    writer.goes_on();
    writer.stop("kill -9 of driver and serving node");
    host.cluster.restart(lost);
    take_down(host, &used);
}

#[test]
fn writes_under_a_lease_that_was_taken_away_fail_soon() {
    let host = InGuest::start("vm-lease");
    let used = mounted_in_guest(&host);
    let writer = Writer::start(&host, &host.file("pod"));
    let moved = ["lease", "acquire", "data", "--host", "host-2", "--force", "--yes"];
    let start = std::time::Instant::now();
    host.cluster.ballastctl(2, &[&moved[..], &["--reason", "host-1 is cut off"]].concat());
    until_true("an error for the writer", 30, || {
        writer.log().last().is_some_and(|line| line == "failed")
    });
    println!(
        "the writer's error came {:.1} s after the lease moved",
        start.elapsed().as_secs_f64()
    );
    host.unpublish(&used, "pod").expect("it is unpublished");
    host.unstage(&used).expect("it is unstaged");
    host.cluster.ballastctl(1, &["lease", "release", "data", "--host", "host-2"]);
    host.delete(&used).expect("it is deleted");
    host.end();
}

/// A repair that waits for a silent server must not go on, under a lease that is over by then, with what
/// has the number next.
#[test]
fn a_repair_under_way_ends_with_its_device() {
    let host = InGuest::start("vm-repair");
    let used = host.create("data", 16, block(Mode::SingleNodeSingleWriter));
    host.stage(&used).expect("it is staged");
    let silent = host.serving();
    let begun = || host.console().matches("looking for a server").count();
    let ended = || {
        let ends = ["connected again", "not connected", "given up: every request"];
        ends.iter().map(|it| host.console().matches(it).count()).sum::<usize>()
    };
    let (begun_before, ended_before) = (begun(), ended());
    host.cluster.signal(silent, Signal::SIGSTOP);
    for (near, _) in host.connections() {
        host.run(&format!("ss --kill --tcp src {near}"));
    }
    until_true("a repair", 30, || begun() > begun_before);
    host.unstage(&used).expect("it is unstaged");
    host.release(&used).expect("its lease is given back");
    host.cluster.signal(silent, Signal::SIGCONT);
    until_true("the repair's end", 60, || ended() > ended_before);

    let next = host.create("next", 16, block(Mode::SingleNodeSingleWriter));
    host.stage(&next).expect("it is staged");
    let pod = host.publish(&next, "pod").expect("it is published");
    assert_eq!(host.run("ls -d /sys/block/nbd*/pid").trim(), "/sys/block/nbd0/pid");
    let kept = host.run(&format!("ls {}/attach", host.file("state")));
    assert_eq!(kept.trim(), next.volume.volume_id);
    host.run(&format!("dd if=/dev/zero of={pod} bs=1M count=1 conv=fsync,notrunc"));
    host.unpublish(&next, "pod").expect("it is unpublished");
    host.finish(&next);
    host.delete(&used).expect("it is deleted");
    host.end();
}

/// A pod that has a raw device still, and opens it now and then, sees errors and no other volume, whose
/// device the kernel would give the same number.
#[test]
fn a_device_that_was_given_up_is_nobody_elses() {
    let host = InGuest::start("vm-given-up");
    let publish = |name: &str| {
        let used = host.create(name, 16, block(Mode::SingleNodeSingleWriter));
        host.stage(&used).expect("it is staged");
        let pod = host.publish(&used, &format!("{name}.pod")).expect("it is published");
        host.run(&format!(
            "printf '%-4096s' {name} | dd of={pod} bs=4k count=1 iflag=fullblock conv=fsync,notrunc"
        ));
        (used, pod)
    };
    let holds = |pod: &str, name: &str| {
        let read =
            format!("echo 3 >/proc/sys/vm/drop_caches\nhead -c 20 {pod} 2>/dev/null || true");
        host.run(&read).contains(name)
    };
    let number = |pod: &str| host.run(&format!("stat -c %t:%T {pod}"));
    let (lost, pod) = publish("lost");
    assert!(holds(&pod, "lost"));
    let moved = ["lease", "acquire", "lost", "--host", "host-2", "--force", "--yes"];
    host.cluster.ballastctl(2, &[&moved[..], &["--reason", "host-1 is cut off"]].concat());
    until_true("an end of the device", 30, || !holds(&pod, "lost"));
    let its_own = number(&pod);
    let mut others = Vec::new();
    for name in ["second", "third"] {
        let (used, other) = publish(name);
        assert_ne!(number(&other), its_own);
        assert!(holds(&other, name) && !holds(&pod, name));
        others.push(used);
        if name == "second" {
            // The next life has to know.
            host.kill_node();
            host.start_node();
        }
    }
    for (used, name) in others.iter().zip(["second", "third"]) {
        host.unpublish(used, &format!("{name}.pod")).expect("it is unpublished");
        host.finish(used);
    }
    host.unpublish(&lost, "lost.pod").expect("it is unpublished");
    host.unstage(&lost).expect("it is unstaged");
    host.cluster.ballastctl(1, &["lease", "release", "lost", "--host", "host-2"]);
    host.delete(&lost).expect("it is deleted");
    let (used, pod) = publish("last");
    assert_eq!(number(&pod), its_own, "nobody has it any more");
    host.unpublish(&used, "last.pod").expect("it is unpublished");
    host.finish(&used);
    host.end();
}

/// Its lease is released and it is deleted while the host's driver is not there to hear of either.
#[test]
fn writes_to_a_volume_that_was_deleted_fail_soon() {
    let host = InGuest::start("vm-deleted");
    let used = mounted_in_guest(&host);
    let writer = Writer::start(&host, &host.file("pod"));
    host.kill_node();
    host.cluster.ballastctl(1, &["lease", "release", "data", "--host", HOST]);
    host.cluster.ballastctl(1, &["volume", "delete", "data", "--yes"]);
    until_true("the loss of the connections", 60, || host.served_by().is_empty());
    assert_ne!(writer.log().last().expect("it has written"), "failed", "it waits");
    let start = std::time::Instant::now();
    host.start_node();
    until_true("an error for the writer", 60, || {
        writer.log().last().is_some_and(|line| line == "failed")
    });
    let took = start.elapsed().as_secs_f64();
    println!("the writer's error came {took:.1} s after the driver");
    // What the driver says goes through a pipe and the guest's serial line.
    until_true("the driver's word why", 60, || {
        host.console().contains("the cluster says that the volume is deleted")
    });
    host.unpublish(&used, "pod").expect("it is unpublished");
    host.unstage(&used).expect("it is unstaged");
    host.end();
}

/// `PF_MEMALLOC_NOIO` and `PF_LOCAL_THROTTLE` of the kernel: what an I/O flusher has.
const FLUSHER: u64 = 0x0008_0000 | 0x0010_0000;

/// As `daemon/tests/reclaim.rs`, with all rights.
#[test]
fn a_storage_node_is_locked_in_memory_and_an_io_flusher() {
    let guest = Guest::take();
    guest.run(
        "mkdir -p /var/lib/node
        cd /var/lib/node
        cat >node.toml <<-'END'
            cluster = \"0f2b5c3e-7a4d-4c1b-9e56-000000000007\"
            node = 1
            pool = \"pool\"
            [listen]
            peer = \"127.0.0.1:0\"
            [[nodes]]
            id = 1
            name = \"only\"
            peer = \"127.0.0.1:9\"
END
        ballastd format --config node.toml --create 256MiB
        ballastd run --config node.toml >log 2>&1 &
        echo $! >pid",
    );
    until_true("the node in the guest", 60, || {
        let log =
            guest.run("cd /var/lib/node; kill -0 $(cat pid) || cat log >/dev/console; cat log");
        log.contains("node serves")
    });
    let field = |name: &str| {
        let line = guest.run(&format!("grep {name}: /proc/$(cat /var/lib/node/pid)/status"));
        line.split_whitespace().nth(1).and_then(|kib| kib.parse::<u64>().ok()).expect("in KiB")
    };
    assert!(field("VmLck") >= field("VmRSS"), "{} of {} KiB", field("VmLck"), field("VmRSS"));
    // Ninth, and the name, which is second, may hold blanks.
    let flags = "sed 's/.*) //' /proc/$(cat /var/lib/node/pid)/task/*/stat | cut -d ' ' -f 7";
    let flags: Vec<u64> = guest.run(flags).lines().flat_map(str::parse).collect();
    assert!(flags.len() > 1, "a shard has a thread of its own: {flags:?}");
    assert!(flags.iter().all(|flags| flags & FLUSHER == FLUSHER), "not all threads: {flags:x?}");
    let log = guest.run("cat /var/lib/node/log");
    assert!(!log.contains("WARN"), "{log}");
    guest.run("kill -9 $(cat /var/lib/node/pid); rm -rf /var/lib/node");
}
