//! Carries plans out, in whichever process copies: through the copy engine, or straight through the driver.

use std::fmt;
use std::sync::Arc;
use std::sync::mpsc::channel;
use std::time::{Duration, Instant};

use kvbm_cuda::copy_engine::{CopyEnd, CopyEngine, CopyEngineConfig, CopyMemory, RawCopies, RawMethod};
use kvbm_cuda::{Context, DeviceRange, Driver};
use serde::{Deserialize, Serialize};

use super::plan::Plan;
use super::text;

/// Longer than any copy takes that works.
const LIMIT: Duration = Duration::from_secs(60);

/// How blocks are copied.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(super) enum Method {
    /// By the daemon's copy engine.
    Engine,
    /// One call of the driver for each block.
    Loop,
    /// One call for 256 blocks.
    Batch,
    /// Not scattered, but in long copies.
    Contiguous,
}

impl fmt::Display for Method {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Engine => "engine",
            Self::Loop => "loop",
            Self::Batch => "batch",
            Self::Contiguous => "contiguous",
        })
    }
}

/// Pool, host memory and what copies between them.
pub(super) struct Mover {
    engine: CopyEngine,
    raw: RawCopies,
    pool: CopyMemory,
    host: Vec<CopyMemory>,
}

impl Mover {
    pub fn start(
        driver: &Driver,
        context: &Context,
        pool: Arc<dyn DeviceRange>,
        host: Vec<CopyMemory>,
        streams: usize,
    ) -> Result<Self, String> {
        let config = CopyEngineConfig { queue: 512, streams, ..CopyEngineConfig::default() };
        Ok(Self {
            engine: CopyEngine::start(driver, context, config).map_err(text)?,
            raw: RawCopies::new(driver, context).map_err(text)?,
            pool: CopyMemory::Device(pool),
            host,
        })
    }

    /// Seconds that all copies of the plan take together.
    pub fn run(&mut self, plan: &Plan, method: Method) -> Result<f64, String> {
        let nobody = |_: CopyEnd| ();
        let took = match method {
            Method::Engine => return self.by_engine(plan),
            Method::Loop => self.raw.run(RawMethod::Loop, &plan.batches(&self.pool, &self.host, nobody)),
            Method::Batch => self.raw.run(RawMethod::Batch, &plan.batches(&self.pool, &self.host, nobody)),
            Method::Contiguous => self.raw.run(RawMethod::Loop, &plan.contiguous(&self.pool, &self.host)),
        };
        took.map(|took| took.as_secs_f64()).map_err(text)
    }

    /// From the first batch handed over to the last end told.
    fn by_engine(&self, plan: &Plan) -> Result<f64, String> {
        let (sender, ends) = channel();
        let batches = plan.batches(&self.pool, &self.host, move |end| {
            let _ = sender.send(end);
        });
        let count = batches.len();
        let started = Instant::now();
        for batch in batches {
            self.engine.submit(batch).map_err(|refused| format!("submit a batch: {:?}", refused.reason))?;
        }
        for _ in 0..count {
            match ends.recv_timeout(LIMIT) {
                Ok(CopyEnd::Done { .. }) => {}
                Ok(CopyEnd::Failed(failure)) => return Err(failure.to_string()),
                Err(_) => return Err("a batch did not end".into()),
            }
        }
        Ok(started.elapsed().as_secs_f64())
    }
}
