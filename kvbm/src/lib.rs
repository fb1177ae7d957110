//! The block manager: one ledger that decides, a store that holds, transfers that move.
//!
//! ```text
//!                        Manager  (the facade; one mutex around the ledger)
//!            ┌──────────────┼──────────────────┐
//!         ledger          store             transfer
//!   pure, synchronous   host segments     a bounded queue and a thread per route,
//!   is told the time    device pools      exactly one outcome per batch
//! ```
//!
//! No gRPC, HTTP, command line or environment variables here.
#![deny(unsafe_code)]

mod counters;
mod error;
mod event;
pub mod ledger;
mod manager;
mod store;
mod tier;
mod transfer;
mod what_if;

pub use counters::{Counters, Histogram};
pub use error::{Error, Refused};
pub use event::{Event, EventKind, EventLog, EventsGone};
pub use ledger::{
    AdmissionRules, AdmissionTally, BatchLimit, BlockRef, CommitBlock, DiskRules, Held, LeaseId, Matched,
    NamespaceId, PEER_LEASE_MAX, PinId, PinInfo, PinWhat, Pinned, PolicyKind, PoolId, Quotas, Retention,
    SessionId, TenantQuota, TenantUsage, TierQuota, TrustDomain,
};
pub use manager::{
    AdoptPool, DiskCapacity, DiskFigures, DiskState, DiskTierConfig, Fence, HostCapacity, LivePin, Manager,
    ManagerConfig, OpenEnginePool, OpenPool, OpenedEnginePool, OpenedPool, Outcome, PIN_BUDGET_BYTES,
    Prefetched, Recovery, Resident, Staged, StoreRequest,
};
pub use store::disk::DiskError;
pub use store::disk_io;
pub use store::{
    EngineMemory, Export, Fragment, Keeper, MapExports, MapGpus, MapShared, NoDeviceMemory, Pace, PeerCopy,
    RangeCopy, WarmHost, WarmSegment, WarmWords, is_gpu,
};
pub use tier::{Route, Tier};
pub use what_if::{CAPACITIES as WHAT_IF_CAPACITIES, TierWhatIf, WhatIfReport};
