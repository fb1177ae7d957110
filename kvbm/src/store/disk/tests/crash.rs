//! Power cuts at every moment of random workloads.
//!
//! `KVBM_SEED` repeats one seed, with a cut at each of its moments.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fs;
use std::sync::Mutex;

use tempfile::TempDir;

use super::super::recording::{Image, Recording, image_after, image_of_all};
use super::*;

const SEEDS: u64 = 200;
/// Of each, every so many gets a cut at each moment.
const THOROUGH_ONE_IN: u64 = 100;
const CUTS: usize = 2;
const SEGMENTS: u32 = 4;
const FILES: usize = 2;
const CLASSES: [Class; 3] = [SMALL, Class { domain: TrustDomain(1000), stride: 8192 }, LARGE];

/// A machine: files of a size, and what the drives hold.
struct Node {
    root: TempDir,
    images: Vec<Image>,
}

impl Node {
    fn new() -> Self {
        let memory = Path::new("/dev/shm");
        let root = if memory.is_dir() { tempfile::tempdir_in(memory) } else { tempfile::tempdir() };
        Self { root: root.unwrap(), images: vec![Image::default(); FILES] }
    }

    /// Puts the sizes and first pages where a daemon looks for them, and starts one.
    fn boot(&self, sizes: &[u64]) -> (DiskStore, Arc<Recording>, Recovered) {
        let config = config(directories(self.root.path(), FILES), u64::from(SEGMENTS));
        for ((directory, image), size) in config.directories.iter().zip(&self.images).zip(sizes) {
            fs::create_dir_all(directory).unwrap();
            fs::write(cache_file(directory), image.read(0, 4096.min(*size as usize))).unwrap();
            File::options().write(true).open(cache_file(directory)).unwrap().set_len(*size).unwrap();
        }
        let made = Mutex::new(None);
        let engine = |files| -> EngineResult {
            let recording = Arc::new(Recording::new(files, self.images.clone()));
            *made.lock().unwrap() = Some(Arc::clone(&recording));
            Ok(recording)
        };
        let store = DiskStore::open(&config, &engine).unwrap();
        let recovered = store.prepare(&|| false).unwrap();
        assert_eq!(store.segment_count(), SEGMENTS);
        let recording = made.into_inner().unwrap().expect("the engine was started");
        (store, recording, recovered)
    }

    fn sizes(&self) -> Vec<u64> {
        let size = |directory: PathBuf| fs::metadata(cache_file(&directory)).unwrap().len();
        directories(self.root.path(), FILES).into_iter().map(size).collect()
    }
}

/// A block that has been written, and how long it can be relied on. Moments are numbers of events.
#[derive(Debug, Clone)]
struct Kept {
    place: DiskPlace,
    block: Block,
    written: usize,
    durable_from: Option<usize>,
    until: Option<usize>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum End {
    PowerCut,
    Kill,
}

/// What is known of the disk by what the store said.
#[derive(Debug, Default)]
struct Model {
    now: BTreeMap<DiskPlace, Kept>,
    past: Vec<Kept>,
    bound: BTreeMap<u32, Class>,
    /// Everything ever handed in under a name.
    versions: HashMap<(u8, u8), Vec<Block>>,
    next_version: u64,
}

impl Model {
    fn touch(&mut self, place: DiskPlace, moment: usize) {
        if let Some(kept) = self.now.remove(&place) {
            self.past.push(Kept { until: Some(moment), ..kept });
        }
    }

    fn flushed(&mut self, moment: usize) {
        for kept in self.now.values_mut() {
            kept.durable_from.get_or_insert(moment);
        }
    }

    /// Blocks that the end of the power, or else of the daemon, at this moment must not have harmed.
    fn reliable(&self, moment: usize, end: End) -> impl Iterator<Item = &Kept> {
        let from = move |kept: &Kept| match end {
            End::PowerCut => kept.durable_from,
            End::Kill => Some(kept.written),
        };
        self.now.values().chain(&self.past).filter(move |kept| {
            from(kept).is_some_and(|from| from <= moment) && kept.until.is_none_or(|until| moment <= until)
        })
    }

