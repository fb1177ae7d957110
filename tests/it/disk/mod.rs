//! The disk tier over real processes: what is on disk comes back as it was, or not at all, and nobody but the cache
//! notices a drive.

mod conversations;
mod crash;
mod drills;
mod refusals;
mod up;
