//! Takes the status of a running daemon.

use std::collections::BTreeMap;

use kvbm::ledger::{DevicePool, EngineOwner, EnginePool, Ledger, Namespace, Owner, SlotCounts};
use kvbm::{DiskState, HostCapacity, LivePin, PoolId, Tier, WHAT_IF_CAPACITIES};

use crate::core::Core;
use crate::gpus::NodeGpus;
use crate::rights::{self, By};
use crate::status::{
    DaemonStatus, EnginePoolStatus, LayoutStatus, NamespaceStatus, PinStatus, PoolStatus, SCHEMA, SlotStatus,
    Status, TenantStatus, TierStatus, WhatIfStatus,
};

/// Everything.
pub(crate) fn take(core: &Core) -> Status {
    let mut status = figures(core);
    let namespaces =
        |ledger: &Ledger| ledger.namespaces().map(|(id, found)| namespace(ledger, id.0, found)).collect();
    status.namespaces = core.manager.inspect(namespaces);
    status
}

/// Everything but the namespaces: salts come from users, so there may be very many, and everybody waits for the list.
pub(crate) fn figures(core: &Core) -> Status {
    let reasons = core.reasons_not_ready();
    let host = host_state(core);
    let mut status = core.manager.inspect(|ledger| from_ledger(core, ledger, host));
    status.tiers.push(disk_tier(core));
    status.daemon.ready = reasons.is_empty();
    status.daemon.reasons = reasons;
    status.sessions = core.sessions.status();
    status.workers = core.workers.status();
    status.what_if = what_if(core);
    status.tenants = tenants(core);
    status.pins = pins(core);
    status.gpus = core.gpus.get().map(NodeGpus::status).unwrap_or_default();
    status.transfers_in_flight = core.manager.transfers_in_flight() as u64;
    status
}

fn from_ledger(core: &Core, ledger: &Ledger, host: HostState) -> Status {
    let summaries = ledger.host_summaries();
    let mut layouts = BTreeMap::<u64, u64>::new();
    let mut host_slots = SlotStatus::default();
    let mut host_used = 0;
    for summary in &summaries {
        let stride = summary.class.stride as u64;
        *layouts.entry(stride).or_default() += summary.segments as u64;
        add(&mut host_slots, slots(summary.counts, 0));
        host_used += used(summary.counts) * stride;
    }
    host_slots.quarantined = ledger.engine_quarantined() as u64;
    let live = || ledger.pools().filter(|(_, pool)| pool.owner != Owner::Retired);
    let mut device = TierStatus { reason: "no engine has opened a pool".to_owned(), ..off(Tier::Device) };
    for (_, pool) in live() {
        let layout = pool.identity.layout;
        device.state = "on".to_owned();
        device.reason.clear();
        device.capacity_bytes += layout.stride() as u64 * u64::from(layout.block_count);
        device.used_bytes += used(pool.slots.counts()) * layout.stride() as u64;
        add(&mut device.slots, slots(pool.slots.counts(), pool.quarantined()));
    }
    device.evictions = ledger.evictions(Tier::Device);
    let host = TierStatus {
        state: host.state.to_owned(),
        reason: host.reason,
        capacity_bytes: host.capacity_bytes,
        used_bytes: host_used,
        slots: host_slots,
        evictions: ledger.evictions(Tier::Host),
        ..off(Tier::Host)
    };
    Status {
        schema: SCHEMA,
        daemon: DaemonStatus {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            pid: std::process::id(),
            uptime_s: core.started.elapsed().as_secs_f64(),
            socket: core.config.socket.display().to_string(),
            admin: core.admin.get().cloned().unwrap_or_default(),
            grpc: core.grpc.get().cloned(),
            ready: false,
            reasons: Vec::new(),
        },
        tiers: vec![device, host],
        pools: ledger.pools().map(|(id, found)| pool(id, found)).collect(),
        engine_pools: ledger.engine_pools().map(|(id, found)| engine_pool(id, found)).collect(),
        layouts: layouts
            .into_iter()
            .map(|(slot_bytes, segments)| LayoutStatus { slot_bytes, segments })
            .collect(),
        namespaces: Vec::new(),
        sessions: Vec::new(),
        leases: ledger.leases() as u64,
        transfers_in_flight: 0,
        workers: Vec::new(),
        what_if: Vec::new(),
        tenants: Vec::new(),
        pins: Vec::new(),
        gpus: Vec::new(),
    }
}

fn tenants(core: &Core) -> Vec<TenantStatus> {
    let tenant = |usage: kvbm::TenantUsage| TenantStatus {
        tenant: usage.tenant,
        tier: usage.tier.name().to_owned(),
        used_bytes: usage.used_bytes,
        min_bytes: usage.quota.min_bytes,
        max_bytes: usage.quota.max_bytes,
        refused: usage.refused,
        evicted: usage.evicted,
    };
    core.manager.tenants().into_iter().map(tenant).collect()
}

/// What operators keep.
pub(crate) fn pins(core: &Core) -> Vec<PinStatus> {
    let pin = |LivePin { pin, left }: LivePin| PinStatus {
        id: pin.id.0,
        namespace: pin.namespace.0,
        blocks: pin.blocks as u64,
        bytes: pin.bytes,
        remaining_s: left.as_secs_f64(),
    };
    rights::pins(core, By::Operator).into_iter().map(pin).collect()
}

fn what_if(core: &Core) -> Vec<WhatIfStatus> {
    let report = core.manager.what_if();
    let tier = |tier: kvbm::TierWhatIf| {
        let times = WHAT_IF_CAPACITIES.iter().map(ToString::to_string).zip(tier.estimates);
        WhatIfStatus {
            tier: tier.tier.name().to_owned(),
            capacity_bytes: tier.capacity_bytes,
            window_s: report.window_s,
            blocks: tier.blocks,
            hit_rate: tier.hit_rate,
            estimates: times.chain([("inf".to_owned(), tier.ceiling)]).collect(),
            sampled: tier.sampled,
        }
    };
    report.tiers.into_iter().map(tier).collect()
}

