//! A whole worker in this process, over its socket.

use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::Parser;
use kvbm_proto::v1::generate_event::Body;
use kvbm_proto::v1::worker_client::WorkerClient;
use kvbm_proto::v1::{
    DescribeRequest, FinishReason, Finished, GenerateEvent, GenerateRequest, Sampling, Started,
};
use kvbm_worker::{KvMemory, ReadyInfo, WorkerArgs, WorkerError};
use tempfile::TempDir;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::sync::oneshot;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;
use tonic::transport::{Channel, Endpoint};
use tonic::{Code, Status, Streaming};

use crate::support;

#[derive(Parser)]
struct Line {
    #[command(flatten)]
    args: WorkerArgs,
}

/// A worker that serves.
struct Served {
    folder: TempDir,
    stop: CancellationToken,
    outcome: JoinHandle<Result<(), WorkerError>>,
    info: ReadyInfo,
}

impl Served {
    async fn start(flags: &[&str]) -> Self {
        Self::start_at(|folder| format!("unix:{}", folder.join("w.sock").display()), flags).await
    }

    async fn start_at(listen: impl Fn(&Path) -> String, flags: &[&str]) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let listen = listen(folder.path());
        let model = support::model().display().to_string();
        let given = ["worker", "--model", &model, "--no-daemon", "--device-cache-blocks", "64"];
        let line = [&given[..], &["--system-host", "127.0.0.1", "--listen", &listen], flags].concat();
        let args = Line::try_parse_from(line).unwrap().args;
        let stop = CancellationToken::new();
        let (ready, info) = oneshot::channel();
        let on_ready = |info| ready.send(info).unwrap();
        let outcome = tokio::spawn(kvbm_worker::run(args, stop.clone(), on_ready));
        Self { folder, stop, outcome, info: info.await.unwrap() }
    }

    fn socket(&self) -> PathBuf {
        self.folder.path().join("w.sock")
    }

    fn client(&self) -> WorkerClient<Channel> {
        WorkerClient::new(Endpoint::try_from(self.info.endpoint.clone()).unwrap().connect_lazy())
    }

    async fn metric(&self, name: &str) -> f64 {
        let page = get(self.info.system_url.as_ref().unwrap(), "/metrics").await;
        let line =
            page.lines().find(|line| line.starts_with(name)).unwrap_or_else(|| panic!("{name} in {page}"));
        line.rsplit(' ').next().unwrap().parse().unwrap()
    }

    /// Waits until a metric has a value; the test's time limit is that of the whole run.
    async fn until(&self, name: &str, value: f64) {
        while self.metric(name).await != value {
            tokio::task::yield_now().await;
        }
    }

    async fn stop(self) {
        self.stop.cancel();
        self.outcome.await.unwrap().unwrap();
    }
}

