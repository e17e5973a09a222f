//! Leases as an administrator and the CSI driver use them, on real processes.

use std::io::Write;
use std::process::Output;

use ballast_api::v1 as api;
use ballast_api::v1::VolumeContent;
use ballast_e2e::cluster::{Cluster, Options};
use ballast_e2e::nbd::Connection;
use ballast_e2e::process::{Running, output, run};
use ballast_e2e::scratch;
use ballast_e2e::wait::{until_true, within};
use serde_json::Value;

fn small(test: &str) -> Cluster {
    Cluster::with(test, &Options { volume_mib: 64, ..Options::default() })
}

fn ctl(cluster: &Cluster, arguments: &[&str]) -> Output {
    let program = scratch::program("ballastctl").display().to_string();
    output(&program, &[&["--endpoint", &cluster.node(1).grpc], arguments].concat())
}

#[track_caller]
fn assert_refused(cluster: &Cluster, arguments: &[&str], code: i32, says: &str) {
    let refused = ctl(cluster, arguments);
    let text = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert_eq!(refused.status.code(), Some(code), "{arguments:?}: {text}");
    assert!(text.contains(says), "{arguments:?} does not say {says:?}: {text}");
}

/// Acquires by `ballastctl` and returns the epoch and the export.
#[track_caller]
fn acquire(cluster: &Cluster, node: u32, more: &[&str]) -> (u64, String) {
    let words = [&["lease", "acquire", "demo", "-o", "json"], more].concat();
    let json: Value = serde_json::from_str(&cluster.ballastctl(node, &words)).expect("JSON");
    let epoch = json["lease"]["epoch"].as_u64().expect("an epoch");
    (epoch, json["export"].as_str().expect("an export").to_owned())
}

/// Where a node serves that export.
fn uri(cluster: &Cluster, node: u32, export: &str) -> String {
    format!("{}/{export}", cluster.node(node).nbd.trim_end_matches('/'))
}

/// Waits until a node has heard of a host's lease: another one may have granted it.
#[track_caller]
fn wait_heard(cluster: &Cluster, node: u32, host: &str) {
    until_true(&format!("the lease of {host} on node {node}"), 20, || {
        cluster.ballastctl(node, &["lease", "list", "--volume", "demo"]).contains(host)
    });
}

fn qemu_io(uri: &str, command: &str) -> Output {
    output("qemu-io", &["-f", "raw", "-c", command, uri])
}

/// A client that stays connected and does what it is told.
struct Writer {
    process: Running,
    answers: String,
}

impl Writer {
    fn start(cluster: &Cluster, uri: &str) -> Writer {
        let answers = uri.replace(|c: char| !c.is_ascii_alphanumeric(), "-") + ".txt";
        let answers = cluster.scratch.file(&answers);
        let command = format!("exec stdbuf -oL qemu-io -f raw '{uri}' >'{answers}' 2>&1");
        let log = cluster.scratch.path().join("writer.log");
        Writer { process: Running::start(&log, &["bash", "-c", &command], true), answers }
    }

    #[track_caller]
    fn tell(&mut self, command: &str, says: &str) {
        let before = std::fs::read_to_string(&self.answers).unwrap_or_default().len();
        let input = self.process.child().stdin.as_mut().expect("it is piped");
        writeln!(input, "{command}").expect("the client runs");
        until_true(&format!("{says:?} after {command:?}"), 20, || {
            let all = std::fs::read_to_string(&self.answers).unwrap_or_default();
            all.get(before..).is_some_and(|new| new.contains(says))
        });
    }
}

