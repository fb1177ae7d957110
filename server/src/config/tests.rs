use std::path::Path;

use clap::{Args, FromArgMatches};

/// Somebody who reads the documentation knows every setting.
#[test]
fn every_setting_is_documented_with_its_variables() {
    let page = include_str!("../../../docs/configuration.md");
    for setting in super::SETTINGS {
        let row = page.lines().find(|line| line.starts_with(&format!("| `{}` |", setting.key)));
        let row = row.unwrap_or_else(|| panic!("docs/configuration.md has no row for {}", setting.key));
        for name in setting.env {
            assert!(row.contains(name), "{row} does not name {name}");
        }
    }
}

use super::load::load_within;
use super::*;
use crate::DaemonArgs;
use kvbm::PolicyKind;

const PLENTY: Option<u64> = Some(1 << 40);

fn parse(flags: &[&str]) -> DaemonArgs {
    let command = DaemonArgs::augment_args(clap::Command::new("daemon"));
    let matches = command.try_get_matches_from([&["daemon"], flags].concat()).unwrap();
    DaemonArgs::from_arg_matches(&matches).unwrap()
}

fn environment(pairs: &[(&str, &str)]) -> Environment {
    [("XDG_STATE_HOME", "/state")].iter().chain(pairs).copied().collect()
}

fn fails(flags: &[&str], pairs: &[(&str, &str)], line: &str) {
    let error = load_within(&parse(flags), &environment(pairs), PLENTY, 0).unwrap_err().to_string();
    assert_eq!(error, line);
    assert!(!error.contains('\n'));
}

fn file(dir: &Path, text: &str) -> String {
    let path = dir.join("settings.toml");
    std::fs::write(&path, text).unwrap();
    path.to_string_lossy().into_owned()
}

#[test]
fn flags_win_over_environment_over_file_over_defaults() {
    let dir = tempfile::tempdir().unwrap();
    let path = file(
        dir.path(),
        "lease_ms = 111\nqueue_depth = 1\nbatch_blocks = 2\nallowed_uids = [1, 2]\n[worker]\nx = 1",
    );
    let flags = ["--config", &path, "--lease-ms", "333", "--log-json"];
    let pairs =
        [("KVBM_LEASE_MS", "222"), ("KVBM_QUEUE_DEPTH", "3"), ("DYN_LOG", "warn"), ("RUST_LOG", "x=")];
    let loaded = load_within(&parse(&flags), &environment(&pairs), PLENTY, 0).unwrap();
    let config = &loaded.config;
    assert_eq!((config.lease_ms, config.queue_depth, config.batch_blocks), (333, 3, 2));
    assert_eq!((config.metrics_port, config.log.as_str(), config.log_json), (6880, "warn", true));
    assert_eq!(config.socket, Path::new("/state/kvbm/kvbm.sock"));
    assert_eq!(config.side_socket(), Path::new("/state/kvbm/kvbm.sock.fd"));
    assert_eq!(config.allowed_uids, [1, 2]);
    let source = |key| loaded.source(key).unwrap().to_string();
    assert_eq!(source("lease_ms"), "--lease-ms");
    assert_eq!(source("queue_depth"), "KVBM_QUEUE_DEPTH");
    assert_eq!(source("batch_blocks"), format!("batch_blocks in {path}"));
    assert_eq!(source("log"), "DYN_LOG");
    assert_eq!(source("socket"), "socket (default)");
}

#[test]
fn what_is_printed_can_be_read_again() {
    let flags = ["--cpu-cache-gb", "2.5", "--socket", "/run/k.sock", "--metrics=off"];
    let loaded =
        load_within(&parse(&flags), &environment(&[("KVBM_ALLOWED_UIDS", "7, 8")]), PLENTY, 0).unwrap();
    let text = loaded.print();
    assert!(text.contains("cpu_cache_gb = 2.5"), "{text}");
    let line = text.lines().find(|line| line.starts_with("socket = \"/run/k.sock\"")).unwrap();
    assert!(line.ends_with("# --socket"), "{line}");
    assert!(text.contains("# cpu_cache_blocks is unset"));
    let dir = tempfile::tempdir().unwrap();
    let again = parse(&["--config", &file(dir.path(), &text)]);
    assert_eq!(load_within(&again, &environment(&[]), PLENTY, 0).unwrap().config, loaded.config);
}

