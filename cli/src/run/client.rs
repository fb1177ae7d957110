//! The smallest client that reads a streamed answer.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpStream};

use serde_json::Value;

/// Sends a body, and hands on each event of the answer until there are no more, or `each` says so. HTTP/1.0: the answer
/// ends with the connection.
pub(super) fn post(
    address: SocketAddr,
    path: &str,
    body: &Value,
    mut each: impl FnMut(&Value) -> bool,
) -> Result<(), String> {
    let failed = |what: &'static str| move |error: std::io::Error| format!("{what}: {error}");
    let mut stream = TcpStream::connect(address).map_err(failed("connect"))?;
    let body = body.to_string();
    let head = format!(
        "POST {path} HTTP/1.0\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\r\n",
        body.len()
    );
    stream.write_all((head + &body).as_bytes()).map_err(failed("send"))?;
    let mut lines = BufReader::new(stream);
    let mut line = String::new();
    lines.read_line(&mut line).map_err(failed("receive"))?;
    let is_answer = line.split(' ').nth(1) == Some("200");
    while !line.trim().is_empty() {
        line.clear();
        lines.read_line(&mut line).map_err(failed("receive"))?;
    }
    if !is_answer {
        let mut text = String::new();
        lines.read_to_string(&mut text).map_err(failed("receive"))?;
        return Err(message(&serde_json::from_str(&text).unwrap_or_default()));
    }
    for line in lines.lines() {
        let line = line.map_err(failed("receive"))?;
        let Some(event) = line.strip_prefix("data: ").filter(|event| *event != "[DONE]") else { continue };
        let event: Value = serde_json::from_str(event).map_err(|error| format!("receive: {error}"))?;
        if event["error"].is_object() {
            return Err(message(&event));
        }
        if !each(&event) {
            return Ok(());
        }
    }
    Ok(())
}

fn message(error: &Value) -> String {
    error["error"]["message"].as_str().unwrap_or("the answer makes no sense").to_owned()
}
