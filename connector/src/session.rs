//! One session with the daemon: a stream in each direction, many questions under way at once, and the side channel.
//!
//! An answer runs the waiter of its question in the reader's task, so waiters see answers in the order of the stream.
//! A waiter runs exactly once: with the answer, or with an error when the session ends.

use std::collections::HashMap;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use hyper_util::rt::TokioIo;
use kvbm_proto::v1::cache_client::CacheClient;
use kvbm_proto::v1::{
    ClientMessage, Hello, HelloReply, Refusal, ServerMessage, TraceContext, client_message, server_message,
};
use kvbm_proto::{MESSAGE_BYTES_MAX, PROTOCOL_VERSION};
use kvbm_shm::ProcessWatch;
use parking_lot::Mutex;
use tokio::net::UnixStream;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::JoinSet;
use tokio::time::timeout;
use tokio_stream::wrappers::ReceiverStream;
use tonic::Streaming;
use tonic::transport::{Channel, Endpoint, Uri};

use crate::ClientError;
use crate::side::SideChannel;

/// A question.
pub(crate) type Question = client_message::Body;
/// The body of an answer.
pub(crate) type Answer = server_message::Body;
type Waiter = Box<dyn FnOnce(Result<Answer, ClientError>) + Send>;

/// Messages on their way to the daemon, at most.
const OUTGOING_MESSAGES_MAX: usize = 256;

/// What late answers brought and is on its way back, messages, at most. More than that waits for the session's end.
const RETURNS_MAX: usize = 4096;

/// Questions without an answer. `None` once the session has ended.
#[derive(Clone)]
struct Waiters(Arc<Mutex<Option<HashMap<u64, Waiter>>>>);

impl Waiters {
    fn insert(&self, id: u64, waiter: Waiter) -> Result<(), Waiter> {
        match &mut *self.0.lock() {
            Some(waiters) => {
                waiters.insert(id, waiter);
                Ok(())
            }
            None => Err(waiter),
        }
    }

    fn remove(&self, id: u64) -> Option<Waiter> {
        self.0.lock().as_mut()?.remove(&id)
    }

    fn close(&self, reason: &str) {
        for waiter in self.0.lock().take().into_iter().flat_map(HashMap::into_values) {
            waiter(Err(ClientError::unavailable(reason)));
        }
    }
}

/// A session that has been greeted and bound.
pub(crate) struct Session {
    outgoing: mpsc::Sender<ClientMessage>,
    returns: mpsc::Sender<ClientMessage>,
    waiters: Waiters,
    next_id: AtomicU64,
    /// Why the session ended.
    ended: watch::Receiver<Option<String>>,
    side: Arc<SideChannel>,
    daemon: Option<Arc<ProcessWatch>>,
    hello: HelloReply,
    channel: Channel,
    _tasks: JoinSet<()>,
}

impl Session {
    /// Connects, greets and binds, all within `deadline`.
    pub async fn connect(socket: &Path, client: &str, deadline: Duration) -> Result<Self, ClientError> {
        timeout(deadline, Self::open(socket, client)).await.unwrap_or(Err(ClientError::Deadline))
    }

    async fn open(socket: &Path, client: &str) -> Result<Self, ClientError> {
        let channel = connect_channel(socket).await?;
        let (outgoing, messages) = mpsc::channel(OUTGOING_MESSAGES_MAX);
        let hello = Hello {
            protocol_version: PROTOCOL_VERSION,
            features: Vec::new(),
            pid: std::process::id(),
            client: client.to_owned(),
        };
        let hello = ClientMessage { id: 1, body: Some(Question::Hello(hello)), trace: None };
        outgoing.try_send(hello).expect("the queue is new");
        let mut cache = CacheClient::new(channel.clone())
            .max_decoding_message_size(MESSAGE_BYTES_MAX)
            .max_encoding_message_size(MESSAGE_BYTES_MAX);
        let mut stream = cache.attach(ReceiverStream::new(messages)).await?.into_inner();
        let hello = match next(&mut stream).await? {
            ServerMessage { body: Some(Answer::Hello(hello)), .. } => hello,
            ServerMessage { body: Some(Answer::Refused(refused)), .. } => return Err(refusal(refused)),
            other => return Err(ClientError::malformed(format!("Hello was answered with {other:?}"))),
        };
        let side = SideChannel::bind(socket, kvbm_proto::digest("token", &hello.token)?).await?;
        let waiters = Waiters(Arc::new(Mutex::new(Some(HashMap::new()))));
        let (ending, ended) = watch::channel(None);
        let mut tasks = JoinSet::new();
        tasks.spawn(run(stream, side.clone(), waiters.clone(), ending));
        let (returns, returned) = mpsc::channel(RETURNS_MAX);
        tasks.spawn(send_back(returned, outgoing.clone()));
        let daemon = side.watch_daemon().map(Arc::new);
        let next_id = AtomicU64::new(2);
        Ok(Self { outgoing, returns, waiters, next_id, ended, side, daemon, hello, channel, _tasks: tasks })
    }

    /// What the daemon said first.
    pub fn hello(&self) -> &HelloReply {
        &self.hello
    }

    /// For the other services at the same socket.
    pub fn channel(&self) -> Channel {
        self.channel.clone()
    }

    /// The side channel.
    pub fn side(&self) -> &SideChannel {
        &self.side
    }

    /// The daemon's process, if the kernel names it.
    pub fn daemon(&self) -> Option<&Arc<ProcessWatch>> {
        self.daemon.as_ref()
    }