#[test]
fn a_holder_is_named_or_not_and_a_flag_can_turn_it_off() {
    let pairs = [("KVBM_HOLDER", "/run/k.hold")];
    let holder = |flags: &[&str], pairs: &[(&str, &str)]| {
        load_within(&parse(flags), &environment(pairs), PLENTY, 0).unwrap().config.holder
    };
    assert_eq!(holder(&[], &[]), None);
    assert_eq!(holder(&[], &pairs).as_deref(), Some(Path::new("/run/k.hold")));
    assert_eq!(holder(&["--holder="], &pairs), None);
    let long = "x".repeat(108);
    fails(
        &["--holder", &long],
        &[],
        &format!("invalid --holder = \"{long}\": permitted is a path of at most 107 bytes, or nothing"),
    );
}

#[test]
fn an_invalid_value_is_one_line_with_setting_value_and_range() {
    fails(
        &["--lease-ms", "1"],
        &[],
        "invalid --lease-ms = \"1\": permitted is a whole number from 10 to 3600000",
    );
    fails(
        &["--lease-ms", "-5"],
        &[],
        "invalid --lease-ms = \"-5\": permitted is a whole number from 10 to 3600000",
    );
    fails(
        &[],
        &[("DYN_KVBM_CPU_CACHE_GB", "lots")],
        "invalid DYN_KVBM_CPU_CACHE_GB = \"lots\": permitted is a number from 0 to 65536",
    );
    fails(
        &[],
        &[("DYN_KVBM_CPU_CACHE_GB", "NaN")],
        "invalid DYN_KVBM_CPU_CACHE_GB = \"NaN\": permitted is a number from 0 to 65536",
    );
    fails(
        &[],
        &[("DYN_KVBM_METRICS_PORT", "65536")],
        "invalid DYN_KVBM_METRICS_PORT = \"65536\": permitted is a whole number from 0 to 65535",
    );
    fails(
        &[],
        &[("DYN_KVBM_LEADER_WORKER_INIT_TIMEOUT_SECS", "86401")],
        "invalid DYN_KVBM_LEADER_WORKER_INIT_TIMEOUT_SECS = \"86401\": permitted is a whole number from 0 to 86400",
    );
    fails(
        &[],
        &[("KVBM_LOG_JSON", "maybe")],
        "invalid KVBM_LOG_JSON = \"maybe\": permitted is true or false",
    );
    fails(&["--metrics-host", "here"], &[], "invalid --metrics-host = \"here\": permitted is an IP address");
    fails(
        &["--allowed-uids", "1,x"],
        &[],
        "invalid --allowed-uids = \"1,x\": permitted is user ids from 0 to 4294967294, separated by commas",
    );
    let long = "x".repeat(105);
    fails(
        &["--socket", &long],
        &[],
        &format!("invalid --socket = \"{long}\": permitted is a path of 1 to 104 bytes"),
    );
    fails(
        &["--log", "a=b=c"],
        &[],
        "invalid --log = \"a=b=c\": permitted is levels error, warn, info, debug, trace or off, or target=level",
    );
}

#[test]
fn a_wrong_file_is_named_with_the_nearest_key() {
    let dir = tempfile::tempdir().unwrap();
    let path = file(dir.path(), "cpu_cache_db = 1");
    let line = format!("unknown setting \"cpu_cache_db\" in {path} (did you mean \"cpu_cache_gb\"?)");
    fails(&["--config", &path], &[], &line);
    let path = file(dir.path(), "lease_ms = true");
    let line =
        format!("invalid lease_ms in {path} = \"true\": permitted is a whole number from 10 to 3600000");
    fails(&[], &[("KVBM_CONFIG", &path)], &line);
    let path = file(dir.path(), "socket = \"a\"\nlease_ms = \n");
    let error =
        load_within(&parse(&["--config", &path]), &environment(&[]), PLENTY, 0).unwrap_err().to_string();
    assert!(error.contains("(named by --config): line 2: "), "{error}");
    assert!(!error.contains('\n'));
    let missing = dir.path().join("none.toml").to_string_lossy().into_owned();
    let error =
        load_within(&parse(&["--config", &missing]), &environment(&[]), PLENTY, 0).unwrap_err().to_string();
    assert!(error.contains("No such file"), "{error}");
}

