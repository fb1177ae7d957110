//! The format of the Mooncake traces (FAST'25): one request per line, as JSON.

use std::io::Write;

use serde::{Deserialize, Serialize};

use super::Numbered;
use crate::replay::workloads::Request;

/// One line. Blocks are named by numbers that stand for their content and all before it.
#[derive(Debug, Serialize, Deserialize)]
struct Line {
    /// Milliseconds.
    timestamp: u64,
    #[serde(default)]
    input_length: u64,
    #[serde(default)]
    output_length: u64,
    hash_ids: Vec<u64>,
}

/// What a line must look like, for messages.
pub(super) const EXPECTED: &str =
    r#"a JSON object with "timestamp" (milliseconds) and "hash_ids" (a list of whole numbers from 0)"#;

/// Adds one line.
pub(super) fn read(text: &str, requests: &mut Numbered) -> Result<(), String> {
    let line: Line = serde_json::from_str(text).map_err(|error| format!("expected {EXPECTED}: {error}"))?;
    let last = requests.last_ms();
    if line.timestamp < last {
        let now = line.timestamp;
        return Err(format!(
            "timestamp {now} is before that of an earlier line, {last}: sort the trace by time"
        ));
    }
    requests.request(line.timestamp, &line.hash_ids)
}

/// Writes requests in this format.
pub(in crate::replay) fn write(requests: &[Request], mut out: impl Write) -> std::io::Result<()> {
    for request in requests {
        let line = Line {
            timestamp: request.at_ms,
            input_length: request.input_tokens,
            output_length: request.output_tokens,
            hash_ids: request.blocks.clone(),
        };
        serde_json::to_writer(&mut out, &line)?;
        out.write_all(b"\n")?;
    }
    out.flush()
}
