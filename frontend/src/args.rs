//! Flags, and the configuration that they are checked into before a port is bound.

mod router;

use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::time::Duration;

use crate::discovery::Place;
use crate::error::FrontendError;
use crate::fleet::{Daemon, DaemonFiles, Endpoint, Unusable};
use crate::router::RouterConfig;
use crate::serve::Times;
use crate::tools::Format as ToolCallFormat;
use crate::upstream::UpstreamUrl;
pub use router::RouterArgs;

/// Flags of the frontend. `Config::try_from` checks them.
#[derive(Debug, Clone, clap::Args)]
pub struct FrontendArgs {
    /// Unix socket of the daemon, whose workers are served
    #[arg(long, env = "KVBM_SOCKET", value_name = "PATH")]
    pub socket: Option<PathBuf>,
    /// Daemon whose workers are served, instead of the one at --socket: https://host:port, http://host:port or
    /// unix:/path (repeatable)
    #[arg(long = "daemon", env = "KVBM_DAEMON", value_name = "ENDPOINT", value_delimiter = ',')]
    pub daemons: Vec<String>,
    /// PEM file with the authorities that the certificate of a --daemon over https may come from
    #[arg(long, env = "KVBM_DAEMON_CA", value_name = "FILE")]
    pub daemon_ca: Option<PathBuf>,
    /// File with the token that a --daemon over TCP demands; only its owner may read it
    #[arg(long, env = "KVBM_DAEMON_TOKEN_FILE", value_name = "FILE")]
    pub daemon_token_file: Option<PathBuf>,
    /// PEM file with the certificate that is shown to a --daemon over https
    #[arg(long, env = "KVBM_DAEMON_CERT", value_name = "FILE")]
    pub daemon_cert: Option<PathBuf>,
    /// PEM file with the key of that certificate
    #[arg(long, env = "KVBM_DAEMON_KEY", value_name = "FILE")]
    pub daemon_key: Option<PathBuf>,
    /// A worker that is served without a daemon: unix:/path or http://host:port (repeatable)
    #[arg(long = "worker", env = "KVBM_FRONTEND_WORKERS", value_name = "ENDPOINT", value_delimiter = ',')]
    pub workers: Vec<String>,
    /// Another OpenAI server whose models are served too: http://host:port or https://host:port (repeatable)
    #[arg(long = "upstream", env = "KVBM_UPSTREAMS", value_name = "URL", value_delimiter = ',')]
    pub upstreams: Vec<String>,
    /// PEM file with the authorities one of which vouches for each https:// upstream [default: those that this machine trusts]
    #[arg(long, env = "KVBM_UPSTREAM_CA", value_name = "FILE")]
    pub upstream_ca: Option<PathBuf>,
    /// Where to learn of further daemons, workers and upstreams while serving: file:/path (a JSON object with lists of
    /// these names, see `kvbm models --help`), etcd://host:port, or etcd for what ETCD_ENDPOINTS names
    #[arg(long, env = "KVBM_DISCOVERY", value_name = "WHERE")]
    pub discovery: Option<String>,
    /// Folder with tokenizer and chat template, instead of the one that the workers name
    #[arg(long, env = "KVBM_MODEL_PATH", value_name = "DIR")]
    pub model_path: Option<PathBuf>,
    /// Address to listen on
    #[arg(long, env = "DYN_HTTP_HOST", default_value = "0.0.0.0")]
    pub http_host: String,
    /// Port to listen on, 0 for any that is free
    #[arg(long, env = "DYN_HTTP_PORT", default_value_t = 8000, allow_negative_numbers = true)]
    pub http_port: i64,
    /// Seconds that a request waits for a worker before it is answered 503, 0 to 3600
    #[arg(long, env = "KVBM_WORKER_WAIT_SECONDS", default_value_t = 10.0, allow_negative_numbers = true)]
    pub worker_wait_seconds: f64,
    /// Largest request body in MB (10^6 bytes), 1 to 1024
    #[arg(long, env = "DYN_HTTP_BODY_LIMIT_MB", default_value_t = 32, allow_negative_numbers = true)]
    pub body_limit_mb: i64,
    /// Seconds that an answer may take, 0 to 86400; 0: any number
    #[arg(long, env = "KVBM_REQUEST_TIMEOUT_SECONDS", default_value_t = 0.0, allow_negative_numbers = true)]
    pub request_timeout_seconds: f64,
    /// Seconds of silence after which a stream sends a comment, 0 to 3600; 0: never
    #[arg(long, env = "KVBM_KEEP_ALIVE_SECONDS", default_value_t = 15.0, allow_negative_numbers = true)]
    pub keep_alive_seconds: f64,
    /// How the models write calls of tools
    #[arg(long, env = "KVBM_TOOL_CALL_PARSER", value_enum, default_value_t = ToolCallParser::Auto)]
    pub tool_call_parser: ToolCallParser,
    /// Seconds that running requests are given when the frontend stops, 0 to 3600
    #[arg(long, env = "KVBM_DRAIN_SECONDS", default_value_t = 10.0, allow_negative_numbers = true)]
    pub drain_seconds: f64,
    /// How workers are chosen.
    #[command(flatten)]
    pub router: RouterArgs,
}

