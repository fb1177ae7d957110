//! Owned pools whose blocks are on a GPU, for which memory of the host stands in: all but CUDA itself is the same.

use super::*;
use crate::store::StandInGpus;

const GPU: &str = "GPU-0";

fn on_gpus(config: ManagerConfig) -> Manager {
    manager(ManagerConfig { exports: Arc::new(StandInGpus::new()), ..config })
}

#[test]
fn blocks_travel_from_a_gpu_to_host_and_into_pools_on_gpu_and_processor() {
    let manager = on_gpus(with_host(1 << 20));
    let from = Engine::attach_on(&manager, true, GPU);
    assert_eq!((from.pool.memory.memory().bytes(), from.pool.memory.blocks_offset()), (4096, 0));
    let keys = from.keys(&(0..24).collect::<Vec<_>>());
    assert_eq!(from.offloaded(&from.compute(&keys)).blocks_done, 6);
    for device in [GPU, "GPU-1", "cpu:0"] {
        let to = Engine::attach_on(&manager, true, device);
        let pool = Some(to.pool.pool_id);
        let matched = manager.match_prefix(to.session, to.namespace, &keys, pool, &[]).unwrap();
        assert_eq!((matched.device.len(), matched.host_blocks), (0, 6), "{device}");
        let targets = to.granted(6);
        let outcome = to.onboard(matched.lease.unwrap(), &targets).unwrap();
        assert_eq!((outcome.blocks_done, outcome.bytes), (6, 6 * 8192), "{device}");
        to.check(&targets, &keys);
    }
    manager.stop();
    manager.inspect(Ledger::check_integrity);
}

#[test]
fn a_successor_inherits_the_gpus_memory_and_nobody_on_another_device_does() {
    let manager = on_gpus(with_host(0));
    let first = Engine::attach_on(&manager, false, GPU);
    let keys = first.keys(&(0..12).collect::<Vec<_>>());
    let blocks = first.compute(&keys);
    manager.session_dead(first.session);
    drop(first);
    assert!(!Engine::attach_on(&manager, false, "GPU-1").pool.inherited);
    assert!(!Engine::attach_on(&manager, false, "cpu:0").pool.inherited);
    let second = Engine::attach_on(&manager, false, GPU);
    assert!(second.pool.inherited && second.pool.entries.len() == 3);
    second.check(&blocks, &keys);
    manager.stop();
}

/// The daemon died, the engine went on with its memory and hands it to the next daemon.
#[test]
fn a_pool_on_a_gpu_is_adopted_by_the_next_daemon_with_its_blocks() {
    let before = on_gpus(with_host(1 << 20));
    let engine = Engine::attach_on(&before, true, GPU);
    let keys = engine.keys(&(0..12).collect::<Vec<_>>());
    let blocks = engine.compute(&keys);
    let epoch = engine.pool.memory.raise_epoch();
    before.stop();
    let manager = on_gpus(with_host(1 << 20));
    let session = manager.open_session(TrustDomain(1));
    let namespace = manager.register_namespace(session, engine.digest.0, base().0, "", "m").unwrap();
    let adopt = |device: &str, device_memory: bool| {
        let memory = &engine.pool.memory;
        let fd = |fd: std::os::fd::BorrowedFd<'_>| fd.try_clone_to_owned().unwrap();
        let on_device = memory.device().filter(|_| device_memory).map(|(descriptor, _)| fd(descriptor));
        let entries = keys.iter().zip(&blocks).enumerate().map(|(i, (key, block))| PoolEntry {
            block: *block,
            namespace,
            hash: *key,
            parent: i.checked_sub(1).map(|before| keys[before]),
            held: true,
            retention: Retention::default(),
        });
        Some(AdoptPool {
            memory: PoolMemory::from_fds(fd(memory.fd()), on_device).ok()?,
            epoch,
            base: base().0,
            tokens_per_block: 4,
            device: device.into(),
            entries: entries.collect(),
            held: vec![],
        })
    };
    let adopted = |adopt| {
        let (send, receive) = mpsc::channel();
        manager.adopt_pool(session, adopt, Box::new(move |opened| send.send(opened).unwrap()));
        receive.recv().unwrap()
    };
    assert!(adopt(GPU, false).is_none(), "the descriptor is missing");
    assert!(adopted(adopt("cpu:0", true).unwrap()).is_err(), "a processor has no such memory");
    let pool = adopted(adopt(GPU, true).unwrap()).unwrap();
    let engine = Engine { manager: manager.clone(), session, namespace, pool, ..engine };
    assert_eq!(engine.offloaded(&blocks).blocks_done, 3);
    let other = Engine::attach_on(&manager, true, GPU);
    let matched = manager.match_prefix(other.session, other.namespace, &keys, None, &[]).unwrap();
    let targets = other.granted(3);
    assert_eq!(other.onboard(matched.lease.unwrap(), &targets).unwrap().blocks_done, 3);
    other.check(&targets, &keys);
    manager.stop();
    manager.inspect(Ledger::check_integrity);
}

#[test]
fn copies_out_of_a_gpu_in_an_older_epoch_do_not_count() {
    let manager = on_gpus(with_host(1 << 20));
    let engine = Engine::attach_on(&manager, true, GPU);
    engine.pool.memory.raise_epoch();
    let blocks = engine.compute(&engine.keys(&(0..12).collect::<Vec<_>>()));
    assert_eq!(engine.offloaded(&blocks).blocks_failed, 3);
    assert_eq!(manager.counters().blocks(Route::DeviceToHost), 0);
    manager.stop();
}

#[test]
fn a_gpu_that_is_not_there_is_refused_and_one_that_is_full_is_exhausted() {
    let open = |manager: &Manager, block_count| {
        let session = manager.open_session(TrustDomain(1));
        let layout = PoolLayout { block_count, ..LAYOUT };
        let open = OpenPool {
            base: base().0,
            layout,
            tokens_per_block: 4,
            device: GPU.into(),
            fresh: true,
            uuid: [200; 16],
        };
        manager.open_pool(session, open).map(|_| ())
    };
    let without = manager(with_host(0));
    let refused = open(&without, 16).unwrap_err().to_string();
    assert_eq!(refused, "device: this daemon has no CUDA");
    let full = on_gpus(with_host(0));
    assert!(matches!(
        open(&full, 1 << 20),
        Err(Error::Refused(Refused::Exhausted { wanted: 1_048_576, .. }))
    ));
    // What a dead worker left there gives way.
    let most = (StandInGpus::BYTES / LAYOUT.stride()) as u32;
    let session = full.open_session(TrustDomain(1));
    let left = OpenPool {
        base: base().0,
        layout: PoolLayout { block_count: most, ..LAYOUT },
        tokens_per_block: 4,
        device: GPU.into(),
        fresh: true,
        uuid: [201; 16],
    };
    full.open_pool(session, left).unwrap();
    assert!(open(&full, 16).is_err());
    full.session_dead(session);
    // Somebody may still be looking after it for a moment.
    while open(&full, 16).is_err() {
        std::thread::yield_now();
    }
    [without, full].iter().for_each(Manager::stop);
}

#[test]
fn concurrent_engines_on_gpus_always_read_what_was_stored() {
    let device_of = |seed| ["GPU-0", "GPU-0", "GPU-1", "cpu:0"][seed as usize % 4];
    concurrent_engines(on_gpus(with_host(24 * 8192)), device_of);
}
