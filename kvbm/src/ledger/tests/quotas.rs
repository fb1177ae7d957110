//! Tenants' maxima and minima.

use super::node::{BLOCK, Chain, Node, Sizes, keep};
use super::*;

fn quota(min: u64, max: Option<u64>) -> TierQuota {
    TierQuota { min_bytes: min * BLOCK, max_bytes: max.map(|max| max * BLOCK) }
}

fn in_host(quotas: &[(&str, TierQuota)]) -> Quotas {
    let of = |quota: &TierQuota| TenantQuota { host: *quota, ..TenantQuota::default() };
    Quotas { tenants: quotas.iter().map(|(tenant, quota)| ((*tenant).to_owned(), of(quota))).collect() }
}

const SIZES: Sizes = Sizes { device: 8, host: 8, disk: 0 };

fn flood(node: &mut Node, tenant: &'static str, names: std::ops::Range<u8>, retention: Retention) {
    for name in names {
        node.serve_for(tenant, Chain(name, 2), &[retention; 2]);
        node.settle();
    }
}

#[test]
fn a_tenant_at_its_maximum_evicts_its_own_and_nobody_elses() {
    let quotas = in_host(&[("greedy", quota(0, Some(4))), ("small", quota(2, None))]);
    let mut node = Node::new(SIZES, quotas);
    node.serve_for("small", Chain(1, 2), &[]);
    node.serve_for("", Chain(2, 2), &[]);
    node.settle();
    // However dear it says its blocks are.
    flood(&mut node, "greedy", 10..30, keep(100, None));
    assert_eq!(node.held_for("small", Tier::Host, Chain(1, 2)), 2);
    assert_eq!(node.held_for("", Tier::Host, Chain(2, 2)), 2, "there was room");
    let greedy = node.usage("greedy", Tier::Host);
    assert_eq!((greedy.used_bytes, greedy.refused), (4 * BLOCK, 0));
    assert_eq!(greedy.evicted, 2 * 20 - 4);
    assert_eq!(node.held_for("greedy", Tier::Host, Chain(29, 2)), 2, "the latest of its own");
}

#[test]
fn what_is_guaranteed_is_not_evicted_for_others_whatever_the_priority() {
    let quotas = in_host(&[("small", quota(2, None))]);
    let mut node = Node::new(SIZES, quotas);
    node.serve_for("small", Chain(1, 4), &[keep(0, None); 4]);
    node.settle();
    flood(&mut node, "", 10..30, keep(100, None));
    assert_eq!(node.held_for("small", Tier::Host, Chain(1, 4)), 2, "no more than the minimum");
    // Its own newcomers may have the place.
    node.serve_for("small", Chain(2, 2), &[keep(0, None); 2]);
    node.settle();
    assert_eq!(node.usage("small", Tier::Host).used_bytes, 2 * BLOCK);
}

/// One block at its maximum, all of it held: the next is refused and counted, and nothing waits for it.
#[test]
fn a_newcomer_without_a_right_is_refused_and_counted() {
    let quotas = in_host(&[("greedy", quota(0, Some(2)))]);
    let mut node = Node::new(SIZES, quotas);
    node.serve_for("greedy", Chain(1, 3), &[]);
    node.settle();
    // A chain never evicts what it hangs on.
    assert_eq!(node.held_for("greedy", Tier::Host, Chain(1, 3)), 2);
    let greedy = node.usage("greedy", Tier::Host);
    assert_eq!((greedy.refused, greedy.evicted, node.ledger.backlog()), (1, 0, 0));
}

/// Guarantees that cannot be kept together: who came first keeps his, others are refused in host. In a pool the engine's
/// need goes before them.
#[test]
fn minima_that_are_more_than_there_is_stop_nobody() {
    let all = TenantQuota { device: quota(8, None), host: quota(8, None), disk: quota(0, None) };
    let tenants = ["one", "two"].map(|tenant| (tenant.to_owned(), all));
    let mut node = Node::new(SIZES, Quotas { tenants: tenants.into() });
    node.serve_for("one", Chain(1, 8), &[]);
    node.settle();
    assert_eq!(node.held_for("one", Tier::Host, Chain(1, 8)), 8);
    for name in 10..20 {
        assert_eq!(node.serve_for("two", Chain(name, 2), &[]), 0, "it computes");
        node.settle();
    }
    assert_eq!(node.held_for("one", Tier::Host, Chain(1, 8)), 8);
    assert_eq!(node.held_for("one", Tier::Device, Chain(1, 8)), 0);
    let two = node.usage("two", Tier::Host);
    assert_eq!((two.used_bytes, node.ledger.backlog()), (0, 0));
    assert!(two.refused >= 10);
}

