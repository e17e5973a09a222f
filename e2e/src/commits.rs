//! A load on PostgreSQL that knows which commits returned.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use crate::postgres::Postgres;
use crate::process::Running;

/// Clients of one load.
pub const CLIENTS: u64 = 4;

/// pgbench, whose log holds a line for every transaction that returned.
#[derive(Debug)]
pub struct Commits {
    bench: Running,
    folder: PathBuf,
    name: String,
    first: u64,
}

impl Commits {
    /// Makes the tables, for loads whose clients have these first numbers.
    ///
    /// # Panics
    /// When PostgreSQL refuses.
    #[track_caller]
    pub fn prepare(server: &Postgres, firsts: &[u64]) {
        server.query("create table committed (client int, n int, filler text)");
        server.query("create table counters (client int primary key, n int)");
        for first in firsts {
            let last = first + CLIENTS - 1;
            let clients = format!("select c, 0 from generate_series({first}, {last}) c");
            server.query(&format!("insert into counters {clients}"));
        }
    }

    /// Starts a load of this name and length. What it says goes to files of this folder, which is
    /// not on the volume. Its clients have the numbers from `first` on.
    ///
    /// # Panics
    /// When pgbench is not there.
    #[track_caller]
    pub fn start(
        server: &Postgres,
        folder: &Path,
        name: &str,
        first: u64,
        seconds: u64,
    ) -> Commits {
        let path = |file: String| folder.join(file).display().to_string();
        let (script, prefix) = (path(format!("{name}.sql")), path(format!("{name}.commits")));
        // Every client numbers its transactions; pgbench's log says how many returned.
        let text = format!(
            "\\set n :n + 1\n\\set client :client_id + {first}\nbegin;\n\
             insert into committed values (:client, :n, repeat('x', 200));\n\
             update counters set n = n + 1 where client = :client;\ncommit;\n"
        );
        fs::write(&script, text).expect("a file can be written");
        let (seconds, clients) = (seconds.to_string(), CLIENTS.to_string());
        let options = ["-n", "-T", &seconds, "-c", &clients, "-D", "n=0", "-l", "--log-prefix"];
        let options = [&options[..], &[&prefix, "-f", &script]].concat();
        let bench = server.pgbench(&folder.join(format!("{name}.log")), &options);
        Commits { bench, folder: folder.to_owned(), name: name.to_owned(), first }
    }

    /// Commits that returned, as far as pgbench has said so: it says it in blocks, and all of it
    /// when it ends.
    ///
    /// # Panics
    /// When its folder is gone.
    pub fn returned(&self) -> usize {
        self.log().lines().count()
    }

    fn log(&self) -> String {
        let prefix = format!("{}.commits.", self.name);
        let entries = fs::read_dir(&self.folder).expect("the folder is there").flatten();
        let logs = entries.filter(|e| e.file_name().to_string_lossy().starts_with(&prefix));
        logs.map(|entry| fs::read_to_string(entry.path()).unwrap_or_default()).collect()
    }

    /// Waits for its end: 0 when every transaction was well.
    ///
    /// # Panics
    /// When it does not end.
    #[track_caller]
    pub fn wait(&mut self, seconds: u64) -> i32 {
        self.bench.wait(seconds)
    }

    /// What pgbench said.
    pub fn said(&self) -> String {
        self.bench.log()
    }

    /// Every commit that returned is in the database, whose tables agree.
    ///
    /// # Panics
    /// When one is missing.
    #[track_caller]
    pub fn assert_there(&self, server: &Postgres) {
        let mut returned: BTreeMap<u64, u64> = BTreeMap::new();
        for line in self.log().lines() {
            let client = line.split(' ').next().and_then(|word| word.parse::<u64>().ok());
            *returned.entry(client.expect("a client's number")).or_default() += 1;
        }
        assert_eq!(returned.len() as u64, CLIENTS, "{returned:?}");
        for (client, count) in returned {
            let client = client + self.first;
            let there = format!(
                "select count(distinct n) from committed where client = {client} and n <= {count}"
            );
            assert_eq!(server.query(&there), count.to_string(), "commits of client {client}");
            let consistent = format!(
                "select c.n = (select count(*) from committed k where k.client = {client}) \
                 from counters c where c.client = {client}"
            );
            assert_eq!(server.query(&consistent), "t", "client {client}: both tables agree");
        }
    }
}
