//! What a seed means: the options of one run.
//!
//! Swarm testing: each kind of fault is on in about half of the runs, with a rate of its own, so
//! that some runs have only one and reach states which a mix of all would never reach.

use ballast_env::planted::PlantedBug;

use crate::host::workload::Mix;
use crate::nemesis::Faults;
use crate::rng::Rng;
use crate::system::System;

/// The options of one run.
#[derive(Clone, Debug)]
pub struct Plan {
    /// Storage nodes.
    pub nodes: u32,
    /// A bug that the programs are to have.
    pub planted: Option<PlantedBug>,
    /// Hosts per volume that write, one at a time.
    pub writers: u32,
    /// Hosts per volume that only read.
    pub readers: u32,
    /// What each host does.
    pub mix: Mix,
    /// What goes wrong.
    pub faults: Faults,
    /// Largest rate difference of two clocks, in parts per million.
    pub drift_ppm: u64,
    /// Answered requests that end the safety phase, once there were enough faults.
    pub steps: u64,
    /// Faults that are enough.
    pub fault_count: u64,
    /// Virtual time that ends it in any case, in milliseconds.
    pub safety_ms: u64,
    /// Virtual time in which everything must work again afterwards, in milliseconds.
    pub liveness_ms: u64,
}

impl Plan {
    /// The plan of `seed`; `steps` replaces its own.
    pub fn of(seed: u64, steps: Option<u64>, system: &impl System) -> Self {
        let rng = Rng::named(seed, "plan", 0);
        let some = |low, high| rng.between(low, high);
        let volume_blocks = system.volumes().iter().map(|volume| volume.blocks).min();
        let volume_blocks = volume_blocks.expect("a system has a volume");
        let attaches = system.fences();
        let shape = Rng::named(seed, "shape", 0);
        let writers = if attaches { *shape.pick(&[1, 1, 2]) } else { 1 };
        let readers = if attaches { *shape.pick(&[0, 0, 1]) } else { 0 };
        let mut mix = Mix {
            depth: *rng.pick(&[1, 2, 4, 8, 16]),
            // All of a volume that does not fit the pools.
            blocks: if volume_blocks > 8 << 10 {
                volume_blocks
            } else {
                *rng.pick(&[2, 8, 32, 64])
            },
            request_blocks_max: some(1, system.request_blocks_max()),
            read_rate: some(100_000, 800_000),
            zero_rate: *rng.pick(&[0, 20_000, 150_000]),
            pause_ms_max: *rng.pick(&[0, 5, 50]),
            patience_ms: *rng.pick(&[500, 3_000, 15_000]),
            fenced: attaches,
            reader: false,
            leave_after: if writers > 1 { shape.between(5, 100) } else { 0 },
            leased: attaches && Rng::named(seed, "leases", 0).chance(330_000),
            lanes: 0,
            moves_hidden: false,
        };
        let lanes = Rng::named(seed, "host lanes", 0);
        // Who takes the volume from another without a lease may take it from one that asks again.
        let alone = writers == 1 || mix.leased;
        mix.lanes = if attaches && alone { *lanes.pick(&[0, 0, 2, 4]) } else { 0 };
        let faults = Faults::of(&rng);
        Self {
            nodes: system.nodes(),
            planted: None,
            writers,
            readers,
            mix,
            fault_count: if faults.happen() { some(5, 40) } else { 0 },
            faults,
            drift_ppm: *rng.pick(&[0, 50, 20_000]),
            steps: steps.unwrap_or_else(|| some(300, 3_000)),
            // Time must not end a run whose length was asked for: a stall of a second per answer is
            // far more than any fault causes.
            safety_ms: some(20_000, 120_000).max(steps.map_or(0, |steps| steps * 1_000)),
            liveness_ms: 60_000,
        }
    }
}
