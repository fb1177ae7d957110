//! A batch as the kernels want it: lists of numbers, uploaded with one copy.
//!
//! ```text
//! tiles (4 each) | tokens | positions | table starts | decode rows | answer rows | tables, one behind the other
//! ```
//!
//! Each token of the batch is a row. Chunks of one token are attended to as decoding, longer ones as tiles of a prompt.

use super::BatchLimits;
use super::kernels::Kernels;
use crate::engine::{Chunk, Want};

/// Position of a row that only fills up a batch; `NO_POSITION` in `pool.cuh`.
const NO_POSITION: u32 = u32::MAX;

/// See the module.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Step {
    /// All lists.
    pub words: Vec<u32>,
    /// Tokens of the batch, and rows that fill it up.
    pub rows: usize,
    /// Tiles of prompts.
    pub tiles: usize,
    /// Single tokens.
    pub decode_rows: usize,
    /// Keys of the longest sequence that decodes.
    pub decode_keys: usize,
    /// What is fetched, of each row in the list of answers that somebody asked for.
    pub answers: Vec<Fetched>,
    /// Rows that fill the batch up. They are answered too, to nobody.
    pub filling: usize,
}

/// What is fetched of a row.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Fetched {
    /// The token with the largest logit.
    Largest,
    /// The logits.
    Logits,
}

/// Where the lists begin, in words.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Lists {
    pub tiles: usize,
    pub tokens: usize,
    pub positions: usize,
    pub table_starts: usize,
    pub decode_rows: usize,
    pub answer_rows: usize,
    pub tables: usize,
}

impl Lists {
    /// Of a step with so many tiles, rows, rows that decode, and answers.
    fn new(tiles: usize, rows: usize, decode_rows: usize, answers: usize) -> Self {
        let tokens = 4 * tiles;
        Self {
            tiles: 0,
            tokens,
            positions: tokens + rows,
            table_starts: tokens + 2 * rows,
            decode_rows: tokens + 3 * rows,
            answer_rows: tokens + 3 * rows + decode_rows,
            tables: tokens + 3 * rows + decode_rows + answers,
        }
    }
}

impl Step {
    /// Words that a step may have within these limits, each sequence of so many blocks.
    pub fn words_max(limits: BatchLimits, blocks_each: usize) -> usize {
        let BatchLimits { tokens, sequences, answers, .. } = limits;
        // Tiles: full ones, and the last of each chunk.
        let tiles = tokens / Kernels::TILE_ROWS + sequences;
        Lists::new(tiles, tokens, sequences, answers).tables + sequences * blocks_each
    }

    /// Every chunk is one token of which something is wanted: the work depends on their number only.
    pub fn only_decodes(batch: &[Chunk<'_>]) -> bool {
        batch.iter().all(|chunk| chunk.tokens.len() == 1 && chunk.want != Want::Nothing)
    }

    /// Lists the batch. If it only decodes, rows are added until there are `fill_to`.
    pub fn gather(batch: &[Chunk<'_>], fill_to: usize, tokens_per_block: usize) -> Self {
        let (mut tiles, mut tokens, mut positions, mut starts) = (vec![], vec![], vec![], vec![]);
        let (mut decodes, mut answer_rows, mut answers, mut tables) = (vec![], vec![], vec![], vec![]);
        let mut decode_keys = 0;
        for chunk in batch {
            let (row, start) = (tokens.len() as u32, tables.len() as u32);
            if chunk.tokens.len() == 1 {
                decodes.push(row);
                decode_keys = decode_keys.max(chunk.end());
            } else {
                tiles.extend((0..chunk.tokens.len()).step_by(Kernels::TILE_ROWS).map(|at| {
                    let rows = (chunk.tokens.len() - at).min(Kernels::TILE_ROWS) as u32;
                    [row + at as u32, rows, (chunk.first_position + at) as u32, start]
                }));
            }
            tokens.extend(chunk.tokens);
            positions.extend((chunk.first_position..chunk.end()).map(|position| position as u32));
            starts.resize(tokens.len(), start);
            tables.extend(chunk.blocks[..chunk.end().div_ceil(tokens_per_block)].iter().map(|block| block.0));
            answer_rows.extend((tokens.len() - chunk.want.answers()..tokens.len()).map(|row| row as u32));
            let fetched = if chunk.want == Want::Largest { Fetched::Largest } else { Fetched::Logits };
            answers.resize(answer_rows.len(), fetched);
        }
        let asked = tokens.len();
        if Self::only_decodes(batch) {
            for row in asked..fill_to {
                decodes.push(row as u32);
                answer_rows.push(row as u32);
                tokens.push(0);
                positions.push(NO_POSITION);
                starts.push(0);
            }
        }
        // Tiles with the most keys first, so that the GPU's processors end together.
        tiles.sort_by_key(|tile| std::cmp::Reverse(tile[2]));
        let (rows, tile_count, decode_rows) = (tokens.len(), tiles.len(), decodes.len());
        let filling = rows - asked;
        let words = [tiles.concat(), tokens, positions, starts, decodes, answer_rows, tables].concat();
        Self { words, rows, tiles: tile_count, decode_rows, decode_keys, answers, filling }
    }

    /// Rows in the list of answers.
    pub fn answer_rows(&self) -> usize {
        self.answers.len() + self.filling
    }

    /// Where the lists are.
    pub fn lists(&self) -> Lists {
        Lists::new(self.tiles, self.rows, self.decode_rows, self.answer_rows())
    }
}

#[cfg(test)]
mod tests;
