//! How many descriptors this process may have. Two go with each segment.

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

use super::{HolderError, SEGMENTS_MAX};

/// Descriptors that are not of segments: sockets, the runtime's, standard streams; with room to spare.
pub(super) const DESCRIPTORS_RESERVED: u64 = 64;

/// Raises the limit of this process as far as it may, and returns it.
pub(super) fn raise() -> Result<u64, HolderError> {
    let Rlimit { current, maximum } = getrlimit(Resource::Nofile);
    // `None` says that there is no limit.
    if current != maximum {
        setrlimit(Resource::Nofile, Rlimit { current: maximum, maximum })
            .map_err(|errno| HolderError::kernel("raise the limit of open files")(errno.into()))?;
    }
    Ok(maximum.unwrap_or(u64::MAX))
}

/// How many segments can be kept under a limit.
pub(super) fn capacity(limit: u64) -> Result<u32, HolderError> {
    let pairs = limit.saturating_sub(DESCRIPTORS_RESERVED) / 2;
    if pairs == 0 {
        return Err(HolderError::Descriptors { limit, needed: DESCRIPTORS_RESERVED + 2 });
    }
    Ok(u32::try_from(pairs).unwrap_or(u32::MAX).min(SEGMENTS_MAX))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn two_descriptors_go_with_each_segment() {
        assert_eq!(capacity(u64::MAX).unwrap(), SEGMENTS_MAX);
        assert_eq!(capacity(1024).unwrap(), 480);
        assert_eq!(capacity(66).unwrap(), 1);
        let error = capacity(65).unwrap_err().to_string();
        assert_eq!(
            error,
            "the limit of open files is 65 and at least 66 are needed: raise it (ulimit -Hn, LimitNOFILE=)"
        );
    }

    #[test]
    fn the_limit_is_raised_to_the_hard_one() {
        let limit = raise().unwrap();
        assert_eq!(getrlimit(Resource::Nofile).current.unwrap_or(u64::MAX), limit);
    }
}
