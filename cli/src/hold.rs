//! `kvbm hold`: the process that keeps host memory alive between two daemons.

use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::Args;
use kvbm_server::holder::{Ended, Holder};

use crate::signals;

/// One line for the list of commands.
pub(crate) const ABOUT: &str = "Keep the daemon's host memory warm while no daemon runs";
/// What `--help` says.
pub(crate) const HELP: &str = "\
Keep the daemon's host memory warm while no daemon runs

The daemon hands each segment of host memory to this process. When the daemon is killed, crashes or is replaced, the \
memory stays, and the next daemon goes on with what is in it instead of starting cold. This process only keeps \
descriptors: it reads nothing, maps nothing, and needs a few MB.

Run it beside the daemon, as the same user, and not as its child: what ends the daemon must not end it. Both are told \
the same path:

  kvbm hold --socket /run/kvbm/kvbm.sock.hold
  kvbm daemon --socket /run/kvbm/kvbm.sock --holder /run/kvbm/kvbm.sock.hold

Under systemd each is a unit of its own, because stopping a unit ends all its processes; the daemon's has Wants= and \
After= with the holder's name. `kvbm up` does all of this by itself (--no-warm-host turns it off).

It ends when no daemon has been connected for the grace period, or with SIGTERM; the memory then goes back to the \
kernel, unless a daemon still has it. Two open files go with each segment, so the limit of open files (ulimit -Hn, \
LimitNOFILE=) bounds how many it can keep, up to 65536.";

/// Flags of `kvbm hold`.
#[derive(Debug, Clone, Args)]
pub(crate) struct HoldArgs {
    /// Socket at which the daemon finds it [default: kvbm.sock.hold in the state directory of `kvbm up`]
    #[arg(long, env = "KVBM_HOLDER", value_name = "PATH")]
    socket: Option<PathBuf>,
    /// How long it waits for a daemon, from its start and after each daemon, seconds
    #[arg(long, value_name = "N", default_value_t = 60, value_parser = clap::value_parser!(u32).range(1..=86_400))]
    grace_secs: u32,
}

/// The holder's socket beside a daemon's.
pub(crate) fn beside(daemon: &Path) -> PathBuf {
    let mut name = daemon.as_os_str().to_owned();
    name.push(".hold");
    name.into()
}

/// Holds until told to stop or left alone. The error comes with the exit code.
pub(crate) fn run(args: &HoldArgs, ready: impl FnOnce(&Path)) -> Result<(), (String, u8)> {
    let socket = args.socket.clone().unwrap_or_else(|| beside(&crate::up::default_socket()));
    let grace = Duration::from_secs(args.grace_secs.into());
    // It does little: one thread is enough.
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let runtime = runtime.map_err(|error| (format!("start the runtime: {error}"), 1))?;
    runtime.block_on(async {
        let stop = signals::stop_token().map_err(|error| (error, 1))?;
        let holder = Holder::bind(&socket).map_err(|error| (error.to_string(), error.exit_code()))?;
        let segments_max = holder.capacity();
        tracing::info!(socket = %socket.display(), ?grace, segments_max, "kvbm hold serves");
        ready(&socket);
        let ended = holder.serve(grace, stop).await;
        match ended.map_err(|error| (error.to_string(), error.exit_code()))? {
            Ended::Told => tracing::info!("stopped"),
            Ended::Alone => tracing::info!(?grace, "no daemon is connected for so long: ends"),
        }
        Ok(())
    })
}
