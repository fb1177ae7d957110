//! Pins and quotas as operators use them: over the socket and over HTTP.

use kvbm_proto::pack_keys;
use kvbm_proto::v1::admin_client::AdminClient;
use kvbm_proto::v1::{self, pin_request};
use kvbm_server::status::Status;
use tonic::Code;
use tonic::transport::Channel;

use crate::authority::secret;
use crate::client::{Client, DIGEST, Pool, channel, keys};
use crate::rig::Rig;

async fn admin(rig: &Rig) -> AdminClient<Channel> {
    AdminClient::new(channel(rig.socket()).await)
}

fn request(keys: &[[u8; 16]], duration_ms: u64) -> v1::PinRequest {
    v1::PinRequest {
        namespace: Some(pin_request::Namespace::NamespaceDigest(DIGEST.to_vec())),
        blocks: Some(pin_request::Blocks::Prefix(pack_keys(keys))),
        duration_ms,
    }
}

fn hex(keys: &[[u8; 16]]) -> serde_json::Value {
    let digits = |key: &[u8; 16]| key.iter().map(|byte| format!("{byte:02x}")).collect::<String>();
    keys.iter().map(digits).collect::<Vec<_>>().into()
}

/// A daemon with 8 blocks of host memory, a client with a pool of 8, and two blocks stored.
async fn small(settings: &[(&str, &str)]) -> (Rig, Client, u32, Pool) {
    let rig = Rig::start(&[&[("cpu_cache_blocks", "8")], settings].concat()).await;
    let mut client = Client::attach(rig.socket()).await;
    let (namespace, pool) = (client.namespace().await, client.pool(8).await);
    store(&mut client, namespace, &pool, 0).await;
    (rig, client, namespace, pool)
}

async fn store(client: &mut Client, namespace: u32, pool: &Pool, sequence: u8) {
    let blocks = client.store(namespace, pool, &keys(sequence, 2)).await;
    client.release(pool.id, &blocks).await;
}

/// Much more than there is room for, anywhere.
async fn flood(client: &mut Client, namespace: u32, pool: &Pool, from: u8) {
    for sequence in from..from + 10 {
        store(client, namespace, pool, sequence).await;
    }
}

