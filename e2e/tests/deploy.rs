//! The manifests in `deploy/`: known to Kubernetes' own types, to the programs that they start, and
//! to each other. No cluster is asked: there is none here.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Output;
use std::sync::OnceLock;

use ballast_csi_shim::{DRIVER_NAME, parameters::Parameters};
use ballast_e2e::cluster::Cluster;
use ballast_e2e::process::{output, run};
use ballast_e2e::scratch::{self, Scratch};
use serde_json::Value;

const FOLDERS: [&str; 3] = ["deploy/kubernetes", "deploy/file-pools", "deploy/examples"];

fn repository() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("the crate lies in it").to_owned()
}

fn read(path: &str) -> String {
    fs::read_to_string(repository().join(path)).unwrap_or_else(|error| panic!("{path}: {error}"))
}

/// `deploy/check`, built by Go; its modules are pinned by go.sum.
fn checker() -> &'static str {
    static BUILT: OnceLock<String> = OnceLock::new();
    BUILT.get_or_init(|| {
        let program = scratch::root().join("manifest-check").display().to_string();
        fs::create_dir_all(scratch::root()).expect("a folder can be made");
        let sources = repository().join("deploy/check").display().to_string();
        let go =
            if output("which", &["go"]).status.success() { "go" } else { "/usr/local/go/bin/go" };
        run("env", &["GOFLAGS=-mod=readonly", go, "build", "-C", &sources, "-o", &program, "."]);
        program
    })
}

/// Every manifest, by its path from the repository's root.
fn manifests() -> Vec<String> {
    let mut found = Vec::new();
    for folder in FOLDERS {
        for entry in fs::read_dir(repository().join(folder)).expect("it is there").flatten() {
            let name = entry.file_name().into_string().expect("names are UTF-8");
            if name.ends_with(".yaml") {
                found.push(format!("{folder}/{name}"));
            }
        }
    }
    found.sort();
    found
}

fn check(files: &[String]) -> Output {
    let paths: Vec<String> =
        files.iter().map(|file| repository().join(file).display().to_string()).collect();
    output(checker(), &paths.iter().map(String::as_str).collect::<Vec<_>>())
}

/// All objects, with the file's path, as Kubernetes' types read them.
fn objects() -> Vec<(String, Value)> {
    let checked = check(&manifests());
    assert!(checked.status.success(), "{}", String::from_utf8_lossy(&checked.stderr));
    let root = format!("{}/", repository().display());
    let lines = String::from_utf8(checked.stdout).expect("JSON is UTF-8");
    lines
        .lines()
        .map(|line| {
            let mut line: Value = serde_json::from_str(line).expect("the checker prints JSON");
            let file = text(&line["file"]).replace(&root, "");
            (file, line["document"].take())
        })
        .collect()
}

/// Those that are whole: not kustomize's own, and no patches.
fn whole_objects() -> Vec<(String, Value)> {
    let whole = |(file, object): &(String, Value)| {
        !file.starts_with("deploy/file-pools/") && object["kind"] != "Kustomization"
    };
    objects().into_iter().filter(whole).collect()
}

fn text(value: &Value) -> String {
    value.as_str().unwrap_or_else(|| panic!("{value} is not a text")).to_owned()
}

fn texts(value: &Value) -> Vec<String> {
    value.as_array().map(|all| all.iter().map(text).collect()).unwrap_or_default()
}

fn list(value: &Value) -> impl Iterator<Item = &Value> {
    value.as_array().into_iter().flatten()
}

/// The pod in an object, if there is one.
fn pod(object: &Value) -> Option<&Value> {
    match object["kind"].as_str() {
        Some("Pod") => Some(&object["spec"]),
        _ => Some(&object["spec"]["template"]["spec"]).filter(|spec| spec.is_object()),
    }
}

fn containers(pod: &Value) -> impl Iterator<Item = &Value> {
    list(&pod["initContainers"]).chain(list(&pod["containers"]))
}

