//! `kvbm up` as a user meets it.

use std::path::Path;
use std::process::Command;
use std::time::Duration;

use kvbm_tests::{Up, eventually, eventually_within, get, metric_in, program};
use serde_json::{Value, json};

fn gone(pid: u64) -> bool {
    let Ok(status) = std::fs::read_to_string(Path::new("/proc").join(pid.to_string()).join("stat")) else {
        return true;
    };
    // A zombie that only its new parent has to collect has ended, too.
    status.rsplit(") ").next().is_some_and(|rest| rest.starts_with('Z'))
}

/// What the bundled model says to the README's prompt.
const CONTINUATION: &str = "\nAnd the waters were filled with the waters, and the waters were filled with the waters.\n\
                            And the waters were filled with the waters, and the waters";

#[test]
fn a_busy_port_gives_way_to_the_next() {
    let taken = std::net::TcpListener::bind("0.0.0.0:0").unwrap();
    let port = taken.local_addr().unwrap().port().to_string();
    let up = Up::start(&["--http-port", &port]);
    assert!(!up.url("").ends_with(&format!(":{port}")), "{}", up.url(""));
    eventually("it is healthy", || ureq::get(up.url("/health")).call().ok());
}

#[test]
fn the_readmes_curl_gives_the_stored_continuation_and_then_cached_tokens() {
    let up = Up::start(&["--workers", "2"]);
    let readme = include_str!("../../README.md");
    let body: Value =
        serde_json::from_str(readme.split("-d '").nth(1).unwrap().split('\'').next().unwrap()).unwrap();
    let (status, cached, cold) = up.post("/v1/completions", &body);
    assert_eq!((status, cached.as_str()), (200, "device=0,host=0,disk=0"), "{cold}");
    let text = cold["choices"][0]["text"].as_str().unwrap().to_owned();
    assert_eq!(text, CONTINUATION);
    let whole_blocks = (cold["usage"]["prompt_tokens"].as_u64().unwrap() - 1) / 32 * 32;
    assert!(whole_blocks >= 32);
    // Round robin: the second request goes to the other worker and is a host hit.
    let metrics = up.ready["metrics"].as_str().unwrap().to_owned();
    eventually("the prompt is in host memory", || {
        let offloaded = metric_in(&get(&metrics), "kvbm_offload_blocks_d2h", "");
        (offloaded >= whole_blocks as f64 / 32.0).then_some(())
    });
    // Unless that one is not there yet, or was busy: then a later one does.
    let elsewhere = format!("device=0,host={whole_blocks},disk=0");
    let same = format!("device={whole_blocks},host=0,disk=0");
    let mut seen = Vec::new();
    while !(seen.contains(&elsewhere) && seen.last() == Some(&same)) {
        let (status, cached, warm) = up.post("/v1/completions", &body);
        assert!(status == 200 && (cached == elsewhere || cached == same), "{status} {cached} after {seen:?}");
        assert_eq!(warm["choices"][0]["text"].as_str().unwrap(), text);
        assert_eq!(warm["usage"]["prompt_tokens_details"]["cached_tokens"].as_u64(), Some(whole_blocks));
        seen.push(cached);
        assert!(seen.len() < 20, "{seen:?}");
    }
    let models: Value = serde_json::from_str(&get(&up.url("/v1/models"))).unwrap();
    assert_eq!(models["data"][0]["id"].as_str(), Some("tiny"));
}

#[test]
fn a_worker_can_be_made_to_say_hello() {
    for name in ["DYN_ENABLE_TEST_LOGITS_PROCESSOR", "DYNAMO_ENABLE_TEST_LOGITS_PROCESSOR"] {
        let folder = std::sync::Arc::new(tempfile::Builder::new().prefix("kvbm").tempdir().unwrap());
        let up = Up::start_in(folder, &[], &[(name, "1")]);
        let body = json!({ "model": "tiny", "messages": [{ "role": "user", "content": "Who?" }], "temperature": 1.5 });
        let (status, _, answer) = up.post("/v1/chat/completions", &body);
        assert_eq!((status, &answer["choices"][0]["finish_reason"]), (200, &json!("stop")));
        assert_eq!(answer["choices"][0]["message"]["content"], "Hello world!");
    }
}

