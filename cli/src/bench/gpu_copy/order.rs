//! What the two processes say to each other: one order, one reply, each a packet of JSON.

use std::fmt::Write;

use serde::{Deserialize, Serialize};

use super::mover::Method;
use super::plan::Plan;

/// What the owner of the pool is to do.
#[derive(Debug, Serialize, Deserialize)]
pub(super) enum Order {
    /// Map the pool behind the descriptor that comes along.
    Map { bytes: usize },
    /// Allocate the pool.
    Allocate { bytes: usize },
    /// Map and register the host memory behind the descriptor that comes along.
    Segment,
    /// Start a copy engine of its own.
    Start,
    /// Give all blocks the bytes that a plan begins with.
    Fill { plan: Plan },
    /// Compare all blocks with what they should hold after a plan was carried out.
    Check { plan: Plan },
    /// Carry out a plan.
    Run { plan: Plan, method: Method },
    /// End.
    End,
}

/// What it answers.
#[derive(Debug, Serialize, Deserialize)]
pub(super) enum Reply {
    Done,
    /// Of the pool, for other processes.
    Handle {
        hex: String,
    },
    /// What carrying out a plan took.
    Took {
        seconds: f64,
    },
    Failed {
        error: String,
    },
}

pub(super) fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::new(), |mut text, byte| {
        let _ = write!(text, "{byte:02x}");
        text
    })
}

/// `None` if it is not 64 bytes.
pub(super) fn unhex(text: &str) -> Option<[u8; 64]> {
    let digits = text.as_bytes();
    if digits.len() != 128 {
        return None;
    }
    let mut bytes = [0; 64];
    for (byte, pair) in bytes.iter_mut().zip(digits.as_chunks::<2>().0) {
        *byte = u8::from_str_radix(std::str::from_utf8(pair).ok()?, 16).ok()?;
    }
    Some(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_handle_survives_being_written_down() {
        let bytes: [u8; 64] = std::array::from_fn(|i| (i * 5) as u8);
        assert_eq!(unhex(&hex(&bytes)), Some(bytes));
        assert_eq!((unhex("00"), unhex(&"zz".repeat(64))), (None, None));
    }

    #[test]
    fn every_order_fits_a_packet() {
        let plan = Plan::new(65_536, 4 << 20, super::super::plan::Way::Both);
        let longest = Order::Run { plan, method: Method::Contiguous };
        assert!(serde_json::to_string(&longest).unwrap().len() <= 256);
        let handle = Reply::Handle { hex: hex(&[255; 64]) };
        assert!(serde_json::to_string(&handle).unwrap().len() <= 256);
    }
}
