use clap::Parser;

use super::*;
use crate::replay::drive::Capacities;
use crate::replay::policies::BASELINE;
use crate::replay::workloads::{Workload, trace_of};
use kvbm::ledger::DiskRules;

#[derive(Parser)]
struct Line {
    #[command(flatten)]
    args: ReplayArgs,
}

fn figures(trace: &Trace, mode: RouterMode, more: &[&str]) -> FleetRow {
    let line = ["x", "--workload", "chat", "--device-blocks", "300", "--router-mode", "kv"];
    let args = Line::parse_from(line.iter().chain(more)).args;
    let setup = Setup {
        policy: BASELINE,
        capacities: Capacities { device: 300, host: 2000, disk: 0 },
        disk_rules: DiskRules::default(),
        secret: 1,
        block_bytes: 1000,
        engines: args.fleet.workers,
    };
    FleetRow::new(mode, trace, replay(trace, &setup, &args.fleet, mode).unwrap())
}

#[test]
fn the_same_trace_gives_the_same_figures() {
    let trace = trace_of(&Workload::Chat.requests(2, 1000)).unwrap();
    for mode in [RouterMode::RoundRobin, RouterMode::Kv, RouterMode::LeastLoaded, RouterMode::Random] {
        let [one, other] = [(); 2].map(|()| crate::replay::json(&figures(&trace, mode, &[])).unwrap());
        assert_eq!(one, other);
    }
}

#[test]
fn one_worker_is_one_worker_in_every_mode() {
    let trace = trace_of(&Workload::Agents.requests(2, 1000)).unwrap();
    let alone = ["--nodes", "1", "--workers", "1"];
    let hits = |mode| figures(&trace, mode, &alone).hit_blocks;
    assert_eq!(hits(RouterMode::Kv), hits(RouterMode::RoundRobin));
}

/// Without a weight for it, a quiet fleet would be one worker: all that it knows draws all that comes.
#[test]
fn all_caches_are_used_also_when_there_is_hardly_anything_to_do() {
    let trace = trace_of(&Workload::Chat.requests(2, 3000)).unwrap();
    let quiet = ["--prefill-rate", "1000000000", "--answer-ms", "0"];
    let spread = figures(&trace, RouterMode::Kv, &quiet);
    let plain = figures(&trace, RouterMode::RoundRobin, &quiet);
    assert!(spread.most_over_mean < 1.5, "{spread:?}");
    assert!(spread.hit_blocks > plain.hit_blocks, "{spread:?} {plain:?}");
}
