//! `kvbm pin` and `kvbm unpin`: what operators keep in the cache.

mod prompt;

use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::Args;
use kvbm_connector::{Client, ClientError};
use kvbm_hash::{SequenceHash, sequence_hashes};
use kvbm_proto::pack_keys;
use kvbm_proto::v1::{self, Tier, pin_request};
use kvbm_server::status::{PinStatus, render_pins};
use prompt::{ModelArgs, PromptArgs};

/// How long the daemon may take to answer.
const DEADLINE: Duration = Duration::from_secs(10);

/// Keep the blocks of a prompt in the cache, in every tier that has them, until a time is over
#[derive(Debug, Args)]
#[command(
    long_about = "Keep the blocks of a prompt in the cache, in every tier that has them, until a time is over\n\n\
                        The prompt must have been computed once: what no tier has cannot be kept. Model, name, revision \
                        and block size are those of the worker."
)]
pub(crate) struct PinArgs {
    #[command(flatten)]
    model: ModelArgs,
    #[command(flatten)]
    prompt: PromptArgs,
    /// Cache salt of the requests
    #[arg(long, value_name = "TEXT")]
    salt: Option<String>,
    /// LoRA adapter of the requests
    #[arg(long, value_name = "NAME")]
    lora: Option<String>,
    /// Tenant of the requests, as in their header x-kvbm-tenant
    #[arg(long, value_name = "NAME", default_value = "", hide_default_value = true)]
    tenant: String,
    /// How long, as in 90s, 30m, 12h or 7d
    #[arg(long = "for", value_name = "TIME", default_value = "1h", value_parser = duration)]
    lifetime: Duration,
    /// Show the pins instead of setting one
    #[arg(long, conflicts_with_all = ["prompt", "prompt_file", "tokens_file"])]
    list: bool,
    /// Answer as JSON
    #[arg(long)]
    json: bool,
    /// Socket of the daemon [default: the one of `kvbm up`]
    #[arg(long, env = "KVBM_SOCKET", value_name = "PATH")]
    socket: Option<PathBuf>,
}

/// End a pin before its time
#[derive(Debug, Args)]
pub(crate) struct UnpinArgs {
    /// The pin's id, from `kvbm pin` or `kvbm pin --list`
    #[arg(value_name = "ID")]
    id: u64,
    /// Socket of the daemon [default: the one of `kvbm up`]
    #[arg(long, env = "KVBM_SOCKET", value_name = "PATH")]
    socket: Option<PathBuf>,
}

pub(crate) async fn run(args: PinArgs) -> Result<u8, String> {
    let socket = args.socket.clone().unwrap_or_else(crate::up::default_socket);
    if args.list {
        return list(&socket, args.json).await;
    }
    let request = request(&args)?;
    let asked = match &request.blocks {
        Some(pin_request::Blocks::Prefix(keys)) => keys.len() / size_of::<SequenceHash>(),
        Some(pin_request::Blocks::Keys(_)) | None => 0,
    };
    let pinned = connect(&socket).await?.pin(request).await.map_err(|error| told(&socket, &error))?;
    if args.json {
        let blocks: std::collections::BTreeMap<&str, u32> =
            pinned.blocks.iter().map(|tier| (name(tier.tier()), tier.blocks)).collect();
        let (id, bytes, missing) = (pinned.pin_id, pinned.bytes, pinned.missing);
        println!("{}", serde_json::json!({ "id": id, "blocks": blocks, "bytes": bytes, "missing": missing }));
    } else {
        let tiers: Vec<String> =
            pinned.blocks.iter().map(|tier| format!("{} in {}", tier.blocks, name(tier.tier()))).collect();
        let missing = match pinned.missing {
            0 => String::new(),
            missing => format!("; {missing} of {asked} blocks are in no tier"),
        };
        let seconds = args.lifetime.as_secs_f64();
        println!(
            "pin {}: blocks {}; {:.1} MB for {seconds:.0} s{missing}",
            pinned.pin_id,
            tiers.join(", "),
            pinned.bytes as f64 / 1e6
        );
    }
    Ok(0)
}