/// Leading blocks of the first sequence that are anywhere.
async fn left(client: &mut Client, namespace: u32, pool: &Pool) -> usize {
    let found = client.find(namespace, pool.id, &keys(0, 2)).await;
    client.release(pool.id, &found.device).await;
    found.device.len() + found.host_blocks as usize
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pinned_prompt_outlives_a_flood_until_it_is_unpinned() {
    // The default policy may keep what was asked for more often.
    let (rig, mut client, namespace, pool) = small(&[("eviction_policy", "lru")]).await;
    let mut admin = admin(&rig).await;
    let pinned = admin.pin(request(&keys(0, 3), 60_000)).await.unwrap().into_inner();
    assert_eq!((pinned.pin_id, pinned.missing), (1, 1), "{pinned:?}");
    let tiers: Vec<_> = pinned.blocks.iter().map(|tier| (tier.tier(), tier.blocks)).collect();
    assert_eq!(tiers, [(v1::Tier::Device, 2), (v1::Tier::Host, 2)]);
    flood(&mut client, namespace, &pool, 1).await;
    assert_eq!(left(&mut client, namespace, &pool).await, 2);

    let listed = admin.list_pins(v1::ListPinsRequest {}).await.unwrap().into_inner().pins;
    assert_eq!((listed.len(), listed[0].pin_id, listed[0].blocks), (1, 1, 2));
    assert!((1..=60_000).contains(&listed[0].remaining_ms), "{listed:?}");
    let status = rig.daemon.status();
    assert_eq!(
        (status.pins[0].id, status.pins[0].namespace, status.pins[0].bytes),
        (1, namespace, pinned.bytes)
    );
    assert_eq!(rig.metric("kvbm_pins"), 1.0);
    assert_eq!(rig.metric("kvbm_pinned_bytes"), pinned.bytes as f64);

    admin.unpin(v1::UnpinRequest { pin_id: 1 }).await.unwrap();
    assert_eq!(rig.metric("kvbm_pins"), 0.0);
    flood(&mut client, namespace, &pool, 20).await;
    assert_eq!(left(&mut client, namespace, &pool).await, 0);
    let again = admin.unpin(v1::UnpinRequest { pin_id: 1 }).await.unwrap_err();
    assert_eq!(
        (again.code(), again.message().contains("kvbm pin --list")),
        (Code::NotFound, true),
        "{again}"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pin_ends_by_its_time() {
    let (rig, mut client, namespace, pool) = small(&[]).await;
    admin(&rig).await.pin(request(&keys(0, 2), 300)).await.unwrap();
    rig.until("ended", |status| status.pins.is_empty()).await;
    flood(&mut client, namespace, &pool, 1).await;
    assert_eq!(left(&mut client, namespace, &pool).await, 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pin_that_cannot_be_says_why() {
    let (rig, _client, namespace, _pool) = small(&[("pin_budget_gb", "0.00001")]).await;
    let mut admin = admin(&rig).await;
    let mut fails = async |request: v1::PinRequest, code: Code, part: &str| {
        let status = admin.pin(request).await.unwrap_err();
        assert_eq!(status.code(), code, "{status}");
        assert!(status.message().contains(part) && !status.message().contains('\n'), "{status}");
    };
    let there = request(&keys(0, 2), 1000);
    fails(there.clone(), Code::ResourceExhausted, "raise pin_budget_gb").await;
    fails(request(&keys(9, 2), 1000), Code::NotFound, "no tier has any of the 2 blocks").await;
    fails(request(&[], 1000), Code::InvalidArgument, "prefix: 0 blocks").await;
    fails(request(&keys(0, 2), 0), Code::InvalidArgument, "duration: 0 s").await;
    let other = pin_request::Namespace::NamespaceId(namespace + 77);
    let other = v1::PinRequest { namespace: Some(other), ..there.clone() };
    fails(other, Code::NotFound, "kvbm status").await;
    let short = pin_request::Namespace::NamespaceDigest(vec![1; 31]);
    let short = v1::PinRequest { namespace: Some(short), ..there.clone() };
    fails(short, Code::InvalidArgument, "namespace_digest").await;
    fails(v1::PinRequest { namespace: None, ..there.clone() }, Code::InvalidArgument, "namespace").await;
    fails(v1::PinRequest { blocks: None, ..there }, Code::InvalidArgument, "blocks").await;
    assert!(rig.daemon.status().pins.is_empty(), "what is refused leaves nothing");
}

#[tokio::test(flavor = "multi_thread")]
async fn pins_over_http_on_loopback() {
    let (rig, _client, namespace, _pool) = small(&[]).await;
    let body = serde_json::json!({ "namespace": namespace, "prefix": hex(&keys(0, 2)), "duration_s": 60 });
    let (code, answer) = rig.send("POST", "/pins", None, &body.to_string()).await;
    let answer: serde_json::Value = serde_json::from_str(&answer).unwrap();
    assert_eq!((code, &answer["id"], &answer["missing"]), (201, &1.into(), &0.into()), "{answer}");
    assert_eq!((&answer["blocks"]["device"], &answer["blocks"]["host"]), (&2.into(), &2.into()));
    let by_model = serde_json::json!({ "model": "m", "keys": hex(&keys(0, 1)), "duration_s": 0.5 });
    assert_eq!(rig.send("POST", "/pins", None, &by_model.to_string()).await.0, 201);
    let (code, listed) = rig.get("/pins").await;
    let listed: serde_json::Value = serde_json::from_str(&listed).unwrap();
    assert_eq!((code, &listed["pins"][0]["id"], &listed["pins"][0]["blocks"]), (200, &1.into(), &2.into()));

    let gone = [serde_json::json!({ "model": "n", "prefix": hex(&keys(0, 1)), "duration_s": 1 })];
    let wrong = [
        serde_json::json!({ "namespace": namespace, "prefix": ["xyz"], "duration_s": 1 }),
        serde_json::json!({ "namespace": namespace, "model": "m", "prefix": hex(&keys(0, 1)), "duration_s": 1 }),
        serde_json::json!({ "namespace": namespace, "prefix": hex(&keys(0, 1)), "duration_s": -1 }),
    ];
    let unread = [serde_json::json!({ "namespace": namespace, "prefixes": [], "duration_s": 1 })];
    for (code, bodies) in [(404, gone.as_slice()), (400, &wrong), (422, &unread)] {
        for body in bodies {
            let (actual, answer) = rig.send("POST", "/pins", None, &body.to_string()).await;
            assert_eq!(actual, code, "{body}: {answer}");
            let answer: serde_json::Value = serde_json::from_str(&answer).unwrap();
            assert!(answer["error"].is_string(), "{answer}");
        }
    }
    assert_eq!(rig.send("DELETE", "/pins/1", None, "").await.0, 204);
    assert_eq!(rig.send("DELETE", "/pins/1", None, "").await.0, 404);
    assert_eq!(rig.send("DELETE", "/pins/one", None, "").await.0, 400);
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_is_changed_over_http_without_a_token_where_others_listen() {
    let body = serde_json::json!({ "model": "m", "prefix": hex(&keys(0, 2)), "duration_s": 60 }).to_string();
    let files = tempfile::tempdir().unwrap();
    let token = "a-token-of-enough-letters";
    let file = secret(files.path(), "token", token).display().to_string();
    for (host, demands) in [("0.0.0.0", false), ("0.0.0.0", true), ("127.0.0.1", true)] {
        let settings = [("metrics_host", host), ("admin_token_file", file.as_str())];
        let (rig, _client, ..) = small(if demands { &settings } else { &settings[..1] }).await;
        let refused = if demands { 401 } else { 403 };
        for shown in [None, Some("a-token-of-other-letters")] {
            assert_eq!(rig.send("POST", "/pins", shown, &body).await.0, refused);
            assert_eq!(rig.send("DELETE", "/pins/1", shown, "").await.0, refused);
        }
        assert!(rig.daemon.status().pins.is_empty());
        assert_eq!(rig.get("/pins").await.0, 200, "to look is open");
        let admitted = if demands { 201 } else { 403 };
        assert_eq!(rig.send("POST", "/pins", Some(token), &body).await.0, admitted);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_tenant_at_its_maximum_is_counted_and_takes_nothing_from_others() {
    // Three blocks of 8 KiB.
    let (rig, mut client, namespace, pool) = small(&[("tenants", "t:host:min=8kB,max=25kB")]).await;
    for sequence in 1..6 {
        store(&mut client, namespace, &pool, sequence).await;
    }
    let of = |status: &Status, tier: &str| {
        status.tenants.iter().find(|usage| usage.tenant == "t" && usage.tier == tier).cloned().unwrap()
    };
    let status = rig.until("evicted", |status| of(status, "host").evicted > 0).await;
    let host = of(&status, "host");
    assert_eq!((host.min_bytes, host.max_bytes), (8000, Some(25_000)));
    assert!((8192..=25_000).contains(&host.used_bytes), "{host:?}");
    assert_eq!(of(&status, "device").max_bytes, None);
    assert!(rig.metric("kvbm_tenant_used_bytes{tenant=\"t\",tier=\"host\"}") <= 25_000.0);
    assert_eq!(rig.metric("kvbm_tenant_evicted_total{tenant=\"t\",tier=\"host\"}"), host.evicted as f64);
    assert_eq!(rig.metric("kvbm_tenant_refused_total{tenant=\"t\",tier=\"host\"}"), host.refused as f64);
    assert!(kvbm_server::status::render(&status).contains("\nt         host"), "people see it too");
}
