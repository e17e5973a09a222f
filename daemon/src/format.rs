//! `ballastd format`: makes the pools of a new node, or one of them, as an explicit act.

use ballast_block::{PoolId, ReplicaId, ShardId};
use ballast_env::linux::LinuxShard;
use ballast_node::config::NodeConfig;
use ballast_node::node;

use crate::cli::FormatArguments;
use crate::error::DaemonError;
use crate::logging;
use crate::settings::Settings;

/// How to make a pool.
#[derive(Clone, Copy, Debug, Default)]
pub struct Making {
    /// As a new file of that many bytes.
    pub create: Option<u64>,
    /// Although something lies there, unless it is a pool.
    pub overwrite_foreign: bool,
    /// In the place of one that was given up, which had a member of the cluster group.
    pub replacement: Option<ReplicaId>,
}

/// Formats the pools of the configuration, or the one that is asked for, and prints their ids.
///
/// # Errors
/// [`DaemonError`]; what ever was a pool is refused, and then no pool is made.
pub fn run(arguments: &FormatArguments) -> Result<(), DaemonError> {
    let settings = Settings::load(&arguments.config, &arguments.overrides)?;
    let wanted = wanted(arguments, settings.shards.len())?;
    logging::start(&settings.log);
    let making = Making {
        create: arguments.create.map(|size| size.0),
        overwrite_foreign: arguments.overwrite_foreign,
        replacement: arguments.replacement.map(ReplicaId),
    };
    for &shard in &wanted {
        check(&settings.shards[shard as usize], making)?;
    }
    for &shard in &wanted {
        println!("{}", format(&settings.shards[shard as usize], ShardId(shard), making)?);
    }
    Ok(())
}

/// The shards whose pools are to be made.
fn wanted(arguments: &FormatArguments, shards: usize) -> Result<Vec<u32>, DaemonError> {
    let all = 0..u32::try_from(shards).expect("there is a limit of shards");
    match (arguments.shard, arguments.replacement) {
        (Some(shard), _) if !all.contains(&shard) => Err(DaemonError::Usage(format!(
            "--shard {shard}: the node has {shards} pools, counted from 0; add the pool to `pools`"
        ))),
        (Some(shard), Some(_)) if shard != 0 => Err(DaemonError::Usage(format!(
            "--replacement is for the pool of shard 0; the one of shard {shard} is made without"
        ))),
        (Some(shard), _) => Ok(vec![shard]),
        (None, Some(_)) => Ok(vec![0]),
        (None, None) => Ok(all.collect()),
    }
}

/// Refuses what [`format()`] would refuse, and writes nothing: several pools are made all or none.
fn check(config: &NodeConfig, making: Making) -> Result<(), DaemonError> {
    let Making { create, overwrite_foreign, .. } = making;
    if create.is_some() && config.pool.exists() {
        let exists = std::io::Error::from(std::io::ErrorKind::AlreadyExists);
        return Err(DaemonError::file("create", &config.pool)(exists));
    }
    let checked = LinuxShard::run(async |env| {
        node::check_format(&env, config, create, overwrite_foreign).await
    });
    Ok(checked.map_err(DaemonError::system("start a shard"))??)
}

/// Formats the pool of one shard.
///
/// # Errors
/// [`DaemonError`].
pub fn format(config: &NodeConfig, shard: ShardId, making: Making) -> Result<PoolId, DaemonError> {
    let Making { create, overwrite_foreign, replacement } = making;
    let made = LinuxShard::run(async |env| match shard {
        ShardId(0) => node::format(&env, config, create, overwrite_foreign, replacement).await,
        _ => node::format_further(&env, config, create, overwrite_foreign).await,
    });
    Ok(made.map_err(DaemonError::system("start a shard"))??)
}
