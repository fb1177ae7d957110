//! Passes that begin before all layers of what they read have arrived: each layer is waited for when the engine gets
//! there, on its stream, by what its attention calls.
//!
//! A load is told of early only when nothing but the device can still keep its bytes from arriving, so no pass ever has
//! to be taken back. What is left is that every pass waits, whoever is in it: for each layer, where the engine has shown
//! that it asks for all of them in passes of this kind; otherwise, as in CUDA graphs, for the whole load at the start.

use std::sync::Arc;

use super::loads::LoadJob;
use crate::engine::pool::Steps;

/// What is known of a pass before it is launched.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Pass {
    /// Nothing is computed.
    Idle,
    /// The engine does not ask for layers in it.
    Whole,
    /// It may; one of a kind that behaves alike.
    Layered(String),
}

/// Loads of which the engine was told before they were there.
#[derive(Default)]
pub(super) struct Arriving {
    steps: Option<Steps>,
    jobs: Vec<Arc<LoadJob>>,
    /// Kinds of passes in which the engine asked for every layer.
    trusted: Vec<String>,
    /// The pass under way, and which layers it asked for.
    pass: Option<(String, Vec<bool>)>,
    /// Pages of what arrives are somebody else's now.
    is_reassigned: bool,
}

impl Arriving {
    pub fn new(steps: Option<Steps>) -> Self {
        Self { steps, ..Self::default() }
    }

    /// The engine goes on with this load's request.
    pub fn add(&mut self, job: Arc<LoadJob>) {
        self.jobs.push(job);
    }

    /// True once the engine was seen to begin a pass before it asks for its layers, and to ask for all of them. Until then
    /// nothing is told early.
    pub fn trusts_any(&self) -> bool {
        !self.trusted.is_empty()
    }

    /// True where loads within this pass need not be whole when it begins.
    pub fn trusts(&self, pass: &Pass) -> bool {
        matches!(pass, Pass::Layered(kind) if self.trusted.contains(kind))
    }

    /// Pages of the first layer group that the next pass may write as another block's.
    pub fn reassigned(&mut self, pages: &[i32]) {
        self.jobs.retain(|job| !job.is_over());
        if !self.jobs.is_empty() && !pages.is_empty() {
            let is_ours = |page: i32| pages.contains(&page);
            self.is_reassigned |= self.jobs.iter().any(|job| job.first_pages().any(is_ours));
        }
    }

    /// A pass begins. True: it is to ask for its layers.
    pub fn begin(&mut self, pass: Pass, stream: u64) -> Result<bool, String> {
        let trusted = self.trusts(&pass);
        self.pass = None;
        if pass == Pass::Idle {
            return Ok(false);
        }
        self.jobs.retain(|job| !job.is_over());
        if !trusted || self.is_reassigned {
            for job in self.jobs.drain(..) {
                job.hold(stream, None)?;
            }
            self.is_reassigned = false;
        }
        let Some((steps, Pass::Layered(kind))) = self.steps.zip(Some(pass)) else { return Ok(false) };
        let asks = !trusted || !self.jobs.is_empty();
        self.pass = asks.then(|| (kind, vec![false; steps.layers()]));
        Ok(asks)
    }

    /// The pass gets to a layer. One that is not known stands for all, as does any of a pass that never began.
    pub fn layer(&mut self, layer: usize, stream: u64) -> Result<(), String> {
        let Some((steps, (_, asked))) = self.steps.zip(self.pass.as_mut()) else {
            return self.jobs.iter().try_for_each(|job| job.hold(stream, None));
        };
        if let Some(asked) = asked.get_mut(layer) {
            *asked = true;
        }
        let step = (layer < steps.layers()).then(|| steps.of_layer(layer));
        self.jobs.iter().try_for_each(|job| job.hold(stream, step))
    }

    /// The pass has been launched.
    pub fn end(&mut self) -> Result<(), String> {
        let Some((kind, asked)) = self.pass.take() else { return Ok(()) };
        if !asked.iter().all(|asked| *asked) {
            self.trusted.retain(|trusted| *trusted != kind);
            return if self.jobs.is_empty() {
                Ok(())
            } else {
                Err(format!("a pass ({kind}) did not wait for layers that it read, as those before it did"))
            };
        }
        if !self.trusted.contains(&kind) {
            self.trusted.push(kind);
        }
        // What is launched from now on comes behind them.
        self.jobs.clear();
        Ok(())
    }
}