#[test]
fn every_field_is_known_to_the_api_that_the_manifest_names() {
    let objects = objects();
    assert!(objects.len() > 25, "only {} objects", objects.len());
    for folder in &FOLDERS[..2] {
        let file = format!("{folder}/kustomization.yaml");
        let (_, list_of) = objects.iter().find(|(path, _)| *path == file).expect("it is there");
        let resources = texts(&list_of["resources"]);
        let patches: Vec<String> = list(&list_of["patches"]).map(|it| text(&it["path"])).collect();
        for name in manifests().iter().filter_map(|path| path.strip_prefix(&format!("{folder}/"))) {
            let named = name == "kustomization.yaml"
                || resources.iter().chain(&patches).any(|it| it == name);
            assert!(named, "{file} does not name {name}");
        }
        for path in resources.iter().chain(&patches) {
            assert!(repository().join(folder).join(path).exists(), "{file} names {path}");
        }
    }
}

#[test]
fn what_the_api_does_not_know_is_refused_by_name() {
    let scratch = Scratch::new("manifests");
    let file = scratch.file("wrong.yaml");
    let refused = |manifest: &str, from: &str, to: &str| {
        let text = read(manifest);
        assert!(text.contains(from), "{manifest} has no {from:?}");
        fs::write(&file, text.replacen(from, to, 1)).expect("a file can be written");
        let output = output(checker(), &[&file]);
        assert!(!output.status.success(), "{to:?} passes in {manifest}");
        String::from_utf8_lossy(&output.stderr).into_owned()
    };
    let daemon = "deploy/kubernetes/ballastd.yaml";
    for (manifest, from, to, says) in [
        (daemon, "hostNetwork:", "hostNetwrok:", "hostNetwrok"),
        (daemon, "hostNetwork:", "hostnetwork:", "hostnetwork"),
        (daemon, "readOnlyRootFilesystem", "readOnlyRootFileSystem", "readOnlyRootFileSystem"),
        (daemon, "memory: 2Gi", "memory: 2Gb", "quantities"),
        (daemon, "minReadySeconds: 60", "minReadySeconds: soon", "minReadySeconds"),
        (daemon, "hostNetwork: true", "hostNetwork: true\n      hostNetwork: true", "already"),
        (daemon, "kind: DaemonSet", "kind: DemonSet", "DemonSet"),
        (daemon, "apiVersion: apps/v1", "apiVersion: apps/v1beta1", "apps/v1beta1"),
        (daemon, "spec:\n", "spec: {\n", "yaml"),
        (
            "deploy/kubernetes/csidriver.yaml",
            "attachRequired",
            "attachedRequired",
            "attachedRequired",
        ),
        ("deploy/kubernetes/rbac.yaml", "verbs:", "verb:", "\"rules[0].verb\""),
        ("deploy/examples/postgresql.yaml", "storageClassName", "storageClass", "storageClass"),
    ] {
        let message = refused(manifest, from, to);
        assert!(message.contains(says), "{to:?}: not {says:?}: {message}");
    }
    fs::write(&file, "# nothing\n").expect("a file can be written");
    assert!(!output(checker(), &[&file]).status.success(), "an empty manifest passes");
}

/// `--name` of `--name=value`.
fn flag(argument: &str) -> Option<&str> {
    Some(argument.split('=').next().unwrap_or(argument)).filter(|flag| flag.starts_with("--"))
}

