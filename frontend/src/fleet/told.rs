//! Events of a daemon as NATS tells them. May lack some, or bring some twice: numbers tell.

use std::time::Duration;

use kvbm_nats::{Bus, Messages, NatsError};
use kvbm_proto::v1::{Event, EventBatch};

/// Longer than a daemon ever says nothing at all.
const SILENCE: Duration = Duration::from_secs(8);

/// See the module.
pub struct Told(Messages);

/// What came.
pub enum Batch {
    /// Events behind the last one that was known, which now is the one with this number.
    News { events: Vec<Event>, last: u64 },
    /// Some are missing.
    Gap(String),
}

impl Told {
    pub async fn of(bus: &Bus, instance: &str) -> Result<Self, NatsError> {
        Ok(Self(bus.follow(instance).await?))
    }

    /// What comes next for somebody who knows all events up to number `known`.
    pub async fn next(&mut self, known: u64) -> Result<Batch, NatsError> {
        let batch: EventBatch = self.0.next(SILENCE).await?;
        Ok(behind(known, batch))
    }
}

fn behind(known: u64, batch: EventBatch) -> Batch {
    let mut last = known;
    let mut events = Vec::new();
    for event in batch.events {
        if event.sequence <= last {
            continue;
        }
        if event.sequence != last + 1 {
            return Batch::Gap(format!("event {} came behind {last}", event.sequence));
        }
        last = event.sequence;
        events.push(event);
    }
    match batch.last_sequence > last {
        true => Batch::Gap(format!("events from {} on were not told", last + 1)),
        false => Batch::News { events, last },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn batch(numbers: std::ops::Range<u64>, last_sequence: u64) -> EventBatch {
        let event = |sequence| Event { sequence, ..Event::default() };
        EventBatch { events: numbers.map(event).collect(), last_sequence }
    }

    fn known(known: u64, numbers: std::ops::Range<u64>, last: u64) -> Option<(usize, u64)> {
        match behind(known, batch(numbers, last)) {
            Batch::News { events, last } => Some((events.len(), last)),
            Batch::Gap(_) => None,
        }
    }

    #[test]
    fn what_is_known_is_passed_over_and_what_is_missing_is_noticed() {
        assert_eq!(known(0, 1..4, 3), Some((3, 3)));
        assert_eq!(known(2, 1..4, 3), Some((1, 3)));
        assert_eq!(known(7, 1..4, 3), Some((0, 7)), "a batch from before the snapshot");
        assert_eq!(known(3, 5..7, 6), None);
        assert_eq!(known(3, 0..0, 3), Some((0, 3)), "nothing happened");
        assert_eq!(known(3, 0..0, 4), None, "the batch with event 4 was lost");
    }
}
