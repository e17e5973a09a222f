//! `simulate`: runs seeds, one line each; a failing seed prints the command that replays it.
//!
//! Each seed runs in a process of its own, because the libraries below keep random state per
//! process: only so does a seed replay exactly.

use std::io::Read;
use std::process::{Child, Command, ExitCode, Stdio};
use std::time::{Duration, Instant};

use ballast_env::planted;
use ballast_sim::nemesis::{Fault, Faults};
use ballast_sim::plan::Plan;
use ballast_sim::toy::Planted;
use ballast_sim::whole::{Order, run_node, run_toy};
use clap::{Args, Parser, ValueEnum};

/// Runs whole clusters in one thread from one seed, with faults, and checks the guarantees.
#[derive(Parser)]
struct Options {
    /// Run this one seed, here.
    #[arg(long, conflicts_with_all = ["seeds", "hours"])]
    seed: Option<u64>,
    /// Run the seeds A..B (B is left out).
    #[arg(long, value_name = "A..B", value_parser = parse_range)]
    seeds: Option<(u64, u64)>,
    /// Run seeds for so many hours, from --first on.
    #[arg(long, conflicts_with = "seeds")]
    hours: Option<f64>,
    /// First seed of --hours.
    #[arg(long, default_value_t = 0)]
    first: u64,
    /// Seeds that run at the same time.
    #[arg(long, default_value_t = 1)]
    jobs: usize,
    /// Print every event of --seed to standard error.
    #[arg(long)]
    verbose: bool,
    /// Print the program's own log of --seed to standard error; a filter as `ballast_node=debug`.
    #[arg(long)]
    log: Option<String>,
    #[command(flatten)]
    run: RunOptions,
}

#[derive(Args, Clone)]
struct RunOptions {
    /// Requests answered before the faults end, in place of the seed's own number.
    #[arg(long)]
    steps: Option<u64>,
    /// Names under which volumes are made, formatted and deleted, in place of the seed's own number.
    #[arg(long)]
    claims: Option<usize>,
    /// What runs on the nodes.
    #[arg(long, value_enum, default_value = "node")]
    system: SystemName,
    /// A bug to plant, which the seeds must find.
    #[arg(long, value_enum)]
    plant: Option<PlantedBug>,
    /// Faults that happen, in place of the seed's own choice.
    #[arg(long, value_enum, value_delimiter = ',')]
    faults: Vec<Fault>,
    /// Mean time between two of --faults, in milliseconds.
    #[arg(long, default_value_t = 1_000)]
    every: u64,
    /// Real seconds after which a run counts as hung.
    #[arg(long, default_value_t = 300)]
    limit: u64,
}

#[derive(Clone, Copy, ValueEnum)]
enum SystemName {
    /// The product.
    Node,
    /// The small replicated store that the simulator is proved with.
    Toy,
}

#[derive(Clone, Copy, ValueEnum)]
enum PlantedBug {
    LeaderRestore,
    EarlyAck,
    SkippedReadGate,
    LiveBlockFreed,
    EarlyCheckpoint,
    LooseFormatting,
    EpochsAnew,
    /// Of hosts: servers can't see that a request was asked again on another connection.
    HiddenMoves,
    /// Of the toy only.
    ForgetsVotes,
}

impl RunOptions {
    fn adjust(&self, plan: &mut Plan) {
        plan.planted = self.planted();
        plan.mix.moves_hidden = matches!(self.plant, Some(PlantedBug::HiddenMoves));
        if !self.faults.is_empty() {
            plan.faults = Faults::only(&self.faults, self.every);
            plan.fault_count = 20;
        }
    }

    /// The options as they must be given again.
    fn arguments(&self) -> Vec<String> {
        let mut arguments = vec![format!("--system={}", name_of(self.system))];
        arguments.extend(self.steps.map(|steps| format!("--steps={steps}")));
        arguments.extend(self.claims.map(|claims| format!("--claims={claims}")));
        arguments.extend(self.plant.map(|bug| format!("--plant={}", name_of(bug))));
        if !self.faults.is_empty() {
            let names: Vec<String> = self.faults.iter().copied().map(name_of).collect();
            arguments.push(format!("--faults={}", names.join(",")));
            arguments.push(format!("--every={}", self.every));
        }
        arguments.push(format!("--limit={}", self.limit));
        arguments
    }

    fn planted(&self) -> Option<planted::PlantedBug> {
        match self.plant? {
            PlantedBug::LeaderRestore => Some(planted::PlantedBug::LeaderRestore),
            PlantedBug::EarlyAck => Some(planted::PlantedBug::EarlyAck),
            PlantedBug::SkippedReadGate => Some(planted::PlantedBug::SkippedReadGate),
            PlantedBug::LiveBlockFreed => Some(planted::PlantedBug::LiveBlockFreed),
            PlantedBug::EarlyCheckpoint => Some(planted::PlantedBug::EarlyCheckpoint),
            PlantedBug::LooseFormatting => Some(planted::PlantedBug::LooseFormatting),
            PlantedBug::EpochsAnew => Some(planted::PlantedBug::EpochsAnew),
            PlantedBug::HiddenMoves | PlantedBug::ForgetsVotes => None,
        }
    }

