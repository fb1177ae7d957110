//! The scheduler half against a directory that knows what is promised and taken back.

use std::collections::BTreeSet;

use parking_lot::Mutex;

use super::*;

const SIZE: usize = 4;
const ENGINE: [u8; 16] = [7; 16];

/// Finds so many blocks of every sequence.
#[derive(Default)]
struct Shelf {
    blocks: Mutex<usize>,
    held: Mutex<BTreeSet<u64>>,
    next: Mutex<u64>,
}

impl Directory for Shelf {
    fn look_up(
        &self,
        _: Namespace,
        keys: &[SequenceHash],
        skip: usize,
        _: &mut dyn FnMut() -> bool,
    ) -> Option<Promised> {
        let found = (*self.blocks.lock()).min(keys.len()).saturating_sub(skip);
        let mut next = self.next.lock();
        *next += 1;
        self.held.lock().insert(*next);
        let slot = |index: usize| Slot { segment: 1, index: u32::try_from(skip + index).unwrap() };
        (found > 0).then(|| Promised {
            lease: Lease { lease_id: *next, pin: 0 },
            slots: (0..found).map(slot).collect(),
        })
    }

    fn take_back(&self, lease: Lease) {
        assert!(self.held.lock().remove(&lease.lease_id), "taken back twice");
    }

    fn takes_saves(&self) -> bool {
        true
    }
}

struct Engine {
    shelf: Arc<Shelf>,
    half: SchedulerHalf,
}

fn engine(mode: LoadMode, found: usize) -> Engine {
    let shelf = Arc::new(Shelf { blocks: Mutex::new(found), ..Shelf::default() });
    Engine { half: SchedulerHalf::new(ENGINE, SIZE as u32, mode, shelf.clone()), shelf }
}

fn tokens(count: usize) -> Vec<u32> {
    (0..count as u32).collect()
}

fn request(id: u64, count: usize) -> NewRequest {
    NewRequest {
        id,
        tokens: tokens(count),
        namespace: Namespace([1; 32]),
        items: Vec::new(),
        cacheable: true,
    }
}

fn report(id: u64, tokens: Vec<u32>, pages: Vec<i32>, computed: usize, scheduled: usize) -> Report {
    let scheduled = Some(scheduled);
    Report { id, known: 0, tokens, opaque: false, pages: vec![pages], computed, scheduled, priorities: None }
}

impl Engine {
    fn query(&mut self, id: u64, count: usize, local: usize) -> usize {
        self.half.query(request(id, count), local, Duration::ZERO, &mut || false)
    }

    fn allocated(&mut self, id: u64, pages: &[i32]) {
        assert!(self.half.allocated(id, &[pages.to_vec()], Duration::ZERO));
    }

    fn build(&mut self, new: Vec<Report>, cached: Vec<Report>) -> Metadata {
        Metadata::decode(&self.half.build(new, cached, Duration::ZERO)).unwrap().unwrap()
    }
}

fn saved(metadata: &Metadata) -> Vec<(u64, Vec<i32>)> {
    metadata.saves.iter().map(|save| (save.request_id, save.pages[0].pages.clone())).collect()
}

fn reassigned(metadata: &Metadata) -> Vec<i32> {
    metadata.reassigned.iter().flat_map(|group| group.pages.clone()).collect()
}

#[test]
fn only_whole_blocks_are_offered_and_a_token_is_left_to_compute() {
    for (prompt, local, offered) in
        [(17, 0, 16), (16, 0, 12), (15, 0, 12), (17, 4, 12), (17, 16, 0), (17, 5, 0), (4, 0, 0), (1, 0, 0)]
    {
        let mut engine = engine(LoadMode::Parked, usize::MAX);
        assert_eq!(engine.query(1, prompt, local), offered, "{prompt} tokens, {local} of them local");
    }
}