/// How a model writes calls of tools.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum ToolCallParser {
    /// As its chat template says.
    Auto,
    /// Between <tool_call> tags, as Qwen and Hermes do.
    Hermes,
    /// As JSON objects with name and parameters, as Llama does.
    #[value(name = "llama3_json")]
    Llama3Json,
    /// As a list of JSON objects, as Mistral does.
    Mistral,
}

/// Checked settings of the frontend.
#[derive(Debug, Clone)]
pub struct Config {
    /// The daemons whose workers are served.
    pub daemons: Vec<Daemon>,
    /// Workers served without a daemon.
    pub workers: Vec<Endpoint>,
    /// Other OpenAI servers whose models are served too.
    pub upstreams: Vec<UpstreamUrl>,
    /// Who vouches for those with TLS.
    pub upstream_ca: Option<PathBuf>,
    /// Where more of all these are listed.
    pub discovery: Option<Place>,
    /// What is shown to daemons that are found there, over TLS.
    pub daemon_files: DaemonFiles,
    /// Folder with the tokenizer, instead of the workers' own.
    pub model_path: Option<PathBuf>,
    /// Where to listen; port 0 is any that is free.
    pub address: SocketAddr,
    /// How long a request waits for a worker.
    pub worker_wait: Duration,
    /// Largest request body.
    pub body_limit_bytes: usize,
    /// Times that answers keep to.
    pub timing: Times,
    /// How models write calls of tools; `None`: as their templates say.
    pub tool_calls: Option<ToolCallFormat>,
    /// How long running requests are given when the frontend stops.
    pub drain: Duration,
    /// How workers are chosen.
    pub router: RouterConfig,
}

impl TryFrom<FrontendArgs> for Config {
    type Error = FrontendError;

    fn try_from(args: FrontendArgs) -> Result<Self, FrontendError> {
        let daemons = daemons(&args)?;
        let elsewhere = !args.upstreams.is_empty() || args.discovery.is_some();
        if daemons.is_empty() && args.workers.is_empty() && !elsewhere {
            let range =
                "the daemon's socket, unless there is a --daemon, --worker, --upstream or --discovery";
            return Err(invalid("--socket", "nothing", range));
        }
        let workers = args.workers.iter().map(|text| {
            Endpoint::parse(text).ok_or_else(|| invalid("--worker", text, "unix:/path or http://host:port"))
        });
        let upstreams = args.upstreams.iter().map(|text| {
            UpstreamUrl::parse(text).ok_or_else(|| invalid("--upstream", text, UpstreamUrl::FORM))
        });
        let host: IpAddr = match args.http_host.as_str() {
            "localhost" => IpAddr::from([127, 0, 0, 1]),
            host => host.parse().map_err(|_| invalid("--http-host", host, "an IP address"))?,
        };
        let port = u16::try_from(args.http_port)
            .map_err(|_| invalid("--http-port", args.http_port, "within 0 to 65535"))?;
        let body_limit_mb = usize::try_from(args.body_limit_mb)
            .ok()
            .filter(|mb| (1..=1024).contains(mb))
            .ok_or_else(|| invalid("--body-limit-mb", args.body_limit_mb, "within 1 to 1024"))?;
        Ok(Self {
            workers: workers.collect::<Result<_, _>>()?,
            daemons,
            upstreams: upstreams.collect::<Result<_, _>>()?,
            discovery: args.discovery.as_deref().map(discovery).transpose()?,
            daemon_files: daemon_files(&args),
            upstream_ca: args.upstream_ca.clone(),
            router: RouterConfig::try_from(&args.router)?,
            model_path: args.model_path,
            address: SocketAddr::new(host, port),
            worker_wait: seconds("--worker-wait-seconds", args.worker_wait_seconds, 3600.0)?,
            body_limit_bytes: body_limit_mb * 1_000_000,
            timing: Times {
                request: time("--request-timeout-seconds", args.request_timeout_seconds, 86_400.0)?,
                keep_alive: time("--keep-alive-seconds", args.keep_alive_seconds, 3600.0)?,
            },
            tool_calls: match args.tool_call_parser {
                ToolCallParser::Auto => None,
                ToolCallParser::Hermes => Some(ToolCallFormat::Tagged),
                ToolCallParser::Llama3Json => Some(ToolCallFormat::Objects),
                ToolCallParser::Mistral => Some(ToolCallFormat::List),
            },
            drain: seconds("--drain-seconds", args.drain_seconds, 3600.0)?,
        })
    }
}

fn discovery(text: &str) -> Result<Place, FrontendError> {
    Place::parse(text).ok_or_else(|| invalid("--discovery", text, Place::FORM))
}

fn daemon_files(args: &FrontendArgs) -> DaemonFiles {
    DaemonFiles {
        ca: args.daemon_ca.clone(),
        token: args.daemon_token_file.clone(),
        cert: args.daemon_cert.clone(),
        key: args.daemon_key.clone(),
    }
}

