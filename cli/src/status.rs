//! `kvbm status`: what the daemon holds, and for whom.

use std::path::PathBuf;
use std::time::Duration;

use clap::Args;
use kvbm_connector::Client;

/// How long the daemon may take to answer.
const DEADLINE: Duration = Duration::from_secs(5);

/// Show what the daemon holds: tiers, pools, namespaces, sessions, workers
#[derive(Debug, Args)]
pub(crate) struct StatusArgs {
    /// Socket of the daemon [default: the one of `kvbm up`]
    #[arg(long, env = "KVBM_SOCKET", value_name = "PATH")]
    socket: Option<PathBuf>,
    /// Print the document for scripts
    #[arg(long)]
    json: bool,
}

pub(crate) async fn run(args: StatusArgs) -> Result<u8, String> {
    let socket = args.socket.unwrap_or_else(crate::up::default_socket);
    let client =
        Client::connect_as(&socket, concat!("kvbm-status/", env!("CARGO_PKG_VERSION")), DEADLINE).await;
    let client = client.map_err(|error| format!("--socket {}: {error}", socket.display()))?;
    let json = client.status().await.map_err(|error| format!("--socket {}: {error}", socket.display()))?;
    if args.json {
        println!("{json}");
    } else {
        let status = serde_json::from_str(&json).map_err(|error| format!("read the status: {error}"))?;
        print!("{}", kvbm_server::status::render(&status));
    }
    Ok(0)
}
