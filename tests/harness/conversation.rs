//! Random multi-turn conversations: each turn's prompt is the whole conversation so far.

use crate::random::Random;

/// What a user says in one turn.
#[derive(Debug, Clone)]
pub struct Turn {
    /// Tokens added to the conversation.
    pub user: Vec<u32>,
    /// Tokens asked for.
    pub max_tokens: u32,
}

/// One conversation.
#[derive(Debug, Clone)]
pub struct Conversation {
    /// System prompt, shared by many conversations.
    pub system: Vec<u32>,
    /// Turns.
    pub turns: Vec<Turn>,
}

/// `count` conversations with 2 to 4 turns over a few shared system prompts.
pub fn conversations(seed: u64, count: usize) -> Vec<Conversation> {
    let mut random = Random::new(seed);
    let systems: Vec<Vec<u32>> = (0..6)
        .map(|_| {
            let length = random.within(40..200);
            random.tokens(length)
        })
        .collect();
    (0..count)
        .map(|_| {
            let system = random.pick(&systems).clone();
            let turns = (0..random.within(2..5))
                .map(|_| {
                    let length = random.within(20..120);
                    Turn { user: random.tokens(length), max_tokens: random.within(4..24) as u32 }
                })
                .collect();
            Conversation { system, turns }
        })
        .collect()
}