    fn planted_in_toy(&self) -> Planted {
        let mut planted = Planted::default();
        match self.plant {
            Some(PlantedBug::LeaderRestore) => planted.leader_restore = true,
            Some(PlantedBug::EarlyAck) => planted.early_ack = true,
            Some(PlantedBug::SkippedReadGate) => planted.unchecked_reads = true,
            Some(PlantedBug::ForgetsVotes) => planted.forgets_votes = true,
            // Of nothing that it has.
            Some(_) | None => {}
        }
        planted
    }
}

fn name_of(value: impl ValueEnum) -> String {
    value.to_possible_value().expect("no value is skipped").get_name().to_owned()
}

fn parse_range(text: &str) -> Result<(u64, u64), String> {
    let (first, end) = text.split_once("..").ok_or("write A..B")?;
    let number = |text: &str| text.parse::<u64>().map_err(|error| format!("{text}: {error}"));
    Ok((number(first)?, number(end)?))
}

fn main() -> ExitCode {
    let options = Options::parse();
    match options.seed {
        Some(seed) => one(seed, &options),
        None => many(&options),
    }
}

fn one(seed: u64, options: &Options) -> ExitCode {
    if let Some(filter) = &options.log {
        let log = tracing_subscriber::fmt().with_env_filter(filter).without_time().with_ansi(false);
        log.with_writer(std::io::stderr).init();
    }
    let limit = Duration::from_secs(options.run.limit);
    std::thread::spawn(move || {
        std::thread::sleep(limit);
        println!("seed {seed} FAILED hung for {limit:?} of real time");
        std::process::exit(3);
    });
    let of_run = options.run.clone();
    let verbose = options.verbose;
    // On a thread of its own: hash maps that logging or arguments made have drawn from this
    // thread's random state, and with them the run would be another.
    let run = std::thread::spawn(move || {
        let adjust = |plan: &mut Plan| of_run.adjust(plan);
        let RunOptions { steps, claims, .. } = of_run;
        let order = Order { seed, steps, claims, verbose, adjust: &adjust };
        match of_run.system {
            SystemName::Node => run_node(&order),
            SystemName::Toy => run_toy(&order, of_run.planted_in_toy()),
        }
    });
    let failure = match run.join() {
        Ok(report) => {
            println!("{report}");
            let Some(failure) = &report.failure else { return ExitCode::SUCCESS };
            report.tail.iter().for_each(|line| eprintln!("{line}"));
            failure.to_string()
        }
        Err(panic) => {
            println!("seed {seed} FAILED by a panic");
            let text = panic.downcast_ref::<String>().map(String::as_str);
            text.or_else(|| panic.downcast_ref::<&str>().copied()).unwrap_or("(no text)").to_owned()
        }
    };
    println!("seed {seed}: {failure}");
    println!("replay: simulate --seed {seed} {}", options.run.arguments().join(" "));
    ExitCode::FAILURE
}

fn many(options: &Options) -> ExitCode {
    let (first, end) = options.seeds.unwrap_or((options.first, u64::MAX));
    let started = Instant::now();
    let time_left = || match options.hours {
        Some(hours) => started.elapsed().as_secs_f64() < hours * 3600.0,
        None => options.seeds.is_some(),
    };
    let mut seeds = first..end;
    let mut running: Vec<Child> = Vec::new();
    let (mut passed, mut failed) = (0_u64, 0_u64);
    loop {
        while running.len() < options.jobs.max(1) && time_left() {
            let Some(seed) = seeds.next() else { break };
            running.push(start(seed, options));
        }
        if running.is_empty() {
            break;
        }
        let child = running.remove(0);
        if finish(child) {
            passed += 1;
        } else {
            failed += 1;
        }
    }
    println!("{passed} seeds passed, {failed} failed, in {:?}", started.elapsed());
    if failed > 0 || passed == 0 { ExitCode::FAILURE } else { ExitCode::SUCCESS }
}

fn start(seed: u64, options: &Options) -> Child {
    let program = std::env::current_exe().expect("a running program has a path");
    let mut command = Command::new(program);
    command.arg(format!("--seed={seed}")).args(options.run.arguments());
    command.stdout(Stdio::piped()).stderr(Stdio::null());
    command.spawn().expect("the program that runs can be run")
}

/// Waits for a seed and prints what it said; whether it passed.
fn finish(mut child: Child) -> bool {
    let mut said = String::new();
    if let Some(mut output) = child.stdout.take() {
        // What can't be read is told by the exit status.
        let _ = output.read_to_string(&mut said);
    }
    let status = child.wait().expect("a child can be waited for");
    print!("{said}");
    if !status.success() && !said.contains("FAILED") {
        println!("a seed ended with {status}; run it alone to see its panic");
    }
    status.success()
}
