//! etcd for discovery: who is there says so under a key that a lease holds, who looks for them follows the prefix.
//!
//! Both go on for ever, through losses of etcd: an announcement is made again, a list that was known holds until etcd
//! says otherwise. Only the calls that this needs are here, with etcd's own names (`proto/`), so that a build needs
//! neither a compiler of protocol buffers nor etcd's whole schema.
#![forbid(unsafe_code)]

mod announce;
mod client;
mod follow;
mod key;
mod tls;

pub use announce::announce;
pub use client::{Etcd, EtcdError};
pub use follow::follow;
pub use key::{DAEMONS, PREFIX, key};

/// Generated from `proto/`.
#[allow(missing_docs, clippy::all)]
mod api {
    pub(crate) mod mvccpb {
        tonic::include_proto!("mvccpb");
    }
    pub(crate) mod etcdserverpb {
        tonic::include_proto!("etcdserverpb");
    }
}
