//! The folder of a development cluster.
//!
//! `dev.json` describes it to programs and is what makes a folder one of ours; it is only ever
//! replaced whole, by who holds `dev.lock`. Each node has a folder with its configuration, its
//! pool, its log, and a lock that its process holds.

use std::fs::{self, File};
use std::io::Write;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use ballast_block::{ClusterId, ShardId};
use ballast_node::config::NodeConfig;
use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};
use serde::{Deserialize, Serialize};

use super::ports;
use crate::cli::Overrides;
use crate::error::DaemonError;
use crate::format::Making;
use crate::settings::Settings;
use crate::size::Size;

/// Longest path of a Unix socket, in bytes (`sun_path` of unix(7), with its end).
const SOCKET_PATH_MAX: usize = 107;

/// `dev.json`.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Description {
    /// The cluster's id.
    #[serde(with = "crate::config::cluster_id")]
    pub cluster: ClusterId,
    /// Pools of each node; left out where it is 1.
    #[serde(skip_serializing_if = "is_one", default = "one")]
    pub pools_per_node: u32,
    /// Its nodes, by id.
    pub nodes: Vec<NodeDescription>,
    /// Its volumes, as far as `ballastd dev` knows.
    #[serde(default)]
    pub volumes: Vec<VolumeDescription>,
}

/// A node in `dev.json`.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct NodeDescription {
    /// Its number.
    pub id: u32,
    /// Its process: the last one that was started, whether or not it still runs; none after the
    /// cluster was stopped.
    pub pid: Option<u32>,
    /// To be followed by `/` and the name of a volume.
    pub nbd: String,
    /// Its Unix socket for NBD, as a URL that needs `VOLUME` replaced.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub nbd_unix: Option<String>,
    /// Administration.
    pub grpc: String,
    /// Metrics.
    pub metrics: String,
    /// Where the other nodes connect.
    pub peer: SocketAddr,
    /// Its first pool, once it was made: it is never made a second time.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub pool: Option<String>,
    /// Its further pools, as far as they were made.
    #[serde(skip_serializing_if = "Vec::is_empty", default)]
    pub further_pools: Vec<String>,
}

impl NodeDescription {
    /// How many of its pools were made.
    fn pools_made(&self) -> u32 {
        u32::from(self.pool.is_some()) + self.further_pools.len() as u32
    }

    fn note_pool(&mut self, id: String) {
        match self.pool {
            None => self.pool = Some(id),
            Some(_) => self.further_pools.push(id),
        }
    }
}

fn one() -> u32 {
    1
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde asks for it")]
fn is_one(number: &u32) -> bool {
    *number == 1
}

/// A volume in `dev.json`.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct VolumeDescription {
    /// Its name.
    pub name: String,
    /// Its size.
    pub size_bytes: u64,
    /// Where the first node serves it.
    pub nbd: String,
}

/// A lock that is held until it is dropped.
pub type Held = Flock<File>;

/// The folder.
#[derive(Clone, Debug)]
pub struct Folder {
    path: PathBuf,
}

/// Random bytes of the kernel.
///
/// # Errors
/// When it gives none.
pub fn random_bytes<const N: usize>() -> Result<[u8; N], DaemonError> {
    use std::io::Read;
    let mut bytes = [0; N];
    let path = Path::new("/dev/urandom");
    let read = File::open(path).and_then(|mut file| file.read_exact(&mut bytes));
    read.map_err(DaemonError::file("read", path))?;
    Ok(bytes)
}

impl Folder {
    /// The cluster in `path`; `None` if there is nothing at all.
    ///
    /// # Errors
    /// When something else is there.
    pub fn find(path: &Path) -> Result<Option<Self>, DaemonError> {
        let entries = match fs::read_dir(path) {
            Ok(entries) => entries,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(DaemonError::file("read folder", path)(error)),
        };
        let path = path.canonicalize().map_err(DaemonError::file("find", path))?;
        let folder = Self { path };
        if folder.json().exists() {
            folder.read()?;
            return Ok(Some(folder));
        }
        // A first start that was interrupted leaves locks only.
        let foreign = entries.flatten().find(|entry| !is_lock(&entry.file_name()));
        match foreign {
            None => Ok(None),
            Some(entry) => Err(DaemonError::Dev(format!(
                "{} is not empty and not a folder of `ballastd dev` (it holds {:?} and no \
                 dev.json): use another folder, or an empty one",
                folder.path.display(),
                entry.file_name()
            ))),
        }
    }

