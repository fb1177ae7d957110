//! Where etcd is, and single calls to it.

use std::collections::BTreeMap;
use std::fmt;
use std::time::Duration;

use thiserror::Error;
use tonic::transport::{Channel, Endpoint};

use crate::api::etcdserverpb::kv_client::KvClient;
use crate::api::etcdserverpb::{DeleteRangeRequest, PutRequest, RangeRequest};
use crate::tls::TlsFiles;

const CONNECT_DEADLINE: Duration = Duration::from_secs(2);
/// Of calls that are answered once.
const CALL_DEADLINE: Duration = Duration::from_secs(5);
/// A member that answers no pings is given up for another.
const PING_INTERVAL: Duration = Duration::from_secs(3);
const PING_DEADLINE: Duration = Duration::from_secs(5);

/// Members of one etcd, any of which may be asked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Etcd {
    /// URLs, all with TLS or all without.
    members: Vec<String>,
    /// `None`: without TLS.
    tls: Option<TlsFiles>,
}

/// Why etcd did not do what it was asked.
#[derive(Debug, Error)]
pub enum EtcdError {
    /// No member can be reached.
    #[error("reach etcd at {members}: {reason}")]
    Unreachable {
        /// All that were tried.
        members: String,
        /// What the last one said.
        reason: String,
    },
    /// A call failed.
    #[error("ask etcd: {0}")]
    Failed(String),
}

impl From<tonic::Status> for EtcdError {
    fn from(status: tonic::Status) -> Self {
        Self::Failed(status.message().to_owned())
    }
}

impl Etcd {
    /// Reads `etcd://host:port`, with further members behind commas, or what the variable `ETCD_ENDPOINTS` holds. With
    /// `etcds://` or `https://` members are spoken to over TLS.
    pub fn parse(text: &str) -> Option<Self> {
        let (with_tls, text) = match text.strip_prefix("etcds://") {
            Some(rest) => (true, rest),
            None => (text.trim_start().starts_with("https://"), text.strip_prefix("etcd://").unwrap_or(text)),
        };
        let scheme = if with_tls { "https://" } else { "http://" };
        let member = |part: &str| {
            let part = part.trim().trim_end_matches('/');
            let authority = part.strip_prefix(scheme).unwrap_or(part);
            let (host, port) = authority.rsplit_once(':')?;
            let plain = !host.is_empty() && !host.contains('/') && port.parse::<u16>().is_ok();
            plain.then(|| format!("{scheme}{authority}"))
        };
        let members: Option<Vec<String>> = text.split(',').map(member).collect();
        let tls = with_tls.then(TlsFiles::of_environment);
        Some(Self { members: members.filter(|members| !members.is_empty())?, tls })
    }

    pub(crate) async fn connect(&self) -> Result<Channel, EtcdError> {
        let mut reason = String::new();
        for member in &self.members {
            match self.endpoint(member) {
                Ok(endpoint) => match endpoint.connect().await {
                    Ok(channel) => return Ok(channel),
                    Err(error) => reason = chain(&error),
                },
                Err(error) => reason = error,
            }
        }
        Err(EtcdError::Unreachable { members: self.members.join(","), reason })
    }

    fn endpoint(&self, member: &str) -> Result<Endpoint, String> {
        let endpoint = Endpoint::from_shared(member.to_owned()).map_err(|error| error.to_string())?;
        let endpoint = endpoint
            .connect_timeout(CONNECT_DEADLINE)
            .http2_keep_alive_interval(PING_INTERVAL)
            .keep_alive_timeout(PING_DEADLINE);
        match &self.tls {
            None => Ok(endpoint),
            Some(files) => endpoint.tls_config(files.read()?).map_err(|error| chain(&error)),
        }
    }

    /// All keys with a prefix, and their values.
    pub async fn list(&self, prefix: &str) -> Result<BTreeMap<String, String>, EtcdError> {
        let (entries, _) = range(self.connect().await?, prefix).await?;
        Ok(entries)
    }

    /// Sets a key, for ever.
    pub async fn put(&self, key: &str, value: &str) -> Result<(), EtcdError> {
        let put = PutRequest { key: key.into(), value: value.into(), lease: 0 };
        KvClient::new(self.connect().await?).put(in_time(put)).await?;
        Ok(())
    }

    /// Removes a key; false if there was none.
    pub async fn remove(&self, key: &str) -> Result<bool, EtcdError> {
        let delete = DeleteRangeRequest { key: key.into(), range_end: Vec::new() };
        let reply = KvClient::new(self.connect().await?).delete_range(in_time(delete)).await?;
        Ok(reply.into_inner().deleted > 0)
    }
}

impl fmt::Display for Etcd {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let scheme = if self.tls.is_some() { "etcds" } else { "etcd" };
        write!(f, "{scheme}://{}", self.members.join(",").replace("http://", "").replace("https://", ""))
    }
}

/// With what lies behind it: "transport error" alone says nothing.
fn chain(error: &dyn std::error::Error) -> String {
    let causes = std::iter::successors(error.source(), |error| error.source());
    causes.fold(error.to_string(), |text, cause| format!("{text}: {cause}"))
}

pub(crate) fn in_time<T>(message: T) -> tonic::Request<T> {
    let mut request = tonic::Request::new(message);
    request.set_timeout(CALL_DEADLINE);
    request
}

/// What is there, and as of which revision.
pub(crate) async fn range(
    channel: Channel,
    prefix: &str,
) -> Result<(BTreeMap<String, String>, i64), EtcdError> {
    let range = RangeRequest { key: prefix.into(), range_end: prefix_end(prefix) };
    let reply = KvClient::new(channel).range(in_time(range)).await?.into_inner();
    let revision = reply.header.map_or(0, |header| header.revision);
    let entry = |kv: crate::api::mvccpb::KeyValue| Some((text(kv.key)?, text(kv.value)?));
    Ok((reply.kvs.into_iter().filter_map(entry).collect(), revision))
}

/// What is no text was not written by us.
pub(crate) fn text(bytes: Vec<u8>) -> Option<String> {
    String::from_utf8(bytes).ok()
}

/// The first key behind all that have a prefix.
pub(crate) fn prefix_end(prefix: &str) -> Vec<u8> {
    let mut end = prefix.as_bytes().to_vec();
    // Text has no byte 0xFF.
    if let Some(last) = end.last_mut() {
        *last += 1;
    }
    end
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn members_are_read_and_nonsense_is_refused() {
        for text in ["etcd://a:1,b:2", "http://a:1,http://b:2", "a:1, b:2/"] {
            assert_eq!(Etcd::parse(text).unwrap().to_string(), "etcd://a:1,b:2");
        }
        for text in ["etcds://a:1,b:2", "https://a:1,https://b:2"] {
            let etcd = Etcd::parse(text).unwrap();
            assert_eq!((etcd.to_string(), etcd.tls.is_some()), ("etcds://a:1,b:2".into(), true));
        }
        for text in [
            "",
            "etcd://",
            "etcd://a",
            "https://a",
            "etcds://",
            "http://a:1,https://b:2",
            "etcd://a:1,",
            "etcd://a:1/x",
            "a:b",
        ] {
            assert_eq!(Etcd::parse(text), None, "{text}");
        }
        assert_eq!(prefix_end("/a/"), b"/a0");
    }
}