fn pool(id: PoolId, pool: &DevicePool) -> PoolStatus {
    let (state, session) = Core::owner_state(pool.owner);
    PoolStatus {
        id: id.0,
        session: session.map(|session| session.0),
        device: pool.identity.device.clone(),
        mode: "owned".to_owned(),
        epoch: pool.epoch,
        slots: slots(pool.slots.counts(), pool.quarantined()),
        state: state.to_owned(),
        block_bytes: pool.identity.layout.block_bytes as u64,
    }
}

fn engine_pool(id: PoolId, pool: &EnginePool) -> EnginePoolStatus {
    let identity = &pool.identity;
    let state = match pool.owner {
        EngineOwner::Session(_) => "attached",
        EngineOwner::Silent(_) => "silent",
        EngineOwner::Former(_) => "former",
        EngineOwner::Rescue(_) => "rescue",
        EngineOwner::Retired => "retired",
    };
    EnginePoolStatus {
        id: id.0,
        session: pool.session().map(|session| session.0),
        engine: identity.engine.0.iter().map(|byte| format!("{byte:02x}")).collect(),
        rank: identity.rank,
        rank_count: identity.rank_count,
        shard: identity.shard,
        shard_count: identity.shard_count,
        device: identity.device.clone(),
        mode: identity.mode.name().to_owned(),
        state: state.to_owned(),
        block_bytes: identity.block_bytes as u64,
        blocks: identity.block_count.into(),
        registered: pool.registered() as u64,
        writing: pool.writing() as u64,
    }
}

fn namespace(ledger: &Ledger, id: u32, namespace: &Namespace) -> NamespaceStatus {
    // Without a pool of that base there never was a block of it, unless in an earlier life of the daemon.
    let of_pools = namespace.base.and_then(|base| ledger.stride(namespace.domain, base));
    let stride = of_pools.or(namespace.found_stride).unwrap_or(0) as u64;
    let resident = namespace.resident.iter();
    NamespaceStatus {
        id,
        tenant: namespace.tenant.clone(),
        model: namespace.model.clone(),
        resident_bytes: resident
            .map(|(tier, blocks)| (tier.name().to_owned(), *blocks as u64 * stride))
            .collect(),
    }
}

fn off(tier: Tier) -> TierStatus {
    TierStatus {
        tier: tier.name().to_owned(),
        state: "off".to_owned(),
        reason: String::new(),
        capacity_bytes: 0,
        used_bytes: 0,
        slots: SlotStatus::default(),
        evictions: 0,
    }
}

struct HostState {
    state: &'static str,
    reason: String,
    capacity_bytes: u64,
}

fn host_state(core: &Core) -> HostState {
    let (planned, populated) = core.manager.host_bytes();
    let (state, reason, capacity_bytes) = match core.manager.host_error() {
        Some(error) if populated == 0 => ("off", error, 0),
        Some(error) => ("on", format!("less than configured: {error}"), populated),
        None if planned == 0 => ("off", why_no_host(core), 0),
        None if populated < planned => {
            ("populating", format!("{populated} of {planned} bytes are populated"), planned)
        }
        None => ("on", String::new(), planned),
    };
    HostState { state, reason, capacity_bytes }
}

fn why_no_host(core: &Core) -> String {
    match core.config.manager(0).host {
        HostCapacity::Bytes(bytes) => format!("its size is set to {bytes} bytes"),
        HostCapacity::Blocks(0) => "its size is set to 0 blocks".to_owned(),
        HostCapacity::Blocks(_) => "the first pool will tell how large its blocks are".to_owned(),
    }
}

fn disk_tier(core: &Core) -> TierStatus {
    let Some(figures) = core.manager.disk() else {
        return TierStatus { reason: "its size is set to 0".to_owned(), ..off(Tier::Disk) };
    };
    let (state, reason) = match figures.state {
        DiskState::Off => ("off", "its size is set to 0".to_owned()),
        DiskState::Opening if figures.capacity_bytes == 0 => {
            ("opening", "the first pool will tell how large its blocks are".to_owned())
        }
        DiskState::Opening => ("opening", "its files are being made or read".to_owned()),
        DiskState::On => ("on", String::new()),
        DiskState::Out(reason) => ("out", reason),
    };
    let mut tier = TierStatus {
        state: state.to_owned(),
        reason,
        capacity_bytes: figures.capacity_bytes,
        ..off(Tier::Disk)
    };
    core.manager.inspect(|ledger| {
        for summary in ledger.disk_summaries() {
            add(&mut tier.slots, slots(summary.counts, summary.counts.bad));
            tier.used_bytes += used(summary.counts) * summary.class.stride as u64;
        }
        tier.evictions = ledger.evictions(Tier::Disk);
    });
    tier
}

fn slots(counts: SlotCounts, quarantined: usize) -> SlotStatus {
    SlotStatus {
        free: counts.free as u64,
        filling: counts.filling as u64,
        resident: counts.resident as u64,
        pinned: counts.pinned as u64,
        quarantined: quarantined as u64,
    }
}

fn used(counts: SlotCounts) -> u64 {
    (counts.filling + counts.resident) as u64
}

fn add(sum: &mut SlotStatus, more: SlotStatus) {
    sum.free += more.free;
    sum.filling += more.filling;
    sum.resident += more.resident;
    sum.pinned += more.pinned;
    sum.quarantined += more.quarantined;
}
