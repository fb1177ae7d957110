//! Says that somebody is there, for as long as he is.

use std::time::Duration;

use tokio::time::sleep;
use tokio_stream::wrappers::IntervalStream;
use tokio_stream::{Stream, StreamExt};
use tonic::transport::Channel;

use crate::api::etcdserverpb::kv_client::KvClient;
use crate::api::etcdserverpb::lease_client::LeaseClient;
use crate::api::etcdserverpb::{LeaseGrantRequest, LeaseKeepAliveRequest, LeaseRevokeRequest, PutRequest};
use crate::client::in_time;
use crate::{Etcd, EtcdError};

/// How long a key outlives whoever said it.
const LIFETIME_S: i64 = 10;
const RENEWAL: Duration = Duration::from_secs(3);
/// Pause before it is said again.
const PAUSE: Duration = Duration::from_secs(1);

/// Keeps a key until `until` is there, then takes it away. Goes on through losses of etcd.
pub async fn announce(etcd: Etcd, key: String, value: String, until: impl Future<Output = ()>) {
    let mut lease = None;
    let keeping = async {
        let mut last_error = String::new();
        loop {
            let error = match hold(&etcd, &key, &value, &mut lease, &mut last_error).await {
                Ok(()) => "the lease has run out".to_owned(),
                Err(error) => error.to_string(),
            };
            if error != last_error {
                tracing::warn!(%etcd, key, error, "cannot be announced, trying on");
                last_error = error;
            }
            sleep(PAUSE).await;
        }
    };
    tokio::select! {
        () = keeping => {}
        () = until => {}
    }
    if let Some((channel, id)) = lease {
        // If this does not get through, the lease runs out.
        let _ = LeaseClient::new(channel).lease_revoke(in_time(LeaseRevokeRequest { id })).await;
    }
}

/// Ends when the lease does.
async fn hold(
    etcd: &Etcd,
    key: &str,
    value: &str,
    lease: &mut Option<(Channel, i64)>,
    last_error: &mut String,
) -> Result<(), EtcdError> {
    let channel = etcd.connect().await?;
    let mut leases = LeaseClient::new(channel.clone());
    let granted = leases.lease_grant(in_time(LeaseGrantRequest { ttl: LIFETIME_S, id: 0 })).await?;
    let id = granted.into_inner().id;
    *lease = Some((channel.clone(), id));
    let put = PutRequest { key: key.into(), value: value.into(), lease: id };
    KvClient::new(channel).put(in_time(put)).await?;
    tracing::info!(%etcd, key, value, "announced");
    last_error.clear();
    let mut renewed = leases.lease_keep_alive(renewals(id)).await?.into_inner();
    while let Some(reply) = renewed.message().await? {
        if reply.ttl == 0 {
            return Ok(());
        }
    }
    Ok(())
}

fn renewals(id: i64) -> impl Stream<Item = LeaseKeepAliveRequest> {
    IntervalStream::new(tokio::time::interval(RENEWAL)).map(move |_| LeaseKeepAliveRequest { id })
}