#[test]
fn host_memory_that_is_not_there_is_an_error() {
    let gigabytes = |flags: &[&str], pairs: &[(&str, &str)]| {
        load_within(&parse(flags), &environment(pairs), Some(1_950_000_000), 1_000_000_000)
            .map_err(|error| error.to_string())
    };
    let asked = gigabytes(&[], &[("DYN_KVBM_CPU_CACHE_GB", "2")]).unwrap_err();
    assert_eq!(
        asked,
        "invalid DYN_KVBM_CPU_CACHE_GB = \"2\": permitted is at most 1.9 (GB of memory available now)"
    );
    let config = gigabytes(&[], &[("DYN_KVBM_CPU_CACHE_GB", "1.9")]).unwrap().config;
    assert_eq!(config.cpu_cache_bytes(), 1_900_000_000);
    // What is shared may be what a holder keeps.
    assert!(gigabytes(&["--holder", "/h"], &[("DYN_KVBM_CPU_CACHE_GB", "2")]).is_ok());
    let blocks = [("DYN_KVBM_CPU_CACHE_GB", "2"), ("DYN_KVBM_CPU_CACHE_OVERRIDE_NUM_BLOCKS", "10")];
    assert_eq!(gigabytes(&[], &blocks).unwrap().config.cpu_cache_blocks, Some(10));
}

#[test]
fn every_foreign_variable_is_in_one_warning_with_its_reason() {
    let pairs = [
        ("DYN_KVBM_LEADER_ZMQ_PUB_PORT", "56001"),
        ("DYN_KVBM_NCCL_MLA_MODE", "true"),
        ("DYN_KVBM_CPU_CACHE_BG", "5"),
        ("DYN_KVBM_METRICS", "true"),
        ("DYN_KVBM_SLEEP", ""),
        ("KVBM_LEASE_SM", "5"),
        ("KVBM_WORKER_THREADS", "5"),
    ];
    let warnings = load_within(&parse(&[]), &environment(&pairs), PLENTY, 0).unwrap().warnings;
    assert_eq!(warnings.len(), 2, "{warnings:?}");
    for part in [
        "DYN_KVBM_LEADER_ZMQ_PUB_PORT: engines reach the daemon over a Unix socket (KVBM_SOCKET), not over ZMQ",
        "DYN_KVBM_NCCL_MLA_MODE: several ranks per engine are not served yet",
        "DYN_KVBM_CPU_CACHE_BG: unknown (did you mean DYN_KVBM_CPU_CACHE_GB?)",
    ] {
        assert!(warnings[0].contains(part), "{part} in {}", warnings[0]);
    }
    assert!(!warnings[0].contains("DYN_KVBM_METRICS:") && !warnings[0].contains("SLEEP"));
    assert_eq!(warnings[1], "unknown variables are ignored: KVBM_LEASE_SM (did you mean KVBM_LEASE_MS?)");
}

#[test]
fn without_a_home_a_state_directory_must_be_named() {
    let empty = Environment::default();
    let error = load_within(&parse(&[]), &empty, PLENTY, 0).unwrap_err().to_string();
    assert_eq!(error, "no state directory: set --state-dir, KVBM_STATE_DIR, XDG_STATE_HOME or HOME");
    assert!(load_within(&parse(&["--state-dir", "/s"]), &empty, PLENTY, 0).is_ok());
}

#[test]
fn help_names_range_default_and_variables() {
    let help = DaemonArgs::augment_args(clap::Command::new("daemon")).render_long_help().to_string();
    let help = help.split_whitespace().collect::<Vec<_>>().join(" ");
    assert!(help.contains("--lease-ms <VALUE>"), "{help}");
    assert!(
        help.contains("[a whole number from 10 to 3600000] [default: 30000] [env: KVBM_LEASE_MS]"),
        "{help}"
    );
}

/// A certificate and its key, one token that may be used, and tokens that may not.
fn files(dir: &Path) -> impl Fn(&str) -> String {
    use std::os::unix::fs::PermissionsExt;
    let own = rcgen::generate_simple_self_signed(vec!["localhost".to_owned()]).unwrap();
    let other = rcgen::KeyPair::generate().unwrap();
    let token = "0123456789abcdef\n";
    for (name, text, mode) in [
        ("cert", own.cert.pem(), 0o644),
        ("key", own.signing_key.serialize_pem(), 0o600),
        ("other_key", other.serialize_pem(), 0o600),
        ("token", token.to_owned(), 0o400),
        ("open_token", token.to_owned(), 0o604),
        ("group_token", token.to_owned(), 0o640),
        ("short_token", "0123456789abcde\n".to_owned(), 0o600),
        ("two_tokens", token.repeat(2), 0o600),
        ("long_token", "x".repeat(4097), 0o600),
    ] {
        let path = dir.join(name);
        std::fs::write(&path, text).unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(mode)).unwrap();
    }
    let dir = dir.to_owned();
    move |name| dir.join(name).display().to_string()
}

