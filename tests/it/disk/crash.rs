//! A daemon is killed with -9 while it writes to disk, and started again: each block whose Stored event was seen is
//! served, byte by byte what was stored, except one whose bytes or entry were changed meanwhile, and what hangs on it.
//!
//! ```text
//!  fill ── kill -9 at a random moment ── (damage) ── start ── recall all ── fill on ── kill -9 or stop ── start ── recall all
//! ```

use std::cell::Cell;
use std::collections::BTreeSet;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use kvbm_connector::Client;
use kvbm_hash::SequenceHash;
use kvbm_proto::v1::{Event, EventKind, Tier};
use kvbm_tests::{
    DaemonOptions, KeyedChain, KeyedEngine, KeyedModel, Node, Random, drill_seeds, flip_entry, flip_payload,
};
use tokio::time::Instant;

/// Seeds that run unless a drill says otherwise: one of each [`Mishap`].
const SHORT: u64 = 4;
/// Daemons at a time: most of a seed is waiting.
const AT_ONCE: usize = 4;
/// Neither is a whole number of pages.
const MODELS: [KeyedModel; 2] = [
    KeyedModel { number: 1, tokens_per_block: 16, block_bytes: 6_000, pool_blocks: 64 },
    KeyedModel { number: 2, tokens_per_block: 32, block_bytes: 20_000, pool_blocks: 48 },
];
const SALTS: [&str; 2] = ["one", "two"];
/// Chains of each model and namespace; pairs begin alike.
const CHAINS: usize = 10;
const HOST_MB: f64 = 2.0;
/// Room for more than is ever stored, and for about a third of it.
const AMPLE_DISK_MB: f64 = 40.0;
const TIGHT_DISK_MB: f64 = 4.0;
/// Longer than filling takes on a slow machine.
const FILL_MAX: Duration = Duration::from_secs(60);
/// What may have been evicted from a tight disk without a watcher having heard of it: as many blocks as are on their way
/// to disk at a time, a quarter of host memory.
const UNHEARD_MAX: usize = 64;

/// What happens to a file while no daemon has it, or to the disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Mishap {
    Nothing,
    /// One byte of a block is changed.
    Payload,
    /// One byte of a block's entry is changed.
    Entry,
    /// The disk is too small for all: blocks are evicted, slots are written again.
    TightDisk,
}

/// How the daemon ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum End {
    Killed,
    Stopped,
}

struct Scenario {
    mishap: Mishap,
    random: Random,
    chains: Vec<(KeyedModel, Vec<KeyedChain>)>,
}

impl Scenario {
    fn new(seed: u64) -> Self {
        let kinds = [Mishap::Nothing, Mishap::Payload, Mishap::Entry, Mishap::TightDisk];
        let mut random = Random::new(seed);
        let chains = MODELS.map(|model| (model, chains(model, &mut random))).to_vec();
        Self { mishap: kinds[(seed % 4) as usize], random, chains }
    }

    fn options(&mut self) -> DaemonOptions {
        let disk_mb = if self.mishap == Mishap::TightDisk { TIGHT_DISK_MB } else { AMPLE_DISK_MB };
        let delay = *self.random.pick(&["0", "200", "1000"]);
        let io = *self.random.pick(&["auto", "pread"]);
        DaemonOptions::with_disk(HOST_MB, disk_mb).and(&["--copy-delay-us", delay, "--disk-io", io])
    }

    fn all(&self) -> impl Iterator<Item = (KeyedModel, &KeyedChain)> {
        self.chains.iter().flat_map(|(model, chains)| chains.iter().map(move |chain| (*model, chain)))
    }

    /// Different blocks in all chains.
    fn blocks(&self) -> usize {
        self.all().flat_map(|(_, chain)| &chain.keys).collect::<BTreeSet<_>>().len()
    }
}

fn chains(model: KeyedModel, random: &mut Random) -> Vec<KeyedChain> {
    let mut chains = Vec::new();
    for salt in SALTS {
        for _ in 0..CHAINS / 2 {
            let (shared, tails) = (random.within(1..5), [random.within(3..8), random.within(3..8)]);
            let common = random.tokens(shared * model.tokens_per_block);
            for tail in tails {
                let own = random.tokens(tail * model.tokens_per_block);
                chains.push(model.chain(salt, &[common.clone(), own].concat()));
            }
        }
    }
    chains
}

/// Keys of blocks that are on disk, by what the daemon said.
type OnDisk = BTreeSet<SequenceHash>;