#[test]
fn a_parked_load_is_given_with_its_pages_once() {
    let mut engine = engine(LoadMode::Parked, 3);
    assert_eq!(engine.query(1, 17, 4), 8);
    engine.allocated(1, &[10, 11, 12, 13, 14]);
    let metadata = engine.build(vec![], vec![]);
    assert_eq!(metadata.loads.len(), 1);
    let load = &metadata.loads[0];
    assert_eq!(
        (load.pages[0].pages.as_slice(), load.indices.as_slice()),
        ([11, 12].as_slice(), [1, 2].as_slice())
    );
    assert!(load.parked && load.last);
    assert_eq!(reassigned(&metadata), [11, 12, 13, 14], "block 0 was the engine's own");
    assert!(metadata.saves.is_empty());
    // Loaded: the pass begins behind it.
    let metadata = engine.build(vec![report(1, tokens(17), vec![10, 11, 12, 13, 14], 12, 5)], vec![]);
    assert_eq!((metadata.loads.len(), reassigned(&metadata)), (0, vec![]));
    assert_eq!(saved(&metadata), [(1, vec![10, 11, 12, 13])]);
    assert_eq!(metadata.saves[0].parent, b"");
}

#[test]
fn tokens_that_were_compared_need_not_be_said_again_but_all_of_the_querys_must_have_been() {
    for (known, kept) in [(9, vec![(1, vec![0, 1])]), (8, vec![])] {
        let mut engine = engine(LoadMode::Parked, 0);
        engine.query(1, 9, 0);
        engine.allocated(1, &[0, 1, 2]);
        assert_eq!(*engine.half.prompt(1), tokens(9), "to compare with");
        let first = Report { known, ..report(1, vec![], vec![0, 1, 2], 0, 9) };
        assert_eq!(saved(&engine.build(vec![first], vec![])), kept, "{known} of 9");
        assert!(engine.half.prompt(1).is_empty() && engine.half.prompt(2).is_empty());
    }
}

#[test]
fn a_load_in_the_pass_is_given_with_the_first_report_which_begins_before_it() {
    let mut engine = engine(LoadMode::InPass, 2);
    assert_eq!(engine.query(1, 17, 0), 8);
    engine.allocated(1, &[0, 1, 2, 3, 4]);
    let metadata = engine.build(vec![report(1, tokens(17), vec![0, 1, 2, 3, 4], 0, 8)], vec![]);
    let load = &metadata.loads[0];
    assert_eq!((load.pages[0].pages.as_slice(), load.parked, load.last), ([0, 1].as_slice(), false, true));
    assert_eq!(saved(&metadata), [(1, vec![0, 1])], "where behind them the pass begins is not told");
    let next = engine.build(vec![], vec![report(1, vec![], vec![], 16, 1)]);
    assert_eq!(saved(&next), [(1, vec![2, 3])]);
    assert!(engine.half.finished(1));
    assert_eq!(engine.shelf.held.lock().len(), 1, "ranks end it");
}

#[test]
fn blocks_are_saved_when_their_tokens_are_known_and_a_pass_writes_them() {
    let mut engine = engine(LoadMode::Parked, 0);
    engine.query(1, 6, 0);
    engine.allocated(1, &[0, 1]);
    let first = engine.build(vec![report(1, tokens(6), vec![0, 1], 0, 6)], vec![]);
    assert_eq!(saved(&first), [(1, vec![0])]);
    // Overlap: the token of the pass before is not appended yet.
    let lagging = engine.build(vec![], vec![report(1, vec![], vec![], 5, 1)]);
    assert!(lagging.saves.is_empty());
    // Drafts 7, 8 and 9 may be rejected.
    let drafts = engine.build(vec![], vec![report(1, vec![6], vec![2], 6, 4)]);
    assert!(drafts.saves.is_empty());
    assert_eq!(reassigned(&drafts), [2]);
    let accepted = engine.build(vec![], vec![report(1, vec![7, 8], vec![], 8, 4)]);
    assert_eq!(saved(&accepted), [(1, vec![1])]);
    assert_eq!(accepted.saves[0].parent, first.saves[0].keys, "the key of block 0");
}

