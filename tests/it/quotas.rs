//! What tenants may have, from the header of a request to what is found later.

use kvbm_tests::{DaemonOptions, Node, Random};
use serde_json::json;

use super::retention::{FOUND_TOKENS, PROMPT_TOKENS, Served, small};

/// One keeps what is guaranteed to it, one is held at its maximum, and one that has no quota takes what it can get.
#[test]
fn a_tenant_at_its_maximum_and_one_without_leave_what_is_guaranteed_to_another() {
    let options = DaemonOptions { host_mb: 8.0, ..DaemonOptions::default() };
    let quotas = ["--tenant-quota", "modest:host:min=2MB,max=4MB", "--tenant-quota", "greedy:host:max=3MB"];
    let node = Node::start(options.and(&quotas));
    let served = Served::start(&node, "a", &small());
    let mut random = Random::new(41);
    let prompts: Vec<_> = (0..2).map(|_| random.tokens(PROMPT_TOKENS)).collect();
    let (modest, greedy) = ([("x-kvbm-tenant", "modest")], [("x-kvbm-tenant", "greedy")]);
    for prompt in &prompts {
        assert_eq!(served.ask_as(&modest, prompt, &json!({})), [0; 3]);
    }
    node.assert_offloaded(8);
    for _ in 0..40 {
        served.ask_as(&greedy, &random.tokens(PROMPT_TOKENS), &json!({}));
    }
    node.assert_idle();
    let used = |tenant: &str| {
        let tenants = node.status().tenants;
        let of = tenants.iter().find(|of| of.tenant == tenant && of.tier == "host").unwrap();
        (of.used_bytes, of.min_bytes, of.max_bytes)
    };
    let (greedy_bytes, _, greedy_max) = used("greedy");
    assert_eq!(greedy_max, Some(3_000_000));
    assert!((2_000_000..=3_000_000).contains(&greedy_bytes), "{greedy_bytes}");
    for _ in 0..60 {
        served.ask(&random.tokens(PROMPT_TOKENS), &json!({}));
    }
    node.assert_idle();
    let (modest_bytes, modest_min, _) = used("modest");
    assert!(modest_bytes > 0 && modest_bytes <= modest_min, "{modest_bytes}");
    // The pool has long forgotten them: an empty one finds all in host memory.
    let second = Served::start(&node, "b", &small());
    for prompt in &prompts {
        assert_eq!(second.ask_as(&modest, prompt, &json!({})), [0, FOUND_TOKENS, 0]);
    }
}