#[test]
fn a_port_that_would_not_be_protected_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let path = files(dir.path());
    let tls = [("cert", "cert"), ("key", "key")];
    let with = |listen: &str, files: &[(&str, &str)]| {
        let mut flags = vec!["--grpc-listen".to_owned(), listen.to_owned()];
        for (what, file) in files {
            let flag = match *what {
                "token" => "--grpc-token-file".to_owned(),
                "ca" => "--grpc-tls-client-ca".to_owned(),
                other => format!("--grpc-tls-{other}"),
            };
            flags.extend([flag, path(file)]);
        }
        let flags: Vec<&str> = flags.iter().map(String::as_str).collect();
        load_within(&parse(&flags), &environment(&[]), PLENTY, 0)
            .map(|loaded| loaded.config.grpc_listen.unwrap().to_string())
            .map_err(|error| error.to_string().replace(&format!("{}/", dir.path().display()), ""))
    };
    for (listen, files) in [
        ("127.0.0.1:0", &[("token", "token")][..]),
        ("[::1]:0", &[("token", "token")]),
        ("0.0.0.0:6881", &[tls[0], tls[1], ("token", "token")]),
        ("[::]:6881", &[tls[0], tls[1], ("ca", "cert")]),
        ("127.0.0.1:0", &[tls[0], tls[1], ("ca", "cert"), ("token", "token")]),
    ] {
        assert_eq!(with(listen, files), Ok(listen.to_owned()));
    }
    let token = |file, permitted: &str| {
        let line = format!("invalid --grpc-token-file = \"{file}\": permitted is {permitted}");
        assert_eq!(with("127.0.0.1:0", &[("token", file)]), Err(line));
    };
    token("open_token", "a file that group and others cannot read (its mode is 604, not 600 or 400)");
    token("group_token", "a file that group and others cannot read (its mode is 640, not 600 or 400)");
    for file in ["short_token", "two_tokens", "long_token"] {
        token(file, "a file with one line of 16 to 4096 printable characters without spaces");
    }
    token("none", "a file that can be read (No such file or directory (os error 2))");
    token(".", "a regular file");
    for (listen, files, line) in [
        (
            "0.0.0.0:6881",
            &[("token", "token")][..],
            "invalid --grpc-listen = \"0.0.0.0:6881\": permitted is a loopback address, unless grpc_tls_cert and \
             grpc_tls_key are set",
        ),
        (
            "127.0.0.1:6881",
            &[],
            "invalid --grpc-listen = \"127.0.0.1:6881\": permitted is an address together with grpc_token_file",
        ),
        (
            "0.0.0.0:6881",
            &tls,
            "invalid --grpc-listen = \"0.0.0.0:6881\": permitted is an address together with grpc_token_file or \
             grpc_tls_client_ca",
        ),
        (
            "127.0.0.1:0",
            &[tls[0], ("token", "token")],
            "invalid --grpc-tls-cert = \"cert\": permitted is a certificate together with grpc_tls_key",
        ),
        (
            "127.0.0.1:0",
            &[tls[1], ("token", "token")],
            "invalid --grpc-tls-key = \"key\": permitted is a key together with grpc_tls_cert",
        ),
        (
            "127.0.0.1:0",
            &[("ca", "cert"), ("token", "token")],
            "invalid --grpc-tls-client-ca = \"cert\": permitted is an authority together with grpc_tls_cert and \
             grpc_tls_key",
        ),
        (
            "127.0.0.1:0",
            &[tls[0], tls[1], ("ca", "token")],
            "invalid --grpc-tls-client-ca = \"token\": permitted is a PEM file with certificates (there is none in it)",
        ),
        (
            "node-7:1",
            &[("token", "token")],
            "invalid --grpc-listen = \"node-7:1\": permitted is an IP address and a port, as in 127.0.0.1:6881 or \
             [::]:6881",
        ),
    ] {
        assert_eq!(with(listen, files), Err(line.to_owned()));
    }
    for (files, start) in [
        (
            &[tls[0], ("key", "other_key")][..],
            "invalid --grpc-tls-cert = \"cert\": permitted is a certificate that goes",
        ),
        (
            &[("cert", "key"), tls[1]],
            "invalid --grpc-tls-cert = \"key\": permitted is a PEM file with certificates (",
        ),
        (
            &[tls[0], ("key", "cert")],
            "invalid --grpc-tls-key = \"cert\": permitted is a PEM file with a private key (",
        ),
        (
            &[tls[0], ("key", "none")],
            "invalid --grpc-tls-key = \"none\": permitted is a PEM file with a private key (",
        ),
    ] {
        let line = with("127.0.0.1:0", &[files, &[("token", "token")]].concat()).unwrap_err();
        assert!(line.starts_with(start) && !line.contains('\n'), "{line}");
    }
}

