//! What the frontend knows of the workers.

use std::time::Duration;

use serde_json::Value;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

/// How long an answer may take.
const ANSWER_MAX: Duration = Duration::from_secs(2);

/// How many workers the frontend at `url` can use; none if it does not say.
pub(super) async fn usable_workers(url: &str) -> Option<usize> {
    let address = url.strip_prefix("http://")?;
    let ask = async {
        let mut stream = TcpStream::connect(address).await.ok()?;
        // HTTP/1.0: the answer ends with the connection.
        stream.write_all(b"GET /health HTTP/1.0\r\n\r\n").await.ok()?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.ok()?;
        let (_, body) = answer.split_once("\r\n\r\n")?;
        let health: Value = serde_json::from_str(body).ok()?;
        Some(health["workers"].as_array()?.iter().filter(|worker| worker["state"] == "ready").count())
    };
    tokio::time::timeout(ANSWER_MAX, ask).await.ok().flatten()
}