/// `--daemon` names them, else `--socket`.
fn daemons(args: &FrontendArgs) -> Result<Vec<Daemon>, FrontendError> {
    let files = daemon_files(args);
    let given = [
        ("--daemon-ca", &files.ca),
        ("--daemon-token-file", &files.token),
        ("--daemon-cert", &files.cert),
        ("--daemon-key", &files.key),
    ];
    let path = |flag: &str| {
        let path = given.iter().find(|(name, _)| *name == flag)?.1.as_ref();
        Some(path.map_or_else(|| "nothing".to_owned(), |path| path.display().to_string()))
    };
    if args.daemons.is_empty() {
        let given = if args.discovery.is_some() { &given[..0] } else { &given[..] };
        return match given.iter().find(|(_, path)| path.is_some()) {
            Some((flag, _)) => Err(invalid(flag, path(flag).unwrap_or_default(), "given only with --daemon")),
            None => Ok(args.socket.clone().map(Daemon::at_socket).into_iter().collect()),
        };
    }
    let daemon = |text: &String| {
        Daemon::parse(text, &files).map_err(|Unusable { flag, must_be }| FrontendError::Daemon {
            flag,
            value: path(flag).unwrap_or_else(|| text.clone()),
            must_be,
        })
    };
    args.daemons.iter().map(daemon).collect()
}

fn seconds(flag: &'static str, value: f64, most: f64) -> Result<Duration, FrontendError> {
    if (0.0..=most).contains(&value) {
        return Ok(Duration::from_secs_f64(value));
    }
    Err(invalid(flag, value, if most > 3600.0 { "within 0 to 86400" } else { "within 0 to 3600" }))
}

/// `None` for 0.
fn time(flag: &'static str, value: f64, most: f64) -> Result<Option<Duration>, FrontendError> {
    Ok(Some(seconds(flag, value, most)?).filter(|time| !time.is_zero()))
}

fn invalid(flag: &'static str, value: impl ToString, range: &'static str) -> FrontendError {
    FrontendError::Invalid { flag, value: value.to_string(), range }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Command {
        #[command(flatten)]
        frontend: FrontendArgs,
    }

    fn config(flags: &[&str]) -> Result<Config, String> {
        let command = Command::parse_from([&["frontend"], flags].concat());
        Config::try_from(command.frontend).map_err(|error| error.to_string())
    }

    #[test]
    fn an_invalid_value_names_flag_value_and_range() {
        for (flags, message) in [
            (&["--http-port", "70000"][..], "--http-port = 70000 is not valid, it must be within 0 to 65535"),
            (&["--http-port", "-1"], "--http-port = -1 is not valid, it must be within 0 to 65535"),
            (&["--http-host", "pluto"], "--http-host = pluto is not valid, it must be an IP address"),
            (&["--body-limit-mb", "0"], "--body-limit-mb = 0 is not valid, it must be within 1 to 1024"),
            (
                &["--worker-wait-seconds", "-2"],
                "--worker-wait-seconds = -2 is not valid, it must be within 0 to 3600",
            ),
            (&["--drain-seconds", "NaN"], "--drain-seconds = NaN is not valid, it must be within 0 to 3600"),
            (
                &["--worker", "ftp:x"],
                "--worker = ftp:x is not valid, it must be unix:/path or http://host:port",
            ),
        ] {
            let flags = [&["--socket", "/run/kvbm.sock"], flags].concat();
            assert_eq!(config(&flags).unwrap_err(), message);
        }
        assert!(config(&[]).unwrap_err().starts_with("--socket = nothing"));
        for (flags, message) in [
            (
                &["--daemon-ca", "/c"][..],
                "--daemon-ca = /c is not valid, it must be given only with --daemon",
            ),
            (
                &["--daemon", "https://node-7:1"],
                "--daemon-ca = nothing is not valid, it must be given with https://host:port",
            ),
            (
                &["--daemon", "node-7"],
                "--daemon = node-7 is not valid, it must be unix:/path, http://host:port or https://host:port",
            ),
        ] {
            assert_eq!(config(flags).unwrap_err(), message);
        }
    }

    #[test]
    fn defaults_are_those_that_users_know() {
        let config = config(&["--worker", "unix:/run/w.sock", "--worker", "http://127.0.0.1:9"]).unwrap();
        assert_eq!(config.address.to_string(), "0.0.0.0:8000");
        assert_eq!(config.body_limit_bytes, 32_000_000);
        assert_eq!(config.worker_wait, Duration::from_secs(10));
        assert_eq!(config.workers.len(), 2);
        assert!(config.daemons.is_empty());
        assert_eq!(config.router, RouterConfig::default());
    }

    #[test]
    fn a_daemon_that_is_named_wins_over_a_socket() {
        let both = config(&["--socket", "/run/kvbm.sock", "--daemon", "http://node-7:6881"]).unwrap();
        assert_eq!(both.daemons[0].to_string(), "http://node-7:6881");
        let socket = config(&["--socket", "/run/kvbm.sock"]).unwrap();
        assert_eq!(socket.daemons[0].to_string(), "unix:/run/kvbm.sock");
    }
}
