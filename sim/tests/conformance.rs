//! The simulated environment against the suite that every environment passes.

use std::cell::Cell;
use std::path::Path;
use std::rc::Rc;

use ballast_block::NodeId;
use ballast_env::conformance;
use ballast_env::network::Address;
use ballast_sim::env::disk::DiskFaults;
use ballast_sim::machine::MachineOptions;
use ballast_sim::world::run;

fn conforms(seed: u64, drift_ppm: i32, address: fn(u64) -> Address) {
    run(seed, |world| async move {
        let options = MachineOptions { drift_ppm, ..Default::default() };
        let machine = world.add_machine(NodeId(1), options);
        let latencies = DiskFaults { latency_max_ms: 1 + seed, ..Default::default() };
        machine.disk().set_faults(latencies);
        let passed = Rc::new(Cell::new(false));
        let flag = passed.clone();
        machine.start(move |env| async move {
            conformance::all(&env, Path::new("/folder"), &address(seed)).await;
            flag.set(true);
        });
        while machine.is_running() {
            world.sleep_ms(100).await;
        }
        assert!(passed.get());
    });
}

#[test]
fn over_tcp() {
    for seed in 0..10 {
        conforms(seed, 0, |_| Address::Tcp("127.0.0.1:0".parse().unwrap()));
    }
}

#[test]
fn over_unix_sockets_with_a_drifting_clock() {
    for (seed, drift) in [(1, -200_000), (2, 37), (3, 250_000)] {
        conforms(seed, drift, |_| Address::Unix("/run/ballast.sock".into()));
    }
}