#[test]
fn our_programs_know_what_they_are_started_with() {
    let mut seen = BTreeSet::new();
    for (file, object) in objects() {
        for container in pod(&object).into_iter().flat_map(containers) {
            let image = container["image"].as_str().unwrap_or_default();
            let ours = image == "ballast" || image.starts_with("registry.example/ballast:");
            let Some(name) = container["command"][0].as_str().filter(|_| ours) else { continue };
            let arguments = texts(&container["args"]);
            seen.insert(name.to_owned());
            if name == "modprobe" {
                continue;
            }
            let program = scratch::program(name).display().to_string();
            // A word before the flags is a command, with flags of its own.
            let words = arguments.iter().map(String::as_str);
            let command: Vec<&str> = words.take_while(|word| flag(word).is_none()).collect();
            let help = run(&program, &[&command[..], &["--help"]].concat());
            let known: BTreeSet<&str> =
                help.split(|c: char| c.is_whitespace() || c == ',').filter_map(flag).collect();
            for argument in &arguments[command.len()..] {
                let flag = flag(argument).unwrap_or_else(|| panic!("{file}: {argument}"));
                assert!(known.contains(flag), "{file}: {name} does not know {flag}:\n{help}");
            }
        }
    }
    assert_eq!(seen.into_iter().collect::<Vec<_>>(), ["ballast-csi", "ballastd", "modprobe"]);
}

#[test]
fn other_programs_are_of_versions_whose_flags_are_known() {
    let known = read("deploy/check/sidecars.txt");
    let mut seen = 0;
    for (file, object) in objects() {
        for container in pod(&object).into_iter().flat_map(containers) {
            let Some(image) = container["image"].as_str() else { continue };
            let tag = image.rsplit_once(':').map(|(_, tag)| tag);
            // kustomization.yaml gives ours its tag.
            let pinned = image == "ballast" || tag.is_some_and(|tag| tag != "latest");
            assert!(pinned, "{file}: {image} has no version");
            if !image.starts_with("registry.k8s.io/") {
                continue;
            }
            seen += 1;
            let line = known.lines().find_map(|line| line.strip_prefix(&format!("{image} ")));
            let line = line.unwrap_or_else(|| panic!("{file}: {image} is not in sidecars.txt"));
            for argument in texts(&container["args"]) {
                let flag = flag(&argument).unwrap_or_else(|| panic!("{file}: {argument}"));
                let is_known = line.split(' ').any(|known| known == &flag[2..]);
                assert!(is_known, "{file}: {image} does not know {flag}");
            }
        }
    }
    assert!(seen >= 6, "only {seen} sidecars");
}

#[test]
fn configurations_are_ones_that_ballastd_reads() {
    let scratch = Scratch::new("manifest-config");
    let objects = objects();
    let (_, map) = objects.iter().find(|(_, it)| it["kind"] == "ConfigMap").expect("there is one");
    let files = map["data"].as_object().expect("it has data");
    let mut endpoints = Vec::new();
    for (name, contents) in files.iter().filter(|(name, _)| name.ends_with(".toml")) {
        let (contents, file) = (text(contents), scratch.file(name));
        fs::write(&file, &contents).expect("a file can be written");
        let ballastd = scratch::program("ballastd").display().to_string();
        let refused = output(&ballastd, &["format", "--config", &file]);
        let message = String::from_utf8_lossy(&refused.stderr).into_owned();
        // All that is wrong is that this machine does not have the disk.
        assert_eq!(refused.status.code(), Some(1), "{name}: {message}");
        assert!(message.contains("/dev/disk/by-id/nvme-example_"), "{name}: {message}");
        let node = name.strip_suffix(".toml").expect("it was filtered");
        assert!(contents.contains(&format!("name = \"{node}\"")), "{name}: other names");
        let grpc = contents.lines().find_map(|line| line.strip_prefix("grpc = "));
        endpoints.push(format!("http://{}", grpc.expect("it is set").trim_matches('"')));
        for (key, port) in [("grpc", 7431), ("metrics", 7432), ("peer", 7430)] {
            let listens = contents.lines().any(|line| {
                line.starts_with(&format!("{key} = ")) && line.contains(&format!(":{port}\""))
            });
            assert!(listens, "{name}: {key} is not on the DaemonSet's port {port}");
        }
    }
    assert_eq!(endpoints.join(","), text(&files["endpoints"]));
}

/// Whether one object has all labels that another selects by.
fn selects(selector: &Value, labels: &Value) -> bool {
    let wanted = selector.as_object().expect("a selector has labels");
    !wanted.is_empty() && wanted.iter().all(|(key, value)| labels[key] == *value)
}

