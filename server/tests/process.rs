//! `kvbm_server::run` as a process: what it prints, how it ends. Starts itself again as the daemon.
#![allow(missing_docs, clippy::unwrap_used)]

use std::io::{BufRead, BufReader, Read};
use std::path::Path;
use std::process::{Command, ExitCode, Output, Stdio};

use clap::{Args, FromArgMatches};
use kvbm_server::DaemonArgs;

const AS_DAEMON: &str = "KVBM_TEST_AS_DAEMON";

fn main() -> ExitCode {
    if std::env::var_os(AS_DAEMON).is_some() {
        let command = DaemonArgs::augment_args(clap::Command::new("daemon"));
        let args = DaemonArgs::from_arg_matches(&command.get_matches()).unwrap();
        return kvbm_server::run(&args, |addresses| println!("{}", addresses.admin_url("/metrics")));
    }
    let dir = tempfile::tempdir().unwrap();
    settings_are_printed_with_their_source(dir.path());
    an_invalid_setting_is_one_line_and_code_2(dir.path());
    it_serves_until_it_is_told_to_end(dir.path());
    ExitCode::SUCCESS
}

fn daemon(dir: &Path, flags: &[&str], environment: &[(&str, &str)]) -> Command {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(flags).current_dir(dir).env_clear().env(AS_DAEMON, "1").env("KVBM_STATE_DIR", dir);
    command
        .envs(environment.iter().copied())
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    command
}

fn texts(output: &Output) -> (String, String) {
    let text = |bytes: &[u8]| String::from_utf8(bytes.to_vec()).unwrap();
    (text(&output.stdout), text(&output.stderr))
}

fn settings_are_printed_with_their_source(dir: &Path) {
    std::fs::write(dir.join("kvbm.toml"), "queue_depth = 3\n").unwrap();
    let output = daemon(dir, &["--print-config", "--lease-ms", "50"], &[("DYN_KVBM_METRICS_PORT", "0")])
        .output()
        .unwrap();
    let (stdout, stderr) = texts(&output);
    assert_eq!((output.status.code(), stderr.as_str()), (Some(0), ""));
    for (value, source) in [
        ("lease_ms = 50", "--lease-ms"),
        ("metrics_port = 0", "DYN_KVBM_METRICS_PORT"),
        ("queue_depth = 3", "queue_depth in kvbm.toml"),
        ("batch_blocks = 128", "default"),
    ] {
        let line = stdout
            .lines()
            .find(|line| line.starts_with(value))
            .unwrap_or_else(|| panic!("{value} in {stdout}"));
        assert!(line.ends_with(&format!("# {source}")), "{line}");
    }
    std::fs::remove_file(dir.join("kvbm.toml")).unwrap();
}

fn an_invalid_setting_is_one_line_and_code_2(dir: &Path) {
    for (name, value, line) in [
        ("DYN_KVBM_CPU_CACHE_GB", "-1", "permitted is a number from 0 to 65536"),
        ("DYN_KVBM_CPU_CACHE_GB", "60000", "(GB of memory available now)"),
        ("KVBM_QUEUE_DEPTH", "0", "permitted is a whole number from 1 to 65536"),
        ("KVBM_GRPC_LISTEN", "0.0.0.0:0", "permitted is a loopback address, unless"),
    ] {
        let output = daemon(dir, &[], &[(name, value)]).output().unwrap();
        let (stdout, stderr) = texts(&output);
        assert_eq!(
            (output.status.code(), stdout.as_str(), stderr.lines().count()),
            (Some(2), "", 1),
            "{stderr}"
        );
        assert!(stderr.contains(&format!("{name} = {value:?}")) && stderr.contains(line), "{stderr}");
    }
}

fn it_serves_until_it_is_told_to_end(dir: &Path) {
    let environment = [
        ("DYN_KVBM_METRICS_PORT", "0"),
        ("DYN_KVBM_CPU_CACHE_GB", "0.01"),
        ("DYN_KVBM_LEADER_ZMQ_PUB_PORT", "1"),
        ("DYN_KVBM_SLEEP", "1"),
    ];
    let mut first = daemon(dir, &[], &environment).spawn().unwrap();
    let mut lines = BufReader::new(first.stderr.take().unwrap()).lines().map(Result::unwrap);
    let warning = lines.next().unwrap();
    assert!(
        warning.contains("DYN_KVBM_LEADER_ZMQ_PUB_PORT: ") && warning.contains("DYN_KVBM_SLEEP: "),
        "{warning}"
    );
    let serving = lines.find(|line| line.contains("kvbm daemon serves")).unwrap();
    let socket = dir.join("kvbm.sock");
    assert!(serving.contains(socket.to_str().unwrap()) && serving.contains("/metrics"), "{serving}");

    let second = daemon(dir, &[], &environment[..2]).output().unwrap();
    let (_, stderr) = texts(&second);
    let expected = format!("a daemon is already serving at {} (process {})", socket.display(), first.id());
    assert_eq!(second.status.code(), Some(2));
    assert!(stderr.contains(&expected), "{stderr}");

    assert!(Command::new("kill").args(["-TERM", &first.id().to_string()]).status().unwrap().success());
    assert_eq!(first.wait().unwrap().code(), Some(0));
    assert!(!socket.exists());
    assert!(lines.any(|line| line.contains("stopped")));
    let mut stdout = String::new();
    first.stdout.take().unwrap().read_to_string(&mut stdout).unwrap();
    assert!(stdout.starts_with("http://127.0.0.1:") && stdout.ends_with("/metrics\n"), "{stdout}");
}
