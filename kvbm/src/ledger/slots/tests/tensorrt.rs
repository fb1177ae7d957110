//! The scenarios of TensorRT-LLM's tests of its eviction policy, on a table: claim is a pin, release its return.

use super::*;

const DEFAULT: Retention = Retention { priority: PRIORITY_DEFAULT, duration: None };

/// Slots of one tier, all holding a block of its own that nobody uses: what TensorRT-LLM calls free.
struct Pool {
    table: SlotTable,
    next: u16,
}

impl Pool {
    fn new(slots: u32) -> Self {
        let mut pool = Self { table: SlotTable::new(slots, TableRules::of_tests()), next: 0 };
        for _ in 0..slots {
            pool.store(Millis(0));
        }
        pool
    }

    fn store(&mut self, now: Millis) -> u16 {
        let n = 100 + self.next;
        self.next += 1;
        let block = Incoming::of_tests(key(n), None);
        let reserved = self.table.reserve(block, Need::Wanted, Allowances::NONE, now).unwrap();
        assert!(self.table.commit(reserved, now));
        n
    }

    fn slot(&self, n: u16) -> SlotIndex {
        self.table.resident(key(n)).expect("it is there")
    }

    /// Without a retention: keeps its priority, loses its duration.
    fn claim(&mut self, n: u16, retention: Option<Retention>, now: u64) {
        let slot = self.slot(n);
        self.table.pin(slot);
        let said = retention.map(Some);
        self.table.reuse(slot, said.as_slice(), Millis(now));
    }

    fn release(&mut self, n: u16, now: u64) {
        let slot = self.slot(n);
        self.table.unpin(slot, 1, Millis(now));
        self.table.check_integrity();
    }

    /// Who would go next.
    fn next(&mut self, now: u64) -> u16 {
        let slot = self.table.victim(super::super::evict::Claim::Any, Allowances::NONE, Millis(now));
        number(self.table.block(slot.expect("somebody waits")).unwrap().0)
    }

    fn waiting(&self) -> usize {
        self.table.queues.counts().values().sum()
    }
}

fn timed(priority: u8, ms: u64) -> Option<Retention> {
    Some(Retention { priority, duration: Some(Duration::from_millis(ms)) })
}

/// Scenarios 1 and 2.
#[test]
fn a_claimed_block_does_not_wait_and_tiers_do_not_know_of_each_other() {
    let (mut primary, secondary) = (Pool::new(8), Pool::new(4));
    let first = primary.next(0);
    assert_eq!((primary.waiting(), secondary.waiting()), (8, 4));
    assert_eq!(primary.table.pins(primary.slot(first)), 0);
    primary.claim(first, None, 0);
    assert_eq!((primary.waiting(), secondary.waiting()), (7, 4));
    assert_ne!(primary.next(0), first);
}

/// Scenarios 3 and 4. There is no release to the front here: what is not worth keeping is given priority 0.
#[test]
fn what_was_released_first_goes_first() {
    let mut pool = Pool::new(8);
    let (b1, b2) = (100, 101);
    pool.claim(b1, None, 0);
    pool.claim(b2, None, 0);
    pool.release(b2, 1);
    assert_ne!(pool.next(1), b2, "a plain release goes to the end");
    pool.release(b1, 1);
    (102..108).for_each(|n| pool.claim(n, None, 2));
    assert_eq!(pool.next(2), b2);
    pool.claim(b2, None, 2);
    assert_eq!(pool.next(2), b1);
    pool.release(b2, 3);
    pool.claim(b2, Some(Retention { priority: 0, duration: None }), 3);
    pool.release(b2, 3);
    assert_eq!(pool.next(3), b2, "as if released to the front");
}

/// Scenario 5.
#[test]
fn a_lower_priority_goes_first_and_is_kept_when_none_is_given() {
    let mut pool = Pool::new(8);
    let of = |priority| Some(Retention { priority, duration: None });
    pool.claim(100, of(5), 0);
    pool.release(100, 0);
    assert_eq!(pool.next(0), 100);
    pool.claim(100, None, 1);
    pool.release(100, 1);
    assert_eq!((pool.next(1), pool.table.priority(pool.slot(100))), (100, 5));
    (101..108).for_each(|n| pool.claim(n, None, 2));
    pool.claim(100, of(80), 2);
    pool.release(100, 2);
    pool.release(101, 3);
    pool.claim(101, of(5), 3);
    pool.release(101, 3);
    assert_eq!(pool.next(3), 101);
}