#[test]
fn a_maximum_in_a_pool_keeps_blocks_private_and_takes_none_of_others() {
    let limit = TenantQuota { device: quota(0, Some(2)), ..TenantQuota::default() };
    let tenants = [("greedy".to_owned(), limit)];
    let mut node = Node::new(Sizes { device: 8, host: 0, disk: 0 }, Quotas { tenants: tenants.into() });
    node.serve_for("", Chain(1, 4), &[]);
    node.serve_for("greedy", Chain(2, 3), &[]);
    let greedy = node.usage("greedy", Tier::Device);
    assert_eq!((greedy.used_bytes, greedy.refused), (2 * BLOCK, 1), "the third hangs on the others");
    assert_eq!(node.held_for("greedy", Tier::Device, Chain(2, 3)), 2);
    node.serve_for("greedy", Chain(3, 2), &[]);
    assert_eq!(node.held_for("greedy", Tier::Device, Chain(3, 2)), 2, "it made room of its own");
    assert_eq!(node.held_for("", Tier::Device, Chain(1, 4)), 4);
}

/// What was found in the files belongs to nobody until somebody registers its namespace.
#[test]
fn found_blocks_get_their_tenant_when_it_registers() {
    let mut node = Node::new(SIZES, in_host(&[("small", quota(2, None))]));
    let mut digest = [7; 32];
    digest[..5].copy_from_slice(b"small");
    let class = Class { domain: TrustDomain(1), stride: BLOCK as usize };
    let slots_in = SlotsIn::bytes(8 * BLOCK as usize);
    let mut ledger = Ledger::new(LedgerConfig {
        quotas: in_host(&[("small", quota(2, None))]),
        ..node.ledger.config.clone()
    });
    ledger.set_segments(Some(slots_in.clone()));
    let retention = Retention::default();
    let chain = Chain(1, 2);
    let blocks = (0..2u8).map(|i| FoundBlock {
        namespace: digest,
        index: u32::from(i),
        key: chain.key(i),
        parent: i.checked_sub(1).map(|before| chain.key(before)),
        retention,
        stored: u64::from(i),
    });
    let found = vec![FoundSegment { segment: SegmentId(0), class, blocks: blocks.collect() }];
    let names = ledger.name_found(&found, Millis(0));
    let tables = names.tables(found, &slots_in);
    ledger.install_found(Tier::Host, names, tables);
    let used = |ledger: &Ledger, tenant: &str| {
        let usage =
            ledger.tenants().into_iter().find(|usage| usage.tenant == tenant && usage.tier == Tier::Host);
        usage.expect("it has a quota").used_bytes
    };
    assert_eq!((used(&ledger, ""), used(&ledger, "small")), (2 * BLOCK, 0));
    node.ledger = ledger;
    node.session = node.ledger.open_session(TrustDomain(1));
    node.namespace("small");
    assert_eq!((used(&node.ledger, ""), used(&node.ledger, "small")), (0, 2 * BLOCK));
    node.ledger.check_integrity();
}

#[test]
fn quotas_that_contradict_themselves_are_refused_by_name() {
    let quotas = in_host(&[("odd", quota(3, Some(2)))]);
    let told = quotas.validate().unwrap_err().to_string();
    assert_eq!(
        told,
        "quotas: tenant odd, host: the minimum of 12288 bytes is above the maximum of 8192 bytes"
    );
    let many = (0..600).map(|i| (i.to_string(), TenantQuota::default())).collect();
    assert!(Quotas { tenants: many }.validate().is_err());
}

/// Another model's blocks are larger: its class would take the segment, but not what is guaranteed in it.
#[test]
fn a_segment_with_guaranteed_blocks_is_not_taken() {
    for (min, expected) in [(0, 0), (2, 2)] {
        let mut node = Node::new(SIZES, in_host(&[("small", quota(min, None))]));
        node.serve_for("small", Chain(1, 2), &[]);
        node.settle();
        let identity = PoolIdentity { base: base(1), layout: layout(1), ..World::identity(1, 1, 2) };
        node.pool = node.ledger.add_pool(node.session, identity, 1).expect("the session is there");
        let other =
            node.ledger.register_namespace(node.session, [9; 32], base(1), "", "m", node.now).unwrap();
        let block = node.ledger.request_grants(node.session, node.pool, 1, node.now).unwrap()[0];
        let (hash, retention) = (Chain(9, 1).key(0), Retention::default());
        let commit = CommitBlock { block, hash, parent: None, retention: Some(retention) };
        node.ledger.commit(node.session, other, node.pool, &[commit], node.now).unwrap();
        node.settle();
        assert_eq!(node.held_for("small", Tier::Host, Chain(1, 2)), expected);
    }
}