    /// Begins a new cluster. [`Folder::complete`] does the rest.
    ///
    /// # Errors
    /// [`DaemonError`].
    pub fn create(path: &Path, nodes: u32, pools: u32) -> Result<Self, DaemonError> {
        let cluster = ClusterId::from_random(random_bytes()?);
        fs::create_dir_all(path).map_err(DaemonError::file("make folder", path))?;
        let path = path.canonicalize().map_err(DaemonError::file("find", path))?;
        let folder = Self { path };
        let _lock = folder.lock_json()?;
        if folder.json().exists() {
            return Ok(folder);
        }
        let ports = ports::pick(nodes as usize * 4)?;
        let nodes = (1..=nodes).zip(ports.chunks_exact(4)).map(|(id, ports)| {
            let socket = folder.node_path(id).join("nbd.sock");
            let fits = socket.as_os_str().len() <= SOCKET_PATH_MAX;
            let url = || format!("nbd+unix:///VOLUME?socket={}", socket.display());
            NodeDescription {
                id,
                pid: None,
                nbd: format!("nbd://{}", ports[0]),
                nbd_unix: fits.then(url),
                grpc: format!("http://{}", ports[1]),
                metrics: format!("http://{}/metrics", ports[2]),
                peer: ports[3],
                pool: None,
                further_pools: Vec::new(),
            }
        });
        let (nodes, volumes) = (nodes.collect(), Vec::new());
        let description = Description { cluster, pools_per_node: pools, nodes, volumes };
        folder.write(&description)?;
        Ok(folder)
    }

    /// Makes whatever of a new cluster is not there yet: configurations, then pools. A pool that
    /// was made once is never made again.
    ///
    /// # Errors
    /// [`DaemonError`].
    pub fn complete(&self, pool_size: Size) -> Result<(), DaemonError> {
        let description = self.read()?;
        for node in &description.nodes {
            let folder = self.node_path(node.id);
            fs::create_dir_all(&folder).map_err(DaemonError::file("make folder", &folder))?;
            let config = self.config_path(node.id);
            if !config.exists() {
                replace(&config, super::node::config_text(&description, node).as_bytes())?;
            }
        }
        for node in &description.nodes {
            for shard in node.pools_made()..description.pools_per_node {
                let pool = self.make_pool(node.id, ShardId(shard), pool_size)?;
                self.change(|description| {
                    if let Some(known) = description.nodes.iter_mut().find(|n| n.id == node.id) {
                        known.note_pool(pool.clone());
                    }
                })?;
            }
        }
        Ok(())
    }

