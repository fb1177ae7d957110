//! Lookups on a connection of their own, asked by the thread that waits for them.
//!
//! On the session's stream a question passes through two runtimes: four threads have to be woken one after another, and
//! on a machine whose cores sleep that takes longer than the rest of a lookup. Here one thread of the daemon reads what
//! the engine's thread wrote. It can be told that a question is coming, so that it is awake when it comes.

use std::path::Path;
use std::thread::available_parallelism;
use std::time::{Duration, Instant};

use kvbm_proto::v1::{ClientMessage, MatchReply, Ping, ServerMessage};
use kvbm_proto::{LOOKUP_BYTES_MAX, SideMessage, v1};
use kvbm_shm::{Received, SideSocket};
use prost::Message;

use crate::ClientError;
use crate::session::{Answer, Question, refusal};
use crate::side::side_path;

/// An answer that takes longer does not come from a daemon that is awake.
const AWAKE: Duration = Duration::from_micros(300);

/// On fewer cores whoever stays awake is in the way of whom it waits for.
const CORES_TO_STAY_AWAKE: usize = 4;

/// See the module. One question at a time.
pub(crate) struct Lookups {
    socket: SideSocket,
    /// Of the last question.
    id: u64,
    awake: Duration,
    over: bool,
    buffer: Vec<u8>,
}

impl Lookups {
    /// Connects beside `socket` for the session with this token. Blocks.
    pub fn open(socket: &Path, token: [u8; 32], limit: Duration) -> Result<Self, ClientError> {
        let socket = SideSocket::connect(&side_path(socket)).map_err(ClientError::unavailable)?;
        socket.send(&SideMessage::Lookups { token }.encode(), None).map_err(ClientError::unavailable)?;
        let stays_awake = available_parallelism().is_ok_and(|cores| cores.get() >= CORES_TO_STAY_AWAKE);
        let awake = if stays_awake { AWAKE } else { Duration::ZERO };
        let mut lookups = Self { socket, id: 0, awake, over: false, buffer: vec![0; LOOKUP_BYTES_MAX] };
        let bytes = lookups.receive(limit)?.ok_or(ClientError::Deadline)?;
        match SideMessage::decode(&lookups.buffer[..bytes])? {
            SideMessage::Bound => Ok(lookups),
            other => Err(ClientError::malformed(format!("lookups were greeted with {other:?}"))),
        }
    }

    /// Tells the daemon that a question follows.
    pub fn expect(&self) {
        if !self.awake.is_zero() {
            let message = ClientMessage { id: 0, body: Some(Question::Ping(Ping {})), trace: None };
            // Who cannot be told will not answer either.
            let _ = self.socket.send(&message.encode_to_vec(), None);
        }
    }

    /// Asks. Its answer is waited for before the next is asked.
    pub fn ask(&mut self, question: v1::Match) -> Result<(), ClientError> {
        self.id += 1;
        let message = ClientMessage { id: self.id, body: Some(Question::Match(question)), trace: None };
        self.socket.send(&message.encode_to_vec(), None).map_err(ClientError::unavailable)
    }

    /// True if the answer to the last question can be had without waiting.
    pub fn is_answered(&self) -> Result<bool, ClientError> {
        self.socket.wait_readable(Duration::ZERO).map_err(ClientError::unavailable)
    }

    /// The answer to the last question; `None`: not in time.
    pub fn answer(&mut self, deadline: Instant) -> Result<Option<MatchReply>, ClientError> {
        let limit = deadline.saturating_duration_since(Instant::now());
        let Some(bytes) = self.receive(limit)? else { return Ok(None) };
        let message = ServerMessage::decode(&self.buffer[..bytes]).map_err(ClientError::malformed)?;
        match message.body {
            Some(Answer::Match(reply)) if message.id == self.id => Ok(Some(reply)),
            Some(Answer::Refused(refused)) if message.id == self.id => Err(refusal(refused)),
            _ => Err(ClientError::malformed(format!("lookup {} was answered with {}", self.id, message.id))),
        }
    }

    /// True once nothing can be asked here any more.
    pub fn is_over(&self) -> bool {
        self.over
    }

    /// As [`Lookups::answer`], and if there is none, nothing comes after that: what the daemon can no longer say it takes
    /// back.
    pub fn last_answer(&mut self, deadline: Instant) -> Result<Option<MatchReply>, ClientError> {
        match self.answer(deadline)? {
            None => {
                self.over = true;
                self.socket.hang_up();
                // What came in between can still be read.
                self.answer(Instant::now()).or(Ok(None))
            }
            answered => Ok(answered),
        }
    }

    fn receive(&mut self, limit: Duration) -> Result<Option<usize>, ClientError> {
        match self.socket.receive_within(&mut self.buffer, self.awake.min(limit), limit) {
            Ok(Received::Packet(bytes)) => Ok(Some(bytes)),
            Ok(Received::Nothing) => Ok(None),
            Ok(Received::End) => Err(ClientError::unavailable("the daemon ended the lookups")),
            Err(error) => Err(ClientError::unavailable(error)),
        }
    }
}

