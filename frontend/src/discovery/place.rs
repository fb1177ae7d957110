//! Where the list is kept.

use std::fmt;
use std::path::PathBuf;

use kvbm_etcd::{Etcd, PREFIX, key};

use super::{Appointed, DiscoveryList, Kind, etcd, file};

/// A file, or etcd.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Place {
    /// A file of JSON.
    File(PathBuf),
    /// Keys under one prefix.
    Etcd(Etcd),
}

impl Place {
    /// What a place must be.
    pub const FORM: &str = "file:/path, etcd://host:port, or etcds://host:port over TLS";

    /// Reads `file:/path`, `etcd://host:port[,host:port]`, or `etcd` for what ETCD_ENDPOINTS names.
    pub fn parse(text: &str) -> Option<Self> {
        if let Some(path) = text.strip_prefix("file:") {
            let path = path.strip_prefix("//").unwrap_or(path);
            return (!path.is_empty()).then(|| Self::File(path.into()));
        }
        match text {
            "etcd" => Etcd::parse(&std::env::var("ETCD_ENDPOINTS").ok()?).map(Self::Etcd),
            _ if text.starts_with("etcd://") || text.starts_with("etcds://") => {
                Etcd::parse(text).map(Self::Etcd)
            }
            _ => None,
        }
    }

    /// What is listed there.
    pub async fn read(&self) -> Result<DiscoveryList, String> {
        match self {
            Self::File(path) => file::read(path),
            Self::Etcd(etcd) => {
                let entries = etcd.list(PREFIX).await.map_err(|error| error.to_string())?;
                Ok(etcd::list(&entries))
            }
        }
    }

    /// Lists one more; false if it is listed already.
    pub async fn add(&self, kind: Kind, address: &str) -> Result<bool, String> {
        let mut list = self.read().await?;
        if !list.of_mut(kind).insert(address.to_owned()) {
            return Ok(false);
        }
        match self {
            Self::File(path) => file::write(path, &list)?,
            Self::Etcd(etcd) => {
                let put = etcd.put(&key(kind.name(), address), address).await;
                put.map_err(|error| error.to_string())?;
            }
        }
        Ok(true)
    }

    /// Lists one less; false if it was not listed.
    pub async fn remove(&self, kind: Kind, address: &str) -> Result<bool, String> {
        match self {
            Self::File(path) => {
                let mut list = file::read(path)?;
                let was_there = list.of_mut(kind).remove(address);
                if was_there {
                    file::write(path, &list)?;
                }
                Ok(was_there)
            }
            Self::Etcd(etcd) => {
                etcd.remove(&key(kind.name(), address)).await.map_err(|error| error.to_string())
            }
        }
    }

    /// Serves what is listed, for ever.
    pub(crate) async fn follow(self, appointed: Appointed) {
        match self {
            Self::File(path) => file::follow(&path, appointed).await,
            Self::Etcd(etcd) => etcd::follow(etcd, appointed).await,
        }
    }
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::File(path) => write!(f, "file:{}", path.display()),
            Self::Etcd(etcd) => etcd.fmt(f),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_are_read_and_printed() {
        for text in ["file:/etc/fleet.json", "etcd://h:2379", "etcds://h:2379", "etcd://a:1,b:2"] {
            assert_eq!(Place::parse(text).unwrap().to_string(), text);
        }
        for text in ["", "file:", "/etc/fleet.json", "etcd://", "etcd:2379", "h:2379", "nats://h:4222"] {
            assert_eq!(Place::parse(text), None, "{text}");
        }
    }
}
