//! Requests between the frontends that ask and the engine that answers.

use std::collections::{HashMap, VecDeque};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use kvbm_proto::v1;
use kvbm_proto::v1::generate_event::Body;
use kvbm_proto::v1::worker_server::Worker;
use parking_lot::{Condvar, Mutex};
use tokio::sync::{mpsc, watch};
use tokio_stream::Stream;
use tonic::{Request, Response, Status};

use super::{ServingOptions, description};

/// Pieces of an answer that nobody fetched, at most: then the frontend is as good as gone.
const ANSWERS_MAX: usize = 4096;

/// What an engine is to know.
#[derive(Debug, Clone, PartialEq)]
pub enum Event {
    /// A request to be answered, under this number.
    Asked(u64, Box<v1::GenerateRequest>),
    /// Nobody waits for the answer any more. It may have ended.
    Cancelled(u64),
}

/// Piece of an answer.
#[derive(Debug, Clone, PartialEq)]
pub enum Answer {
    /// An event of the stream. After [`v1::Finished`] nothing more is said.
    Event(Body),
    /// The request cannot be served, in words.
    Invalid(String),
    /// The engine failed.
    Failed(String),
}

type Piece = Result<v1::GenerateEvent, Status>;

#[derive(Debug, Default)]
struct State {
    next: u64,
    events: VecDeque<Event>,
    running: HashMap<u64, mpsc::Sender<Piece>>,
}

/// See the module. One lock, never held while waiting for anything else.
#[derive(Debug)]
pub struct Requests {
    state: Mutex<State>,
    came: Condvar,
    max: usize,
}

impl Requests {
    /// At most `max` at a time.
    pub fn new(max: usize) -> Self {
        Self { state: Mutex::default(), came: Condvar::new(), max }
    }

    /// See [`super::Serving::next`].
    pub fn next(&self, patience: Duration) -> Option<Event> {
        let mut state = self.state.lock();
        if state.events.is_empty() {
            self.came.wait_for(&mut state, patience);
        }
        state.events.pop_front()
    }

    /// See [`super::Serving::answer`].
    pub fn answer(&self, request: u64, answer: Answer) -> bool {
        let (piece, is_last) = match answer {
            Answer::Event(body) => {
                let is_last = matches!(body, Body::Finished(_));
                (Ok(v1::GenerateEvent { body: Some(body) }), is_last)
            }
            Answer::Invalid(why) => (Err(Status::invalid_argument(why)), true),
            Answer::Failed(why) => (Err(Status::internal(why)), true),
        };
        let mut state = self.state.lock();
        let Some(sender) = state.running.get(&request) else { return false };
        let is_heard = sender.try_send(piece).is_ok();
        if is_last || !is_heard {
            state.running.remove(&request);
        }
        is_heard
    }

    /// Requests under way.
    pub fn running(&self) -> usize {
        self.state.lock().running.len()
    }

    fn ask(self: &Arc<Self>, message: v1::GenerateRequest) -> Result<Pieces, Status> {
        let mut state = self.state.lock();
        if state.running.len() >= self.max {
            return Err(Status::resource_exhausted(format!("{} requests are under way", self.max)));
        }
        state.next += 1;
        let number = state.next;
        let (sender, pieces) = mpsc::channel(ANSWERS_MAX);
        state.running.insert(number, sender);
        state.events.push_back(Event::Asked(number, Box::new(message)));
        drop(state);
        self.came.notify_one();
        Ok(Pieces { pieces, number, requests: self.clone() })
    }

    fn cancel(&self, number: u64) {
        let mut state = self.state.lock();
        if state.running.remove(&number).is_some() {
            state.events.push_back(Event::Cancelled(number));
            drop(state);
            self.came.notify_one();
        }
    }
}

/// The stream of one answer.
#[derive(Debug)]
pub(super) struct Pieces {
    pieces: mpsc::Receiver<Piece>,
    number: u64,
    requests: Arc<Requests>,
}

impl Stream for Pieces {
    type Item = Piece;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Piece>> {
        self.pieces.poll_recv(context)
    }
}

impl Drop for Pieces {
    fn drop(&mut self) {
        self.requests.cancel(self.number);
    }
}

/// What frontends call.
pub(super) struct Service {
    options: ServingOptions,
    requests: Arc<Requests>,
    state: watch::Receiver<&'static str>,
}

impl Service {
    pub fn new(
        options: &ServingOptions,
        requests: Arc<Requests>,
        state: watch::Receiver<&'static str>,
    ) -> Self {
        Self { options: options.clone(), requests, state }
    }
}

#[tonic::async_trait]
impl Worker for Service {
    type GenerateStream = Pieces;

    async fn generate(&self, request: Request<v1::GenerateRequest>) -> Result<Response<Pieces>, Status> {
        let message = request.into_inner();
        if *self.state.borrow() != "ready" {
            return Err(Status::unavailable("this worker is draining"));
        }
        if message.prompt.is_empty() || message.max_tokens == 0 {
            return Err(Status::invalid_argument("prompt and max_tokens: at least one token each"));
        }
        if message.generated.len() >= message.max_tokens as usize {
            return Err(Status::invalid_argument("generated: is to have fewer tokens than max_tokens"));
        }
        self.requests.ask(message).map(Response::new)
    }

    async fn describe(&self, _: Request<v1::DescribeRequest>) -> Result<Response<v1::DescribeReply>, Status> {
        Ok(Response::new(description(&self.options, *self.state.borrow())))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOW: Duration = Duration::ZERO;

    fn asked(requests: &Arc<Requests>) -> (Pieces, u64) {
        let pieces = requests.ask(v1::GenerateRequest::default()).unwrap();
        let Some(Event::Asked(number, _)) = requests.next(NOW) else { panic!("it was asked") };
        (pieces, number)
    }

    #[test]
    fn an_answer_ends_with_its_last_piece_and_a_lost_frontend_cancels() {
        let requests = Arc::new(Requests::new(2));
        let (mut first, number) = asked(&requests);
        let tokens = || Answer::Event(Body::Tokens(v1::Tokens { ids: vec![7], ..Default::default() }));
        assert!(requests.answer(number, tokens()));
        let last = v1::Finished { prompt_tokens: 3, ..v1::Finished::default() };
        assert!(requests.answer(number, Answer::Event(Body::Finished(last))));
        assert!(!requests.answer(number, tokens()), "nothing behind the end");
        assert!(first.pieces.try_recv().unwrap().is_ok() && first.pieces.try_recv().unwrap().is_ok());
        drop(first);
        assert_eq!(requests.next(NOW), None, "it was over");
        let (second, number) = asked(&requests);
        drop(second);
        assert_eq!(requests.next(NOW), Some(Event::Cancelled(number)));
        assert!(!requests.answer(number, tokens()));
        assert_eq!(requests.running(), 0);
    }

    #[test]
    fn more_than_are_permitted_are_refused() {
        let requests = Arc::new(Requests::new(1));
        let (_pieces, number) = asked(&requests);
        let refused = requests.ask(v1::GenerateRequest::default()).unwrap_err();
        assert_eq!(refused.code(), tonic::Code::ResourceExhausted);
        assert!(requests.answer(number, Answer::Invalid("no".into())));
        assert!(requests.ask(v1::GenerateRequest::default()).is_ok());
    }
}