/// A development cluster lets in whoever connects. That is no lease, and is shown all the same.
#[test]
fn a_client_without_a_lease_is_shown_with_the_volume() {
    let cluster = small("leases-none");
    // What node 3 tells is what the leader said last, and the hosts of leases that it has heard of.
    let writers = |expected: Value| {
        let mut last = Value::Null;
        let seen = within(20, || {
            let shown = cluster.ballastctl(3, &["volume", "show", "demo", "-o", "json"]);
            let shown: Value = serde_json::from_str(&shown).expect("JSON");
            last = shown["writers"].clone();
            (last == expected).then_some(())
        });
        assert!(seen.is_some(), "writers are {last}, not {expected}");
    };
    writers(serde_json::json!([]));
    let mut client = Writer::start(&cluster, &uri(&cluster, 2, "demo"));
    client.tell("write -P 0x11 0 4k", "wrote 4096/4096");
    let _reader = Connection::open(&uri(&cluster, 1, "demo@ro")).expect("it may read");
    let unleased = serde_json::json!([{ "node": 2, "epoch": null, "host": null }]);
    // Readers are in no list.
    writers(unleased);
    let list = cluster.ballastctl(1, &["lease", "list"]);
    assert_eq!(list.lines().count(), 1, "a header and no lease: {list}");

    // A lease puts it out.
    let (epoch, export) = acquire(&cluster, 1, &["--host", "host-1"]);
    client.tell("write -P 0x33 0 4k", "failed");
    writers(serde_json::json!([]));
    let mut holder = Writer::start(&cluster, &uri(&cluster, 1, &export));
    holder.tell("read -P 0x11 0 4k", "read 4096/4096");
    let leased = serde_json::json!([{ "node": 1, "epoch": epoch, "host": "host-1" }]);
    writers(leased);
    drop(holder);
    writers(serde_json::json!([]));
}

#[test]
fn a_lease_is_granted_kept_taken_by_force_and_released() {
    let cluster = small("leases");
    let (epoch, export) = acquire(&cluster, 1, &["--host", "host-1"]);
    assert_eq!(export, format!("demo@lease={epoch}"));
    let again = acquire(&cluster, 2, &["--host", "host-1"]);
    assert_eq!(again.0, epoch, "the same again, elsewhere");
    let other = ["lease", "acquire", "demo", "--host", "host-2"];
    assert_refused(&cluster, &other, 1, "leased to host \"host-1\" (single-node-writer)");
    let differs = ["volume", "attach", "demo", "--host", "host-1", "--mode", "readers"];
    assert_refused(&cluster, &differs, 1, "release it first");
    wait_heard(&cluster, 3, "host-1");

    assert!(!qemu_io(&uri(&cluster, 1, "demo"), "write 0 4k").status.success(), "no lease named");
    let mut holder = Writer::start(&cluster, &uri(&cluster, 1, &export));
    holder.tell("write -P 0x11 0 1M", "wrote 1048576/1048576");

    let force = [&other[..], &["--force"]].concat();
    assert_refused(&cluster, &force, 2, "--reason");
    let unreasoned = [&force[..], &["--yes", "--reason", ""]].concat();
    assert_refused(&cluster, &unreasoned, 1, "give a reason");
    let unconfirmed = [&force[..], &["--reason", "host-1 is cut off"]].concat();
    assert_refused(&cluster, &unconfirmed, 2, "give --yes");
    let by_force = ["--host", "host-2", "--force", "--yes", "--reason", "host-1 is cut off"];
    let (newer, new_export) = acquire(&cluster, 3, &by_force);
    assert!(newer > epoch, "{newer} after {epoch}");

    // Whatever the old one does from here on is refused, and the new one works at once.
    holder.tell("write -P 0x33 0 1M", "failed");
    run("qemu-io", &["-f", "raw", "-c", "write -P 0x22 4k 4k", &uri(&cluster, 2, &new_export)]);
    assert!(!qemu_io(&uri(&cluster, 1, &export), "write 0 4k").status.success(), "connects again");
    let new_uri = uri(&cluster, 1, &new_export);
    for look in ["read -P 0x11 0 4k", "read -P 0x22 4k 4k", "read -P 0x11 8k 1016k"] {
        run("qemu-io", &["-f", "raw", "-c", look, &new_uri]);
    }

    assert_refused(&cluster, &["volume", "delete", "demo", "--yes"], 1, "a volume in use");
    // Whether there was one to release is said by what the node that is asked has heard.
    wait_heard(&cluster, 2, "host-2");
    let late = cluster.ballastctl(1, &["lease", "release", "demo", "--host", "host-1"]);
    assert_eq!(late, "not there: nothing to release\n");
    let released = cluster.ballastctl(2, &["volume", "detach", "demo", "--host", "host-2"]);
    assert_eq!(released, "released\n");
    assert!(!qemu_io(&uri(&cluster, 2, &new_export), "write 0 4k").status.success(), "it ended");
    until_true("no lease on node 1", 10, || {
        let list = cluster.ballastctl(1, &["lease", "list", "-o", "json"]);
        let list: Value = serde_json::from_str(&list).expect("JSON");
        list["leases"].as_array().is_some_and(Vec::is_empty)
    });
    cluster.ballastctl(1, &["volume", "delete", "demo", "--yes"]);
}