    /// Waits for the end and says why.
    pub async fn ended(&self) -> String {
        let mut ended = self.ended.clone();
        match ended.wait_for(Option::is_some).await {
            Ok(reason) => reason.clone().unwrap_or_default(),
            Err(_) => "the session was dropped".into(),
        }
    }

    /// True once no answer can come any more.
    pub fn has_ended(&self) -> bool {
        self.ended.borrow().is_some()
    }

    /// Gives back what an answer brought that nobody wants, for waiters: they cannot wait for room in the stream.
    pub fn returns(&self) -> Returns {
        Returns(self.returns.clone())
    }

    /// Sends something that has no answer.
    pub async fn tell(&self, body: Question) -> Result<(), ClientError> {
        let message = ClientMessage { id: 0, body: Some(body), trace: None };
        self.outgoing.send(message).await.map_err(|_| ClientError::unavailable("the stream ended"))
    }

    /// Sends a question once there is room. `waiter` gets its answer.
    pub async fn ask(
        &self,
        body: Question,
        trace: Option<TraceContext>,
        waiter: impl FnOnce(Result<Answer, ClientError>) + Send + 'static,
    ) {
        let Ok(room) = self.outgoing.reserve().await else {
            return waiter(Err(ClientError::unavailable("the stream ended")));
        };
        let id = self.next_id.fetch_add(1, Ordering::Relaxed);
        match self.waiters.insert(id, Box::new(waiter)) {
            Ok(()) => room.send(ClientMessage { id, body: Some(body), trace }),
            Err(waiter) => waiter(Err(ClientError::unavailable("the session ended"))),
        }
    }

    /// Asks and waits. An answer that comes after `deadline` goes to `late`.
    pub async fn question(
        &self,
        body: Question,
        deadline: Duration,
        late: impl FnOnce(Answer) + Send + 'static,
    ) -> Result<Answer, ClientError> {
        let (answer, answered) = oneshot::channel();
        let waiter = |result: Result<Answer, ClientError>| {
            if let Err(Ok(unwanted)) = answer.send(result) {
                late(unwanted);
            }
        };
        let wait = async {
            self.ask(body, None, waiter).await;
            answered.await.unwrap_or_else(|_| Err(ClientError::unavailable("the session was dropped")))
        };
        timeout(deadline, wait).await.unwrap_or(Err(ClientError::Deadline))
    }
}

/// The way back for pins and leases.
pub(crate) struct Returns(mpsc::Sender<ClientMessage>);

impl Returns {
    /// Has a message that needs no answer sent as soon as there is room.
    pub fn send(&self, body: Question) {
        if self.0.try_send(ClientMessage { id: 0, body: Some(body), trace: None }).is_err() {
            tracing::debug!("what a late answer brought is kept until the session ends");
        }
    }
}

async fn send_back(mut returned: mpsc::Receiver<ClientMessage>, outgoing: mpsc::Sender<ClientMessage>) {
    while let Some(message) = returned.recv().await {
        if outgoing.send(message).await.is_err() {
            return;
        }
    }
}

/// Delivers answers until the stream or the side channel ends.
async fn run(
    stream: Streaming<ServerMessage>,
    side: Arc<SideChannel>,
    waiters: Waiters,
    ending: watch::Sender<Option<String>>,
) {
    let reason = tokio::select! {
        reason = deliver(stream, &waiters) => reason,
        reason = side.run() => reason,
    };
    tracing::debug!(reason, "session ended");
    ending.send_replace(Some(reason.clone()));
    waiters.close(&reason);
}

async fn deliver(mut stream: Streaming<ServerMessage>, waiters: &Waiters) -> String {
    loop {
        let ServerMessage { id, body } = match next(&mut stream).await {
            Ok(message) => message,
            Err(error) => return error.to_string(),
        };
        let answer = match body {
            Some(Answer::Refused(refused)) => Err(refusal(refused)),
            Some(body) => Ok(body),
            None => Err(ClientError::malformed("an answer without a body")),
        };
        match (waiters.remove(id), answer) {
            (Some(waiter), answer) => waiter(answer),
            // A lease that has just expired, a generation that has just passed: expected.
            (None, Err(ClientError::Refused { refusal: Refusal::Unknown | Refusal::Stale, detail })) => {
                tracing::debug!(detail, "the daemon did not need a message");
            }
            (None, Err(error)) => tracing::warn!(%error, "the daemon refused a message that has no answer"),
            (None, Ok(_)) => return format!("an answer to question {id}, which was not asked"),
        }
    }
}

async fn next(stream: &mut Streaming<ServerMessage>) -> Result<ServerMessage, ClientError> {
    stream.message().await?.ok_or_else(|| ClientError::unavailable("the daemon ended the stream"))
}

pub(crate) fn refusal(refused: kvbm_proto::v1::Refused) -> ClientError {
    ClientError::Refused { refusal: refused.refusal(), detail: refused.detail }
}

async fn connect_channel(socket: &Path) -> Result<Channel, ClientError> {
    let socket = socket.to_owned();
    let connector = tower::service_fn(move |_: Uri| {
        let socket = socket.clone();
        async move { UnixStream::connect(socket).await.map(TokioIo::new) }
    });
    // A table of a large pool is sent in one message: windows as large as the socket's are not enough.
    let endpoint = Endpoint::from_static("http://kvbm")
        .initial_stream_window_size(4 << 20)
        .initial_connection_window_size(8 << 20);
    endpoint.connect_with_connector(connector).await.map_err(|error| {
        let cause = std::error::Error::source(&error).map(ToString::to_string);
        ClientError::unavailable(cause.unwrap_or_else(|| error.to_string()))
    })
}
