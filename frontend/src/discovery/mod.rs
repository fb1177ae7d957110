//! Daemons, workers and other servers that come and go while the frontend runs, as a list says that others keep: a file,
//! or etcd, where daemons enter themselves.

mod appointed;
mod etcd;
mod file;
mod list;
mod place;

pub(crate) use appointed::{Appointed, keep_daemon};
pub(crate) use list::Item;
pub use list::{DiscoveryList, Kind};
pub use place::Place;