#[test]
fn protection_of_a_port_that_is_not_opened_is_a_warning() {
    let pairs =
        [("KVBM_GRPC_TOKEN_FILE", "/none"), ("KVBM_GRPC_TLS_CERT", "/none"), ("KVBM_DAEMON_CA", "/x")];
    let loaded = load_within(&parse(&[]), &environment(&pairs), PLENTY, 0).unwrap();
    assert_eq!(
        loaded.warnings,
        ["without grpc_listen these settings have no effect: grpc_tls_cert, grpc_token_file"]
    );
}

#[test]
fn quotas_come_from_flags_environment_or_tables() {
    let dir = tempfile::tempdir().unwrap();
    let path = file(
        dir.path(),
        "[tenants.\"a b\".host]\nmin = \"100MB\"\nmax = \"2GB\"\n[tenants.blue.disk]\nmax = \"1.5TB\"",
    );
    let load = |flags: &[&str], pairs: &[(&str, &str)]| {
        load_within(&parse(flags), &environment(pairs), PLENTY, 0).unwrap()
    };
    let from_file = load(&["--config", &path], &[]);
    let quota = from_file.config.manager(1).quotas.tenants["a b"];
    assert_eq!((quota.host.min_bytes, quota.host.max_bytes), (100_000_000, Some(2_000_000_000)));
    assert_eq!(from_file.config.tenants.tenants["blue"].disk.max_bytes, Some(1_500_000_000_000));
    let printed = from_file.print();
    let again = load(&["--config", &file(dir.path(), &printed)], &[]);
    assert_eq!(again.config.tenants, from_file.config.tenants, "{printed}");

    // The strongest source counts alone.
    let variable = ("KVBM_TENANT_QUOTAS", "red:host:max=1GB;red:device:min=1MB");
    let from_environment = load(&["--config", &path], &[variable]).config.tenants.tenants;
    assert_eq!(from_environment.keys().collect::<Vec<_>>(), ["red"]);
    let flags = ["--tenant-quota", "x:host:max=3GB", "--tenant-quota=y:disk:min=1GB,max=2GB"];
    let loaded = load(&flags, &[variable]);
    assert_eq!(loaded.config.tenants.tenants.keys().collect::<Vec<_>>(), ["x", "y"]);
    assert_eq!(loaded.source("tenants").unwrap().to_string(), "--tenant-quota");
    // The disk is off: its minimum cannot be kept.
    assert!(
        loaded.warnings.iter().any(|line| line.contains("in disk add up to 1000000000 bytes")),
        "{loaded:?}"
    );
    fails(
        &["--tenant-quota", "x:host:max=3"],
        &[],
        "invalid --tenant-quota = \"x:host:max=3\": permitted is a size as in 500MB, 2GB or 0, not \"3\" (in \
         \"x:host:max=3\")",
    );
}

#[test]
fn every_policy_has_a_name() {
    let policy = |flags: &[&str]| {
        let loaded = load_within(&parse(flags), &environment(&[]), PLENTY, 0).unwrap();
        loaded.config.manager(1).policy
    };
    for kind in PolicyKind::ALL {
        assert_eq!(policy(&["--eviction-policy", kind.name()]), kind);
    }
    assert_eq!(policy(&[]), PolicyKind::DEFAULT);
    let names = PolicyKind::ALL.map(PolicyKind::name).join(", ");
    let line = format!("invalid --eviction-policy = \"best\": permitted is {names}");
    fails(&["--eviction-policy", "best"], &[], &line);
}
