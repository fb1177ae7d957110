use kvbm::{CommitBlock, Manager, ManagerConfig, OpenPool};
use kvbm_shm::PoolLayout;

use super::*;
use crate::DaemonArgs;
use crate::config::{Environment, load};

const BASE: [u8; 32] = [1; 32];
const HASH: SequenceHash = SequenceHash([7; 16]);

fn core() -> Core {
    let args = DaemonArgs::default().with("state_dir", "/nowhere").with("cpu_cache_gb", "0");
    let config = load(&args, &Environment::default()).unwrap().config;
    Core::new(config, Manager::start(ManagerConfig::default()).unwrap(), None, None)
}

/// One block of a user.
fn stored(core: &Core, domain: TrustDomain, digest: [u8; 32]) -> NamespaceId {
    let manager = &core.manager;
    let session = manager.open_session(domain);
    let namespace = manager.register_namespace(session, digest, BASE, "t", "m").unwrap();
    let open = OpenPool {
        base: BASE,
        layout: PoolLayout { block_bytes: 4096, block_count: 4 },
        tokens_per_block: 16,
        device: "cpu:0".into(),
        fresh: true,
        uuid: crate::random(),
    };
    let pool = manager.open_pool(session, open).unwrap().pool_id;
    let block = manager.request_grants(session, pool, 1).unwrap()[0];
    let commit = CommitBlock { block, hash: HASH, parent: None, retention: Default::default() };
    manager.commit(session, namespace, pool, &[commit]).unwrap();
    namespace
}

#[test]
fn users_see_and_change_only_what_is_their_own() {
    let core = core();
    let (mine, theirs) = (TrustDomain(4001), TrustDomain(4002));
    let namespace = stored(&core, mine, [2; 32]);
    let keys = [HASH];
    let pin = |by, name| super::pin(&core, by, &name, PinWhat::Prefix(&keys), Duration::from_secs(9));
    let unknown = |error| matches!(error, Err(RightsError::UnknownNamespace { .. }));
    for name in
        [NamespaceName::Id(namespace), NamespaceName::Digest([2; 32]), NamespaceName::Model("m".into())]
    {
        assert!(unknown(pin(By::Domain(theirs), name.clone()).map(drop)), "{name}");
        let pinned = pin(By::Domain(mine), name).unwrap();
        assert_eq!(super::pins(&core, By::Domain(theirs)), []);
        assert_eq!(unpin(&core, By::Domain(theirs), pinned.id), Err(RightsError::UnknownPin(pinned.id)));
        assert_eq!(super::pins(&core, By::Domain(mine)).len(), 1);
        unpin(&core, By::Domain(mine), pinned.id).unwrap();
    }
    let pinned = pin(By::Operator, NamespaceName::Id(namespace)).unwrap();
    unpin(&core, By::Operator, pinned.id).unwrap();

    // Two users with the same model and salt: the operator has to say which.
    let other = stored(&core, theirs, [2; 32]);
    assert_ne!(other, namespace);
    let error = pin(By::Operator, NamespaceName::Digest([2; 32])).unwrap_err();
    assert!(matches!(error, RightsError::Ambiguous { count: 2, .. }), "{error}");
    // Unless one of them is the daemon's own.
    let own = stored(&core, core.own_domain(), [2; 32]);
    pin(By::Operator, NamespaceName::Digest([2; 32])).unwrap();
    assert_eq!(super::pins(&core, By::Operator)[0].pin.namespace, own);
}
