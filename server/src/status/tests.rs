use super::*;

fn sample() -> Status {
    let slots = SlotStatus { free: 1, filling: 2, resident: 3, pinned: 1, quarantined: 0 };
    Status {
        schema: SCHEMA,
        daemon: DaemonStatus {
            version: "0.1.0".into(),
            pid: 7,
            uptime_s: 1.5,
            socket: "/run/kvbm.sock".into(),
            admin: "http://127.0.0.1:6880".into(),
            grpc: Some("https://127.0.0.1:6881".into()),
            ready: true,
            reasons: vec![],
        },
        tiers: vec![TierStatus {
            tier: "host".into(),
            state: "on".into(),
            reason: String::new(),
            capacity_bytes: 1_000_000_000,
            used_bytes: 65_536,
            slots,
            evictions: 0,
        }],
        pools: vec![PoolStatus {
            id: 1,
            session: None,
            device: "cpu:0".into(),
            mode: "owned".into(),
            epoch: 2,
            slots,
            state: "orphan".into(),
            block_bytes: 65_536,
        }],
        engine_pools: vec![EnginePoolStatus {
            id: 2,
            session: Some(9),
            engine: "0123456789abcdef0123456789abcdef".into(),
            rank: 1,
            rank_count: 2,
            shard: 1,
            shard_count: 2,
            device: "cpu:0".into(),
            mode: "staged".into(),
            state: "attached".into(),
            block_bytes: 32_768,
            blocks: 64,
            registered: 0,
            writing: 5,
        }],
        layouts: vec![LayoutStatus { slot_bytes: 65_536, segments: 1 }],
        namespaces: vec![],
        sessions: vec![],
        leases: 4,
        transfers_in_flight: 0,
        workers: vec![],
        what_if: vec![WhatIfStatus {
            tier: "host".into(),
            capacity_bytes: 60_000_000_000,
            window_s: 3000.0,
            blocks: 12,
            hit_rate: 0.61,
            estimates: [("0.5", 0.48), ("1", 0.6), ("2", 0.66), ("4", 0.7), ("inf", 0.71)]
                .map(|(times, rate)| (times.to_owned(), rate))
                .into(),
            sampled: 0.25,
        }],
        tenants: vec![TenantStatus {
            tenant: "blue".into(),
            tier: "host".into(),
            used_bytes: 1_000_000,
            min_bytes: 0,
            max_bytes: Some(2_000_000_000),
            refused: 3,
            evicted: 4,
        }],
        pins: vec![PinStatus { id: 9, namespace: 2, blocks: 5, bytes: 327_680, remaining_s: 59.6 }],
        gpus: vec![GpuStatus {
            uuid: "GPU-0011".into(),
            name: "NVIDIA H200".into(),
            pci_bus_id: "0000:17:00.0".into(),
            numa_node: Some(1),
            memory_bytes: 150_000_000_000,
            memory_free_bytes: Some(90_000_000_000),
            state: "on".into(),
            reason: String::new(),
            onboard_bytes: 1_000_000,
            offload_bytes: 2_000_000,
            onboard_batches: 1,
            offload_batches: 2,
            failed_batches: 0,
            onboard_busy_s: 0.25,
            offload_busy_s: 0.5,
            host_registered_bytes: 60_000_000_000,
            paced_bytes_per_second: Some(13_000_000_000),
        }],
    }
}

#[test]
fn the_fields_others_script_against_are_there() {
    let mut json = serde_json::to_value(sample()).unwrap();
    assert_eq!(json["schema"], 1);
    for pointer in [
        "/daemon/version",
        "/daemon/pid",
        "/daemon/uptime_s",
        "/daemon/grpc",
        "/tiers/0/tier",
        "/tiers/0/state",
        "/tiers/0/reason",
        "/tiers/0/capacity_bytes",
        "/tiers/0/used_bytes",
        "/tiers/0/slots/quarantined",
        "/pools/0/id",
        "/pools/0/session",
        "/pools/0/device",
        "/pools/0/mode",
        "/pools/0/epoch",
        "/pools/0/slots/free",
        "/layouts/0/slot_bytes",
        "/layouts/0/segments",
        "/namespaces",
        "/sessions",
        "/leases",
        "/transfers_in_flight",
        "/workers",
        "/what_if/0/tier",
        "/what_if/0/capacity_bytes",
        "/what_if/0/window_s",
        "/what_if/0/blocks",
        "/what_if/0/hit_rate",
        "/what_if/0/estimates/0.5",
        "/what_if/0/estimates/inf",
        "/what_if/0/sampled",
        "/tenants/0/tenant",
        "/tenants/0/tier",
        "/tenants/0/used_bytes",
        "/tenants/0/min_bytes",
        "/tenants/0/max_bytes",
        "/tenants/0/refused",
        "/tenants/0/evicted",
        "/pins/0/id",
        "/pins/0/namespace",
        "/pins/0/blocks",
        "/pins/0/bytes",
        "/pins/0/remaining_s",
        "/gpus/0/uuid",
        "/gpus/0/numa_node",
        "/gpus/0/state",
        "/gpus/0/reason",
        "/gpus/0/onboard_bytes",
        "/gpus/0/offload_bytes",
        "/gpus/0/failed_batches",
        "/gpus/0/host_registered_bytes",
        "/gpus/0/paced_bytes_per_second",
    ] {
        assert!(json.pointer(pointer).is_some(), "{pointer}");
    }
    assert_eq!(serde_json::from_value::<Status>(json.clone()).unwrap(), sample());
    // A daemon that does not know of the port yet.
    json["daemon"].as_object_mut().unwrap().remove("grpc");
    for field in ["what_if", "tenants", "pins", "gpus"] {
        json.as_object_mut().unwrap().remove(field);
    }
    let older = serde_json::from_value::<Status>(json).unwrap();
    assert_eq!((older.daemon.grpc, older.what_if, older.tenants), (None, vec![], vec![]));
    assert!(older.pins.is_empty());
}

#[test]
fn people_get_aligned_tables() {
    let text = render(&sample());
    assert!(text.starts_with("kvbm 0.1.0  pid 7  up 2 s  ready\n"), "{text}");
    assert!(
        text.contains("\ntier  state  capacity  used     free  filling  resident  pinned  quarantined\n"),
        "{text}"
    );
    assert!(
        text.contains("\nhost  on     1.00 GB   65.5 kB  1     2        3         1       0\n"),
        "{text}"
    );
    assert!(text.contains("\nsessions: none\n"));
    let line = "\nhost: 61 % now; 2 x 60.00 GB would give 66 %, 4 x 70 %, half 48 %, all 71 %\n";
    assert!(text.contains(line), "{text}");
    assert!(text.contains("\nblue    host  1.0 MB  -    2.00 GB  3        4\n"), "{text}");
    assert!(text.contains("\n9    2          5       327.7 kB  60 s\n"), "{text}");
    let mut idle = sample();
    idle.what_if[0].blocks = 0;
    assert!(render(&idle).contains("\nhost: nothing was asked for in the last 3000 s\n"));
}
