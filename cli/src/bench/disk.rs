//! What the disk tier gets out of a drive, against fio with the same sizes, depth and amount: its I/O engine alone, and
//! the whole path of blocks between host memory and disk.

mod engine;
mod path;
mod reference;
mod scratch;

use std::path::PathBuf;
use std::time::Duration;

use clap::Args;
use engine::Engine;
use path::WholePath;
use reference::Reference;
use scratch::{Scratch, has_room};

use super::Row;

const SIZES: [(&str, usize); 3] = [("64KiB", 64 << 10), ("1MiB", 1 << 20), ("4MiB", 4 << 20)];
/// I/Os under way, in the engine and in fio.
const DEPTH: usize = 32;
/// Turns of each of the two.
const ALTERNATIONS: usize = 21;
const TURN: Duration = Duration::from_millis(600);
/// Shares of fio's figure that the project demands: of the engine alone, and of a block's whole path.
const ENGINE_LIMIT: f64 = 0.95;
const PATH_LIMIT: f64 = 0.90;

/// What is measured, and where
#[derive(Debug, Args)]
pub(super) struct DiskArgs {
    /// Directory on the drive to be measured; a cache of this size is made in it, measured and removed
    #[arg(long, default_value = ".", value_name = "DIR")]
    dir: PathBuf,
    /// Size of the cache, in GB of 10^9 bytes
    #[arg(long, default_value_t = 8.0, value_parser = size_gb, value_name = "GB")]
    size_gb: f64,
}

fn size_gb(text: &str) -> Result<f64, String> {
    let size: f64 = text.parse().map_err(|_| "not a number".to_owned())?;
    if (0.5..=1000.0).contains(&size) { Ok(size) } else { Err("must be 0.5 to 1000".to_owned()) }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Direction {
    Write,
    Read,
}

impl Direction {
    fn name(self) -> &'static str {
        match self {
            Self::Write => "write",
            Self::Read => "read",
        }
    }
}

/// One cell of the table.
#[derive(Debug, Clone, Copy)]
struct Task {
    direction: Direction,
    io_bytes: usize,
    time: Duration,
}

/// What one turn gave.
#[derive(Debug, Clone, Copy)]
struct Figure {
    bytes: u64,
    seconds: f64,
    cpu_seconds: f64,
}

impl Figure {
    fn gb_per_second(&self) -> f64 {
        self.bytes as f64 / 1e9 / self.seconds
    }

    fn cpu_seconds_per_gb(&self) -> f64 {
        self.cpu_seconds / (self.bytes as f64 / 1e9)
    }
}

pub(super) fn measure(args: &DiskArgs) -> Result<Vec<Row>, String> {
    let bytes = (args.size_gb * 1e9) as u64;
    has_room(&args.dir, bytes)?;
    let (mut engine_rows, mut path_rows) = (Vec::new(), Vec::new());
    for (name, io_bytes) in SIZES {
        eprintln!("filling a disk cache of {} GB with blocks of {name}", args.size_gb);
        let mut path = WholePath::start(&args.dir, bytes, io_bytes)?;
        // One file for all: two files of one drive may differ by half.
        let scratch = Scratch::open(path.dir())?;
        let engine = Engine::start(&scratch, DEPTH)?;
        let reference = Reference::find(&scratch, DEPTH)?;
        // Writes come last: they leave nothing behind that could be read as blocks.
        for direction in [Direction::Read, Direction::Write] {
            let task = Task { direction, io_bytes, time: TURN };
            let turns = alternate(&scratch, &engine, &reference, &mut path, task)?;
            engine_rows.push(engine_row(&engine, &reference, task, name, &turns));
            path_rows.push(path_row(&reference, task, name, args.size_gb, &turns));
        }
    }
    Ok(engine_rows.into_iter().chain(path_rows).collect())
}

/// What all turns gave, in order.
#[derive(Debug, Default)]
struct Turns {
    engine: Vec<Figure>,
    path: Vec<Figure>,
    reference: Vec<Figure>,
}

