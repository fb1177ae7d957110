//! The list as keys of etcd, of which daemons hold their own by a lease.

use std::collections::BTreeMap;

use kvbm_etcd::{Etcd, PREFIX};
use tokio::sync::watch;

use super::{Appointed, DiscoveryList, Kind};

/// What the keys say; those that are not understood are of a later version.
pub(super) fn list(entries: &BTreeMap<String, String>) -> DiscoveryList {
    let mut list = DiscoveryList::default();
    for (key, value) in entries {
        let kind = key.strip_prefix(PREFIX).and_then(|rest| rest.split('/').next()).and_then(Kind::of);
        if let Some(kind) = kind {
            list.of_mut(kind).insert(value.clone());
        }
    }
    list
}

/// Serves what etcd lists, for ever.
pub(super) async fn follow(etcd: Etcd, mut appointed: Appointed) {
    let (sender, mut lists) = watch::channel(None);
    let following = kvbm_etcd::follow(etcd, PREFIX, move |entries| {
        sender.send_replace(Some(list(entries)));
    });
    tokio::pin!(following);
    loop {
        tokio::select! {
            () = &mut following => return,
            () = appointed.reap() => {}
            changed = lists.changed() => {
                if changed.is_err() {
                    return;
                }
                let list = lists.borrow_and_update().clone().unwrap_or_default();
                // One entry that is nonsense must not keep the others out.
                let (items, wrong) = list.usable_items();
                for error in wrong {
                    tracing::warn!(error, "an entry of etcd cannot be used");
                }
                appointed.become_items(items);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use kvbm_etcd::key;

    use super::*;

    #[test]
    fn keys_lead_back_to_what_was_listed() {
        let entries = [
            (Kind::Daemon, "https://node-1:6881"),
            (Kind::Upstream, "http://h:8000/openai"),
            (Kind::Worker, "http://w:9000"),
        ];
        let mut keys: BTreeMap<String, String> = entries
            .iter()
            .map(|(kind, address)| (key(kind.name(), address), (*address).to_owned()))
            .collect();
        keys.insert("/kvbm/v1/planets/x".into(), "x".into());
        let list = list(&keys);
        assert_eq!(list.daemons.into_iter().collect::<Vec<_>>(), ["https://node-1:6881"]);
        assert_eq!(list.upstreams.into_iter().collect::<Vec<_>>(), ["http://h:8000/openai"]);
        assert_eq!(list.workers.into_iter().collect::<Vec<_>>(), ["http://w:9000"]);
    }
}