    fn new_block(&mut self, random: &mut Random, stride: usize) -> Block {
        self.next_version += 1;
        let (namespace, key) = (random.below(3) as u8, random.below(12) as u8);
        // Few sizes, so that what is read under a name in the wrong place would fit.
        let bytes = [stride, stride - 1, 100, 4096][random.below(4)];
        let block = Block { namespace, key, version: self.next_version, bytes };
        self.versions.entry((namespace, key)).or_default().push(block);
        block
    }
}

fn step(store: &DiskStore, drive: &Recording, model: &mut Model, random: &mut Random) {
    match random.below(20) {
        0..2 => bind(store, drive, model, random),
        2 => {
            if let Some(place) = model.now.keys().copied().nth(random.below(model.now.len().max(1))) {
                model.touch(place, drive.events());
                // A drive that fails just now is made up for by the next flush.
                let _ = store.forget(place);
            }
        }
        3..7 => {
            if store.flush().is_ok() {
                model.flushed(drive.events());
            }
        }
        7..9 => {
            for kept in model.now.values() {
                assert_eq!(kept.block.read(store, kept.place), Ok(()), "{kept:?} while the power is on");
            }
        }
        _ => write(store, drive, model, random),
    }
}

fn bind(store: &DiskStore, drive: &Recording, model: &mut Model, random: &mut Random) {
    let segment = random.below(SEGMENTS as usize) as u32;
    let class = CLASSES[random.below(CLASSES.len())];
    let gone: Vec<DiskPlace> = model.now.keys().copied().filter(|p| p.segment.0 == segment).collect();
    gone.into_iter().for_each(|place| model.touch(place, drive.events()));
    store.bind(SegmentId(segment), class);
    model.bound.insert(segment, class);
}

fn write(store: &DiskStore, drive: &Recording, model: &mut Model, random: &mut Random) {
    let mut places = BTreeSet::new();
    let mut blocks = Vec::new();
    for _ in 0..=random.below(6) {
        let Some((segment, class)) = model.bound.iter().nth(random.below(SEGMENTS as usize)) else {
            continue;
        };
        let (segment, class) = (*segment, *class);
        // Low slots more often, so that they are overwritten.
        let limit = if random.one_in(2) { 6 } else { store.slots_in().count(class.stride) as usize };
        let place = place(segment, random.below(limit) as u32);
        if places.insert(place) {
            blocks.push((place, model.new_block(random, class.stride)));
        }
    }
    places.iter().for_each(|place| model.touch(*place, drive.events()));
    let writes: Vec<DiskWrite> = blocks.iter().map(|(place, block)| block.write(*place)).collect();
    for ((place, block), result) in blocks.into_iter().zip(store.write(&writes)) {
        if result.is_ok() {
            model.now.insert(
                place,
                Kept { place, block, written: drive.events(), durable_from: None, until: None },
            );
        }
    }
}

/// Reads everything that a store claims to have. Whatever is delivered was stored under that name.
fn readable(store: &DiskStore, recovered: &Recovered, model: &Model) -> Vec<(DiskPlace, Block)> {
    let mut right = Vec::new();
    for segment in &recovered.segments {
        for (index, entry) in &segment.entries {
            let place = DiskPlace { segment: segment.segment, index: *index };
            let (namespace, key) = (entry.namespace[0], entry.key[0]);
            match read(store, place, namespace, key, entry.payload_bytes as usize) {
                Ok(found) => {
                    let block =
                        model.versions[&(namespace, key)].iter().find(|block| block.payload() == found);
                    right.push((place, *block.expect("nothing else was ever stored under this name")));
                }
                Err(failure) => assert_eq!(failure, ReadFailure::Corrupt, "{place:?}"),
            }
        }
    }
    right
}

fn one_life(seed: u64, thorough: bool) {
    let mut random = Random::new(seed);
    let mut node = Node::new();
    let mut model = Model::default();
    let mut sizes = vec![0; FILES];
    // No power cut yet.
    let mut node_is_whole = true;
    for round in 0..3 {
        let (store, drive, recovered) = node.boot(&sizes);
        model.bound = recovered.segments.iter().map(|found| (found.segment.0, found.class)).collect();
        model.past.clear();
        let survivors = readable(&store, &recovered, &model);
        let kept =
            |(place, block)| (place, Kept { place, block, written: 0, durable_from: Some(0), until: None });
        model.now = survivors.into_iter().map(kept).collect();
        let booted = drive.events();
        let faulty = random.one_in(4);
        if faulty {
            drive.fail_one_in(30, random.next());
        }
        (0..30).for_each(|_| step(&store, &drive, &mut model, &mut random));
        drive.work_again();
        let closed = random.one_in(4);
        if closed {
            store.close().unwrap();
            model.flushed(drive.events());
        }
        drop(store);
        // While the set is being made there is nothing to lose, and the files have other sizes than now.
        let earliest = if round == 0 { booted } else { 0 };
        let (log, sizes_now) = (drive.log(), node.sizes());
        let cuts: Vec<usize> = if thorough {
            (earliest..=log.len()).collect()
        } else {
            (0..CUTS).map(|_| earliest + random.below(log.len() - earliest + 1)).chain([log.len()]).collect()
        };
        let base = node.images.clone();
        for cut in cuts {
            for end in [End::PowerCut, End::Kill] {
                let mut after = Node::new();
                after.images = match end {
                    End::PowerCut => image_after(&base, &log[..cut], &mut random),
                    End::Kill => image_of_all(&base, &log[..cut]),
                };
                let (store, _, recovered) = after.boot(&sizes_now);
                let right = readable(&store, &recovered, &model);
                for kept in model.reliable(cut, end) {
                    let there = right.contains(&(kept.place, kept.block));
                    assert!(there, "round {round}, {end:?} at {cut} of {}: {kept:?} is lost", log.len());
                }
                if end == End::Kill && !faulty && node_is_whole {
                    assert_eq!(recovered.report.entries, right.len(), "{end:?} at {cut} damages no block");
                }
                assert!(cut < log.len() || !closed || !recovered.report.unclean);
            }
        }
        node.images = image_after(&base, &log, &mut random);
        node_is_whole = false;
        sizes = sizes_now;
    }
}

#[test]
fn whatever_is_read_after_a_power_cut_is_right_and_what_was_synced_is_there() {
    let given = std::env::var("KVBM_SEED").ok().map(|seed| seed.parse().expect("KVBM_SEED is a number"));
    let seeds: Vec<u64> = given.map_or_else(|| (0..SEEDS).collect(), |seed| vec![seed]);
    for seed in seeds {
        let thorough = given.is_some() || seed % THOROUGH_ONE_IN == 0;
        let ran = std::panic::catch_unwind(|| one_life(seed, thorough));
        if let Err(panic) = ran {
            eprintln!("failed with KVBM_SEED={seed}");
            std::panic::resume_unwind(panic);
        }
    }
}

#[test]
fn a_power_cut_while_the_set_is_made_leaves_files_that_can_be_used() {
    for seed in 0..50 {
        let mut random = Random::new(seed);
        let node = Node::new();
        let (store, drive, _) = node.boot(&[0; FILES]);
        let (log, sizes) = (drive.log(), node.sizes());
        drop(store);
        for cut in 0..=log.len() {
            let mut after = Node::new();
            after.images = image_after(&node.images, &log[..cut], &mut random);
            // Until the first sync has ended, nothing but the first page can be there.
            let cut_sizes: Vec<u64> = match cut {
                0..4 => after
                    .images
                    .iter()
                    .map(|image| if *image == Image::default() { 0 } else { 4096 })
                    .collect(),
                _ => sizes.clone(),
            };
            let (store, _, recovered) = after.boot(&cut_sizes);
            assert_eq!(recovered.report.entries, 0);
            let blocks = fill(&store, 1, SMALL);
            assert_all_there(&store, &blocks);
        }
    }
}
