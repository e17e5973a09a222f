//! Debian's PostgreSQL with its data on a volume, and pgbench against it.

use std::fs;
use std::path::{Path, PathBuf};

use crate::peer::free_port;
use crate::process::{Running, output, run};
use crate::wait;

/// A running server. Its socket lies in a folder that its user may enter.
#[derive(Debug)]
pub struct Postgres {
    process: Running,
    programs: String,
    home: PathBuf,
    port: String,
}

impl Postgres {
    /// Makes a database cluster in `home/data` if there is none, and starts a server on it.
    ///
    /// # Panics
    /// When PostgreSQL is not installed or does not start.
    #[track_caller]
    pub fn start(home: &Path, log: &Path) -> Postgres {
        let programs = programs();
        let data = home.join("data").display().to_string();
        let socket = home.display().to_string();
        run("chown", &["postgres:postgres", &socket]);
        if !home.join("data").exists() {
            let initdb = format!("{programs}/initdb");
            run("setpriv", &as_user(&[&initdb, "-D", &data, "-A", "trust", "-U", "postgres"]));
        }
        let port = free_port().to_string();
        let server = format!("{programs}/postgres");
        let command = [&server, "-D", &data, "-k", &socket, "-p", &port, "-c", "listen_addresses="];
        // Its own second copy of each page is of no use on a store that writes atomically, but
        // it is on here: the test is about what every PostgreSQL does.
        let full = as_user(&command);
        let process = Running::start(log, &[&["setpriv"], &full[..]].concat(), false);
        let mut server = Postgres { process, programs, home: home.to_path_buf(), port };
        wait::until_true("PostgreSQL", 60, || {
            assert!(server.process.is_running(), "PostgreSQL ended: {}", server.process.log());
            server.try_query("select 1").is_some()
        });
        server
    }

    fn try_query(&self, sql: &str) -> Option<String> {
        let host = self.home.display().to_string();
        let psql = format!("{}/psql", self.programs);
        let arguments =
            ["-X", "-At", "-U", "postgres", "-h", &host, "-p", &self.port, "-c", sql, "postgres"];
        let output = output(&psql, &arguments);
        output.status.success().then(|| String::from_utf8_lossy(&output.stdout).trim().to_string())
    }

    /// Runs SQL and returns what it printed, unaligned.
    ///
    /// # Panics
    /// When it fails.
    #[track_caller]
    pub fn query(&self, sql: &str) -> String {
        self.try_query(sql).unwrap_or_else(|| panic!("{sql}: {}", self.process.log()))
    }

    /// Starts pgbench in the background with these options.
    ///
    /// # Panics
    /// When it is not there.
    #[track_caller]
    pub fn pgbench(&self, log: &Path, options: &[&str]) -> Running {
        let host = self.home.display().to_string();
        let pgbench = format!("{}/pgbench", self.programs);
        let base = [&pgbench, "-U", "postgres", "-h", &host, "-p", &self.port];
        Running::start(log, &[&base[..], options, &["postgres"]].concat(), false)
    }

    /// Stops in order.
    ///
    /// # Panics
    /// When it does not stop.
    #[track_caller]
    pub fn stop(mut self) {
        self.process.signal(nix::sys::signal::Signal::SIGINT);
        assert_eq!(self.process.wait(60), 0, "PostgreSQL: {}", self.process.log());
    }

    /// Kills every process of the server at once, as a power cut would, and removes its lock file,
    /// as after a restart of the machine.
    ///
    /// # Panics
    /// When a process does not go.
    pub fn crash(self) {
        let home = self.home.clone();
        self.kill();
        forget_server(&home);
    }

    /// Kills every process of the server at once.
    ///
    /// # Panics
    /// When a process does not go.
    pub fn kill(mut self) {
        let main = self.process.pid();
        let children = output("pgrep", &["-P", &main.to_string()]).stdout;
        let children = String::from_utf8_lossy(&children).into_owned();
        crate::process::kill_and_wait(main);
        for child in children.lines().filter_map(|line| line.parse().ok()) {
            crate::process::kill_and_wait(child);
        }
        self.process.wait(20);
    }
}

/// Removes the lock file of a server of another host, or of before a restart: process numbers in it
/// mean nothing here.
///
/// # Panics
/// When it can't be removed.
#[track_caller]
pub fn forget_server(home: &Path) {
    fs::remove_file(home.join("data/postmaster.pid")).expect("the pid file can be removed");
}

fn as_user<'a>(command: &[&'a str]) -> Vec<&'a str> {
    let user = ["--reuid=postgres", "--regid=postgres", "--init-groups", "--"];
    [&user[..], command].concat()
}

/// Debian keeps the servers' programs in a folder of their version.
fn programs() -> String {
    let versions = fs::read_dir("/usr/lib/postgresql").expect("PostgreSQL is installed");
    let folders = versions.flatten().map(|entry| entry.path().join("bin"));
    let newest = folders.filter(|folder| folder.join("initdb").exists()).max();
    newest.expect("PostgreSQL is installed").display().to_string()
}