/// Scenario 6.
#[test]
fn a_priority_ends_when_its_time_is_over_after_the_release() {
    let mut pool = Pool::new(8);
    pool.claim(100, timed(80, 1), 0);
    pool.release(100, 0);
    pool.table.expire(Millis(0));
    assert_eq!(pool.table.priority(pool.slot(100)), 80);
    pool.table.expire(Millis(2));
    assert_eq!(pool.table.priority(pool.slot(100)), PRIORITY_DEFAULT);

    let mut pool = Pool::new(8);
    let (b1, b2) = (100, 101);
    pool.claim(b1, timed(80, 3), 0);
    pool.claim(b2, timed(50, 8), 0);
    (102..108).for_each(|n| pool.claim(n, None, 0));
    pool.release(b1, 5);
    pool.release(b2, 5);
    assert_eq!(pool.next(5), b2);
    assert_eq!(pool.next(9), b1, "expired to the default, below 50");
}

/// The clock starts again at each release, also when the block was used without a retention: that clears it.
#[test]
fn the_clock_starts_at_each_release_and_a_use_without_duration_clears_it() {
    let mut pool = Pool::new(2);
    pool.claim(100, timed(80, 10), 0);
    pool.table.expire(Millis(50));
    assert_eq!(pool.table.priority(pool.slot(100)), 80, "it is held");
    pool.release(100, 50);
    pool.claim(100, timed(80, 10), 55);
    pool.release(100, 58);
    pool.table.expire(Millis(61));
    assert_eq!(pool.table.priority(pool.slot(100)), 80, "it was released at 58");
    pool.claim(100, None, 62);
    pool.release(100, 62);
    pool.table.expire(Millis(1000));
    assert_eq!(pool.table.priority(pool.slot(100)), 80, "the priority stays, for ever");
    pool.claim(100, Some(DEFAULT), 1001);
    pool.release(100, 1001);
    assert_eq!(pool.table.priority(pool.slot(100)), PRIORITY_DEFAULT, "downwards too");
}

/// What expired is most recent among those of default priority.
#[test]
fn what_expired_goes_to_the_end() {
    let mut pool = Pool::new(3);
    pool.claim(100, timed(80, 5), 0);
    pool.release(100, 0);
    pool.table.expire(Millis(5));
    assert_eq!(pool.next(5), 101);
    pool.claim(101, None, 5);
    pool.claim(102, None, 5);
    assert_eq!(pool.next(5), 100);
}

/// A chain is released as a whole: when its end goes after the time is over, what is before it has expired too.
#[test]
fn the_blocks_of_a_chain_expire_together() {
    let mut table = SlotTable::new(4, TableRules::of_tests());
    let mut before = None;
    for n in [100, 101, 102] {
        let retention = timed(90, 30).expect("it is one");
        let block = Incoming { retention, ..Incoming::of_tests(key(n), before) };
        let reserved = table.reserve(block, Need::Wanted, Allowances::NONE, Millis(0)).unwrap();
        assert!(table.commit(reserved, Millis(0)));
        before = Some(key(n).hash);
    }
    let mut flood = |n, at| {
        let block = Incoming::of_tests(key(n), None);
        let reserved = table.reserve(block, Need::Wanted, Allowances::NONE, Millis(at)).unwrap();
        assert!(table.commit(reserved, Millis(at)));
        table.check_integrity();
        [100, 101, 102].into_iter().filter(|n| table.resident(key(*n)).is_some()).count()
    };
    assert_eq!([flood(1, 1), flood(2, 2), flood(3, 29)], [3, 3, 3]);
    // The one of default priority that was stored at 29 goes first, then the chain from its end.
    assert_eq!([flood(4, 31), flood(5, 31), flood(6, 31), flood(7, 31)], [3, 2, 1, 0]);
}