#[test]
fn a_model_is_talked_to_in_the_terminal() {
    let model = concat!(env!("CARGO_MANIFEST_DIR"), "/../models/tiny");
    let run = |arguments: &[&str], input: &str| {
        use std::io::Write;
        let mut child = Command::new(program())
            .args(["run", "--model", model, "--max-tokens", "8", "--temperature", "0"])
            .args(arguments)
            .stdin(std::process::Stdio::piped())
            .stdout(std::process::Stdio::piped())
            .spawn()
            .unwrap();
        child.stdin.take().unwrap().write_all(input.as_bytes()).unwrap();
        let output = child.wait_with_output().unwrap();
        assert!(output.status.success());
        String::from_utf8(output.stdout).unwrap()
    };
    let once = run(&["First Citizen:"], "");
    assert!(once.trim().len() > 3, "{once}");
    let talk = run(&[], "First Citizen:\n/clear\n\nFirst Citizen:\n/exit\nnever");
    assert_eq!(talk, format!("{once}{once}"), "what was forgotten has no part in the second answer");
}

#[test]
fn a_part_that_dies_is_started_again_and_requests_go_on() {
    let up = Up::start(&[]);
    let body = json!({"model": "tiny", "prompt": "First Citizen:", "max_tokens": 8, "temperature": 0});
    let (_, _, first) = up.post("/v1/completions", &body);
    for part in ["holder", "daemon", "frontend"] {
        let pid = up.ready["pids"][part].as_u64().unwrap();
        rustix::process::kill_process(
            rustix::process::Pid::from_raw(pid as i32).unwrap(),
            rustix::process::Signal::KILL,
        )
        .unwrap();
        let again = eventually_within(Duration::from_secs(20), "answers again", || {
            up.try_post("/v1/completions", &body).ok().filter(|(status, ..)| *status == 200)
        });
        assert_eq!(again.2["choices"], first["choices"], "after the {part} was killed");
    }
}

#[test]
fn a_holder_runs_beside_the_daemon_unless_it_is_not_wanted() {
    let up = Up::start(&[]);
    let holder = up.dir.path().join("kvbm.sock.hold");
    assert!(holder.exists());
    let pid = rustix::process::Pid::from_raw(up.ready["pids"]["holder"].as_u64().unwrap() as i32).unwrap();
    std::fs::remove_file(&holder).unwrap();
    rustix::process::kill_process(pid, rustix::process::Signal::KILL).unwrap();
    eventually("the holder is started again", || holder.exists().then_some(()));
    let cold = Up::start(&["--no-warm-host"]);
    assert_eq!(cold.ready["pids"]["holder"], Value::Null);
    assert!(!cold.dir.path().join("kvbm.sock.hold").exists());
}

#[test]
fn children_end_when_up_ends_however_it_ends() {
    for signal in [rustix::process::Signal::INT, rustix::process::Signal::KILL] {
        let mut up = Up::start(&[]);
        let pids = up.pids();
        assert_eq!(pids.len(), 4);
        assert!(pids.iter().all(|pid| !gone(*pid)));
        let own = rustix::process::Pid::from_raw(up.child.id() as i32).unwrap();
        rustix::process::kill_process(own, signal).unwrap();
        let status = up.child.wait().unwrap();
        assert_eq!(status.success(), signal == rustix::process::Signal::INT, "{status}");
        eventually_within(Duration::from_secs(10), "all children have ended", || {
            pids.iter().all(|pid| gone(*pid)).then_some(())
        });
    }
}

#[test]
fn wrong_settings_are_one_line_and_code_2() {
    let cases: [(&[&str], &[(&str, &str)], &[&str]); 9] = [
        (&["daemon", "--cpu-cache-gb", "-1"], &[], &["cpu-cache-gb", "-1"]),
        (&["daemon"], &[("DYN_KVBM_CPU_CACHE_GB", "lots")], &["DYN_KVBM_CPU_CACHE_GB", "lots"]),
        (&["worker", "--model", "/nowhere"], &[], &["/nowhere"]),
        (
            &["frontend", "--http-port", "70000", "--socket", "/tmp/x"],
            &[],
            &["--http-port", "70000", "65535"],
        ),
        (&["up", "--model", "/nowhere"], &[], &["/nowhere"]),
        (&["up", "--http-port", "abc"], &[], &["--http-port", "abc", "65535"]),
        (&["up", "--cpu-cache-gb", "abc"], &[], &["--cpu-cache-gb", "abc"]),
        (&["up", "--workers", "0"], &[], &["--workers", "0"]),
        (&["worker", "--model", "x", "--block-size", "abc"], &[], &["--block-size", "abc"]),
    ];
    let dir = tempfile::tempdir().unwrap();
    for (arguments, environment, expected) in cases {
        let output = Command::new(program())
            .args(arguments)
            .env("KVBM_STATE_DIR", dir.path())
            .envs(environment.iter().copied())
            .output()
            .unwrap();
        let error = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(2), "{arguments:?}: {error}");
        assert_eq!(error.trim_end().lines().count(), 1, "{arguments:?}: {error}");
        for part in expected {
            assert!(error.contains(part), "{arguments:?}: {error}");
        }
    }
}
