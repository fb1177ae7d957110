//! What there is to be served.

use std::collections::BTreeSet;

use serde::{Deserialize, Serialize};

use crate::fleet::Endpoint;
use crate::upstream::UpstreamUrl;

/// The document that is kept.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct DiscoveryList {
    /// Daemons, whose workers are served: unix:/path, http://host:port, https://host:port.
    pub daemons: BTreeSet<String>,
    /// Workers without a daemon: unix:/path or http://host:port.
    pub workers: BTreeSet<String>,
    /// Other OpenAI servers: http://host:port.
    pub upstreams: BTreeSet<String>,
}

/// What an entry is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Kind {
    /// A daemon, whose workers are served
    Daemon,
    /// A worker without a daemon
    Worker,
    /// Another OpenAI server
    Upstream,
}

impl Kind {
    /// As lists call them.
    pub fn name(self) -> &'static str {
        match self {
            Self::Daemon => kvbm_etcd::DAEMONS,
            Self::Worker => "workers",
            Self::Upstream => "upstreams",
        }
    }

    pub(super) fn of(name: &str) -> Option<Self> {
        [Self::Daemon, Self::Worker, Self::Upstream].into_iter().find(|kind| kind.name() == name)
    }

    /// An address as it is listed; what is wrong with it, if it is none.
    pub fn checked(self, address: &str) -> Result<String, String> {
        item(self, address).map(|item| match item {
            Item::Daemon(text) => text,
            Item::Worker(endpoint) => endpoint.to_string(),
            Item::Upstream(url) => url.to_string(),
        })
    }
}

fn item(kind: Kind, text: &str) -> Result<Item, String> {
    let wrong = |form: &str| format!("{text:?} in {} is not {form}", kind.name());
    match kind {
        Kind::Daemon => {
            let plain = text.strip_prefix("https://").map(|rest| format!("http://{rest}"));
            let endpoint = Endpoint::parse(plain.as_deref().unwrap_or(text));
            let form = "unix:/path, http://host:port or https://host:port";
            endpoint.map(|_| Item::Daemon(text.to_owned())).ok_or_else(|| wrong(form))
        }
        Kind::Worker => {
            Endpoint::parse(text).map(Item::Worker).ok_or_else(|| wrong("unix:/path or http://host:port"))
        }
        Kind::Upstream => {
            UpstreamUrl::parse(text).map(Item::Upstream).ok_or_else(|| wrong(UpstreamUrl::FORM))
        }
    }
}

/// One of them, checked.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Item {
    Daemon(String),
    Worker(Endpoint),
    Upstream(UpstreamUrl),
}

impl DiscoveryList {
    /// Those of a kind.
    pub(super) fn of_mut(&mut self, kind: Kind) -> &mut BTreeSet<String> {
        match kind {
            Kind::Daemon => &mut self.daemons,
            Kind::Worker => &mut self.workers,
            Kind::Upstream => &mut self.upstreams,
        }
    }

    /// All that is usable, and what is wrong with the rest.
    pub(crate) fn usable_items(&self) -> (BTreeSet<Item>, Vec<String>) {
        let of = |kind, texts: &BTreeSet<String>| -> Vec<Result<Item, String>> {
            texts.iter().map(|text| item(kind, text)).collect()
        };
        let all = [
            of(Kind::Daemon, &self.daemons),
            of(Kind::Worker, &self.workers),
            of(Kind::Upstream, &self.upstreams),
        ];
        let (mut items, mut wrong) = (BTreeSet::new(), Vec::new());
        for item in all.into_iter().flatten() {
            match item {
                Ok(item) => drop(items.insert(item)),
                Err(error) => wrong.push(error),
            }
        }
        (items, wrong)
    }

    /// All of it, or what is wrong with some of it.
    pub(crate) fn items(&self) -> Result<BTreeSet<Item>, String> {
        let (items, wrong) = self.usable_items();
        wrong.into_iter().next().map_or(Ok(items), Err)
    }
}
