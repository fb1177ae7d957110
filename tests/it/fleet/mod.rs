//! One frontend before many workers: routing, migration, disaggregation.

mod disagg;
mod discovery;
mod events;
mod migration;
mod models;
mod moves;
mod nats_accounts;
mod outage;
mod routing;
mod servers;
mod trace;
mod whole;

use kvbm_tests::{Node, Process, WorkerOptions};

/// Workers of a node, each with one thread, in blocks of so many tokens.
fn workers(node: &Node, count: usize, pool_blocks: usize, tokens_per_block: usize) -> Vec<Process> {
    let start = |number| worker(node, number, pool_blocks, tokens_per_block, &[]);
    (0..count).map(start).collect()
}

fn worker(node: &Node, number: usize, pool_blocks: usize, tokens_per_block: usize, more: &[&str]) -> Process {
    let mut arguments: Vec<String> = ["--threads", "1"].map(String::from).into();
    arguments.extend(more.iter().map(|argument| (*argument).to_owned()));
    let options = WorkerOptions { pool_blocks, tokens_per_block, arguments, ..WorkerOptions::default() };
    node.worker(&format!("worker-{number}"), &options).0
}
