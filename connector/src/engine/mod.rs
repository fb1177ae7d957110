//! The connector of an engine that owns its KV memory and its scheduler, such as TensorRT-LLM.
//!
//! ```text
//!  engine's scheduler ── SchedulerHalf ── metadata (bytes) ──► WorkerHalf ── engine's KV memory      one per rank
//!                             │                                    │  ▲
//!                        look-ups, ≤ 20 ms                  stores │  │ copies by threads of this process
//!                             ▼                                    ▼  ▼
//!                         EngineLink ── session ── daemon      host segments, mapped
//! ```
//!
//! Every decision is here; what an engine's own language adds translates. The daemon never writes into the memory of
//! such an engine: this process copies out of host memory that it has mapped, so a promise is kept whether the daemon
//! lives or not, and what is called back is not written by anybody.

mod export;
mod generations;
mod host;
mod keys;
mod link;
mod metadata;
mod pool;
mod process;
mod scheduler;
mod settings;
mod worker;

pub use export::{Export, Exported, ExportedMemory, ExportedRegion, PoolChoice};
pub use keys::PlacedItem;
pub use link::LinkCounts;
pub use pool::{
    BlockCopy, Fence, InvalidPool, LayerGroup, MemoryMover, Mover, Piece, PoolShape, Region, issued_at_once,
};
pub use process::{EngineProcess, Figure, Found, MemoryFacts, Prompt, SharedFacts};
pub use scheduler::{LoadMode, NewRequest, Report, SchedulerCounts};
pub use settings::{EngineSettings, InvalidEngineSetting, socket_of};
pub use worker::{Pass, WorkerCounts};
