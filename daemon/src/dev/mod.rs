//! `ballastd dev`: a whole cluster on this machine, one process per node, kept in one folder.
//!
//! Owns the folder (`folder`), its ports (`ports`), the processes (`supervise`, `node`) and what
//! is printed (`guide`). For development and tests: everything listens on 127.0.0.1 only.

mod client;
mod folder;
mod guide;
pub mod node;
mod ports;
mod supervise;

use std::str::FromStr;

use ballast_block::BLOCK_SIZE;
use ballast_block::limits::{NODE_SHARDS_MAX, POOL_SEGMENTS_MIN, SEGMENT_BYTES_MIN};
use ballast_node::cluster::{check_volume_name, check_volume_size};

use crate::cli::DevArguments;
use crate::config::{Log, LogFormat};
use crate::error::DaemonError;
use crate::size::Size;
use folder::Folder;
use supervise::Plan;

/// Nodes of a new cluster when no number is given.
const NODES_DEFAULT: u32 = 3;

/// Replicas of a new volume, if there are as many nodes.
const REPLICAS: u32 = 3;

/// A volume that is wanted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WantedVolume {
    /// Its name.
    pub name: String,
    /// Its size.
    pub size: Size,
}

impl FromStr for WantedVolume {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let Some((name, size)) = text.split_once('=') else {
            return Err(format!("{text:?} has no size: write NAME=SIZE, as in demo=1GiB"));
        };
        let size: Size = size.parse().map_err(|error| format!("{text:?}: {error}"))?;
        check_volume_name(name).map_err(|refusal| refusal.to_string())?;
        check_volume_size(name, size.0).map_err(|refusal| refusal.to_string())?;
        Ok(Self { name: name.to_owned(), size })
    }
}

/// Runs the cluster until a signal ends it.
///
/// # Errors
/// [`DaemonError`]; nothing is written when the arguments are wrong.
pub fn run(arguments: &DevArguments) -> Result<(), DaemonError> {
    let volumes = check(arguments)?;
    crate::logging::start(&Log { format: LogFormat::Text, level: "warn".into() });
    let (nodes, pools) = (arguments.nodes, arguments.pools);
    let (folder, is_new) = match Folder::find(&arguments.data)? {
        Some(folder) => (folder, false),
        None => {
            let (nodes, pools) = (nodes.unwrap_or(NODES_DEFAULT), pools.unwrap_or(1));
            (Folder::create(&arguments.data, nodes, pools)?, true)
        }
    };
    let description = folder.read()?;
    let has = description.nodes.len() as u32;
    for (what, wanted, has) in
        [("nodes", nodes, has), ("pools per node", pools, description.pools_per_node)]
    {
        if let Some(wanted) = wanted
            && wanted != has
        {
            return Err(DaemonError::Usage(format!(
                "{} holds a cluster of {has} {what}, not {wanted}: leave --nodes and --pools away, \
                 or use another folder",
                arguments.data.display()
            )));
        }
    }
    let _running = folder.lock_cluster()?;
    folder.complete(arguments.pool_size)?;
    let plan = Plan {
        folder,
        volumes,
        replicas: REPLICAS.min(has),
        respawn: arguments.respawn,
        log_level: arguments.log_level.clone(),
        is_new,
    };
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(DaemonError::system("start the runtime"))?;
    runtime.block_on(plan.run())
}

fn check(arguments: &DevArguments) -> Result<Vec<WantedVolume>, DaemonError> {
    let wrong = |message: String| Err(DaemonError::Usage(message));
    if let Some(nodes) = arguments.nodes
        && ![1, 3, 5].contains(&nodes)
    {
        return wrong(format!("--nodes {nodes}: a cluster has 1, 3 or 5 nodes"));
    }
    let most = NODE_SHARDS_MAX as u32;
    if let Some(pools) = arguments.pools.filter(|pools| !(1..=most).contains(pools)) {
        return wrong(format!("--pools {pools}: a node has 1 to {most} pools"));
    }
    let least = POOL_SEGMENTS_MIN * SEGMENT_BYTES_MIN;
    let pool = arguments.pool_size.0;
    if pool < least || !pool.is_multiple_of(BLOCK_SIZE as u64) {
        return wrong(format!(
            "--pool-size {}: a pool has at least {} and is a multiple of {BLOCK_SIZE} bytes",
            arguments.pool_size,
            Size(least)
        ));
    }
    if let Err(problem) = crate::logging::check_level(&arguments.log_level) {
        return wrong(format!("--log-level: {problem}"));
    }
    let volumes = arguments.volumes.iter().map(|text| text.parse::<WantedVolume>());
    let volumes: Result<Vec<_>, _> = volumes.collect();
    volumes.or_else(|problem| wrong(format!("--volume {problem}")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn volumes_are_named_and_sized() {
        let demo: WantedVolume = "demo=1GiB".parse().unwrap();
        assert_eq!(demo, WantedVolume { name: "demo".into(), size: Size(1 << 30) });
        for (text, names) in [
            ("x", "size"),
            ("x=12parsecs", "12parsecs"),
            ("a/b=1GiB", "a/b"),
            ("x=0", "0"),
            ("x=1048577", "multiple"),
            ("=1GiB", "name"),
        ] {
            let error = text.parse::<WantedVolume>().unwrap_err();
            assert!(error.contains(names), "{text}: {error}");
        }
    }
}
