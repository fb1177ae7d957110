//! A worker with a logits processor of one's own: it never says a token twice in a row.
//!
//!     cargo run --example logits_processor -- --model models/tiny --no-daemon --listen http://127.0.0.1:9000
//!     kvbm frontend --worker http://127.0.0.1:9000

use std::sync::Arc;

use clap::Parser;
use kvbm_worker::{LogitsProcessor, Processors, SoFar, WorkerArgs, run_with};
use tokio_util::sync::CancellationToken;

/// Forbids the token that came last.
struct NoEcho;

impl LogitsProcessor for NoEcho {
    fn process(&self, so_far: SoFar<'_>, logits: &mut [f32]) {
        let last = so_far.generated.last().or(so_far.prompt.last());
        if let Some(logit) = last.and_then(|token| logits.get_mut(*token as usize)) {
            *logit = f32::NEG_INFINITY;
        }
    }
}

#[derive(Parser)]
struct Flags {
    #[command(flatten)]
    worker: WorkerArgs,
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let runtime = tokio::runtime::Runtime::new()?;
    let processors = Processors(vec![Arc::new(NoEcho)]);
    let ready = |info: kvbm_worker::ReadyInfo| println!("serving at {}", info.endpoint);
    let stop = CancellationToken::new();
    runtime.block_on(run_with(Flags::parse().worker, processors, stop, ready))?;
    Ok(())
}