/// A host that comes back names a volume and an epoch, and both may be long gone.
#[test]
fn an_export_of_a_deleted_volume_never_opens_its_successor() {
    let cluster = small("leases-reborn");
    let (_, old_export) = acquire(&cluster, 1, &["--host", "host-1"]);
    run("qemu-io", &["-f", "raw", "-c", "write -P 0x41 0 64k", &uri(&cluster, 1, &old_export)]);
    cluster.ballastctl(2, &["volume", "detach", "demo", "--host", "host-1"]);
    cluster.ballastctl(2, &["volume", "delete", "demo", "--yes"]);
    cluster.ballastctl(2, &["volume", "create", "demo", "--size", "64MiB", "--wait"]);
    let (_, export) = acquire(&cluster, 2, &["--host", "host-2"]);
    let new_uri = uri(&cluster, 2, &export);
    run("qemu-io", &["-f", "raw", "-c", "write -P 0x42 0 64k", &new_uri]);
    for node in 1..=3 {
        let late = qemu_io(&uri(&cluster, node, &old_export), "write -P 0x41 0 4k");
        let told = String::from_utf8_lossy(&late.stderr).into_owned();
        assert!(!late.status.success() && told.contains("lease"), "{told}");
    }
    run("qemu-io", &["-f", "raw", "-c", "read -P 0x42 0 64k", &new_uri]);
}

#[track_caller]
fn content(
    cluster: &Cluster,
    volume: &str,
    content: VolumeContent,
    fs_type: &str,
) -> (bool, VolumeContent, bool) {
    content_under(cluster, volume, content, fs_type, 0).expect("it answers")
}

/// What a caller knew is named in its requests: one that is carried out after its caller gave it up must
/// not undo what came later.
#[test]
fn a_late_request_is_refused_by_what_its_caller_saw() {
    let cluster = small("leases-late");
    let seen = || {
        let request = || api::GetVolumeRequest { volume: "demo".into(), fresh: true };
        let answer = cluster.ask(2, async |admin| admin.get_volume(request()).await);
        let volume = answer.expect("node 2 runs").expect("it is there").into_inner().volume;
        volume.expect("a volume").lease_revision
    };
    let acquire_late = |host: &str, seen_lease_revision| {
        let request = || api::AcquireLeaseRequest {
            volume: "demo".into(),
            host: host.into(),
            mode: api::LeaseMode::SingleNodeWriter.into(),
            force: true,
            reason: "its host was cut off".into(),
            seen_lease_revision,
            ..Default::default()
        };
        let answer = cluster.ask(3, async |admin| admin.acquire_lease(request()).await);
        answer.expect("node 3 runs").map(drop).map_err(|refused| refused.code())
    };
    let release_late = |host: &str, seen_lease_revision| {
        let (volume, host) = ("demo".to_owned(), host.to_owned());
        let request = api::ReleaseLeaseRequest { volume, host, epoch: 0, seen_lease_revision };
        let answer = cluster.ask(3, async |admin| admin.release_lease(request.clone()).await);
        let answer = answer.expect("node 3 runs").map_err(|refused| refused.code());
        answer.map(|answer| answer.into_inner().released)
    };
    let before = seen();
    assert_eq!(acquire_late("host-1", before), Ok(()));
    let held_by_first = seen();
    acquire(&cluster, 1, &["--host", "host-2", "--force", "--yes", "--reason", "it is dead"]);
    let aborted = tonic::Code::Aborted;
    assert_eq!(acquire_late("host-1", held_by_first), Err(aborted));
    assert_eq!(release_late("host-2", held_by_first), Err(aborted));
    assert_eq!(acquire_late("host-3", before), Err(aborted));
    let leases = cluster.ballastctl(1, &["lease", "list"]);
    assert!(leases.contains("host-2") && !leases.contains("host-1"), "{leases}");

    let held_by_second = seen();
    assert_eq!(release_late("host-2", held_by_second), Ok(true));
    // The release itself is such a step: what was asked before it is late now.
    assert_eq!(acquire_late("host-2", held_by_second), Err(aborted));
    assert_eq!(acquire_late("host-2", seen()), Ok(()));
}

