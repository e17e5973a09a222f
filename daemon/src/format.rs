//! `ballastd format`: makes the pool of a new node, as an explicit act.

use ballast_block::{PoolId, ReplicaId};
use ballast_env::linux::LinuxShard;
use ballast_node::config::NodeConfig;
use ballast_node::node;

use crate::cli::FormatArguments;
use crate::error::DaemonError;
use crate::logging;
use crate::settings::Settings;

/// Formats the pool of the configuration and prints its id.
///
/// # Errors
/// [`DaemonError`]; what ever was a pool is refused.
pub fn run(arguments: &FormatArguments) -> Result<(), DaemonError> {
    let settings = Settings::load(&arguments.config, &arguments.overrides)?;
    logging::start(&settings.log);
    let create = arguments.create.map(|size| size.0);
    let replacement = arguments.replacement.map(ReplicaId);
    let id = format(&settings.node, create, arguments.overwrite_foreign, replacement)?;
    println!("{id}");
    Ok(())
}

/// Formats the pool of a node.
///
/// # Errors
/// [`DaemonError`].
pub fn format(
    config: &NodeConfig,
    create: Option<u64>,
    overwrite_foreign: bool,
    replacement: Option<ReplicaId>,
) -> Result<PoolId, DaemonError> {
    let made = LinuxShard::run(async |env| {
        node::format(&env, config, create, overwrite_foreign, replacement).await
    });
    Ok(made.map_err(DaemonError::system("start a shard"))??)
}
