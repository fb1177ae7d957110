//! Where NATS is.

use std::fmt;
use std::path::{Path, PathBuf};

/// Servers of one NATS, any of which may be asked.
#[derive(Clone, PartialEq, Eq)]
pub struct Nats {
    servers: Vec<String>,
    credentials: Option<PathBuf>,
}

impl Nats {
    /// What such a place must be.
    pub const FORM: &str =
        "nats://host:port, with further servers behind commas, or nats for what NATS_SERVER names";

    /// Reads `nats://[user:password@]host:port`, or `tls://...`, with further servers behind commas; or `nats` for what the
    /// variable `NATS_SERVER` holds.
    pub fn parse(text: &str) -> Option<Self> {
        if text == "nats" {
            return Self::listed(&std::env::var("NATS_SERVER").ok()?);
        }
        (text.starts_with("nats://") || text.starts_with("tls://")).then(|| Self::listed(text)).flatten()
    }

    /// The first server may be without a scheme, as in `NATS_SERVER`; the others always.
    fn listed(text: &str) -> Option<Self> {
        let server = |part: &str| {
            let part = part.trim().trim_end_matches('/');
            let (scheme, authority) = part.split_once("://").unwrap_or(("nats", part));
            let (_, place) = authority.rsplit_once('@').unwrap_or(("", authority));
            let (host, port) = place.rsplit_once(':')?;
            let usable = matches!(scheme, "nats" | "tls")
                && !host.is_empty()
                && !authority.contains(['/', ' '])
                && port.parse::<u16>().is_ok();
            usable.then(|| format!("{scheme}://{authority}"))
        };
        let servers: Option<Vec<String>> = text.split(',').map(server).collect();
        Some(Self { servers: servers.filter(|servers| !servers.is_empty())?, credentials: None })
    }

    /// With a file of credentials, as `nsc` writes it: a user's JWT and seed.
    #[must_use]
    pub fn with_credentials(self, file: Option<&Path>) -> Self {
        Self { credentials: file.map(Path::to_owned), ..self }
    }

    pub(crate) fn credentials(&self) -> Option<&Path> {
        self.credentials.as_deref()
    }

    pub(crate) fn servers(&self) -> &[String] {
        &self.servers
    }
}

/// Without names and passwords.
impl fmt::Display for Nats {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (at, server) in self.servers.iter().enumerate() {
            let (scheme, authority) = server.split_once("://").unwrap_or(("nats", server));
            let (_, place) = authority.rsplit_once('@').unwrap_or(("", authority));
            write!(f, "{}{scheme}://{place}", if at > 0 { "," } else { "" })?;
        }
        Ok(())
    }
}

impl fmt::Debug for Nats {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Nats({self})")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn servers_are_read_passwords_are_not_shown_and_nonsense_is_refused() {
        for (text, shown) in [
            ("nats://a:4222", "nats://a:4222"),
            ("nats://a:4222,b:4223", "nats://a:4222,nats://b:4223"),
            ("tls://a:1/", "tls://a:1"),
            ("nats://user:pa:ss@a:4222", "nats://a:4222"),
        ] {
            let nats = Nats::parse(text).unwrap();
            assert_eq!((nats.to_string(), format!("{nats:?}")), (shown.into(), format!("Nats({shown})")));
        }
        for text in
            ["", "nats://", "nats://a", "http://a:1", "nats://a:1,", "nats://a:1/x", "a:1", "nats://:1"]
        {
            assert_eq!(Nats::parse(text), None, "{text}");
        }
    }
}
