//! What `ballastd dev` prints when the cluster is up: lines that work when they are pasted.

use std::path::Path;

use super::folder::{Description, Folder};

/// How to use the cluster.
pub fn text(folder: &Folder, description: &Description) -> String {
    let program = std::env::current_exe().unwrap_or_else(|_| "ballastd".into());
    let near = |name: &str| {
        let beside = program.parent().unwrap_or(Path::new("")).join(name);
        if beside.exists() { beside.display().to_string() } else { name.to_owned() }
    };
    let (ballastd, ballastctl) = (program.display().to_string(), near("ballastctl"));
    let data = folder.path().display();
    let count = description.nodes.len();
    let nodes = if count == 1 { "1 node".to_owned() } else { format!("{count} nodes") };
    let pools = match description.pools_per_node {
        1 => String::new(),
        pools => format!(" with {pools} pools each"),
    };
    let mut text = format!("\nA cluster of {nodes}{pools} runs; {data} keeps it.\n\n");
    for node in &description.nodes {
        let pid = node.pid.map_or("-".to_owned(), |pid| pid.to_string());
        text.push_str(&format!(
            "  node {}  pid {pid:<8} {}  {}  {}\n",
            node.id, node.nbd, node.grpc, node.metrics
        ));
    }
    if let Some(volume) = description.volumes.first() {
        let (name, nbd) = (&volume.name, &volume.nbd);
        text.push_str(&format!(
            "\nAny NBD client can use volume {name} ({} bytes), on any node, as long as nobody has \
             leased it.\n(A development cluster lets in whoever connects, without a lease: `lease list` \
             does not show it,\n`volume show` does. Production needs a lease.)\n\n  \
             nbdinfo {nbd}\n  \
             qemu-img info {nbd}\n  \
             qemu-io -f raw -c 'write -P 0x5a 0 1M' -c 'read -P 0x5a 0 1M' {nbd}\n  \
             nbdcopy --progress {nbd} {name}.img\n  \
             nbdinfo --map {nbd}\n",
            volume.size_bytes
        ));
    }
    if let Some(node) = description.nodes.first() {
        let grpc = &node.grpc;
        text.push_str(&format!(
            "\nAdministration:\n\n  \
             {ballastctl} --endpoint {grpc} status\n  \
             {ballastctl} --endpoint {grpc} volume list\n  \
             {ballastctl} --endpoint {grpc} volume create more --size 1GiB --replicas {}\n",
            description.nodes.len().min(3)
        ));
    }
    let last = description.nodes.last().map_or(1, |node| node.id);
    text.push_str(&format!(
        "\nKill any one node; this brings it back:\n\n  \
         {ballastd} dev-node --data {data} --id {last}\n\n\
         Logs are in {data}/node-*/log. Ctrl-C stops the cluster and keeps its data.\n"
    ));
    text
}