fn alternate(
    scratch: &Scratch,
    engine: &Engine,
    reference: &Reference,
    path: &mut WholePath,
    task: Task,
) -> Result<Turns, String> {
    let mut turns = Turns::default();
    for turn in 0..ALTERNATIONS {
        // Who goes first changes: drives remember what they did last.
        for who in (0..3).map(|who| (who + turn) % 3) {
            // Nobody pays for what the one before left in the drive's own memory.
            scratch.sync()?;
            match who {
                0 => turns.engine.push(engine.run(task)?),
                1 => turns.reference.push(reference.run(task)?),
                _ => turns.path.push(path.run(task.direction)?),
            }
        }
    }
    Ok(turns)
}

fn engine_row(engine: &Engine, reference: &Reference, task: Task, size: &str, turns: &Turns) -> Row {
    let about = format!(
        "{} with {}, O_DIRECT, depth {DEPTH}, sequential through a file of {:.1} GB",
        engine.name(),
        engine.registration(),
        engine.file_bytes() as f64 / 1e9,
    );
    let name = format!("disk.{}.{size}", task.direction.name());
    row(name, &about, reference, task, (&turns.engine, &turns.reference), ENGINE_LIMIT)
}

fn path_row(reference: &Reference, task: Task, size: &str, size_gb: f64, turns: &Turns) -> Row {
    let way = match task.direction {
        Direction::Write => "host memory to disk, each block replacing another",
        Direction::Read => "disk to host memory, each block replacing another",
    };
    let about = format!("{way}, checksums, tables and accounts included, in a full cache of {size_gb} GB");
    let name = format!("disk.path.{}.{size}", task.direction.name());
    row(name, &about, reference, task, (&turns.path, &turns.reference), PATH_LIMIT)
}

fn row(
    name: String,
    about: &str,
    reference: &Reference,
    task: Task,
    (ours, theirs): (&[Figure], &[Figure]),
    limit: f64,
) -> Row {
    let gb_per_second = |figures: &[Figure]| median(figures, Figure::gb_per_second);
    let cpu_per_gb = |figures: &[Figure]| median(figures, Figure::cpu_seconds_per_gb);
    let turns = |figures: &[Figure]| -> String {
        figures.iter().map(|figure| format!(" {:.2}", figure.gb_per_second())).collect()
    };
    eprintln!("{name}: GB/s{}, {}{}", turns(ours), reference.name(), turns(theirs));
    let detail = format!(
        "{about}; medians of {ALTERNATIONS} alternations of {:.1} s with {}; CPU seconds per GB: {:.3}, {} {:.3}",
        task.time.as_secs_f64(),
        reference.describe(),
        cpu_per_gb(ours),
        reference.name(),
        cpu_per_gb(theirs),
    );
    let row = Row::new(name, gb_per_second(ours), "GB/s");
    row.ceiling(gb_per_second(theirs)).ratio_at_least(limit).detail(detail)
}

fn median(figures: &[Figure], of: fn(&Figure) -> f64) -> f64 {
    let mut sorted: Vec<f64> = figures.iter().map(of).collect();
    sorted.sort_by(f64::total_cmp);
    sorted[sorted.len() / 2]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn engine_and_reference_move_whole_ios_through_the_same_file() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("file"), vec![7; 64 << 20]).unwrap();
        let Ok(scratch) = Scratch::open(dir.path()) else {
            return eprintln!("no O_DIRECT here");
        };
        let engine = Engine::start(&scratch, 4).unwrap();
        for direction in [Direction::Write, Direction::Read] {
            let task = Task { direction, io_bytes: 1 << 20, time: Duration::from_millis(50) };
            for reference in [Reference::find(&scratch, 4).unwrap(), Reference::plain(&scratch, 4).unwrap()] {
                for figure in [engine.run(task).unwrap(), reference.run(task).unwrap()] {
                    assert!(figure.bytes > 0 && figure.bytes.is_multiple_of(1 << 20), "{figure:?}");
                    assert!(figure.seconds > 0.04, "{figure:?}");
                }
            }
        }
    }

    #[test]
    fn a_directory_without_space_is_refused_with_the_numbers() {
        let refused = has_room(&std::env::temp_dir(), 1 << 60).unwrap_err();
        assert!(refused.contains("GB are free"), "{refused}");
    }
}
