//! One other server.

use std::collections::BTreeSet;
use std::fmt;
use std::sync::Arc;

use http::Uri;
use parking_lot::Mutex;
use tokio::time::Instant;

use super::UpstreamHealth;
use super::breaker::Breaker;
use crate::router::Load;

/// `http://host:port` or `https://host:port`, perhaps with a path before `/v1`.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct UpstreamUrl(String);

impl UpstreamUrl {
    /// What a URL must be.
    pub const FORM: &str = "http://host:port or https://host:port, perhaps with the path before /v1";

    /// Reads it; a `/v1` at its end is taken off.
    pub fn parse(text: &str) -> Option<Self> {
        let text = text.trim_end_matches('/');
        let text = text.strip_suffix("/v1").unwrap_or(text);
        let uri: Uri = text.parse().ok()?;
        let plain = matches!(uri.scheme_str(), Some("http" | "https"))
            && uri.host().is_some_and(|host| !host.is_empty());
        (plain && uri.query().is_none() && !text.contains('@')).then(|| Self(text.to_owned()))
    }

    /// What is at a path there.
    pub fn at(&self, path: &str) -> Option<Uri> {
        format!("{}{path}", self.0).parse().ok()
    }
}

impl fmt::Display for UpstreamUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// See the module.
pub struct Upstream {
    pub url: UpstreamUrl,
    pub load: Arc<Load>,
    state: Mutex<State>,
}

struct State {
    /// What it said when it was last looked at.
    models: BTreeSet<String>,
    /// Why it serves nothing, if so.
    down: Option<String>,
    breaker: Breaker,
}

impl Upstream {
    pub(super) fn new(url: &UpstreamUrl) -> Self {
        let down = Some("not looked at yet".to_owned());
        let state = State { models: BTreeSet::new(), down, breaker: Breaker::Closed(0) };
        Self { url: url.clone(), load: Arc::default(), state: Mutex::new(state) }
    }

    /// It answered with these models.
    pub(super) fn is_up(&self, models: BTreeSet<String>) {
        let mut state = self.state.lock();
        (state.models, state.down) = (models, None);
    }

    /// It did not answer. Its models stay: requests for them fail, rather than to be of models that do not exist.
    pub(super) fn is_down(&self, reason: String) {
        self.state.lock().down = Some(reason);
    }

    pub(super) fn serves(&self, model: &str) -> bool {
        self.state.lock().models.contains(model)
    }

    pub(super) fn models(&self) -> BTreeSet<String> {
        let state = self.state.lock();
        if state.down.is_none() { state.models.clone() } else { BTreeSet::new() }
    }

    pub(super) fn lets_through(&self) -> bool {
        self.state.lock().breaker.lets_through(Instant::now())
    }

    pub(super) fn succeeded(&self) {
        self.state.lock().breaker.succeeded();
    }

    pub(super) fn failed(&self) {
        self.state.lock().breaker.failed(Instant::now());
    }

    pub(super) fn health(&self, url: &UpstreamUrl) -> UpstreamHealth {
        let state = self.state.lock();
        let (name, reason) = match (&state.down, state.breaker) {
            (Some(reason), _) => ("down", Some(reason.clone())),
            (None, Breaker::Closed(_)) => ("ready", None),
            (None, Breaker::Open(_) | Breaker::Trial(_)) => {
                ("down", Some("its last answers were errors".to_owned()))
            }
        };
        UpstreamHealth { url: url.to_string(), models: state.models.clone(), state: name, reason }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn urls_lose_their_version_and_what_is_none_is_refused() {
        for (text, url) in [
            ("http://h:8000", "http://h:8000"),
            ("http://h:8000/v1/", "http://h:8000"),
            ("http://h/openai/v1", "http://h/openai"),
            ("https://h/v1", "https://h"),
        ] {
            let parsed = UpstreamUrl::parse(text).unwrap();
            assert_eq!(parsed.to_string(), url);
            assert_eq!(parsed.at("/v1/models").unwrap().to_string(), format!("{url}/v1/models"));
        }
        for text in
            ["", "h:8000", "ftp://h:8000", "http://", "https://", "http://u:p@h", "http://h/?q=1", "unix:/x"]
        {
            assert_eq!(UpstreamUrl::parse(text), None, "{text}");
        }
    }
}
