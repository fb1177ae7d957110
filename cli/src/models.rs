//! `kvbm models`: which daemons, workers and other OpenAI servers frontends serve.

use clap::{Args, Subcommand};
use kvbm_frontend::discovery::{Kind, Place};

/// List, add and remove what frontends serve: other OpenAI servers (`trtllm-serve`, `vllm serve`, ...), workers, daemons
///
/// The list is a file of JSON, {"daemons": [...], "workers": [...], "upstreams": [...]}, or keys in etcd. Every frontend
/// that was started with the same --discovery takes up what is added within a second, and lets go of what is removed.
#[derive(Debug, Args)]
pub(crate) struct ModelsArgs {
    #[command(subcommand)]
    what: What,
    /// Where the list is, as frontends name it: file:/path, etcd://host:port, or etcd for what ETCD_ENDPOINTS names
    #[arg(long, env = "KVBM_DISCOVERY", value_name = "WHERE", global = true)]
    discovery: Option<String>,
}

#[derive(Debug, Subcommand)]
enum What {
    /// Print the list
    List,
    /// Add one
    Add(One),
    /// Remove one
    Remove(One),
}

#[derive(Debug, Args)]
struct One {
    /// Its address: http://host:port of another server
    address: String,
    /// What it is
    #[arg(long, value_enum, default_value_t = Kind::Upstream)]
    kind: Kind,
}

/// Exit code 0 when it is as it was asked for.
pub(crate) async fn run(args: ModelsArgs) -> Result<u8, String> {
    let text = args.discovery.ok_or("--discovery is missing: file:/path or etcd://host:port")?;
    let place = Place::parse(&text);
    let place =
        place.ok_or_else(|| format!("--discovery = {text} is not valid, it must be {}", Place::FORM))?;
    match args.what {
        What::List => {
            let list = place.read().await?;
            println!("{}", serde_json::to_string_pretty(&list).map_err(|error| error.to_string())?);
        }
        What::Add(One { address, kind }) => {
            let address = kind.checked(&address)?;
            if !place.add(kind, &address).await? {
                return Err(format!("{address} is listed in {place} already"));
            }
        }
        What::Remove(One { address, kind }) => {
            // As it would have been listed; what is no address was not.
            let address = kind.checked(&address)?;
            if !place.remove(kind, &address).await? {
                return Err(format!("{address} is not listed in {place}"));
            }
        }
    }
    Ok(0)
}