#[cfg(test)]
mod tests {
    use kvbm_shm::SideListener;

    use super::*;

    const LONG: Duration = Duration::from_secs(60);

    struct Daemon {
        _dir: tempfile::TempDir,
        socket: SideSocket,
    }

    impl Daemon {
        fn receive(&self) -> Vec<u8> {
            let mut buffer = vec![0; LOOKUP_BYTES_MAX];
            match self.socket.receive_within(&mut buffer, Duration::ZERO, LONG).unwrap() {
                Received::Packet(bytes) => buffer[..bytes].to_vec(),
                other => panic!("{other:?}"),
            }
        }

        /// Answers the next question.
        fn answer(&self, body: Answer) {
            let asked = ClientMessage::decode(&*self.receive()).unwrap();
            assert!(matches!(asked.body, Some(Question::Match(_))), "{asked:?}");
            self.say(asked.id, body);
        }

        fn say(&self, id: u64, body: Answer) {
            self.socket.send(&ServerMessage { id, body: Some(body) }.encode_to_vec(), None).unwrap();
        }
    }

    fn open() -> (Lookups, Daemon) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("kvbm.sock");
        let listener = SideListener::bind(&side_path(&path)).unwrap();
        let opened = std::thread::spawn(move || Lookups::open(&path, [3; 32], LONG));
        let socket = loop {
            match listener.accept() {
                Ok(socket) => break socket,
                Err(error) => assert!(error.is_would_block(), "{error}"),
            }
        };
        let daemon = Daemon { _dir: dir, socket };
        assert_eq!(SideMessage::decode(&daemon.receive()), Ok(SideMessage::Lookups { token: [3; 32] }));
        daemon.socket.send(&SideMessage::Bound.encode(), None).unwrap();
        (opened.join().unwrap().unwrap(), daemon)
    }

    fn found(host_blocks: u32) -> Answer {
        Answer::Match(MatchReply { host_blocks, ..MatchReply::default() })
    }

    fn soon() -> Instant {
        Instant::now() + Duration::from_millis(5)
    }

    fn later() -> Instant {
        Instant::now() + LONG
    }

    #[test]
    fn an_answer_that_is_late_can_be_waited_for_and_the_next_is_of_the_next_question() {
        let (mut lookups, daemon) = open();
        lookups.ask(v1::Match::default()).unwrap();
        assert_eq!((lookups.is_answered(), lookups.answer(soon())), (Ok(false), Ok(None)));
        daemon.answer(found(3));
        assert_eq!(lookups.is_answered(), Ok(true));
        assert_eq!(lookups.answer(later()).unwrap().unwrap().host_blocks, 3);
        lookups.ask(v1::Match::default()).unwrap();
        daemon.answer(found(4));
        assert_eq!(lookups.answer(later()).unwrap().unwrap().host_blocks, 4);
        lookups.ask(v1::Match::default()).unwrap();
        daemon.answer(found(5));
        assert_eq!(lookups.last_answer(later()).unwrap().unwrap().host_blocks, 5);
        lookups.ask(v1::Match::default()).unwrap();
        assert_eq!(lookups.last_answer(soon()), Ok(None));
        daemon.receive();
        let late = ServerMessage { id: lookups.id, body: Some(found(6)) };
        assert!(
            daemon.socket.send(&late.encode_to_vec(), None).is_err(),
            "the daemon is told that it came too late"
        );
    }

    #[test]
    fn a_refusal_a_wrong_answer_and_the_end_are_told_apart() {
        let (mut lookups, daemon) = open();
        lookups.ask(v1::Match::default()).unwrap();
        daemon.answer(Answer::Refused(v1::Refused::default()));
        assert!(matches!(lookups.answer(later()), Err(ClientError::Refused { .. })));
        lookups.ask(v1::Match::default()).unwrap();
        daemon.say(99, found(1));
        assert!(matches!(lookups.answer(later()), Err(ClientError::Malformed { .. })));
        drop(daemon);
        assert!(matches!(lookups.answer(later()), Err(ClientError::Unavailable { .. })));
        assert!(matches!(lookups.ask(v1::Match::default()), Err(ClientError::Unavailable { .. })));
    }

    #[test]
    fn who_is_told_that_a_question_follows_does_not_answer() {
        let (mut lookups, daemon) = open();
        lookups.awake = AWAKE;
        lookups.expect();
        let told = ClientMessage::decode(&*daemon.receive()).unwrap();
        assert_eq!((told.id, told.body), (0, Some(Question::Ping(Ping {}))));
        lookups.ask(v1::Match::default()).unwrap();
        daemon.answer(found(5));
        assert_eq!(lookups.answer(later()).unwrap().unwrap().host_blocks, 5);
    }
}
