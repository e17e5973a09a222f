//! What ends the program, and its exit code.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use ballast_node::node::StartNodeError;
use thiserror::Error;

use crate::config::ConfigError;

/// Why `ballastd` ends before its work is done.
#[derive(Debug, Error)]
pub enum DaemonError {
    /// The command line asks for what can't be.
    #[error("{0}")]
    Usage(String),
    /// The configuration file is wrong.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// The node could not be formatted or started.
    #[error(transparent)]
    StartNode(#[from] StartNodeError),
    /// The node stopped by itself.
    #[error("{0}")]
    NodeEnded(String),
    /// Shard 0 ended, and with it the node.
    #[error(transparent)]
    ShardEnded(#[from] Arc<DaemonError>),
    /// A listener of the daemon itself could not be opened.
    #[error("can't listen on {address} for {purpose}: {problem}")]
    Listen {
        /// What was to be served.
        purpose: &'static str,
        /// Where.
        address: String,
        /// What the system says.
        problem: io::Error,
    },
    /// A system call on a file failed.
    #[error("can't {action} {path}: {problem}")]
    File {
        /// What was to be done.
        action: &'static str,
        /// The file or folder.
        path: PathBuf,
        /// What the system says.
        problem: io::Error,
    },
    /// Something of the system that has no file name failed.
    #[error("can't {action}: {problem}")]
    System {
        /// What was to be done.
        action: &'static str,
        /// What the system says.
        problem: io::Error,
    },
    /// The development cluster did not come up, or is not what the folder says.
    #[error("{0}")]
    Dev(String),
}

impl DaemonError {
    /// 2 for usage and configuration, 1 for everything that happened later.
    pub fn exit_code(&self) -> u8 {
        match self {
            DaemonError::Usage(_)
            | DaemonError::Config(_)
            | DaemonError::StartNode(
                StartNodeError::NodeNotListed(_) | StartNodeError::FoundersInvalid(_),
            ) => 2,
            DaemonError::ShardEnded(error) => error.exit_code(),
            _ => 1,
        }
    }

    /// For `map_err` on file operations.
    pub fn file(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Self {
        let path = path.to_owned();
        move |problem| DaemonError::File { action, path, problem }
    }

    /// For `map_err` on system calls without a file.
    pub fn system(action: &'static str) -> impl FnOnce(io::Error) -> Self {
        move |problem| DaemonError::System { action, problem }
    }
}
