//! `kvbm replay`: a trace through the block manager's ledger in virtual time. `docs/replay.md` describes formats and
//! figures.
//!
//! ```text
//!  trace (Mooncake, recorded) ─┐
//!                              ├─► Trace ─┬─► drive ──────► the daemon's own ledger ─┐
//!  workloads (made up) ────────┘          ├─► fleet ──────► several of them, and the router's choice
//!                                         └─► reference ──► known policies, plain ───┴─► report, curve, svg
//! ```
//!
//! Copies end at once and no byte is stored: what is measured are decisions.

mod args;
mod curve;
mod drive;
mod fleet;
mod policies;
mod progress;
mod random;
mod reference;
mod report;
mod svg;
mod trace;
mod workloads;

use std::fs::File;
use std::io::BufWriter;
use std::path::Path;

pub(crate) use args::ReplayArgs;
use drive::{Capacities, Setup};
use policies::{Candidate, Selection};
use progress::Progress;
use report::Row;
use trace::Trace;
use workloads::Workload;

/// Exit code 0 when replayed, whatever the figures.
pub(crate) fn run(args: &ReplayArgs) -> Result<u8, String> {
    if let (Some(workload), Some(path)) = (args.workload, &args.write_trace) {
        return write_trace(args, workload, path).map(|()| 0);
    }
    if !args.curve && args.capacities().total() == 0 {
        return Err("no tier has room: name --host-blocks, --device-blocks or --curve".to_owned());
    }
    if args.capacities().disk > 0 && args.capacities().host == 0 && !args.curve {
        return Err(
            "--disk-blocks without --host-blocks: blocks get to disk from host memory only".to_owned()
        );
    }
    let trace = prepare(args)?;
    if !args.fleet.modes().is_empty() {
        print!("{}", fleet::compare(args, &trace)?);
        return Ok(0);
    }
    let text = if args.curve { draw_curve(args, &trace)? } else { compare(args, &trace)? };
    print!("{text}");
    Ok(0)
}

fn prepare(args: &ReplayArgs) -> Result<Trace, String> {
    let trace = match (&args.trace, args.workload) {
        (Some(path), _) => trace::open(path, args.trace_tokens_per_block)?,
        (None, Some(workload)) => workloads::trace_of(&workload.requests(args.seed, args.requests as usize))?,
        (None, None) => unreachable!("the command line demands one of them"),
    };
    let trace = match args.tokens_per_block {
        Some(tokens_per_block) => trace.with_tokens_per_block(tokens_per_block)?,
        None => trace,
    };
    trace.repeated(args.repeat, args.fresh_ids)
}

fn write_trace(args: &ReplayArgs, workload: Workload, path: &Path) -> Result<(), String> {
    let cannot = |error: std::io::Error| format!("cannot write trace {}: {error}", path.display());
    let file = File::create(path).map_err(cannot)?;
    let requests = workload.requests(args.seed, args.requests as usize);
    trace::write_mooncake(&requests, BufWriter::new(file)).map_err(cannot)
}

fn rows(args: &ReplayArgs, trace: &Trace, capacities: Capacities) -> Result<Vec<Row>, String> {
    let block_bytes = args.block_bytes(trace.block_bytes, trace.tokens_per_block);
    let mut rows = Vec::new();
    for candidate in args.policy.candidates() {
        rows.push(match candidate {
            Candidate::Ledger(policy) => {
                let setup = Setup {
                    policy,
                    capacities,
                    disk_rules: args.disk_rules(),
                    secret: args.secret,
                    block_bytes,
                    engines: 1,
                };
                let what = format!("{} with {} blocks", policy.name(), capacities.total());
                let outcome = drive::replay(trace, &setup, Progress::new(what, trace.events.len()))?;
                Row::of_ledger(policy, trace, capacities, &outcome, block_bytes)
            }
            Candidate::Reference(reference) => {
                let hits = reference.hit_blocks(trace, capacities.total());
                Row::of_reference(candidate, trace, capacities, hits)
            }
        });
    }
    report::close_gaps(&mut rows);
    Ok(rows)
}

fn compare(args: &ReplayArgs, trace: &Trace) -> Result<String, String> {
    let rows = rows(args, trace, args.capacities())?;
    if !args.json {
        return Ok(report::table(&rows));
    }
    match (args.policy, rows.first()) {
        (Selection::One(_), Some(row)) => json(row),
        _ => json(&rows),
    }
}

fn draw_curve(args: &ReplayArgs, trace: &Trace) -> Result<String, String> {
    let mut sizes = args.capacities.clone();
    if sizes.is_empty() {
        sizes = curve::default_capacities(trace.unique_blocks());
    }
    sizes.sort_unstable();
    sizes.dedup();
    let mut by_capacity = Vec::new();
    for host in sizes {
        by_capacity.push((host, rows(args, trace, Capacities { host, ..args.capacities() })?));
    }
    let lines = curve::lines(&by_capacity);
    if let Some(path) = &args.svg {
        let cannot = |error| format!("cannot write plot {}: {error}", path.display());
        std::fs::write(path, svg::plot(&title(args, trace), &lines)).map_err(cannot)?;
    }
    if args.json {
        let rows: Vec<Row> = by_capacity.into_iter().flat_map(|(_, rows)| rows).collect();
        return json(&rows);
    }
    Ok(curve::table(&lines))
}

fn title(args: &ReplayArgs, trace: &Trace) -> String {
    let name = match (&args.trace, args.workload) {
        (Some(path), _) => {
            path.file_name().map_or_else(String::new, |name| name.to_string_lossy().into_owned())
        }
        (None, workload) => workload.map_or_else(String::new, |workload| workload.name().to_owned()),
    };
    let (requests, tokens) = (trace.requests(), trace.tokens_per_block);
    format!("Hit ratio: {name}, {requests} requests, blocks of {tokens} tokens")
}

fn json(value: &impl serde::Serialize) -> Result<String, String> {
    let text = serde_json::to_string(value).map_err(|error| format!("cannot print the result: {error}"))?;
    Ok(text + "\n")
}