#[test]
fn objects_fit_together() {
    let objects = whole_objects();
    let is_there = |kind: &str, name: &Value| {
        objects.iter().any(|(_, it)| it["kind"] == kind && it["metadata"]["name"] == *name)
    };
    for (file, object) in &objects {
        let selector = &object["spec"]["selector"]["matchLabels"];
        let labels = &object["spec"]["template"]["metadata"]["labels"];
        if labels.is_object() {
            assert!(selects(selector, labels), "{file}: a selector that does not select");
        }
        let spec = pod(object).unwrap_or(&Value::Null);
        let account = &spec["serviceAccountName"];
        assert!(account.is_null() || is_there("ServiceAccount", account), "{file}: {account}");
        let claimed = list(&object["spec"]["volumeClaimTemplates"]).map(|it| &it["metadata"]);
        let volumes: Vec<&Value> =
            list(&spec["volumes"]).chain(claimed).map(|it| &it["name"]).collect();
        for container in containers(spec) {
            for mount in list(&container["volumeMounts"]) {
                assert!(volumes.contains(&&mount["name"]), "{file}: no volume {}", mount["name"]);
            }
        }
        for subject in list(&object["subjects"]) {
            assert!(is_there("ServiceAccount", &subject["name"]), "{file}: {subject}");
            let role = &object["roleRef"];
            assert!(is_there(&text(&role["kind"]), &role["name"]), "{file}: {role}");
        }
        match text(&object["kind"]).as_str() {
            "StorageClass" => {
                assert!(is_there("CSIDriver", &object["provisioner"]), "{file}");
                let given = object["parameters"].as_object().expect("it has parameters");
                let given = given.iter().map(|(key, value)| (key.clone(), text(value))).collect();
                Parameters::parse(&given).unwrap_or_else(|refused| panic!("{file}: {refused}"));
            }
            "CSIDriver" => assert_eq!(object["metadata"]["name"], DRIVER_NAME),
            "PodDisruptionBudget" => {
                let chosen =
                    |it: &Value| selects(selector, &it["spec"]["template"]["metadata"]["labels"]);
                let is_some =
                    objects.iter().any(|(_, it)| it["kind"] == "Deployment" && chosen(it));
                assert!(is_some, "{file}: it is about nothing");
            }
            _ => {}
        }
    }
}

/// Lines of a page that are commands, each with the heading and the paragraph that it follows.
fn commands(page: &str) -> Vec<(String, String)> {
    let (mut heading, mut paragraph, mut found) = ("", "", Vec::new());
    for line in page.lines() {
        let indent = line.len() - line.trim_start().len();
        match line.trim() {
            "" => {}
            command if indent >= 4 => {
                found.push((format!("{heading} {paragraph}"), command.into()))
            }
            text if text.starts_with('#') => (heading, paragraph) = (text, ""),
            text => paragraph = text,
        }
    }
    found
}

#[test]
fn commands_of_the_guide_work_or_are_said_to_need_kubernetes() {
    let cluster = Cluster::start("guide");
    let nodes = cluster.nodes();
    let endpoints: Vec<&str> = nodes.iter().map(|node| node.grpc.as_str()).collect();
    let nbd = nodes[0].nbd.replace("nbd://", "");
    let path = format!("{}:{}", scratch::binaries().display(), std::env::var("PATH").expect("set"));
    let (mut script, mut of_kubernetes) = (format!("set -e; export PATH='{path}'\n"), 0);
    for page in ["install", "first-volume", "node-failure", "durability", "memory"] {
        for (about, command) in commands(&read(&format!("docs/guide/{page}.md"))) {
            let program = command.split([' ', '=']).next().unwrap_or_default();
            match program {
                "kubectl" => {
                    assert!(about.contains("[k8s]"), "{page}: not marked: {command}");
                    of_kubernetes += 1;
                }
                "export" => {
                    script += &format!("export BALLAST_ENDPOINT={}\n", endpoints.join(","));
                }
                "ballastctl" | "nbdinfo" => {
                    // The epoch is the cluster's choice: as attach printed it.
                    let export = command.replace("first@lease=41", "${said##* }");
                    let command = export.replace("10.0.0.1:10809", &nbd);
                    script += &match command.contains("volume attach") {
                        true => format!("said=$({command}\n)\necho \"$said\"\n"),
                        false => format!("{command}\n"),
                    };
                }
                // Those that need a network, or hours; `ballastd dev` has tests of its own.
                "podman" | "cargo" | "grep" => {}
                _ => panic!("{page}: what is {command:?}?"),
            }
        }
    }
    assert!(of_kubernetes > 8, "only {of_kubernetes} commands for Kubernetes");
    // The last page takes a lease by force of the volume that the first one deletes.
    let force =
        script.find("said=$(ballastctl volume attach first --host node-b").expect("it is there");
    script.insert_str(force, "ballastctl volume create first --size 1GiB --replicas 3 --wait\n");
    run("bash", &["-c", &script]);
}