fn content_under(
    cluster: &Cluster,
    volume: &str,
    content: VolumeContent,
    fs_type: &str,
    epoch: u64,
) -> Result<(bool, VolumeContent, bool), tonic::Status> {
    let request = || api::SetVolumeContentRequest {
        volume: volume.into(),
        content: content.into(),
        fs_type: fs_type.into(),
        epoch,
    };
    let answer = cluster.ask(2, async |admin| admin.set_volume_content(request()).await);
    let answer = answer.expect("node 2 runs")?.into_inner();
    Ok((answer.refused, answer.content(), answer.ever_written))
}

/// never-format-data, when two hosts format in turn.
#[test]
fn a_host_without_its_lease_can_not_say_what_a_volume_holds() {
    use VolumeContent::*;
    let cluster = small("content-fenced");
    let say = |content, epoch| {
        content_under(&cluster, "demo", content, "ext4", epoch).map_err(|refused| refused.code())
    };
    assert_eq!(say(Formatting, 1), Err(tonic::Code::FailedPrecondition), "nobody has a lease");
    let (first, _) = acquire(&cluster, 1, &["--host", "host-1"]);
    assert_eq!(say(Formatting, first), Ok((false, Formatting, false)));
    let by_force = ["--host", "host-2", "--force", "--yes", "--reason", "host-1 is cut off"];
    let (second, _) = acquire(&cluster, 3, &by_force);
    assert_eq!(say(Formatting, second), Ok((false, Formatting, false)));
    assert_eq!(say(Filesystem, first), Err(tonic::Code::FailedPrecondition), "it comes late");
    assert_eq!(say(Unspecified, 0), Ok((false, Formatting, false)));
    assert_eq!(say(Filesystem, second), Ok((false, Filesystem, false)));
}

/// never-format-data: only what its own formatter wrote is formatted again.
#[test]
fn what_another_host_wrote_to_a_volume_that_was_being_formatted_is_kept() {
    use VolumeContent::*;
    let cluster = small("content-foreign");
    let say = |content, epoch| {
        content_under(&cluster, "demo", content, "ext4", epoch).map_err(|refused| refused.code())
    };
    let write = |export: &str| {
        run("qemu-io", &["-f", "raw", "-c", "write -P 0x77 0 1M", &uri(&cluster, 1, export)]);
    };
    let detach = |host| cluster.ballastctl(2, &["volume", "detach", "demo", "--host", host]);
    let (first, export) = acquire(&cluster, 1, &["--host", "host-1"]);
    assert_eq!(say(Formatting, first), Ok((false, Formatting, false)));
    write(&export);
    detach("host-1");
    let (second, export) = acquire(&cluster, 1, &["--host", "host-2"]);
    assert_eq!(say(Filesystem, second), Ok((true, Formatting, true)), "it made none");
    assert_eq!(say(Formatting, second), Ok((false, Formatting, true)), "the first one gave up");
    write(&export);
    detach("host-2");
    let (_, export) = acquire(&cluster, 1, &["--host", "admin"]);
    write(&export);
    detach("admin");
    let (fourth, _) = acquire(&cluster, 1, &["--host", "host-1"]);
    assert_eq!(say(Formatting, fourth), Ok((true, Raw, true)), "it holds data");
}

/// Several hosts force the lease over at the same moment, through these nodes. Returns what each was
/// told: its epoch, or that its lease was taken away again.
#[track_caller]
fn force_at_once(cluster: &Cluster, round: u32, nodes: &[u32]) -> Vec<(String, Option<u64>)> {
    let force = |number: usize, node: u32| {
        let host = format!("host-{round}-{number}");
        let program = scratch::program("ballastctl").display().to_string();
        let endpoint = cluster.node(node).grpc;
        let words = ["--endpoint", &endpoint, "-o", "json", "lease", "acquire", "demo"];
        let more = ["--host", &host, "--force", "--yes", "--reason", "a race"];
        let ended = output(&program, &[&words[..], &more[..]].concat());
        let says = String::from_utf8_lossy(&ended.stderr).into_owned();
        assert!(ended.status.success() || says.contains("taken away"), "{says}");
        let json = serde_json::from_slice::<Value>(&ended.stdout).ok();
        (host, json.filter(|_| ended.status.success()).and_then(|it| it["lease"]["epoch"].as_u64()))
    };
    std::thread::scope(|scope| {
        let force = &force;
        let racing = nodes.iter().enumerate();
        let racing: Vec<_> =
            racing.map(|(at, node)| scope.spawn(move || force(at, *node))).collect();
        racing.into_iter().map(|it| it.join().expect("no thread panics")).collect()
    })
}