    fn make_pool(&self, id: u32, shard: ShardId, size: Size) -> Result<String, DaemonError> {
        let shards = self.settings(id)?.shards;
        let config = shards.get(shard.0 as usize).ok_or_else(|| {
            let file = self.config_path(id);
            DaemonError::Dev(format!("{} names no pool for {shard}", file.display()))
        })?;
        let path = config.pool.clone();
        if path.exists() {
            // Made, but the note of it was not: it was never used.
            return Ok("made before".to_owned());
        }
        // Made under another name, so that half a pool is never mistaken for one.
        let draft = path.with_extension("new");
        match fs::remove_file(&draft) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                return Err(DaemonError::file("remove", &draft)(error));
            }
            _ => {}
        }
        let making = Making { create: Some(size.0), ..Making::default() };
        let at_draft = NodeConfig { pool: draft.clone(), ..config.clone() };
        let pool = crate::format::format(&at_draft, shard, making)?;
        fs::rename(&draft, &path).map_err(DaemonError::file("rename", &draft))?;
        Ok(pool.to_string())
    }

    /// A node's settings.
    ///
    /// # Errors
    /// [`DaemonError::Config`].
    pub fn settings(&self, id: u32) -> Result<Settings, DaemonError> {
        Ok(Settings::load(&self.config_path(id), &Overrides::default())?)
    }

    /// The folder itself.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// A node's folder.
    pub fn node_path(&self, id: u32) -> PathBuf {
        self.path.join(format!("node-{id}"))
    }

    /// A node's log, when the cluster was started as one.
    pub fn log_path(&self, id: u32) -> PathBuf {
        self.node_path(id).join("log")
    }

    fn config_path(&self, id: u32) -> PathBuf {
        self.node_path(id).join("config.toml")
    }

    fn json(&self) -> PathBuf {
        self.path.join("dev.json")
    }

    /// What `dev.json` says.
    ///
    /// # Errors
    /// [`DaemonError`].
    pub fn read(&self) -> Result<Description, DaemonError> {
        let path = self.json();
        let text = fs::read_to_string(&path).map_err(DaemonError::file("read", &path))?;
        serde_json::from_str(&text).map_err(|error| {
            DaemonError::Dev(format!("{} can't be understood: {error}", path.display()))
        })
    }

    /// Changes `dev.json`.
    ///
    /// # Errors
    /// [`DaemonError`].
    pub fn change(&self, change: impl FnOnce(&mut Description)) -> Result<(), DaemonError> {
        let _lock = self.lock_json()?;
        let mut description = self.read()?;
        change(&mut description);
        self.write(&description)
    }

    fn write(&self, description: &Description) -> Result<(), DaemonError> {
        let mut text = serde_json::to_string_pretty(description).expect("plain data");
        text.push('\n');
        replace(&self.json(), text.as_bytes())
    }

    fn lock_json(&self) -> Result<Held, DaemonError> {
        let path = self.path.join("dev.lock");
        let file = lock_file(&path)?;
        Flock::lock(file, FlockArg::LockExclusive)
            .map_err(|(_, errno)| DaemonError::file("lock", &path)(errno.into()))
    }

    /// Held by the process that runs the whole cluster.
    ///
    /// # Errors
    /// When another one does.
    pub fn lock_cluster(&self) -> Result<Held, DaemonError> {
        let held = try_lock(&self.path.join("cluster.lock"))?;
        held.ok_or_else(|| {
            let path = self.path.display();
            DaemonError::Dev(format!(
                "{path} is in use: another `ballastd dev` runs this cluster; stop that first"
            ))
        })
    }

    /// Held by a node's process; `None` when there is one.
    ///
    /// # Errors
    /// When the lock can't be asked for.
    pub fn lock_node(&self, id: u32) -> Result<Option<Held>, DaemonError> {
        try_lock(&self.node_path(id).join("lock"))
    }
}

fn is_lock(name: &std::ffi::OsStr) -> bool {
    name == "dev.lock" || name == "cluster.lock"
}

fn lock_file(path: &Path) -> Result<File, DaemonError> {
    let opened = File::options().create(true).truncate(false).write(true).open(path);
    opened.map_err(DaemonError::file("open", path))
}

fn try_lock(path: &Path) -> Result<Option<Held>, DaemonError> {
    match Flock::lock(lock_file(path)?, FlockArg::LockExclusiveNonblock) {
        Ok(held) => Ok(Some(held)),
        Err((_, Errno::EWOULDBLOCK)) => Ok(None),
        Err((_, errno)) => Err(DaemonError::file("lock", path)(errno.into())),
    }
}

/// Replaces a file whole: readers see the old text or the new one, also after a power loss.
fn replace(path: &Path, text: &[u8]) -> Result<(), DaemonError> {
    let draft = path.with_extension("draft");
    let write = || -> std::io::Result<()> {
        let mut file = File::create(&draft)?;
        file.write_all(text)?;
        file.sync_all()?;
        fs::rename(&draft, path)
    };
    write().map_err(DaemonError::file("write", path))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_an_empty_folder_is_taken() {
        let path = std::env::temp_dir().join(format!("ballastd-folder-{}", std::process::id()));
        let _ = fs::remove_dir_all(&path);
        assert!(Folder::find(&path).unwrap().is_none());
        fs::create_dir_all(&path).unwrap();
        assert!(Folder::find(&path).unwrap().is_none());
        fs::write(path.join("letter"), "dear").unwrap();
        assert!(Folder::find(&path).unwrap_err().to_string().contains("letter"));
        fs::remove_file(path.join("letter")).unwrap();
        let made = Folder::create(&path, 3, 1).unwrap();
        let found = Folder::find(&path).unwrap().unwrap().read().unwrap();
        assert_eq!(found.cluster, made.read().unwrap().cluster);
        let first = made.lock_cluster().unwrap();
        assert!(made.lock_cluster().unwrap_err().to_string().contains("in use"));
        drop(first);
        made.change(|description| description.nodes[1].pid = Some(7)).unwrap();
        assert_eq!(made.read().unwrap().nodes[1].pid, Some(7));
        fs::remove_dir_all(&path).unwrap();
    }
}
