//! Where a worker or daemon listens.

use std::fmt;
use std::net::IpAddr;
use std::path::PathBuf;

use http::Uri;

/// An address that gRPC is spoken to.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Endpoint {
    /// A Unix socket.
    Unix(PathBuf),
    /// Host and port, as in a URL.
    Tcp(String),
}

impl Endpoint {
    /// Reads `unix:/path` or `http://host:port`.
    pub fn parse(text: &str) -> Option<Self> {
        if let Some(path) = text.strip_prefix("unix:") {
            let path = path.strip_prefix("//").unwrap_or(path);
            return (path.len() > 1 && path.starts_with('/')).then(|| Self::Unix(path.into()));
        }
        let authority = text.strip_prefix("http://")?.trim_end_matches('/');
        let uri: Uri = format!("http://{authority}").parse().ok()?;
        let plain = uri.port_u16().is_some() && uri.authority()?.as_str() == authority;
        plain.then(|| Self::Tcp(authority.to_owned()))
    }

    /// Name or address of the machine, without brackets; none for a Unix socket.
    pub(crate) fn host(&self) -> Option<&str> {
        match self {
            Self::Unix(_) => None,
            Self::Tcp(authority) => {
                let host = authority.rsplit_once(':').map_or(authority.as_str(), |(host, _)| host);
                Some(host.trim_start_matches('[').trim_end_matches(']'))
            }
        }
    }

    /// Whether it is this machine, by its name or address alone.
    pub(crate) fn is_loopback(&self) -> bool {
        let loopback = |host: &str| {
            host == "localhost" || host.parse().is_ok_and(|address: IpAddr| address.is_loopback())
        };
        self.host().is_none_or(loopback)
    }

    /// The URI that requests carry.
    pub(crate) fn origin(&self) -> Uri {
        match self {
            Self::Unix(_) => Uri::from_static("http://localhost"),
            Self::Tcp(authority) => {
                format!("http://{authority}").parse().unwrap_or(Uri::from_static("http://localhost"))
            }
        }
    }
}

impl fmt::Display for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unix(path) => write!(f, "unix:{}", path.display()),
            Self::Tcp(authority) => write!(f, "http://{authority}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn endpoints_are_parsed_and_printed() {
        for text in ["unix:/run/w.sock", "http://127.0.0.1:80", "http://[::1]:9000", "http://node-7:9000"] {
            assert_eq!(Endpoint::parse(text).unwrap().to_string(), text);
        }
        assert_eq!(Endpoint::parse("unix:///run/w.sock"), Endpoint::parse("unix:/run/w.sock"));
        for (text, host, loopback) in [
            ("http://127.0.0.1:80", Some("127.0.0.1"), true),
            ("http://[::1]:9000", Some("::1"), true),
            ("http://localhost:1", Some("localhost"), true),
            ("http://node-7:9000", Some("node-7"), false),
            ("http://0.0.0.0:9000", Some("0.0.0.0"), false),
            ("unix:/w", None, true),
        ] {
            let endpoint = Endpoint::parse(text).unwrap();
            assert_eq!((endpoint.host(), endpoint.is_loopback()), (host, loopback), "{text}");
        }
        for text in
            ["", "unix:", "unix:/", "unix:w.sock", "http://host", "https://host:1", "http://h:1/x", "h:1"]
        {
            assert_eq!(Endpoint::parse(text), None, "{text}");
        }
    }
}