async fn get(url: &str, path: &str) -> String {
    let mut stream = TcpStream::connect(url.strip_prefix("http://").unwrap()).await.unwrap();
    let request = format!("GET {path} HTTP/1.1\r\nhost: worker\r\nconnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.unwrap();
    answer
}

fn request(prompt: Vec<u32>, max_tokens: u32) -> GenerateRequest {
    GenerateRequest { prompt, max_tokens, ignore_eos: true, ..GenerateRequest::default() }
}

fn prompt(seed: u64, tokens: usize) -> Vec<u32> {
    let mut random = support::Random(seed);
    (0..tokens).map(|_| random.below(2000) as u32).collect()
}

#[derive(Debug, Default, PartialEq)]
struct Read {
    started: Vec<Started>,
    tokens: Vec<u32>,
    finished: Option<Finished>,
}

async fn read(mut events: Streaming<GenerateEvent>) -> Result<Read, Status> {
    let mut read = Read::default();
    while let Some(event) = events.message().await? {
        assert_eq!(read.finished, None, "nothing comes after the end");
        match event.body.unwrap() {
            Body::Started(started) => read.started.push(started),
            Body::Tokens(tokens) => read.tokens.extend(tokens.ids),
            Body::Finished(finished) => read.finished = Some(finished),
        }
    }
    Ok(read)
}

async fn generate(served: &Served, request: GenerateRequest) -> Result<Read, Status> {
    read(served.client().generate(request).await?.into_inner()).await
}

/// What the engine says when it runs alone, one token after the other.
fn solo(prompt: &[u32], max_tokens: usize) -> Vec<u32> {
    let mut engine = support::engine(1, None);
    let kv = KvMemory::private(engine.kv_layout(32), 16);
    let (mut tokens, mut done) = (prompt.to_vec(), 0);
    for _ in 0..max_tokens {
        let next = support::argmax(&support::run(&mut engine, &kv, &tokens[done..], done));
        done = tokens.len();
        tokens.push(next);
    }
    tokens.split_off(prompt.len())
}

#[tokio::test]
async fn text_is_that_of_the_engine_alone_and_a_repetition_is_found_in_the_pool() {
    let served = Served::start(&["--system-port", "0"]).await;
    let prompt = prompt(1, 100);
    let first = generate(&served, request(prompt.clone(), 40)).await.unwrap();
    assert_eq!(first.tokens, solo(&prompt, 40));
    assert_eq!(first.started, [Started::default()]);
    let end = Finished { reason: FinishReason::Length.into(), prompt_tokens: 100, completion_tokens: 40 };
    assert_eq!(first.finished, Some(end));
    let second = generate(&served, request(prompt.clone(), 40)).await.unwrap();
    assert_eq!((second.tokens, second.started[0].device_tokens), (first.tokens, 96));
    let salted = GenerateRequest { cache_salt: "tenant".into(), ..request(prompt, 1) };
    assert_eq!(generate(&served, salted).await.unwrap().started[0].device_tokens, 0);
    assert_eq!(served.metric("kvbm_worker_cached_tokens_total{model=\"tiny\",tier=\"device\"}").await, 96.0);
    assert_eq!(served.metric("kvbm_worker_generated_tokens_total").await, 81.0);
    assert_eq!(served.metric("kvbm_worker_cache_attached").await, 0.0);
    let health = get(served.info.system_url.as_ref().unwrap(), "/health").await;
    assert!(health.starts_with("HTTP/1.1 200") && health.contains("healthy"), "{health}");
    served.stop().await;
}

#[tokio::test]
async fn chance_follows_the_seed_and_is_drawn_without_one() {
    let served = Served::start(&[]).await;
    let hot = |seed| GenerateRequest {
        sampling: Some(Sampling { temperature: 1.5, seed, ..Sampling::default() }),
        ..request(prompt(2, 20), 30)
    };
    let seeded = generate(&served, hot(Some(7))).await.unwrap().tokens;
    assert_eq!(generate(&served, hot(Some(7))).await.unwrap().tokens, seeded);
    assert_ne!(generate(&served, hot(Some(8))).await.unwrap().tokens, seeded);
    let drawn = generate(&served, hot(None)).await.unwrap().tokens;
    assert_ne!(generate(&served, hot(None)).await.unwrap().tokens, drawn);
    served.stop().await;
}

#[tokio::test]
async fn what_cannot_be_served_is_said_with_the_field() {
    let served = Served::start(&["--context-length", "200"]).await;
    let ok = || request(vec![1, 2, 3], 2);
    let sampled = |temperature| GenerateRequest {
        sampling: Some(Sampling { temperature, ..Sampling::default() }),
        ..ok()
    };
    for (wrong, message) in [
        (request(vec![], 1), "prompt: is empty"),
        (request(vec![1, 99_999], 1), "prompt: token 99999 is not below"),
        (request(vec![1; 200], 1), "prompt: has 200 tokens, at most 199 are possible"),
        (request(vec![1], 0), "max_tokens: is 0"),
        (sampled(-0.5), "temperature: -0.5 is not 0 or a positive number"),
        (sampled(f32::NAN), "temperature: NaN"),
        (GenerateRequest { lora: "a".into(), ..ok() }, "lora: this worker serves no adapters"),
    ] {
        let status = generate(&served, wrong).await.unwrap_err();
        assert_eq!(status.code(), Code::InvalidArgument, "{status}");
        assert!(status.message().starts_with(message), "{status}");
    }
    assert_eq!(generate(&served, ok()).await.unwrap().tokens.len(), 2);
    let described = served.client().describe(DescribeRequest {}).await.unwrap().into_inner();
    assert_eq!((described.model.as_str(), described.context_length), ("tiny", 200));
    assert_eq!((described.state.as_str(), described.tokens_per_block), ("ready", 32));
    served.stop().await;
}

#[tokio::test]
async fn adapters_that_count_for_keys_only_share_nothing() {
    let served = Served::start(&["--ignore-lora"]).await;
    let with = |lora: &str| GenerateRequest { lora: lora.into(), ..request(prompt(3, 70), 1) };
    for (lora, cached) in [("a", 0), ("b", 0), ("a", 64), ("", 0)] {
        let read = generate(&served, with(lora)).await.unwrap();
        assert_eq!(read.started[0].device_tokens, cached, "{lora:?}");
    }
    served.stop().await;
}

#[tokio::test]
async fn a_client_that_leaves_ends_its_request_and_a_full_queue_is_an_answer() {
    let served = Served::start(&["--system-port", "0", "--max-batch", "1", "--max-waiting", "1"]).await;
    let mut client = served.client();
    let mut first = client.generate(request(prompt(4, 40), 1900)).await.unwrap().into_inner();
    assert!(matches!(first.message().await.unwrap().unwrap().body, Some(Body::Started(_))));
    let waiting = client.generate(request(prompt(5, 40), 2)).await.unwrap().into_inner();
    served.until("kvbm_worker_requests_waiting", 1.0).await;
    let status = generate(&served, request(prompt(6, 40), 2)).await.unwrap_err();
    assert_eq!(status.code(), Code::ResourceExhausted);
    drop(first);
    assert_eq!(read(waiting).await.unwrap().tokens.len(), 2, "the place is free");
    assert_eq!(served.metric("kvbm_worker_requests_total{model=\"tiny\",outcome=\"cancelled\"}").await, 1.0);
    assert!(served.metric("kvbm_worker_generated_tokens_total").await < 1900.0);
    served.until("kvbm_worker_answers_in_flight", 0.0).await;
    served.stop().await;
}

#[tokio::test]
async fn a_reader_that_does_not_read_holds_up_nobody() {
    let served = Served::start(&["--system-port", "0"]).await;
    let slow = served.client().generate(request(prompt(7, 10), 500)).await.unwrap().into_inner();
    assert_eq!(generate(&served, request(prompt(8, 10), 600)).await.unwrap().tokens.len(), 600);
    served.until("kvbm_worker_requests_running", 0.0).await;
    assert_eq!(read(slow).await.unwrap().tokens.len(), 500);
    served.stop().await;
}

#[tokio::test]
async fn draining_lets_requests_end_and_takes_no_more() {
    let served = Served::start(&["--system-port", "0"]).await;
    let mut client = served.client();
    let mut running = client.generate(request(prompt(9, 10), 400)).await.unwrap().into_inner();
    assert!(matches!(running.message().await.unwrap().unwrap().body, Some(Body::Started(_))));
    served.stop.cancel();
    served.until("kvbm_worker_draining", 1.0).await;
    let health = get(served.info.system_url.as_ref().unwrap(), "/health").await;
    assert!(health.starts_with("HTTP/1.1 503") && health.contains("draining"), "{health}");
    let status = client.generate(request(prompt(9, 10), 1)).await.unwrap_err();
    assert_eq!(status.code(), Code::Unavailable);
    assert_eq!(client.describe(DescribeRequest {}).await.unwrap().into_inner().state, "draining");
    assert_eq!(read(running).await.unwrap().tokens.len(), 400);
    let socket = served.socket();
    served.stop().await;
    assert!(!socket.exists());
}

#[tokio::test]
async fn a_stop_without_patience_tells_those_that_are_left() {
    let served = Served::start(&["--drain-seconds", "0"]).await;
    let mut running = served.client().generate(request(prompt(9, 10), 1900)).await.unwrap().into_inner();
    running.message().await.unwrap();
    served.stop.cancel();
    assert_eq!(read(running).await.unwrap_err().code(), Code::Unavailable);
    served.stop().await;
}

#[tokio::test]
async fn echo_is_served_over_tcp() {
    let served = Served::start_at(|_| "http://127.0.0.1:0".into(), &["--engine", "echo"]).await;
    assert!(served.info.endpoint.starts_with("http://127.0.0.1:"), "{}", served.info.endpoint);
    assert_eq!(generate(&served, request(vec![5, 6], 5)).await.unwrap().tokens, [5, 6, 5, 6, 5]);
    served.stop().await;
}

#[tokio::test]
async fn a_worker_whose_daemon_is_missing_serves() {
    let folder = tempfile::tempdir().unwrap();
    let listen = format!("unix:{}", folder.path().join("w.sock").display());
    let socket = folder.path().join("kvbm.sock").display().to_string();
    let model = support::model().display().to_string();
    let line = ["worker", "--model", &model, "--socket", &socket, "--listen", &listen];
    let line = [&line[..], &["--init-timeout-seconds", "0.05", "--device-cache-blocks", "8"]].concat();
    let stop = CancellationToken::new();
    let (ready, info) = oneshot::channel();
    let run = kvbm_worker::run(Line::try_parse_from(line).unwrap().args, stop.clone(), |info| {
        ready.send(info).unwrap();
    });
    let outcome = tokio::spawn(run);
    let info = tokio::time::timeout(Duration::from_secs(30), info).await.unwrap().unwrap();
    let served = Served { folder, stop, outcome, info };
    assert_eq!(generate(&served, request(prompt(1, 40), 3)).await.unwrap().tokens.len(), 3);
    served.stop().await;
}

#[tokio::test]
async fn wrong_settings_end_it_before_anything_is_bound() {
    let args = Line::try_parse_from(["worker", "--model", "/nowhere", "--no-daemon"]).unwrap().args;
    let error = kvbm_worker::run(args, CancellationToken::new(), |_| panic!("is ready")).await.unwrap_err();
    assert!(error.to_string().starts_with("--model /nowhere: expected a folder"), "{error}");
    assert_eq!(error.exit_code(), 2);
}
