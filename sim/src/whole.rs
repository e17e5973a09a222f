//! Whole runs of either system. Not generic, so that the code of a whole cluster is generated
//! here once and not again in each program and test that runs it.

use crate::ballast::{Ballast, Sizes};
use crate::cluster::{Report, simulate};
use crate::plan::Plan;
use crate::system::System;
use crate::toy::{Planted, Toy};

/// How to run a seed.
pub struct Order<'a> {
    /// The seed.
    pub seed: u64,
    /// Requests answered before the faults end, in place of the seed's own number.
    pub steps: Option<u64>,
    /// Claims, in place of the seed's own number; the toy has none.
    pub claims: Option<usize>,
    /// Print every event to standard error.
    pub verbose: bool,
    /// What is to be other than the seed has it.
    pub adjust: &'a dyn Fn(&mut Plan),
}

impl Order<'_> {
    fn run(&self, system: impl System) -> Report {
        let mut plan = Plan::of(self.seed, self.steps, &system);
        (self.adjust)(&mut plan);
        simulate(system, self.seed, plan, self.verbose)
    }
}

/// Runs the product.
pub fn run_node(order: &Order<'_>) -> Report {
    let mut sizes = Sizes::of(order.seed);
    sizes.claims = order.claims.unwrap_or(sizes.claims);
    order.run(Ballast::new(order.seed, sizes))
}

/// Runs the small replicated store that the simulator is proved with.
pub fn run_toy(order: &Order<'_>, planted: Planted) -> Report {
    order.run(Toy::new(planted))
}
