//! The packets, byte by byte as in `docs/wire.md`. Integers are little endian.
//!
//! The kind and the version behind it lie at the same place in `Hello`, `Welcome` and `Refused` of every version, so
//! that two sides of different versions can say so.

use std::os::fd::OwnedFd;

use thiserror::Error;

use super::HeldSegment;

/// What this build speaks.
pub(super) const VERSION: u32 = 1;
/// Index and fingerprint.
const LABEL_BYTES: usize = 4 + 32;

/// How a packet breaks the protocol.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum Malformed {
    /// No message has this form.
    #[error("sent a packet of {bytes} bytes of kind {kind:#04x}, which is no message")]
    Form {
        /// First byte, 0 if there is none.
        kind: u8,
        /// Its length.
        bytes: usize,
    },
    /// Each message has none or two.
    #[error("sent {0} descriptors with a message that needs another number of them")]
    Descriptors(usize),
    /// A message at the wrong time.
    #[error("sent {0} when it may not")]
    Order(&'static str),
    /// What was handed over is not what was announced.
    #[error("sent other segments than it announced, or not in the order of their indexes")]
    Segments,
    /// The socket could not deliver a packet whole.
    #[error("sent a packet that did not arrive whole")]
    Cut,
}

/// The words on a segment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Label {
    pub index: u32,
    pub fingerprint: [u8; 32],
}

impl Label {
    fn encode(self, kind: u8) -> Vec<u8> {
        [&[kind][..], &self.index.to_le_bytes(), &self.fingerprint].concat()
    }

    fn decode(bytes: &[u8; LABEL_BYTES]) -> Self {
        let (index, fingerprint) = bytes.split_first_chunk().expect("it is longer than an index");
        let fingerprint = fingerprint.try_into().expect("the rest is the fingerprint");
        Self { index: u32::from_le_bytes(*index), fingerprint }
    }

    /// The segment that arrived under this label.
    pub fn with(self, fds: Vec<OwnedFd>) -> Result<HeldSegment, Malformed> {
        let [memory, table] =
            <[OwnedFd; 2]>::try_from(fds).map_err(|fds| Malformed::Descriptors(fds.len()))?;
        Ok(HeldSegment { index: self.index, fingerprint: self.fingerprint, memory, table })
    }
}

/// What a daemon says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Request {
    /// First, and once.
    Hello { version: u32 },
    /// With memory and table. Replaces what was kept under the index.
    Keep(Label),
    /// Lets go of one segment, if it is kept.
    Drop { index: u32 },
    /// Lets go of all.
    DropAll,
}

impl Request {
    pub fn encode(self) -> Vec<u8> {
        match self {
            Self::Hello { version } => with_word(b'H', version),
            Self::Keep(label) => label.encode(b'K'),
            Self::Drop { index } => with_word(b'D', index),
            Self::DropAll => vec![b'X'],
        }
    }

    /// The message, if the right number of descriptors came with it.
    pub fn decode(bytes: &[u8], fds: &[OwnedFd]) -> Result<Self, Malformed> {
        let (kind, rest) = split(bytes)?;
        let request = match (kind, rest) {
            // Later versions may have more to say behind the version.
            (b'H', [a, b, c, d, ..]) => Self::Hello { version: u32::from_le_bytes([*a, *b, *c, *d]) },
            (b'K', rest) => Self::Keep(Label::decode(exactly(bytes, rest)?)),
            (b'D', rest) => Self::Drop { index: u32::from_le_bytes(*exactly(bytes, rest)?) },
            (b'X', []) => Self::DropAll,
            _ => return Err(form(bytes)),
        };
        carries(fds, if matches!(request, Self::Keep(_)) { 2 } else { 0 })?;
        Ok(request)
    }
}

/// Why a holder refuses a daemon for good.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Refusal {
    /// It does not speak the daemon's version.
    Version,
    /// The daemon runs as another user.
    User,
}

/// What the holder says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Reply {
    /// So many segments follow, and so many may be kept at a time.
    Welcome { version: u32, count: u32, capacity: u32 },
    /// With memory and table.
    Held(Label),
    /// That was all.
    Done,
    /// The process of another daemon is not dead. Worth another try.
    Busy { pid: u32 },
    /// Not worth one. The holder's version comes with it.
    Refused { version: u32, refusal: Refusal },
}

impl Reply {
    pub fn encode(self) -> Vec<u8> {
        match self {
            Self::Welcome { version, count, capacity } => {
                [&with_word(b'W', version)[..], &count.to_le_bytes(), &capacity.to_le_bytes()].concat()
            }
            Self::Held(label) => label.encode(b'S'),
            Self::Done => vec![b'E'],
            Self::Busy { pid } => with_word(b'B', pid),
            Self::Refused { version, refusal } => {
                let code = match refusal {
                    Refusal::Version => 1,
                    Refusal::User => 2,
                };
                [&with_word(b'R', version)[..], &[code]].concat()
            }
        }
    }