/// Who was let in last was told so, and nobody else can use what he was told. That a loser is not
/// told at all that he has it is held by the simulator's script of the same name.
#[test]
fn of_several_that_force_a_lease_at_once_the_last_one_has_it() {
    let cluster = small("leases-raced");
    let pairs = [[1, 2], [2, 1], [3, 3], [2, 3]];
    let mut rounds: Vec<Vec<u32>> = pairs.iter().cycle().take(16).map(|it| it.to_vec()).collect();
    rounds.extend([vec![1, 2, 3, 1, 2, 3], vec![1; 6]]);
    let mut lost = 0;
    for (round, nodes) in (0..).zip(&rounds) {
        let mut told = force_at_once(&cluster, round, nodes);
        lost += told.iter().filter(|(_, epoch)| epoch.is_none()).count();
        // Asked of the cluster group: a list is what one node has heard.
        let late = ctl(&cluster, &["lease", "acquire", "demo", "--host", "late"]);
        let refusal = String::from_utf8_lossy(&late.stderr).into_owned();
        told.sort_by_key(|(_, epoch)| *epoch);
        let (holder, epoch) = told.pop().expect("several asked");
        assert!(epoch.is_some() && refusal.contains(&format!("{holder:?}")), "{refusal} {told:?}");
        let opens = |epoch: u64| {
            let at = uri(&cluster, round % 3 + 1, &format!("demo@lease={epoch}"));
            qemu_io(&at, "write 0 4k").status.success()
        };
        assert!(epoch.is_some_and(opens), "round {round}: the holder can't write");
        for (host, epoch) in told {
            assert!(!epoch.is_some_and(opens), "round {round}: {host} writes under {epoch:?}");
        }
    }
    println!("{} rounds, {lost} heard that theirs was taken away", rounds.len());
}

#[test]
fn never_format_data_goes_by_the_volumes_own_record() {
    use VolumeContent::*;
    let cluster = small("content");
    let fresh = content(&cluster, "demo", Unspecified, "");
    assert_eq!(fresh, (false, Blank, false));
    assert_eq!(content(&cluster, "demo", Filesystem, "ext4"), (true, Blank, false));
    assert_eq!(content(&cluster, "demo", Formatting, "ext4"), (false, Formatting, false));
    let written = ["-f", "raw", "-c", "write 0 64k", &cluster.uri(1)];
    run("qemu-io", &written);
    let again = content(&cluster, "demo", Formatting, "ext4");
    assert_eq!(again, (true, Formatting, true), "nobody knows who wrote that");
    assert_eq!(content(&cluster, "demo", Filesystem, "ext4"), (false, Filesystem, true));
    assert_eq!(content(&cluster, "demo", Formatting, "ext4"), (true, Filesystem, true));
    assert_eq!(content(&cluster, "demo", Raw, ""), (true, Filesystem, true));

    // Written without a record: nobody knows what it is, so nobody formats it.
    cluster.ballastctl(1, &["volume", "create", "old", "--size", "16MiB", "--wait"]);
    let old = cluster.uri(1).replace("demo", "old");
    run("qemu-io", &["-f", "raw", "-c", "write 1M 4k", &old]);
    assert_eq!(content(&cluster, "old", Formatting, "xfs"), (true, Blank, true));
    assert_eq!(content(&cluster, "old", Raw, ""), (false, Raw, true));
    let untyped = cluster.ask(1, async |admin| {
        let request = api::SetVolumeContentRequest {
            volume: "old".into(),
            content: Formatting.into(),
            fs_type: String::new(),
            epoch: 0,
        };
        admin.set_volume_content(request).await
    });
    let refused = untyped.expect("node 1 runs").expect_err("a file system has a type");
    assert_eq!(refused.code(), tonic::Code::InvalidArgument);
}