#[test]
fn the_image_is_built_by_the_pinned_toolchain_from_programs_that_exist() {
    let recipe = read("deploy/Containerfile");
    let toolchain = read("rust-toolchain.toml");
    let channel = toolchain.lines().find_map(|line| line.strip_prefix("channel = "));
    let channel = channel.expect("it is pinned").trim_matches('"');
    assert!(recipe.contains(&format!("/rust:{channel}-")), "another Rust than {channel}");
    assert!(recipe.contains(&format!("RUSTUP_TOOLCHAIN={channel}\n")));
    let manifests = ["daemon", "tools", "csi-shim"].map(|it| read(&format!("{it}/Cargo.toml")));
    let copied: Vec<&str> = recipe
        .split_whitespace()
        .filter_map(|word| word.strip_prefix("/src/target/release/"))
        .collect();
    assert!(copied.len() >= 3, "{copied:?}");
    for name in copied {
        let is_built = manifests.iter().any(|it| it.contains(&format!("name = \"{name}\"")));
        assert!(is_built, "no crate makes {name}");
    }
}

/// The programs that the node plugin starts, and Debian's packages with them.
const TOOLS: [(&str, &str); 10] = [
    ("blkid", "util-linux"),
    ("e2fsck", "e2fsprogs"),
    ("resize2fs", "e2fsprogs"),
    ("mkfs.ext4", "e2fsprogs"),
    ("mkfs.xfs", "xfsprogs"),
    ("xfs_growfs", "xfsprogs"),
    ("xfs_logprint", "xfsprogs"),
    ("losetup", "mount"),
    ("mount", "mount"),
    ("ss", "iproute2"),
];

fn sources_below(folder: &Path) -> String {
    let entries = std::fs::read_dir(folder).expect("a folder");
    let text = |path: PathBuf| match path.is_dir() {
        true => sources_below(&path),
        false => std::fs::read_to_string(&path).expect("a source file"),
    };
    entries.map(|entry| text(entry.expect("an entry").path())).collect()
}

#[test]
fn the_image_has_the_programs_that_the_node_plugin_starts() {
    let recipe = read("deploy/Containerfile");
    let installed = recipe.split("--no-install-recommends").nth(1).expect("what is installed");
    let installed: Vec<&str> = installed.lines().next().unwrap_or_default().split(' ').collect();
    let source = sources_below(&Path::new(env!("CARGO_MANIFEST_DIR")).join("../csi-shim/src"));
    let calls = ["tools::must(\"", "tools::run(\""].map(|call| source.split(call).skip(1));
    let named = calls.into_iter().flatten().filter_map(|after| after.split('"').next());
    let made = TOOLS.map(|(tool, _)| tool).into_iter().filter(|tool| tool.starts_with("mkfs."));
    for tool in named.chain(made) {
        let known = TOOLS.iter().find(|(known, _)| *known == tool);
        let (_, package) = known.unwrap_or_else(|| panic!("which package has {tool}?"));
        assert!(installed.contains(package), "{tool} of {package} is not in the image");
    }
}