#[test]
fn chunks_save_what_each_of_them_completes() {
    let mut engine = engine(LoadMode::Parked, 0);
    engine.query(1, 12, 0);
    engine.allocated(1, &[0, 1, 2]);
    let first = engine.build(vec![report(1, tokens(12), vec![0, 1, 2], 0, 6)], vec![]);
    assert_eq!(saved(&first), [(1, vec![0])]);
    let second = engine.build(vec![], vec![report(1, vec![], vec![], 6, 6)]);
    assert_eq!(saved(&second), [(1, vec![1, 2])]);
}

#[test]
fn an_engine_that_does_not_say_what_it_schedules_is_a_pass_behind() {
    let mut engine = engine(LoadMode::Parked, 0);
    engine.query(1, 8, 0);
    engine.allocated(1, &[0, 1]);
    let silent = |report: Report| Report { scheduled: None, ..report };
    let first = engine.build(vec![silent(report(1, tokens(8), vec![0, 1], 0, 0))], vec![]);
    assert!(first.saves.is_empty());
    let decode = engine.build(vec![], vec![silent(report(1, vec![8], vec![2], 8, 0))]);
    assert_eq!(saved(&decode), [(1, vec![0, 1])]);
}

#[test]
fn a_load_whose_pages_change_hands_is_voided() {
    let mut engine = engine(LoadMode::Parked, 4);
    engine.query(1, 9, 0);
    engine.allocated(1, &[0, 1, 2]);
    let load_id = engine.build(vec![], vec![]).loads[0].load_id;
    // Cancelled without a word; a page of it goes to another request, as one that it found in the engine's own cache...
    engine.query(2, 9, 8);
    engine.allocated(2, &[1, 5, 6]);
    assert!(engine.build(vec![], vec![]).voided.is_empty(), "shared pages do not change hands");
    // ... and as one that it will write.
    engine.query(3, 9, 8);
    engine.allocated(3, &[7, 8, 1]);
    assert_eq!(engine.build(vec![], vec![]).voided, [load_id]);
    engine.query(4, 9, 8);
    engine.allocated(4, &[7, 8, 0]);
    assert!(engine.build(vec![], vec![]).voided.is_empty(), "once");
    assert_eq!(engine.half.counts().voided_loads, 1);
}

#[test]
fn a_load_that_no_worker_has_heard_of_is_voided_by_emptying_it() {
    let mut engine = engine(LoadMode::Parked, 2);
    engine.query(1, 9, 0);
    engine.allocated(1, &[0, 1, 2]);
    engine.query(2, 9, 8);
    engine.allocated(2, &[7, 8, 1]);
    let metadata = engine.build(vec![], vec![]);
    assert_eq!((metadata.voided.len(), metadata.loads.len()), (0, 1));
    assert_eq!((metadata.loads[0].segments.len(), metadata.loads[0].last), (0, true));
}

#[test]
fn decoding_into_a_page_voids_a_load_too_also_of_a_request_that_nobody_asked_about() {
    let mut engine = engine(LoadMode::Parked, 2);
    engine.query(1, 9, 0);
    engine.allocated(1, &[0, 1, 2]);
    let load_id = engine.build(vec![], vec![]).loads[0].load_id;
    let metadata = engine.build(vec![], vec![report(99, vec![5], vec![1], 30, 1)]);
    assert_eq!((metadata.voided.as_slice(), reassigned(&metadata)), ([load_id].as_slice(), vec![1]));
}

#[test]
fn a_load_is_over_when_its_request_is_reported() {
    let mut engine = engine(LoadMode::Parked, 2);
    engine.query(1, 9, 0);
    engine.allocated(1, &[0, 1, 2]);
    engine.build(vec![], vec![]);
    engine.build(vec![report(1, tokens(9), vec![0, 1, 2], 8, 1)], vec![]);
    assert!(engine.half.loads.is_empty() && engine.half.targets.iter().flatten().all(|load| *load == 0));
    // Its pages go to another: nothing to void.
    engine.query(2, 9, 0);
    engine.allocated(2, &[0, 1, 2]);
    let metadata = engine.build(vec![], vec![]);
    assert_eq!((metadata.voided.len(), reassigned(&metadata)), (0, vec![0, 1, 2]));
}