fn note(on_disk: &mut OnDisk, event: &Event) {
    if event.tier() != Tier::Disk {
        return;
    }
    let key = || SequenceHash(event.key.as_slice().try_into().expect("a key has 16 bytes"));
    match event.kind() {
        EventKind::Stored => assert!(on_disk.insert(key()), "stored twice"),
        EventKind::Removed => assert!(on_disk.remove(&key()), "removed, but never stored"),
        EventKind::Cleared | EventKind::Unspecified => panic!("nothing clears the disk here: {event:?}"),
    }
}

/// Serves chains in random order until the daemon is gone.
async fn fill(engine: &KeyedEngine, chains: &[KeyedChain], mut random: Random, ended: &Cell<bool>) {
    loop {
        let chain = random.pick(chains);
        let prefetched = if random.below(3) == 0 { engine.prefetch(chain).await } else { Ok(()) };
        let served = match prefetched {
            Ok(()) => engine.serve(chain).await,
            Err(error) => Err(error),
        };
        if let Err(error) = served {
            assert!(ended.get(), "a daemon that lives answers: {error}");
            return;
        }
    }
}

/// Fills the tiers until `wanted` more blocks are on disk and a moment has passed, then ends the daemon. Returns what
/// is on disk, by all that it said.
async fn fill_and_end(scenario: &mut Scenario, node: &mut Node, wanted: usize, end: End) -> OnDisk {
    let socket = node.socket();
    let watching = Client::connect(&socket).await.unwrap();
    let (sequence, stored) = watching.snapshot().await.unwrap();
    let mut on_disk = OnDisk::new();
    stored.iter().for_each(|event| note(&mut on_disk, event));
    let mut events = watching.watch_events(sequence).await.unwrap();
    let mut engines = Vec::new();
    for (model, chains) in &scenario.chains {
        let engine = KeyedEngine::attach(&socket, *model, &SALTS).await.unwrap();
        engines.push((engine, chains, Random::new(scenario.random.below(1 << 32))));
    }
    let moment = Duration::from_micros(scenario.random.below(20_000));
    let ended = Cell::new(false);
    let watch = async {
        let (mut last, mut new, mut strike) = (sequence, 0, None);
        while let Ok(Some(batch)) = next(&mut events, strike).await {
            for event in batch {
                assert_eq!(event.sequence, last + 1, "events have no gaps");
                last = event.sequence;
                new += usize::from(event.tier() == Tier::Disk && event.kind() == EventKind::Stored);
                note(&mut on_disk, &event);
            }
            if new >= wanted && strike.is_none() {
                strike = Some(Instant::now() + moment);
            }
            if !ended.get() && strike.is_some_and(|at| at <= Instant::now()) {
                // What the daemon still sent is read to its end.
                ended.set(true);
                strike = Some(Instant::now() + FILL_MAX);
                match end {
                    End::Killed => node.kill_daemon(),
                    End::Stopped => assert!(node.daemon.take().unwrap().terminate().success()),
                }
            }
        }
    };
    let [(first, of_first, a), (second, of_second, b)] = &engines[..] else { panic!("two models") };
    let fill_both = async {
        tokio::join!(fill(first, of_first, a.clone(), &ended), fill(second, of_second, b.clone(), &ended))
    };
    let work = async { tokio::join!(watch, fill_both) };
    tokio::time::timeout(FILL_MAX, work).await.expect("enough blocks go to disk in time");
    assert!(ended.get(), "the daemon ended by itself");
    on_disk
}

/// The next events; none at the moment to strike.
async fn next(
    events: &mut tonic::Streaming<kvbm_proto::v1::EventBatch>,
    strike: Option<Instant>,
) -> Result<Option<Vec<Event>>, tonic::Status> {
    let Some(strike) = strike else { return Ok(events.message().await?.map(|batch| batch.events)) };
    match tokio::time::timeout_at(strike, events.message()).await {
        Ok(message) => Ok(message?.map(|batch| batch.events)),
        Err(_) => Ok(Some(Vec::new())),
    }
}

/// What was done to the files.
struct Damage {
    key: SequenceHash,
    mishap: Mishap,
}

fn damage(scenario: &mut Scenario, directories: &[PathBuf], on_disk: &OnDisk) -> Option<Damage> {
    let victims: Vec<(KeyedModel, SequenceHash)> = scenario
        .all()
        .flat_map(|(model, chain)| chain.keys.iter().map(move |key| (model, *key)))
        .filter(|(_, key)| on_disk.contains(key))
        .collect();
    let mishap = scenario.mishap;
    let (model, key) = *scenario.random.pick(&victims);
    let flipped = match mishap {
        Mishap::Nothing | Mishap::TightDisk => return None,
        Mishap::Payload => flip_payload(directories, &model.bytes_of(key)),
        Mishap::Entry => flip_entry(directories, key),
    };
    assert_eq!(flipped, 1, "a block is on disk once");
    Some(Damage { key, mishap })
}

