//! What a client wishes about the way of its request, and what is said of the way it took.

use std::fmt::{self, Write};

use http::HeaderMap;

use super::cost::Overlap;
use super::mode::RouterMode;

/// Name of a session, of the client's choice.
const SESSION_HEADERS: [&str; 2] = ["x-kvbm-session", "x-session-id"];
/// The worker that is to answer, in mode direct.
pub const WORKER_HEADERS: [&str; 2] = ["x-kvbm-worker", "x-dynamo-worker-instance-id"];
/// Longest name of either, bytes.
const NAME_BYTES_MAX: usize = 256;

/// What a request's headers say about its way.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Wish {
    /// It belongs to this session.
    pub session: Option<String>,
    /// It is for this worker.
    pub worker: Option<String>,
}

impl Wish {
    /// Names that are too long are nobody's.
    pub fn of(headers: &HeaderMap) -> Self {
        let name = |names: [&str; 2]| {
            let mut values = names.into_iter().filter_map(|name| headers.get(name)?.to_str().ok());
            values.find(|value| (1..=NAME_BYTES_MAX).contains(&value.len())).map(str::to_owned)
        };
        Self { session: name(SESSION_HEADERS), worker: name(WORKER_HEADERS) }
    }
}

/// Where a request went, and why.
#[derive(Debug, Clone, PartialEq)]
pub struct Route {
    pub mode: RouterMode,
    pub worker: String,
    /// Tokens that the worker was thought to have.
    pub overlap: Overlap,
    /// Tokens in one of its blocks; 0: nobody looked.
    pub block: usize,
    /// What it was thought to cost there, in tokens.
    pub cost: Option<f64>,
    /// What it would have cost at each worker; empty if nobody wants to know.
    pub costs: Vec<(String, f64)>,
}

impl Route {
    /// Of a choice that looked at no blocks.
    pub fn plain(mode: RouterMode, worker: &str) -> Self {
        Self {
            mode,
            worker: worker.to_owned(),
            overlap: Overlap::default(),
            block: 0,
            cost: None,
            costs: Vec::new(),
        }
    }
}

/// The value of the header `x-kvbm-route`.
impl fmt::Display for Route {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Overlap { device, host, disk, gone: _ } = self.overlap;
        write!(f, "worker={}; mode={}", self.worker, self.mode.name())?;
        let Some(cost) = self.cost else { return Ok(()) };
        write!(f, "; device={device}; host={host}; disk={disk}; cost={cost:.1}; costs=")?;
        for (at, (worker, cost)) in self.costs.iter().enumerate() {
            if at > 0 {
                f.write_char(',')?;
            }
            write!(f, "{worker}:{cost:.1}")?;
        }
        Ok(())
    }
}