#[test]
fn less_than_offered_is_loaded_and_waited_for_when_the_engine_honours_less() {
    let mut engine = engine(LoadMode::Parked, 3);
    assert_eq!(engine.query(1, 17, 0), 12);
    engine.allocated(1, &[0, 1]);
    assert_eq!(engine.build(vec![], vec![]).loads[0].indices, [0, 1]);
    assert_eq!(engine.query(2, 17, 0), 12);
    engine.allocated(2, &[]);
    let nothing = &engine.build(vec![], vec![]).loads[0];
    assert!(nothing.indices.is_empty() && nothing.last && nothing.request_id == 2);
}

#[test]
fn an_offer_in_the_pass_follows_the_pages_of_each_chunk() {
    let mut engine = engine(LoadMode::InPass, 4);
    engine.half.size_is_known = true;
    assert_eq!(engine.query(1, 21, 0), 16);
    engine.allocated(1, &[0, 1, 2]);
    let first = engine.build(vec![report(1, tokens(21), vec![0, 1, 2], 0, 0)], vec![]);
    assert_eq!((first.loads[0].indices.len(), first.loads[0].last), (3, false));
    let second = engine.build(vec![], vec![report(1, vec![], vec![3, 4, 5], 16, 5)]);
    assert_eq!((second.loads[0].indices.as_slice(), second.loads[0].last), ([3].as_slice(), true));
}

#[test]
fn finishing_is_answered_yes_once_and_only_when_something_was_saved() {
    let mut engine = engine(LoadMode::Parked, 0);
    engine.query(1, 6, 0);
    engine.allocated(1, &[0, 1]);
    engine.build(vec![report(1, tokens(6), vec![0, 1], 0, 6)], vec![]);
    assert!(engine.half.finished(1));
    assert!(!engine.half.finished(1));
    engine.query(2, 3, 0);
    engine.allocated(2, &[2]);
    engine.build(vec![report(2, tokens(3), vec![2], 0, 3)], vec![]);
    assert!(!engine.half.finished(2), "no block was complete");
    assert!(!engine.half.finished(3));
}

#[test]
fn an_offer_that_is_not_taken_up_is_taken_back() {
    let mut engine = engine(LoadMode::Parked, 2);
    engine.query(1, 9, 0);
    assert_eq!(engine.shelf.held.lock().len(), 1);
    // Asked again: the allocation was dropped.
    engine.query(1, 9, 0);
    assert_eq!(engine.shelf.held.lock().len(), 1);
    engine.half.build(vec![], vec![], OFFER_KEPT);
    assert_eq!(engine.shelf.held.lock().len(), 0);
    assert!(!engine.half.allocated(1, &[vec![0, 1, 2]], OFFER_KEPT), "too late to keep it");
}

#[test]
fn requests_that_vanish_are_forgotten() {
    let mut engine = engine(LoadMode::Parked, 0);
    engine.query(1, 6, 0);
    engine.allocated(1, &[0, 1]);
    engine.half.build(vec![], vec![], REQUEST_KEPT - Duration::from_secs(6));
    assert_eq!(engine.half.requests.len(), 1);
    engine.half.build(vec![], vec![], REQUEST_KEPT);
    assert_eq!(engine.half.requests.len(), 0);
    // It comes back: served, not cached.
    let metadata = engine.build(vec![], vec![report(1, vec![6, 7], vec![2], 6, 1)]);
    assert_eq!((metadata.saves.len(), reassigned(&metadata)), (0, vec![2]));
}

