//! Every CUDA call of kvbm, over bindings that find the driver at run time: the same binary runs with and without a GPU.
//!
//! ```text
//!   Driver::load ──► Device ──► Context ──► Stream, Event, Graph
//!   (says what          │          ├──────► DeviceMemory ── IpcHandle ──► IpcMemory      (another process)
//!    is missing)        │          ├──────► VmmMemory ── descriptor ──► VmmMemory        (another process)
//!                    by ordinal,   ├──────► RegisteredMemory (host) ──► StreamWord
//!                    UUID, bus     └──────► BatchCopier, Module, Blas
//! ```
//!
//! Memory that is handed to another process, or that the GPU may write at any time, is never reached through references:
//! bytes are copied in and out. What the compiler cannot check (kernels, copies between raw addresses) is `unsafe`.
//! [`copy_engine`] puts copies of blocks on two threads per GPU, behind an interface that needs no unsafe code.

mod batch;
mod blas;
mod context;
pub mod copy_engine;
mod driver;
mod error;
mod event;
mod graph;
mod host;
mod ipc;
mod library;
mod memory;
mod module;
mod scatter;
mod stream;
mod sys;
mod topology;
mod vmm;
mod word;

pub use batch::{BatchCopier, BatchForm, RawCopy};
pub use blas::{Blas, Gemm, Matrix, Strides};
pub use context::Context;
pub use driver::{Device, DeviceName, Driver};
pub use error::Error;
pub use event::Event;
pub use graph::{BesideRecordings, Graph};
pub use host::{REGISTER_CHUNK_BYTES, RegisteredMemory, chunk_plan};
pub use ipc::{IpcHandle, IpcMemory};
pub use memory::{DeviceAddress, DeviceMemory, DeviceRange};
pub use module::{Arguments, Function, Launch, Module};
pub use scatter::{Scatter, Spread};
pub use stream::Stream;
pub use vmm::VmmMemory;
pub use word::StreamWord;