pub(crate) async fn unpin(args: UnpinArgs) -> Result<u8, String> {
    let socket = args.socket.unwrap_or_else(crate::up::default_socket);
    connect(&socket).await?.unpin(args.id).await.map_err(|error| told(&socket, &error))?;
    println!("pin {} is ended", args.id);
    Ok(0)
}

async fn list(socket: &Path, json: bool) -> Result<u8, String> {
    let pins = connect(socket).await?.pins().await.map_err(|error| told(socket, &error))?;
    let pins: Vec<PinStatus> = pins
        .into_iter()
        .map(|pin| PinStatus {
            id: pin.pin_id,
            namespace: pin.namespace_id,
            blocks: pin.blocks.into(),
            bytes: pin.bytes,
            remaining_s: pin.remaining_ms as f64 / 1e3,
        })
        .collect();
    if json {
        println!("{}", serde_json::json!({ "pins": pins }));
    } else if pins.is_empty() {
        println!("pins: none");
    } else {
        print!("{}", render_pins(&pins).trim_start());
    }
    Ok(0)
}

fn request(args: &PinArgs) -> Result<v1::PinRequest, String> {
    let folder = args.model.folder()?;
    let tokens = args.prompt.tokens(folder)?;
    let tokens_per_block = args.model.tokens_per_block()?;
    let base = args.model.base()?;
    let namespace = base.namespace(args.lora.as_deref(), args.salt.as_deref()).of_tenant(&args.tenant);
    let keys = sequence_hashes(namespace, tokens_per_block as usize, &tokens);
    if keys.is_empty() {
        return Err(format!(
            "the prompt has {} tokens, less than one block of {tokens_per_block}: only whole blocks are kept",
            tokens.len()
        ));
    }
    Ok(v1::PinRequest {
        namespace: Some(pin_request::Namespace::NamespaceDigest(namespace.0.to_vec())),
        blocks: Some(pin_request::Blocks::Prefix(pack_keys(keys.iter().map(|key| &key.0)))),
        duration_ms: u64::try_from(args.lifetime.as_millis()).unwrap_or(u64::MAX),
    })
}

async fn connect(socket: &Path) -> Result<Client, String> {
    let client = Client::connect_as(socket, concat!("kvbm-pin/", env!("CARGO_PKG_VERSION")), DEADLINE).await;
    client.map_err(|error| told(socket, &error))
}

/// What the daemon said is said already; anything else is about the way to it.
fn told(socket: &Path, error: &ClientError) -> String {
    match error {
        ClientError::Refused { detail, .. } => detail.clone(),
        other => format!("--socket {}: {other}", socket.display()),
    }
}

fn name(tier: Tier) -> &'static str {
    match tier {
        Tier::Unspecified => "unknown",
        Tier::Device => "device",
        Tier::Host => "host",
        Tier::Disk => "disk",
        Tier::Remote => "remote",
    }
}

fn duration(text: &str) -> Result<Duration, String> {
    const PERMITTED: &str = "permitted is a whole number above 0 with s, m, h or d, as in 90s";
    let text = text.trim();
    let digits = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let (number, unit) = text.split_at(digits);
    let seconds = match unit {
        "s" => 1,
        "m" => 60,
        "h" => 3600,
        "d" => 86_400,
        _ => return Err(PERMITTED.to_owned()),
    };
    let number: u64 = number.parse().ok().filter(|number| *number > 0).ok_or(PERMITTED)?;
    number.checked_mul(seconds).map(Duration::from_secs).ok_or_else(|| PERMITTED.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_have_a_unit() {
        assert_eq!(duration("90s"), Ok(Duration::from_secs(90)));
        assert_eq!(duration("2d"), Ok(Duration::from_secs(172_800)));
        for text in ["", "5", "0s", "-1s", "1.5h", "1 w", "99999999999999999999s", "18446744073709551615d"] {
            assert!(duration(text).is_err(), "{text}");
        }
    }
}