#[test]
fn what_is_not_in_the_key_is_neither_looked_up_nor_saved() {
    let mut engine = engine(LoadMode::Parked, 9);
    let opaque = NewRequest { cacheable: false, ..request(1, 9) };
    assert_eq!(engine.half.query(opaque, 0, Duration::ZERO, &mut || false), 0);
    engine.allocated(1, &[0, 1, 2]);
    let metadata = engine.build(vec![report(1, tokens(9), vec![0, 1, 2], 0, 9)], vec![]);
    assert_eq!((metadata.saves.len(), metadata.loads.len()), (0, 0));
    assert_eq!(engine.shelf.held.lock().len(), 0);
    // Reported with other tokens than it was asked about with.
    engine.query(2, 9, 0);
    engine.build(vec![report(2, vec![5; 9], vec![3, 4, 5], 0, 9)], vec![]);
    assert_eq!((engine.half.counts().bypassed_requests, engine.shelf.held.lock().len()), (2, 0));
    // Something that is no token comes later.
    *engine.shelf.blocks.lock() = 0;
    engine.query(3, 7, 0);
    engine.build(vec![report(3, tokens(7), vec![6, 7], 0, 7)], vec![]);
    let strange = Report { opaque: true, ..report(3, vec![], vec![8], 7, 1) };
    let metadata = engine.build(vec![], vec![strange]);
    assert_eq!((metadata.saves.len(), reassigned(&metadata)), (0, vec![8]));
    assert!(engine.build(vec![], vec![report(3, vec![9; 9], vec![], 16, 1)]).saves.is_empty());
}

#[test]
fn priorities_are_those_of_the_pages() {
    let mut engine = engine(LoadMode::Parked, 0);
    engine.query(1, 9, 0);
    engine.allocated(1, &[0, 1, 2]);
    let with = |report: Report, priorities: &[u8]| Report { priorities: Some(priorities.to_vec()), ..report };
    let first = engine.build(vec![with(report(1, tokens(9), vec![0, 1, 2], 0, 9), &[80, 10, 5])], vec![]);
    assert_eq!(first.saves[0].priorities, [80, 10]);
    let decode = engine.build(vec![], vec![report(1, vec![9, 10, 11], vec![], 11, 1)]);
    assert_eq!(decode.saves[0].priorities, [5]);
    engine.build(vec![], vec![with(report(1, vec![12], vec![3], 12, 1), &[20])]);
    let decoded = engine.build(vec![], vec![report(1, vec![13, 14, 15], vec![], 15, 1)]);
    assert_eq!(decoded.saves[0].priorities, [20]);
    engine.query(2, 9, 0);
    engine.allocated(2, &[4, 5, 6]);
    let plain = engine.build(vec![report(2, tokens(9), vec![4, 5, 6], 0, 9)], vec![]);
    assert_eq!(plain.saves[0].priorities, b"");
}

#[test]
fn blocks_that_did_not_arrive_are_given_again_but_not_all_the_time() {
    let mut engine = engine(LoadMode::Parked, 0);
    engine.query(1, 8, 0);
    engine.allocated(1, &[0, 1]);
    engine.build(vec![report(1, tokens(8), vec![0, 1], 0, 8)], vec![]);
    engine.half.save_again(1, SAVE_AGAIN_EVERY);
    let again = engine.build(vec![], vec![report(1, vec![8], vec![2], 8, 1)]);
    assert_eq!(saved(&again), [(1, vec![0, 1])]);
    engine.half.save_again(1, SAVE_AGAIN_EVERY + Duration::from_millis(1));
    assert!(engine.build(vec![], vec![report(1, vec![9], vec![], 9, 1)]).saves.is_empty());
}

