//! Byte fields of fixed layout. Every receiver goes through these: what has the wrong length is `Malformed`.

use thiserror::Error;

/// A byte field that does not have the length its meaning demands.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[error("{field} has {actual} bytes, {expected}")]
pub struct Malformed {
    /// Name of the field in the schema.
    pub field: &'static str,
    /// Length received, bytes.
    pub actual: usize,
    /// What the length should have been, in words.
    pub expected: &'static str,
}

fn fixed<const N: usize>(
    field: &'static str,
    bytes: &[u8],
    expected: &'static str,
) -> Result<[u8; N], Malformed> {
    bytes.try_into().map_err(|_| Malformed { field, actual: bytes.len(), expected })
}

/// A 32-byte namespace digest or token.
pub fn digest(field: &'static str, bytes: &[u8]) -> Result<[u8; 32], Malformed> {
    fixed(field, bytes, "expected 32")
}

/// A 16-byte pool name.
pub fn uuid(field: &'static str, bytes: &[u8]) -> Result<[u8; 16], Malformed> {
    fixed(field, bytes, "expected 16")
}

/// One 16-byte sequence hash.
pub fn key(field: &'static str, bytes: &[u8]) -> Result<[u8; 16], Malformed> {
    fixed(field, bytes, "expected 16")
}

/// A parent key: empty, or 16 zero bytes, for the first block of a sequence.
pub fn optional_key(field: &'static str, bytes: &[u8]) -> Result<Option<[u8; 16]>, Malformed> {
    if bytes.is_empty() {
        return Ok(None);
    }
    let key = fixed(field, bytes, "expected 0 or 16")?;
    Ok((key != [0; 16]).then_some(key))
}

/// Sequence hashes packed one behind the other.
pub fn keys(field: &'static str, bytes: &[u8]) -> Result<Vec<[u8; 16]>, Malformed> {
    let (keys, rest) = bytes.as_chunks::<16>();
    if !rest.is_empty() {
        return Err(Malformed { field, actual: bytes.len(), expected: "expected a multiple of 16" });
    }
    Ok(keys.to_vec())
}

/// The inverse of [`keys`].
pub fn pack_keys<'a>(keys: impl IntoIterator<Item = &'a [u8; 16]>) -> Vec<u8> {
    let keys = keys.into_iter();
    let mut packed = Vec::with_capacity(keys.size_hint().0 * 16);
    keys.for_each(|key| packed.extend_from_slice(key));
    packed
}

/// A packet of the side channel (`kvbm.sock.fd`): one kind byte, then a name. Descriptors travel as `SCM_RIGHTS`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum SideMessage {
    /// Client to daemon, first packet: this connection belongs to the session with this token.
    Bind {
        /// From `HelloReply`.
        token: [u8; 32],
    },
    /// Daemon to client: bound. Sent once.
    Bound,
    /// Client to daemon, first packet of another connection: lookups of the session with this token are asked here, one
    /// message in each packet. Answered with `Bound`.
    Lookups {
        /// From `HelloReply`.
        token: [u8; 32],
    },
    /// Either way, with one descriptor: the memory of the pool with this name.
    PoolMemory {
        /// `pool_uuid` of `Adoption` or `PoolReply`.
        uuid: [u8; 16],
    },
    /// Either way, with one descriptor, before the `PoolMemory` of the same name: the GPU's memory that has its blocks.
    DeviceMemory {
        /// `pool_uuid` of `Adoption` or `PoolReply`.
        uuid: [u8; 16],
    },
    /// Daemon to client, with one descriptor: the words shared about the pool with this name.
    PoolWords {
        /// `pool_uuid` of `PoolReply`.
        uuid: [u8; 16],
    },
    /// Daemon to client, with one descriptor: a segment of host memory.
    HostSegment {
        /// Its number.
        segment: u32,
    },
}

impl SideMessage {
    /// Bytes of the packet.
    pub fn encode(&self) -> Vec<u8> {
        match self {
            Self::Bind { token } => [b"B".as_slice(), token].concat(),
            Self::Bound => b"A".to_vec(),
            Self::Lookups { token } => [b"L".as_slice(), token].concat(),
            Self::PoolMemory { uuid } => [b"P".as_slice(), uuid].concat(),
            Self::DeviceMemory { uuid } => [b"D".as_slice(), uuid].concat(),
            Self::PoolWords { uuid } => [b"W".as_slice(), uuid].concat(),
            Self::HostSegment { segment } => [b"S".as_slice(), &segment.to_le_bytes()].concat(),
        }
    }

    /// Reads a packet.
    pub fn decode(bytes: &[u8]) -> Result<Self, Malformed> {
        match bytes.split_first() {
            Some((b'B', rest)) => Ok(Self::Bind { token: digest("token", rest)? }),
            Some((b'A', [])) => Ok(Self::Bound),
            Some((b'L', rest)) => Ok(Self::Lookups { token: digest("token", rest)? }),
            Some((b'P', rest)) => Ok(Self::PoolMemory { uuid: uuid("pool_uuid", rest)? }),
            Some((b'D', rest)) => Ok(Self::DeviceMemory { uuid: uuid("pool_uuid", rest)? }),
            Some((b'W', rest)) => Ok(Self::PoolWords { uuid: uuid("pool_uuid", rest)? }),
            Some((b'S', rest)) => {
                let segment = fixed("segment", rest, "expected 4")?;
                Ok(Self::HostSegment { segment: u32::from_le_bytes(segment) })
            }
            _ => Err(Malformed {
                field: "kind",
                actual: bytes.len(),
                expected: "expected a packet of kind B, A, L, P, D, W or S",
            }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn packed_keys_round_trip() {
        let keys_in = [[1u8; 16], [2; 16]];
        assert_eq!(keys("keys", &pack_keys(&keys_in)), Ok(keys_in.to_vec()));
        assert_eq!(keys("keys", &[0; 17]).unwrap_err().actual, 17);
    }

    #[test]
    fn zero_parent_means_first_block() {
        assert_eq!(optional_key("parent", &[]), Ok(None));
        assert_eq!(optional_key("parent", &[0; 16]), Ok(None));
        assert_eq!(optional_key("parent", &[7; 16]), Ok(Some([7; 16])));
        assert!(optional_key("parent", &[7; 15]).is_err());
    }

    #[test]
    fn side_messages_round_trip() {
        for message in [
            SideMessage::Bind { token: [3; 32] },
            SideMessage::Lookups { token: [4; 32] },
            SideMessage::Bound,
            SideMessage::PoolMemory { uuid: [9; 16] },
            SideMessage::DeviceMemory { uuid: [6; 16] },
            SideMessage::PoolWords { uuid: [8; 16] },
            SideMessage::HostSegment { segment: 0x0102_0304 },
        ] {
            assert_eq!(SideMessage::decode(&message.encode()), Ok(message));
        }
        assert!(SideMessage::decode(b"").is_err());
        assert!(SideMessage::decode(b"Bshort").is_err());
        assert!(SideMessage::decode(b"X").is_err());
    }
}
