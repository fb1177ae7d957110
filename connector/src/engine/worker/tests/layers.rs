//! Loads of which the engine is told before all layers are there: what passes wait for.

use std::sync::mpsc::{Receiver, channel};

use super::*;

const LAYERS: usize = 4;

fn layered() -> Pass {
    Pass::Layered("eager".into())
}

/// One whose engine has shown that it asks for its layers.
fn layered_rank() -> Rank {
    let mut rank = rank_of(LAYERS, BrokenPromise::IsTold);
    rank.promise();
    rank.fill_slot(0, 44);
    assert!(rank.half.start_loads(0, layered()).unwrap(), "to find out");
    (0..LAYERS).for_each(|layer| rank.half.layer(layer, 0).unwrap());
    rank.half.pass_done(0).unwrap();
    assert!(!rank.half.start_loads(0, layered()).unwrap(), "there is nothing to wait for");
    rank.half.pass_done(0).unwrap();
    rank
}

impl Rank {
    /// Has page 4 loaded in layers, until the engine was told that it may go on.
    fn load_early(&mut self) {
        self.bind(|metadata| metadata.loads.push(Load { in_layers: true, ..load(true, &[4]) }));
        assert!(!self.half.start_loads(0, Pass::Idle).unwrap());
        let mut told = self.finished(&[], &[7]).1;
        told.extend(self.wait_finished(0, 1 - told.len()).1);
        assert_eq!(told, [7]);
        assert_eq!(self.page(4), [0; BLOCK], "nothing was let through");
        assert_eq!(self.pin(), PinState::InUse(LEASE.lease_id), "it is still copied from");
    }

    /// Lets so many steps through while `wait` runs, which must not end before.
    fn through(&mut self, steps: usize, wait: impl FnOnce(&mut WorkerHalf) + Send) {
        let gate = self.gate.clone();
        let half = &mut self.half;
        std::thread::scope(|scope| {
            let waiting = scope.spawn(|| wait(half));
            std::thread::sleep(Duration::from_millis(20));
            assert!(!waiting.is_finished(), "it did not wait");
            gate.let_through(steps);
        });
    }
}

#[test]
fn a_request_goes_on_when_nothing_can_fail_any_more_and_its_pass_waits_for_each_layer() {
    let mut rank = layered_rank();
    rank.load_early();
    assert!(rank.half.start_loads(0, layered()).unwrap());
    for layer in 0..LAYERS {
        rank.through(1, |half| half.layer(layer, 0).unwrap());
        let there = (layer + 1) * BLOCK / LAYERS;
        assert_eq!(rank.page(4)[..there], [44; BLOCK][..there]);
    }
    rank.half.pass_done(0).unwrap();
    // The next pass has nothing to wait for.
    assert!(!rank.half.start_loads(0, layered()).unwrap());
    while rank.pin() != PinState::Free {
        std::thread::yield_now();
    }
}

#[test]
fn passes_whose_layers_do_not_ask_wait_for_all_that_arrives() {
    for pass in [Pass::Whole, Pass::Layered("of another kind".into())] {
        let mut rank = layered_rank();
        rank.load_early();
        rank.through(LAYERS, |half| {
            half.start_loads(0, pass).unwrap();
        });
        assert_eq!(rank.page(4), [44; BLOCK]);
        rank.half.pass_done(0).unwrap();
    }
}

#[test]
fn a_layer_that_is_not_known_waits_for_all() {
    let mut rank = layered_rank();
    rank.load_early();
    assert!(rank.half.start_loads(0, layered()).unwrap());
    rank.through(LAYERS, |half| half.layer(LAYERS, 0).unwrap());
}

#[test]
fn a_pass_that_may_write_pages_of_what_arrives_waits_for_it() {
    let mut rank = layered_rank();
    rank.load_early();
    // The request was aborted, and its page given to another.
    rank.bind(|metadata| metadata.reassigned.push(Pages { pages: vec![4] }));
    rank.through(LAYERS, |half| {
        half.start_loads(0, layered()).unwrap();
    });
    assert_eq!(rank.page(4), [44; BLOCK]);
}

#[test]
fn a_load_that_is_called_back_while_it_arrives_is_waited_for() {
    let mut rank = layered_rank();
    rank.load_early();
    let mut voided = Metadata::new([9; 16]);
    voided.voided.push(1);
    rank.through(LAYERS, |half| half.bind(voided).unwrap());
    assert_eq!(rank.page(4), [44; BLOCK]);
}

#[test]
fn a_pass_that_stops_asking_for_layers_is_an_error() {
    let mut rank = layered_rank();
    rank.load_early();
    assert!(rank.half.start_loads(0, layered()).unwrap());
    rank.through(1, |half| half.layer(0, 0).unwrap());
    let error = rank.half.pass_done(0).unwrap_err();
    assert!(error.contains("eager") && error.contains("did not wait"), "{error}");
    rank.gate.let_through(LAYERS);
}

