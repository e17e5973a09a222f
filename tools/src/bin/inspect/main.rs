//! `ballast-inspect`: looks at a pool that no node uses now, and says what lies where and whether
//! it is whole. Writes nothing.

use std::path::PathBuf;
use std::process::ExitCode;

use ballast_env::linux::LinuxShard;
use ballast_raft_store::survey::{Located, Survey, survey};
use clap::Parser;
use serde_json::{Value, json};

/// Looks at a pool that no node uses now: superblocks, checkpoint, log, maps. Writes nothing.
/// Ends with 0 if all is whole, 2 if something is damaged, 1 if the pool can't be opened at all.
#[derive(Debug, Parser)]
#[command(
    name = "ballast-inspect",
    version,
    after_help = "Examples:\n  ballast-inspect /var/lib/ballast/pool\n  \
                  ballast-inspect --payload -o json /dev/nvme1n1"
)]
struct Cli {
    /// The pool: a file, partition or disk
    pool: PathBuf,
    /// Read everything that the extent maps refer to, too
    #[arg(long)]
    payload: bool,
    /// List every place, not only what is damaged
    #[arg(long)]
    places: bool,
    /// table or json
    #[arg(short, long, default_value = "table", value_parser = ["table", "json"])]
    output: String,
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    let (path, payload) = (cli.pool.clone(), cli.payload);
    let looked = LinuxShard::run(async move |env| survey(&env, &path, payload).await);
    let survey = match looked {
        Ok(Ok(survey)) => survey,
        Ok(Err(error)) => return failed(&cli, &error),
        Err(error) => return failed(&cli, &error),
    };
    let damaged = survey.places.iter().filter(|place| !place.whole).count();
    print(&cli, &survey);
    if damaged == 0 && survey.pool.findings.is_empty() {
        ExitCode::SUCCESS
    } else {
        ExitCode::from(2)
    }
}

fn failed(cli: &Cli, error: &dyn std::fmt::Display) -> ExitCode {
    eprintln!("{}: {error}", cli.pool.display());
    ExitCode::FAILURE
}

fn print(cli: &Cli, survey: &Survey) {
    let pool = &survey.pool;
    let info = &pool.info;
    let shown: Vec<&Located> =
        survey.places.iter().filter(|place| cli.places || !place.whole).collect();
    if cli.output == "json" {
        let place = |it: &&Located| -> Value {
            json!({
                "kind": it.kind.name(), "replica": it.replica.0, "family": it.family.0,
                "offset": it.offset, "bytes": it.bytes, "whole": it.whole, "detail": it.detail,
            })
        };
        let findings: Vec<String> = pool.findings.iter().map(|it| format!("{it:?}")).collect();
        let all = json!({
            "pool": info.pool.to_string(), "cluster": info.cluster.to_string(),
            "node": info.node.0, "boot_counter": info.boot_counter,
            "segments": info.geometry.segments, "segment_bytes": info.geometry.segment_bytes(),
            "checkpoint": pool.checkpoint, "records_since": pool.replay.len(),
            "findings": findings, "places": shown.iter().map(place).collect::<Vec<_>>(),
        });
        println!("{all:#}");
        return;
    }
    println!("pool        {}", info.pool);
    println!("cluster     {}", info.cluster);
    println!("node        {}", info.node);
    println!("starts      {}", info.boot_counter);
    let segments = info.geometry.segments;
    println!("segments    {segments} of {} bytes", info.geometry.segment_bytes());
    println!("checkpoint  {}, {} records since", pool.checkpoint, pool.replay.len());
    for finding in &pool.findings {
        println!("found       {finding:?}");
    }
    for it in shown {
        let state = if it.whole { "whole" } else { "DAMAGED" };
        println!(
            "{state:8} {:18} {} {} bytes at {} ({})",
            it.kind.name(),
            it.replica,
            it.bytes,
            it.offset,
            it.detail
        );
    }
    let damaged = survey.places.iter().filter(|place| !place.whole).count();
    println!("{} places looked at, {damaged} damaged", survey.places.len());
}
