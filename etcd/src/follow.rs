//! What is under a prefix, now and whenever it changes.

use std::collections::BTreeMap;
use std::time::Duration;

use tokio::time::sleep;
use tokio_stream::StreamExt;

use crate::api::etcdserverpb::watch_client::WatchClient;
use crate::api::etcdserverpb::watch_request::RequestUnion;
use crate::api::etcdserverpb::{WatchCreateRequest, WatchRequest};
use crate::api::mvccpb::event::EventType;
use crate::client::{prefix_end, range, text};
use crate::{Etcd, EtcdError};

const PAUSE: Duration = Duration::from_millis(500);

/// Tells `changed` all keys with a prefix and their values, at once and after each change. Ends only by being dropped;
/// while etcd is away, what was told last holds.
pub async fn follow(etcd: Etcd, prefix: &str, mut changed: impl FnMut(&BTreeMap<String, String>)) {
    let mut last_error = String::new();
    loop {
        let error = match watch(&etcd, prefix, &mut changed, &mut last_error).await {
            Ok(reason) => reason,
            Err(error) => error.to_string(),
        };
        if error != last_error {
            tracing::warn!(%etcd, error, "cannot follow etcd, going on with what it said before");
            last_error = error;
        }
        sleep(PAUSE).await;
    }
}

/// Says why the stream ended.
async fn watch(
    etcd: &Etcd,
    prefix: &str,
    changed: &mut impl FnMut(&BTreeMap<String, String>),
    last_error: &mut String,
) -> Result<String, EtcdError> {
    let channel = etcd.connect().await?;
    let (mut entries, revision) = range(channel.clone(), prefix).await?;
    changed(&entries);
    let create = WatchCreateRequest {
        key: prefix.into(),
        range_end: prefix_end(prefix),
        start_revision: revision + 1,
    };
    let create = WatchRequest { request_union: Some(RequestUnion::CreateRequest(create)) };
    // The stream of requests stays open: its end would be that of the watch.
    let requests = tokio_stream::once(create).chain(tokio_stream::pending());
    let mut responses = WatchClient::new(channel).watch(requests).await?.into_inner();
    tracing::info!(%etcd, prefix, count = entries.len(), "following etcd");
    last_error.clear();
    while let Some(response) = responses.message().await? {
        if response.canceled || response.compact_revision != 0 {
            return Ok(format!("etcd ended the watch: {}", response.cancel_reason));
        }
        let count = response.events.len();
        for event in response.events {
            let kind = event.r#type();
            let Some(kv) = event.kv else { continue };
            let Some(key) = text(kv.key) else { continue };
            match (kind, text(kv.value)) {
                (EventType::Put, Some(value)) => drop(entries.insert(key, value)),
                (EventType::Put, None) | (EventType::Delete, _) => drop(entries.remove(&key)),
            }
        }
        if count > 0 {
            changed(&entries);
        }
    }
    Ok("the watch ended".to_owned())
}
