//! `ballastd dev-node`: one node of a development cluster, in this process.

use nix::sys::prctl;
use nix::sys::signal::Signal;
use nix::unistd::{Pid, getppid};

use super::folder::{Description, Folder, NodeDescription};
use crate::cli::DevNodeArguments;
use crate::error::DaemonError;
use crate::{logging, run};

/// Runs the node until a signal ends it.
///
/// # Errors
/// [`DaemonError`].
pub fn run(arguments: &DevNodeArguments) -> Result<(), DaemonError> {
    if let Some(supervisor) = arguments.supervisor {
        end_with(supervisor)?;
    }
    let data = arguments.data.display();
    let folder = Folder::find(&arguments.data)?;
    let folder = folder.ok_or_else(|| {
        DaemonError::Dev(format!("{data} holds no cluster: start one with `ballastd dev`"))
    })?;
    let id = arguments.id;
    let nodes = folder.read()?.nodes;
    let Some(known) = nodes.iter().find(|node| node.id == id) else {
        let ids: Vec<String> = nodes.iter().map(|node| node.id.to_string()).collect();
        let ids = ids.join(", ");
        return Err(DaemonError::Usage(format!("--id {id}: the nodes of {data} are {ids}")));
    };
    let mut settings = folder.settings(id)?;
    if let Some(level) = &arguments.log_level {
        logging::check_level(level)
            .map_err(|problem| DaemonError::Usage(format!("--log-level: {problem}")))?;
        settings.log.level.clone_from(level);
    }
    logging::start(&settings.log);
    let Some(_running) = folder.lock_node(id)? else {
        let pid = known.pid.map_or("another process".to_owned(), |pid| format!("process {pid}"));
        return Err(DaemonError::Dev(format!(
            "node {id} of {data} is in use: it runs as {pid}; stop that first"
        )));
    };
    folder.change(|description| {
        if let Some(node) = description.nodes.iter_mut().find(|node| node.id == id) {
            node.pid = Some(std::process::id());
        }
    })?;
    run::serve(settings)
}

/// Asks the kernel to end this process when its supervisor ends, however that ends.
fn end_with(supervisor: i32) -> Result<(), DaemonError> {
    prctl::set_pdeathsig(Signal::SIGTERM)
        .map_err(|errno| DaemonError::system("follow the supervisor's end")(errno.into()))?;
    if getppid() != Pid::from_raw(supervisor) {
        return Err(DaemonError::Dev("the supervisor ended before this node began".into()));
    }
    Ok(())
}

/// A node's configuration file.
pub fn config_text(cluster: &Description, node: &NodeDescription) -> String {
    let host = |url: &str| {
        let host = url.split("://").nth(1).unwrap_or(url);
        host.split('/').next().unwrap_or(host).to_owned()
    };
    let mut nbd = vec![format!("\"{}\"", host(&node.nbd))];
    if node.nbd_unix.is_some() {
        nbd.push("\"unix:nbd.sock\"".to_owned());
    }
    let mut text = format!(
        "# Written by `ballastd dev`, once. Yours to change while the node is stopped.\n\
         cluster = \"{}\"\nnode = {}\n{}\n\n\
         [listen]\nnbd = [{}]\ngrpc = \"{}\"\nmetrics = \"{}\"\n\n\
         [volumes]\n# Whoever connects may use a volume that has no lease.\nleases = \"optional\"\n\n\
         [memory]\n# Developers' machines have other uses for it.\nlock = false\n",
        cluster.cluster,
        node.id,
        pools_text(cluster.pools_per_node),
        nbd.join(", "),
        host(&node.grpc),
        host(&node.metrics),
    );
    for node in &cluster.nodes {
        let NodeDescription { id, peer, .. } = node;
        text.push_str(&format!(
            "\n[[nodes]]\nid = {id}\nname = \"node-{id}\"\npeer = \"{peer}\"\n"
        ));
    }
    text
}

/// The line of the configuration that names the pools.
fn pools_text(count: u32) -> String {
    if count == 1 {
        return "pool = \"pool\"".to_owned();
    }
    let further = (1..count).map(|shard| format!(", \"pool-{shard}\""));
    format!("pools = [\"pool\"{}]", further.collect::<String>())
}
