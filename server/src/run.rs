//! `kvbm daemon` from the first line to the exit code.

use std::process::ExitCode;

use tokio::signal::unix::{SignalKind, signal};

use crate::config::{Environment, load};
use crate::{Addresses, Daemon, DaemonArgs, log};

/// Serves until SIGTERM or SIGINT; a second one ends the process at once. `ready` is told where, once it serves. Exit
/// code 2: the settings are to be changed.
pub fn run(args: &DaemonArgs, ready: impl FnOnce(&Addresses)) -> ExitCode {
    let loaded = match load(args, &Environment::of_process()) {
        Ok(loaded) => loaded,
        Err(error) => return complain(&error, 2),
    };
    if args.print_config {
        print!("{}", loaded.print());
        return ExitCode::SUCCESS;
    }
    let _telemetry = log::start(&loaded.config);
    loaded.warnings.iter().for_each(|warning| tracing::warn!("{warning}"));
    let runtime = match tokio::runtime::Builder::new_multi_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => return complain(&error, 1),
    };
    runtime.block_on(async {
        let (mut terminate, mut interrupt) =
            match (signal(SignalKind::terminate()), signal(SignalKind::interrupt())) {
                (Ok(terminate), Ok(interrupt)) => (terminate, interrupt),
                (Err(error), _) | (_, Err(error)) => return complain(&error, 1),
            };
        let daemon = match Daemon::start(loaded.config).await {
            Ok(daemon) => daemon,
            Err(error) => return complain(&error, error.exit_code()),
        };
        ready(daemon.addresses());
        let mut signalled = async || {
            tokio::select! {
                _ = terminate.recv() => {}
                _ = interrupt.recv() => {}
            }
        };
        signalled().await;
        tokio::select! {
            () = daemon.stop() => ExitCode::SUCCESS,
            () = signalled() => complain(&"stopped at once by a second signal", 1),
        }
    })
}

/// One line on standard error.
fn complain(what: &dyn std::fmt::Display, code: u8) -> ExitCode {
    eprintln!("kvbm daemon: {what}");
    ExitCode::from(code)
}