    /// The message, if the right number of descriptors came with it.
    pub fn decode(bytes: &[u8], fds: &[OwnedFd]) -> Result<Self, Malformed> {
        let (kind, rest) = split(bytes)?;
        let reply = match (kind, rest) {
            (b'W', rest) => {
                let words: &[u8; 12] = exactly(bytes, rest)?;
                let word =
                    |at: usize| u32::from_le_bytes([words[at], words[at + 1], words[at + 2], words[at + 3]]);
                Self::Welcome { version: word(0), count: word(4), capacity: word(8) }
            }
            (b'S', rest) => Self::Held(Label::decode(exactly(bytes, rest)?)),
            (b'E', []) => Self::Done,
            (b'B', rest) => Self::Busy { pid: u32::from_le_bytes(*exactly(bytes, rest)?) },
            (b'R', [a, b, c, d, code @ (1 | 2)]) => {
                let refusal = if *code == 1 { Refusal::Version } else { Refusal::User };
                Self::Refused { version: u32::from_le_bytes([*a, *b, *c, *d]), refusal }
            }
            _ => return Err(form(bytes)),
        };
        carries(fds, if matches!(reply, Self::Held(_)) { 2 } else { 0 })?;
        Ok(reply)
    }
}

fn with_word(kind: u8, word: u32) -> Vec<u8> {
    [&[kind][..], &word.to_le_bytes()].concat()
}

fn split(bytes: &[u8]) -> Result<(u8, &[u8]), Malformed> {
    bytes.split_first().map(|(kind, rest)| (*kind, rest)).ok_or_else(|| form(bytes))
}

fn exactly<'a, const N: usize>(packet: &[u8], rest: &'a [u8]) -> Result<&'a [u8; N], Malformed> {
    rest.try_into().map_err(|_| form(packet))
}

fn form(packet: &[u8]) -> Malformed {
    Malformed::Form { kind: packet.first().copied().unwrap_or(0), bytes: packet.len() }
}

fn carries(fds: &[OwnedFd], expected: usize) -> Result<(), Malformed> {
    if fds.len() == expected { Ok(()) } else { Err(Malformed::Descriptors(fds.len())) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn descriptors(count: usize) -> Vec<OwnedFd> {
        (0..count).map(|_| std::fs::File::open("/dev/null").unwrap().into()).collect()
    }

    /// The examples of `docs/wire.md`.
    #[test]
    fn every_request_has_the_documented_bytes() {
        let label = Label { index: 0x0102_0304, fingerprint: [0xAB; 32] };
        let keep = [&b"K\x04\x03\x02\x01"[..], &[0xAB; 32]].concat();
        let cases: [(Request, &[u8], usize); 4] = [
            (Request::Hello { version: 1 }, b"H\x01\0\0\0", 0),
            (Request::Keep(label), &keep, 2),
            (Request::Drop { index: 7 }, b"D\x07\0\0\0", 0),
            (Request::DropAll, b"X", 0),
        ];
        for (request, bytes, fds) in cases {
            assert_eq!(request.encode(), bytes);
            assert_eq!(Request::decode(bytes, &descriptors(fds)), Ok(request));
            for wrong in (0..3).filter(|wrong| *wrong != fds) {
                let refused = Request::decode(bytes, &descriptors(wrong));
                assert_eq!(refused, Err(Malformed::Descriptors(wrong)), "{request:?}");
            }
        }
    }

    #[test]
    fn every_reply_has_the_documented_bytes() {
        let label = Label { index: 0x0102_0304, fingerprint: [0xAB; 32] };
        let held = [&b"S\x04\x03\x02\x01"[..], &[0xAB; 32]].concat();
        let welcome = Reply::Welcome { version: 1, count: 3, capacity: 65_536 };
        let cases: [(Reply, &[u8], usize); 6] = [
            (welcome, b"W\x01\0\0\0\x03\0\0\0\0\0\x01\0", 0),
            (Reply::Held(label), &held, 2),
            (Reply::Done, b"E", 0),
            (Reply::Busy { pid: 258 }, b"B\x02\x01\0\0", 0),
            (Reply::Refused { version: 1, refusal: Refusal::Version }, b"R\x01\0\0\0\x01", 0),
            (Reply::Refused { version: 1, refusal: Refusal::User }, b"R\x01\0\0\0\x02", 0),
        ];
        for (reply, bytes, fds) in cases {
            assert_eq!(reply.encode(), bytes);
            assert_eq!(Reply::decode(bytes, &descriptors(fds)), Ok(reply));
            for wrong in (0..3).filter(|wrong| *wrong != fds) {
                let refused = Reply::decode(bytes, &descriptors(wrong));
                assert_eq!(refused, Err(Malformed::Descriptors(wrong)), "{reply:?}");
            }
        }
    }

    #[test]
    fn what_is_no_message_is_refused_and_a_longer_hello_still_says_its_version() {
        let label = Label { index: 1, fingerprint: [0; 32] };
        let whole = [Request::Keep(label).encode(), Request::Drop { index: 1 }.encode(), vec![b'X']];
        for bytes in whole {
            for wrong in [&bytes[..bytes.len() - 1], &[&bytes[..], b"?"].concat()] {
                let malformed = Request::decode(wrong, &[]).unwrap_err();
                assert_eq!(malformed, form(wrong), "{wrong:?}");
            }
        }
        let welcome = Reply::Welcome { version: 1, count: 1, capacity: 1 }.encode();
        for wrong in [&b""[..], b"H", b"H\x01\0\0", b"B\0\0\0", b"R\x01\0\0\0\x03", &welcome[..12]] {
            assert_eq!(Reply::decode(wrong, &[]), Err(form(wrong)));
        }
        assert_eq!(Request::decode(b"H\x02\0\0\0more", &[]), Ok(Request::Hello { version: 2 }));
    }
}
