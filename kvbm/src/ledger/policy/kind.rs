//! The policies there are, by name.

use std::fmt;
use std::str::FromStr;

use super::{Gittins, Lru, Policy, S3Fifo};

/// A policy of eviction.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash)]
pub enum PolicyKind {
    /// Least recently used goes first.
    Lru,
    /// S3-FIFO.
    S3Fifo,
    /// What is least worth its space goes first, by learned times of reuse.
    #[default]
    Gittins,
}

/// A name that no policy has.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("no policy is called {name:?}: use one of {}", PolicyKind::ALL.map(PolicyKind::name).join(", "))]
pub struct UnknownPolicy {
    name: String,
}

impl PolicyKind {
    /// Every policy.
    pub const ALL: [Self; 3] = [Self::Lru, Self::S3Fifo, Self::Gittins];

    /// What is used where nobody asks for another one.
    pub const DEFAULT: Self = Self::Gittins;

    /// The name it is asked for by.
    pub fn name(self) -> &'static str {
        match self {
            Self::Lru => "lru",
            Self::S3Fifo => "s3fifo",
            Self::Gittins => "gittins",
        }
    }

    /// A policy for a table that has so many slots, and may grow.
    pub fn build(self, slots: u32) -> Box<dyn Policy> {
        let mut policy: Box<dyn Policy> = match self {
            Self::Lru => Box::new(Lru::default()),
            Self::S3Fifo => Box::new(S3Fifo::default()),
            Self::Gittins => Box::new(Gittins::default()),
        };
        policy.grow(slots);
        policy
    }
}

impl fmt::Display for PolicyKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for PolicyKind {
    type Err = UnknownPolicy;

    fn from_str(name: &str) -> Result<Self, UnknownPolicy> {
        let kind = Self::ALL.into_iter().find(|kind| kind.name() == name);
        kind.ok_or_else(|| UnknownPolicy { name: name.to_owned() })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn policies_are_found_by_their_names() {
        for kind in PolicyKind::ALL {
            assert_eq!(kind.to_string().parse(), Ok(kind));
        }
        assert_eq!(PolicyKind::default(), PolicyKind::DEFAULT);
        let refused = "LRU".parse::<PolicyKind>().unwrap_err().to_string();
        assert_eq!(refused, r#"no policy is called "LRU": use one of lru, s3fifo, gittins"#);
    }
}
