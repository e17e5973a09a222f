//! Cuts processes off from the others with the packet filter, in one direction or both.
//!
//! They live in a control group of their own; rules match the sockets of that group. So
//! nothing else on the machine notices, and no address has to be known.

use std::io::Write;
use std::path::PathBuf;
use std::process::{Command, Stdio};

/// A control group whose traffic can be cut.
#[derive(Debug)]
pub struct Island {
    folder: PathBuf,
    /// The group's path as nft wants it, below `/sys/fs/cgroup`.
    path: String,
    table: String,
}

/// Which way packets are lost.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Cut {
    /// Nothing leaves the process.
    Outgoing,
    /// Nothing reaches it.
    Incoming,
    /// Both.
    Both,
}

impl Island {
    /// Makes the group.
    ///
    /// # Panics
    /// Without root or control groups of version 2.
    pub fn new(name: &str) -> Island {
        let name = format!("ballast-e2e-{name}-{}", std::process::id());
        // Pure version 2, or version 2 beside version 1.
        let all = PathBuf::from("/sys/fs/cgroup");
        let unified = all.join("unified");
        let (parent, prefix) = if unified.exists() { (unified, "unified/") } else { (all, "") };
        let folder = parent.join(&name);
        std::fs::create_dir_all(&folder).expect("a control group can be made");
        Island { folder, path: format!("{prefix}{name}"), table: name.replace('-', "_") }
    }

    /// The command line that runs this command inside.
    pub fn command(&self, command: &[&str]) -> Vec<String> {
        let enter = format!("echo $$ >{}/cgroup.procs && exec \"$@\"", self.folder.display());
        let shell = ["sh", "-c", &enter, "sh"];
        shell.iter().chain(command).map(|word| word.to_string()).collect()
    }

    /// Drops its packets from now on, but for those of these ports (the clients').
    ///
    /// # Panics
    /// When the packet filter refuses.
    pub fn cut(&self, cut: Cut, spared_ports: &[u16]) {
        self.heal();
        let mut chains = String::new();
        for (hook, wanted) in [("output", Cut::Outgoing), ("input", Cut::Incoming)] {
            if cut == wanted || cut == Cut::Both {
                let path = &self.path;
                let spared: String = spared_ports
                    .iter()
                    .map(|port| format!("tcp dport {port} accept; tcp sport {port} accept; "))
                    .collect();
                chains += &format!(
                    "chain {hook} {{ type filter hook {hook} priority 0; {spared}\
                     socket cgroupv2 level 1 \"{path}\" counter drop; }}\n"
                );
            }
        }
        nft(&format!("table inet {} {{\n{chains}}}\n", self.table));
    }

    /// Drops what crosses its border from now on: processes within still reach each other, and the
    /// servers within at these ports.
    ///
    /// # Panics
    /// When the packet filter refuses.
    pub fn cut_around(&self, ports_within: &[u16]) {
        self.heal();
        // Packets of this machine keep their mark through the loopback device. The first answer to a
        // connection belongs to no full socket yet and gets none: it is told by its port.
        let mark = format!("{:#x}", 0x6200_0000 | std::process::id());
        let within = format!("socket cgroupv2 level 1 \"{}\"", self.path);
        let ports: String =
            ports_within.iter().map(|port| format!("{within} tcp sport {port} accept; ")).collect();
        nft(&format!(
            "table inet {} {{\n\
             chain output {{ type filter hook output priority 0; {within} meta mark set {mark}; }}\n\
             chain input {{ type filter hook input priority 0; {ports}\
             {within} meta mark {mark} accept; {within} counter drop; \
             meta mark {mark} counter drop; }}\n}}\n",
            self.table
        ));
    }

    /// Lets everything through again.
    ///
    /// # Panics
    /// When the packet filter refuses.
    pub fn heal(&self) {
        // Declared first, so that deleting works whether it was there or not.
        nft(&format!("table inet {0}\ndelete table inet {0}\n", self.table));
    }
}

impl Drop for Island {
    fn drop(&mut self) {
        if !std::thread::panicking() {
            self.heal();
        } else {
            let _ = Command::new("nft").args(["delete", "table", "inet", &self.table]).status();
        }
        // A group with a process in it stays until that process is gone.
        let _ = std::fs::remove_dir(&self.folder);
    }
}

fn nft(script: &str) {
    let child = Command::new("nft").args(["-f", "-"]).stdin(Stdio::piped()).spawn();
    let mut child = child.expect("nft is installed");
    let mut input = child.stdin.take().expect("standard input is piped");
    input.write_all(script.as_bytes()).expect("nft reads its input");
    drop(input);
    let status = child.wait().expect("nft ends");
    assert!(status.success(), "nft refused:\n{script}");
}
