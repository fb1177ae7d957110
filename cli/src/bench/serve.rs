//! Frontend and worker without the model: what serving itself costs.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use hdrhistogram::Histogram;

use super::Row;
use super::row::{histogram, percentile_us};

const WARM_UP: Duration = Duration::from_secs(2);
const MEASURE: Duration = Duration::from_secs(8);
/// Tokens that each request asks for.
const UNARY_TOKENS: u32 = 1;
const STREAM_TOKENS: u32 = 16;

pub(super) fn measure() -> Result<Vec<Row>, String> {
    let up = Up::start()?;
    let mut rows = Vec::new();
    for (kind, stream, tokens) in [("unary", false, UNARY_TOKENS), ("stream", true, STREAM_TOKENS)] {
        for clients in [1, 16] {
            let (requests_per_second, times) = load(&up.address, clients, &body(stream, tokens))?;
            let name = |figure: &str| format!("serve.{kind}.c{clients}.{figure}");
            let detail = format!("chat completions, echo engine, {tokens} tokens, {clients} connections");
            rows.push(Row::new(name("rps"), requests_per_second, "1/s").detail(&detail));
            rows.push(Row::new(name("p50"), percentile_us(&times, 50.0), "us").detail(&detail));
            rows.push(Row::new(name("p99"), percentile_us(&times, 99.0), "us").detail(&detail));
        }
    }
    Ok(rows)
}

fn body(stream: bool, tokens: u32) -> String {
    let message = serde_json::json!({"role": "user", "content": "In the beginning God created the heaven"});
    let body = serde_json::json!({
        "model": "tiny", "messages": [message], "max_tokens": tokens, "stream": stream, "ignore_eos": true
    });
    body.to_string()
}

/// `kvbm up` with the echo engine.
struct Up {
    child: Child,
    address: String,
    _dir: tempfile::TempDir,
}

impl Up {
    fn start() -> Result<Self, String> {
        let dir = tempfile::tempdir().map_err(|error| format!("make a temporary folder: {error}"))?;
        let program = std::env::current_exe().map_err(|error| format!("find own program: {error}"))?;
        let mut child = Command::new(program)
            .args(["up", "--json", "--engine", "echo", "--http-port", "0", "--metrics-port", "0"])
            .args(["--cpu-cache-gb", "0.1", "--device-cache-gb", "0.05", "--state-dir"])
            .arg(dir.path())
            .env("DYN_LOG", "warn")
            .stdout(Stdio::piped())
            .spawn()
            .map_err(|error| format!("start kvbm up: {error}"))?;
        let stdout = child.stdout.take().ok_or("kvbm up has no standard output")?;
        let mut line = String::new();
        BufReader::new(stdout).read_line(&mut line).map_err(|error| error.to_string())?;
        let mut up = Self { child, address: String::new(), _dir: dir };
        let ready: serde_json::Value =
            serde_json::from_str(&line).map_err(|error| format!("kvbm up did not become ready: {error}"))?;
        up.address = ready["http"].as_str().unwrap_or_default().trim_start_matches("http://").to_owned();
        Ok(up)
    }
}

impl Drop for Up {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Requests per second, and how long each took from its first byte to the last of the answer.
fn load(address: &str, clients: usize, body: &str) -> Result<(f64, Histogram<u64>), String> {
    let (counting, stop) = (AtomicBool::new(false), AtomicBool::new(false));
    let request = format!(
        "POST /v1/chat/completions HTTP/1.1\r\nHost: {address}\r\nContent-Type: application/json\r\n\
         Content-Length: {}\r\n\r\n{body}",
        body.len()
    );
    std::thread::scope(|scope| {
        let client = || {
            let mut times = histogram();
            let mut connection = Connection::open(address)?;
            while !stop.load(Ordering::Relaxed) {
                let started = Instant::now();
                connection.exchange(request.as_bytes())?;
                if counting.load(Ordering::Relaxed) {
                    times.saturating_record(started.elapsed().as_nanos() as u64);
                }
            }
            Ok::<_, String>(times)
        };
        let threads: Vec<_> = (0..clients).map(|_| scope.spawn(client)).collect();
        std::thread::sleep(WARM_UP);
        counting.store(true, Ordering::Relaxed);
        let started = Instant::now();
        std::thread::sleep(MEASURE);
        let elapsed = started.elapsed().as_secs_f64();
        stop.store(true, Ordering::Relaxed);
        let mut all = histogram();
        for thread in threads {
            let times = thread.join().map_err(|_| "a client panicked".to_owned())??;
            all.add(times).map_err(|error| error.to_string())?;
        }
        Ok((all.len() as f64 / elapsed, all))
    })
}

/// A kept-alive HTTP/1.1 connection that knows just enough to count answers.
struct Connection(BufReader<TcpStream>);

impl Connection {
    fn open(address: &str) -> Result<Self, String> {
        let address = address.replace("0.0.0.0", "127.0.0.1");
        let stream =
            TcpStream::connect(&address).map_err(|error| format!("connect to {address}: {error}"))?;
        stream.set_nodelay(true).map_err(|error| error.to_string())?;
        Ok(Self(BufReader::new(stream)))
    }

    fn exchange(&mut self, request: &[u8]) -> Result<(), String> {
        self.0.get_mut().write_all(request).map_err(|error| format!("send: {error}"))?;
        let status = self.line()?;
        if !status.starts_with("HTTP/1.1 200") {
            return Err(format!("answered {status}"));
        }
        let (mut length, mut chunked) = (0, false);
        loop {
            let header = self.line()?.to_ascii_lowercase();
            if header.is_empty() {
                break;
            }
            if let Some(value) = header.strip_prefix("content-length:") {
                length = value.trim().parse().map_err(|_| format!("length {value}"))?;
            }
            chunked |= header.starts_with("transfer-encoding:") && header.contains("chunked");
        }
        if !chunked {
            return self.skip(length);
        }
        loop {
            let size = self.line()?;
            let size = usize::from_str_radix(&size, 16).map_err(|_| format!("chunk size {size}"))?;
            self.skip(size + 2)?;
            if size == 0 {
                return Ok(());
            }
        }
    }

    fn line(&mut self) -> Result<String, String> {
        let mut line = String::new();
        self.0.read_line(&mut line).map_err(|error| format!("receive: {error}"))?;
        Ok(line.trim_end().to_owned())
    }

    fn skip(&mut self, bytes: usize) -> Result<(), String> {
        let mut rest = self.0.by_ref().take(bytes as u64);
        let skipped =
            std::io::copy(&mut rest, &mut std::io::sink()).map_err(|error| format!("receive: {error}"))?;
        if skipped == bytes as u64 { Ok(()) } else { Err("the connection ended within an answer".into()) }
    }
}