#[test]
fn a_load_within_the_pass_may_arrive_layer_by_layer_too() {
    let mut rank = layered_rank();
    rank.bind(|metadata| metadata.loads.push(Load { in_layers: true, ..load(false, &[4]) }));
    assert!(rank.half.start_loads(0, layered()).unwrap());
    rank.through(LAYERS, |half| (0..LAYERS).for_each(|layer| half.layer(layer, 0).unwrap()));
    assert_eq!(rank.page(4), [44; BLOCK]);
    rank.half.pass_done(0).unwrap();
    assert_eq!(rank.half.counts().layered_loads.load(Ordering::Relaxed), 1);
}

#[test]
fn a_load_in_layers_that_cannot_begin_is_told_of_as_any_other() {
    let mut rank = rank_of(LAYERS, BrokenPromise::IsTold);
    // Nobody promised it.
    rank.bind(|metadata| metadata.loads.push(Load { in_layers: true, ..load(true, &[4]) }));
    rank.half.start_loads(0, Pass::Idle).unwrap();
    let mut told = rank.finished(&[], &[7]).1;
    told.extend(rank.wait_finished(0, 1 - told.len()).1);
    assert_eq!((told, rank.half.take_failed()), (vec![7], vec![4]));
    assert!(!rank.half.start_loads(0, Pass::Whole).unwrap());
}

#[test]
fn an_engine_whose_device_fails_behind_its_back_is_stopped() {
    let mut rank = layered_rank();
    *rank.gate.0.fails_after.lock() = Some(2);
    rank.gate.let_through(LAYERS);
    rank.bind(|metadata| metadata.loads.push(Load { in_layers: true, ..load(true, &[4]) }));
    rank.half.start_loads(0, Pass::Idle).unwrap();
    let _ = rank.half.get_finished(&[], &[7]);
    let error = loop {
        if let Err(error) = rank.half.get_finished(&[], &[]) {
            break error;
        }
        std::thread::yield_now();
    };
    assert!(error.contains("request 7: the device is gone"), "{error}");
    assert_eq!(rank.half.start_loads(0, layered()), Err(error), "nothing is computed any more");
    // Before anything of it was on its way, it is a load that failed.
    let mut rank = layered_rank();
    *rank.gate.0.fails_after.lock() = Some(0);
    rank.bind(|metadata| metadata.loads.push(Load { in_layers: true, ..load(true, &[4]) }));
    rank.half.start_loads(0, Pass::Idle).unwrap();
    let mut told = rank.finished(&[], &[7]).1;
    told.extend(rank.wait_finished(0, 1 - told.len()).1);
    assert_eq!((told, rank.half.take_failed()), (vec![7], vec![4]));
    assert!(!rank.half.start_loads(0, layered()).unwrap());
    rank.gate.let_through(LAYERS);
}

#[test]
fn an_engine_that_begins_its_passes_too_late_is_told_of_nothing_early() {
    let mut rank = rank_of(LAYERS, BrokenPromise::IsTold);
    rank.promise();
    // Its layers ask, and only then loads are started.
    for _ in 0..3 {
        (0..LAYERS).for_each(|layer| rank.half.layer(layer, 0).unwrap());
        rank.half.start_loads(0, layered()).unwrap();
        rank.half.pass_done(0).unwrap();
    }
    rank.bind(|metadata| metadata.loads.push(Load { in_layers: true, ..load(true, &[4]) }));
    rank.half.start_loads(0, Pass::Idle).unwrap();
    rank.gate.let_through(LAYERS - 1);
    rank.gate.wait_for_arrival(LAYERS);
    assert_eq!(rank.finished(&[], &[7]).1, [] as [u64; 0]);
    rank.gate.let_through(1);
    assert_eq!(rank.wait_finished(0, 1).1, [7]);
}

#[test]
fn layers_of_a_pass_that_did_not_begin_wait_for_all_that_arrives() {
    let mut rank = layered_rank();
    rank.load_early();
    rank.through(LAYERS, |half| half.layer(0, 0).unwrap());
    assert_eq!(rank.page(4), [44; BLOCK]);
}

/// Ends when it is told to.
#[derive(Debug)]
struct Held(Mutex<Receiver<()>>);

impl Fence for Held {
    fn wait(&self) -> Result<(), String> {
        let _ = self.0.lock().recv();
        Ok(())
    }
}

#[test]
fn a_load_in_layers_that_is_called_back_before_it_begins_writes_nothing() {
    let mut rank = layered_rank();
    rank.gate.let_through(LAYERS);
    let (release, held) = channel();
    *rank.gate.0.fence.lock() = Some(Arc::new(Held(Mutex::new(held))));
    rank.bind(|metadata| metadata.loads.push(Load { in_layers: true, ..load(true, &[4]) }));
    rank.half.start_loads(0, Pass::Idle).unwrap();
    rank.bind(|metadata| metadata.voided.push(1));
    drop(release);
    let mut told = rank.finished(&[], &[7]).1;
    told.extend(rank.wait_finished(0, 1 - told.len()).1);
    assert_eq!((told, rank.page(4)), (vec![7], [0; BLOCK]));
    assert_eq!(rank.half.counts().cancelled_loads.load(Ordering::Relaxed), 1);
}