#[test]
fn blocks_of_another_size_than_said_are_not_cached() {
    let served = |half: &mut SchedulerHalf, id: u64, tokens_count: usize, blocks: usize| {
        half.query(request(id, tokens_count), 0, Duration::ZERO, &mut || false);
        let pages: Vec<i32> = (0..blocks as i32).collect();
        assert!(half.allocated(id, std::slice::from_ref(&pages), Duration::ZERO));
        let reported = report(id, tokens(tokens_count), pages, 0, tokens_count);
        let metadata = half.build(vec![reported], vec![], Duration::ZERO);
        Metadata::decode(&metadata).unwrap().unwrap().saves.len()
    };
    // 16 tokens in 2 blocks: they have 8. In 100: far fewer.
    for blocks in [2, 100] {
        let mut half = engine(LoadMode::Parked, 0).half;
        assert_eq!(served(&mut half, 1, 16, blocks), 0);
        assert!(half.disabled().unwrap().contains("tokens_per_block"));
        assert_eq!(served(&mut half, 2, 16, 4), 0);
    }
    // In 8: of 2 tokens each, or with some for tokens to come. Not cached before a long prompt has shown which.
    let mut half = engine(LoadMode::Parked, 0).half;
    assert_eq!((served(&mut half, 1, 16, 8), served(&mut half, 2, 64, 32)), (0, 0));
    assert_eq!(served(&mut half, 3, 16, 4), 1, "exactly as many as said");
    assert_eq!(served(&mut half, 4, 64, 18), 1);
    assert_eq!(served(&mut half, 5, 16, 6), 1);
    assert_eq!(half.disabled(), None);
}

#[test]
fn pages_that_the_engine_found_at_the_query_and_not_when_it_allocated_change_hands() {
    let mut engine = engine(LoadMode::Parked, 0);
    engine.query(1, 17, 12);
    engine.allocated(1, &[0, 1, 2, 3, 4]);
    assert_eq!(reassigned(&engine.build(vec![], vec![])), [3, 4]);
    let metadata = engine.build(vec![report(1, tokens(17), vec![0, 1, 2, 3, 4], 4, 13)], vec![]);
    assert_eq!(reassigned(&metadata), [1, 2]);
}

#[test]
fn absent_pages_are_loaded_around_and_not_saved() {
    let mut engine = engine(LoadMode::Parked, 2);
    engine.query(1, 17, 0);
    assert!(engine.half.allocated(1, &[vec![0, 1, 2, 3, 4], vec![-1, 11, 12, 13, 14]], Duration::ZERO));
    let loading = engine.build(vec![], vec![]);
    assert_eq!(loading.loads[0].pages[1].pages, [-1, 11]);
    let groups = vec![vec![0, 1, 2, 3, 4], vec![-1, 11, 12, 13, 14]];
    let first = Report { pages: groups, ..report(1, tokens(17), vec![], 8, 9) };
    let metadata = engine.build(vec![first], vec![]);
    assert_eq!(metadata.saves[0].pages[1].pages, [11, 12, 13], "from behind the absent page on");
    assert_eq!(metadata.saves[0].parent.len(), 16);
    assert_eq!(loading.reassigned[1].pages, [11, 12, 13, 14]);
}

#[test]
fn pages_of_a_window_are_not_saved_later_than_their_pass() {
    struct Away;
    impl Directory for Away {
        fn look_up(
            &self,
            _: Namespace,
            _: &[SequenceHash],
            _: usize,
            _: &mut dyn FnMut() -> bool,
        ) -> Option<Promised> {
            None
        }
        fn take_back(&self, _: Lease) {}
        fn takes_saves(&self) -> bool {
            false
        }
    }
    let mut half = SchedulerHalf::new(ENGINE, SIZE as u32, LoadMode::Parked, Arc::new(Away)).windowed();
    half.query(request(1, 8), 0, Duration::ZERO, &mut || false);
    assert!(half.allocated(1, &[vec![0, 1]], Duration::ZERO));
    half.build(vec![report(1, tokens(8), vec![0, 1], 0, 8)], vec![], Duration::ZERO);
    half.directory = Arc::new(Shelf::default());
    half.save_again(1, SAVE_AGAIN_EVERY);
    let later = half.build(vec![], vec![report(1, vec![8, 9, 10, 11], vec![2], 11, 1)], Duration::ZERO);
    assert_eq!(saved(&Metadata::decode(&later).unwrap().unwrap()), [(1, vec![2])]);
}