/// Loads all chains and checks them; nothing that was on disk may be missing but what was damaged.
async fn recall_all(scenario: &Scenario, node: &Node, on_disk: &OnDisk, damage: Option<&Damage>) -> usize {
    let (mut recalled, mut missing) = (OnDisk::new(), OnDisk::new());
    for (model, chains) in &scenario.chains {
        let engine = KeyedEngine::attach(&node.socket(), *model, &SALTS).await.unwrap();
        for chain in chains {
            let expected = chain.keys.iter().take_while(|key| on_disk.contains(key)).count();
            let behind = chain.keys.iter().skip(expected).filter(|key| on_disk.contains(key)).count();
            assert_eq!(behind, 0, "prefixes on disk are closed");
            let intact = chain.keys.iter().position(|key| damage.is_some_and(|it| it.key == *key));
            let served = engine.recall(chain).await.unwrap();
            match intact {
                Some(intact) => {
                    assert_eq!(served, intact.min(expected), "all before the damage, nothing of it")
                }
                None => missing.extend(&chain.keys[served.min(expected)..expected]),
            }
            recalled.extend(&chain.keys[..served]);
        }
        engine.detach().await.unwrap();
    }
    let most = if scenario.mishap == Mishap::TightDisk { UNHEARD_MAX } else { 0 };
    assert!(missing.len() <= most, "{} of {} blocks are gone: {missing:?}", missing.len(), on_disk.len());
    let flipped = damage.is_some_and(|damage| damage.mishap == Mishap::Payload);
    assert_eq!(node.metric("kvbm_disk_checksum_failures_total", ""), f64::from(u8::from(flipped)));
    recalled.len()
}

async fn run(seed: u64) {
    let mut scenario = Scenario::new(seed);
    let mut node = Node::empty();
    let count = 1 + seed as usize % 2;
    let directories: Vec<PathBuf> = (0..count).map(|i| node.dir.path().join(format!("drive-{i}"))).collect();
    let list = directories.iter().map(|path| path.display().to_string()).collect::<Vec<_>>().join(",");
    node.configure(scenario.options().and(&["--disk-cache-dir", &list]));
    node.start_daemon();
    let blocks = scenario.blocks();
    let wanted = scenario.random.within(1..blocks * 4 / 5);
    let first = fill_and_end(&mut scenario, &mut node, wanted, End::Killed).await;
    let damage = damage(&mut scenario, &directories, &first);
    node.start_daemon();
    let recalled = recall_all(&scenario, &node, &first, damage.as_ref()).await;
    let damaged = f64::from(u8::from(scenario.mishap == Mishap::Entry));
    assert_eq!(node.metric("kvbm_disk_recovery_damaged_entries", ""), damaged);
    // What the first life left behind is used, replaced and added to by the second.
    let rest = blocks - recalled;
    let wanted = scenario.random.within(0..rest.max(1) * 4 / 5 + 1);
    let end = if seed % 8 < 4 { End::Killed } else { End::Stopped };
    let second = fill_and_end(&mut scenario, &mut node, wanted, end).await;
    node.start_daemon();
    let again = recall_all(&scenario, &node, &second, None).await;
    // A damaged entry is off the disk with the first flush, if the second life was long enough for one.
    assert!(node.metric("kvbm_disk_recovery_damaged_entries", "") <= damaged);
    node.assert_idle();
    println!(
        "seed {seed}: {:?}, {:?} with {} of {blocks} blocks on disk, {recalled} recalled; {end:?} with {}, {again} recalled",
        scenario.mishap,
        End::Killed,
        first.len(),
        second.len(),
    );
}

#[test]
fn drill_disk_crash() {
    let seeds = drill_seeds(SHORT);
    let next = AtomicU64::new(seeds.start);
    let work = || {
        loop {
            let seed = next.fetch_add(1, Ordering::Relaxed);
            if seed >= seeds.end {
                return;
            }
            let runtime =
                tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
            let outcome =
                std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| runtime.block_on(run(seed))));
            if let Err(panic) = outcome {
                eprintln!("seed {seed} failed");
                // The others need not go on.
                next.store(seeds.end, Ordering::Relaxed);
                std::panic::resume_unwind(panic);
            }
        }
    };
    std::thread::scope(|scope| {
        let workers: Vec<_> = (0..AT_ONCE).map(|_| scope.spawn(work)).collect();
        workers.into_iter().for_each(|worker| worker.join().unwrap());
    });
}
