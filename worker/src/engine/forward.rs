//! One pass over a batch of chunks of sequences.

use rayon::prelude::*;

use super::attention::{Queries, attend};
use super::layer::Layer;
use super::matmul::matmul;
use super::pointwise::{activate, normalize, normalize_in_place, rotate};
use super::{BlockId, Engine, KvLayout, KvMemory};
use crate::model::Config;
use crate::sampling::largest;

/// Tokens of one piece of attention.
const QUERY_SPAN: usize = 16;

/// Consecutive tokens of one sequence: part of a prompt, or the one token that was sampled last.
#[derive(Debug, Clone, Copy)]
pub struct Chunk<'a> {
    /// The tokens; at least one.
    pub tokens: &'a [u32],
    /// Position of the first of them. The KV of all positions before is in the blocks.
    pub first_position: usize,
    /// The sequence's blocks, from its first; they reach at least to the end of the chunk.
    pub blocks: &'a [BlockId],
    /// What is wanted beside its KV.
    pub want: Want,
}

/// What is wanted of a chunk beside its KV.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Want {
    /// Nothing.
    Nothing,
    /// The token with the largest logit behind the chunk, the lowest of equal ones. An engine may answer with all logits
    /// instead.
    Largest,
    /// The logits of so many of the last tokens; at least 1.
    Logits(usize),
}

impl Want {
    /// So many answers it has.
    pub fn answers(self) -> usize {
        match self {
            Self::Nothing => 0,
            Self::Largest => 1,
            Self::Logits(tokens) => tokens,
        }
    }
}

impl Chunk<'_> {
    /// Position behind the last token.
    pub fn end(&self) -> usize {
        self.first_position + self.tokens.len()
    }
}

/// Answers to what was wanted, in the order of the batch: a token's logits, or the token that has the largest.
#[derive(Debug, Clone, Default)]
pub struct Logits {
    values: Vec<f32>,
    vocab_size: usize,
    answers: Vec<Place>,
}

/// Where an answer is.
#[derive(Debug, Clone, Copy)]
enum Place {
    Token(u32),
    /// Logits from this element of the values on.
    Row(usize),
}

/// An answer to what was wanted.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Answer<'a> {
    /// The token with the largest logit.
    Token(u32),
    /// The logits of all tokens.
    Row(&'a [f32]),
}

impl Logits {
    /// Makes room for `rows` rows, all zero.
    pub fn reset(&mut self, rows: usize, vocab_size: usize) -> &mut [f32] {
        self.clear(vocab_size);
        self.values.resize(rows * vocab_size, 0.0);
        self.answers.extend((0..rows).map(|row| Place::Row(row * vocab_size)));
        &mut self.values
    }

    /// No answers yet.
    pub(crate) fn clear(&mut self, vocab_size: usize) {
        self.vocab_size = vocab_size;
        self.values.clear();
        self.answers.clear();
    }

    /// The next answer is the token that has the largest logit.
    pub(crate) fn push_token(&mut self, token: u32) {
        self.answers.push(Place::Token(token));
    }

    /// The next answer is logits, which are to be written to the row.
    pub(crate) fn push_row(&mut self) -> &mut [f32] {
        let begin = self.values.len();
        self.answers.push(Place::Row(begin));
        self.values.resize(begin + self.vocab_size, 0.0);
        &mut self.values[begin..]
    }

    /// The `index`th answer.
    pub fn answer(&self, index: usize) -> Answer<'_> {
        match self.answers[index] {
            Place::Token(token) => Answer::Token(token),
            Place::Row(begin) => Answer::Row(&self.values[begin..][..self.vocab_size]),
        }
    }

    /// The `index`th answer, which is logits.
    ///
    /// # Panics
    /// When it is a token.
    pub fn row(&self, index: usize) -> &[f32] {
        match self.answer(index) {
            Answer::Row(row) => row,
            Answer::Token(_) => panic!("answer {index} is a token"),
        }
    }

    /// The token with the largest logit, of the `index`th answer.
    pub fn largest(&self, index: usize) -> u32 {
        match self.answer(index) {
            Answer::Token(token) => token,
            Answer::Row(row) => largest(row),
        }
    }

    /// Number of answers.
    pub fn answers(&self) -> usize {
        self.answers.len()
    }
}

/// Activations of a batch, kept from pass to pass.
#[derive(Default)]
pub(super) struct Buffers {
    hidden: Vec<f32>,
    normal: Vec<f32>,
    qkv: Vec<f32>,
    attended: Vec<f32>,
    gate_up: Vec<f32>,
    active: Vec<f32>,
    delta: Vec<f32>,
}

/// Where a token of the batch belongs.
struct Token {
    chunk: usize,
    position: usize,
}

/// A piece of attention: tokens `first .. first + count` of the batch, one head of keys.
struct Piece {
    chunk: usize,
    first: usize,
    position: usize,
    count: usize,
    kv_head: usize,
}

/// Base address of a buffer whose rows are written by several threads, each its own.
struct Rows(*mut f32);
// SAFETY: the pieces write disjoint rows and heads.
unsafe impl Sync for Rows {}

impl Rows {
    /// # Safety
    /// `offset` must be within the buffer.
    unsafe fn at(&self, offset: usize) -> *mut f32 {
        // SAFETY: the caller's promise.
        unsafe { self.0.add(offset) }
    }
}

/// Panics when a batch breaks a rule of [`Engine::forward`].
pub(super) fn check_batch(config: &Config, kv: KvLayout, batch: &[Chunk<'_>]) {
    let per_block = kv.tokens_per_block;
    assert_eq!(kv, KvLayout::of(config, per_block), "memory is laid out for this model");
    let mut filled: Vec<BlockId> = Vec::new();
    for chunk in batch {
        assert!(!chunk.tokens.is_empty(), "a chunk has tokens");
        let wanted = chunk.want.answers();
        assert!(wanted <= chunk.tokens.len(), "logits are wanted of tokens that there are");
        assert!(chunk.want != Want::Logits(0), "who wants no logits wants nothing");
        assert!(chunk.end() <= config.context_length, "positions are within the context");
        assert!(chunk.end() <= chunk.blocks.len() * per_block, "blocks reach to the end of the chunk");
        let known = config.token_count;
        assert!(chunk.tokens.iter().all(|t| (*t as usize) < known), "tokens are in the vocabulary");
        filled.extend(&chunk.blocks[chunk.first_position / per_block..chunk.end().div_ceil(per_block)]);
    }
    filled.sort_unstable();
    assert!(filled.windows(2).all(|pair| pair[0] != pair[1]), "no block is filled twice");
}

impl Engine {
    /// Computes the chunks' KV into their blocks, and the logits that are wanted.
    ///
    /// # Panics
    /// When the batch breaks a rule: a token outside the vocabulary, a position behind the context, a block table too
    /// short, a block outside the pool or filled by two chunks, or memory laid out for another model.
    pub fn forward(&mut self, kv: &KvMemory, batch: &[Chunk<'_>], logits: &mut Logits) {
        check_batch(&self.config, kv.layout(), batch);
        let mut buffers = std::mem::take(&mut self.buffers);
        self.pool.install(|| self.run(kv, batch, &mut buffers, logits));
        self.buffers = buffers;
    }

    fn run(&self, kv: &KvMemory, batch: &[Chunk<'_>], buffers: &mut Buffers, logits: &mut Logits) {
        let (hidden_size, wide) = (self.config.hidden_size, self.config.intermediate_size);
        let (tokens, pieces) = self.divide(batch);
        let count = tokens.len();
        buffers.resize(count, self);
        let ids = batch.iter().flat_map(|chunk| chunk.tokens);
        for (id, to) in ids.zip(buffers.hidden.chunks_exact_mut(hidden_size)) {
            self.model.embedding.row(*id as usize, to);
        }
        for (index, layer) in self.layers().iter().enumerate() {
            self.normalize_all(&buffers.hidden, &layer.attention_norm, &mut buffers.normal);
            matmul(self.isa, &buffers.normal, &layer.qkv, &mut buffers.qkv, count);
            self.store_kv(kv, batch, &tokens, (index, layer), &mut buffers.qkv);
            self.attend_all(kv, batch, &pieces, index, &buffers.qkv, &mut buffers.attended);
            matmul(self.isa, &buffers.attended, &layer.out, &mut buffers.delta, count);
            if let Some(bias) = &layer.out_bias {
                buffers.delta.chunks_exact_mut(hidden_size).for_each(|row| add(row, bias));
            }
            add(&mut buffers.hidden, &buffers.delta);

            self.normalize_all(&buffers.hidden, &layer.feed_forward_norm, &mut buffers.normal);
            matmul(self.isa, &buffers.normal, &layer.gate_up, &mut buffers.gate_up, count);
            each_row(&buffers.gate_up, 2 * wide, &mut buffers.active, wide, |from, to| {
                activate(self.isa, &from[..wide], &from[wide..], to);
            });
            matmul(self.isa, &buffers.active, &layer.down, &mut buffers.delta, count);
            add(&mut buffers.hidden, &buffers.delta);
        }
        self.logits(batch, buffers, logits);
    }

    /// Lists the tokens of the batch and the pieces of attention.
    fn divide(&self, batch: &[Chunk<'_>]) -> (Vec<Token>, Vec<Piece>) {
        let (mut tokens, mut pieces) = (Vec::new(), Vec::new());
        for (chunk, part) in batch.iter().enumerate() {
            for begin in (0..part.tokens.len()).step_by(QUERY_SPAN) {
                let count = QUERY_SPAN.min(part.tokens.len() - begin);
                let (first, position) = (tokens.len() + begin, part.first_position + begin);
                pieces.extend((0..self.config.kv_heads).map(|kv_head| Piece {
                    chunk,
                    first,
                    position,
                    count,
                    kv_head,
                }));
            }
            tokens.extend((part.first_position..part.end()).map(|position| Token { chunk, position }));
        }
        // Long pieces first, so that threads end together.
        pieces.sort_by_key(|piece| std::cmp::Reverse(piece.position));
        (tokens, pieces)
    }

    fn normalize_all(&self, from: &[f32], weight: &[f32], to: &mut [f32]) {
        let size = self.config.hidden_size;
        each_row(from, size, to, size, |from, to| normalize(from, weight, self.config.norm_epsilon, to));
    }

    /// Normalizes and rotates queries and keys, and stores keys and values.
    fn store_kv(
        &self,
        kv: &KvMemory,
        batch: &[Chunk<'_>],
        tokens: &[Token],
        (index, layer): (usize, &Layer),
        qkv: &mut [f32],
    ) {
        let head_dim = self.config.head_dim;
        let (q, k) = (self.config.heads * head_dim, self.config.kv_heads * head_dim);
        let per_block = kv.layout().tokens_per_block;
        let store = |(row, token): (&mut [f32], &Token)| {
            let angles = &self.model.angles[token.position * head_dim..][..head_dim];
            let (cosines, sines) = angles.split_at(head_dim / 2);
            if let Some(bias) = &layer.qkv_bias {
                add(row, bias);
            }
            if let Some([of_queries, of_keys]) = &layer.head_norms {
                let epsilon = self.config.norm_epsilon;
                row[..q]
                    .chunks_exact_mut(head_dim)
                    .for_each(|head| normalize_in_place(head, of_queries, epsilon));
                row[q..q + k]
                    .chunks_exact_mut(head_dim)
                    .for_each(|head| normalize_in_place(head, of_keys, epsilon));
            }
            rotate(&mut row[..q + k], head_dim, cosines, sines);
            let block = batch[token.chunk].blocks[token.position / per_block];
            let (k, v) = row[q..].split_at(k);
            // SAFETY: `check` saw that no block is filled by two chunks, and positions within a chunk differ.
            unsafe { kv.write(block, token.position % per_block, index, k, v) };
        };
        if tokens.len() < SERIAL_ROWS {
            qkv.chunks_exact_mut(q + 2 * k).zip(tokens).for_each(store);
        } else {
            qkv.par_chunks_exact_mut(q + 2 * k).zip(tokens).with_min_len(SERIAL_ROWS).for_each(store);
        }
    }

    fn attend_all(
        &self,
        kv: &KvMemory,
        batch: &[Chunk<'_>],
        pieces: &[Piece],
        layer: usize,
        qkv: &[f32],
        attended: &mut [f32],
    ) {
        let head_dim = self.config.head_dim;
        let (group, q) = (self.config.heads / self.config.kv_heads, self.config.heads * head_dim);
        let qkv_stride = q + 2 * self.config.kv_heads * head_dim;
        let rows = Rows(attended.as_mut_ptr());
        let attend_piece = |piece: &Piece| {
            let head = piece.kv_head * group * head_dim;
            let queries = Queries {
                kv,
                blocks: batch[piece.chunk].blocks,
                layer,
                kv_head: piece.kv_head,
                group,
                first_position: piece.position,
                tokens: piece.count,
                q: qkv[piece.first * qkv_stride + head..].as_ptr(),
                q_stride: qkv_stride,
                // SAFETY: `attended` has a row of `q` elements for each token of the batch.
                out: unsafe { rows.at(piece.first * q + head) },
                out_stride: q,
            };
            let thread = rayon::current_thread_index().unwrap_or(0);
            let mut scratch = self.scratch[thread].lock();
            // SAFETY: the piece's rows exist in both buffers, its heads of `attended` are its own, and all KV of this
            // layer is written.
            unsafe { attend(self.isa, &queries, &mut scratch) };
        };
        let keys: usize = pieces.iter().map(|piece| (piece.position + piece.count) * piece.count).sum();
        if keys * group * head_dim < SERIAL_ATTENTION {
            pieces.iter().for_each(attend_piece);
        } else {
            pieces.par_iter().with_max_len(1).for_each(attend_piece);
        }
    }

    fn logits(&self, batch: &[Chunk<'_>], buffers: &mut Buffers, logits: &mut Logits) {
        let size = self.config.hidden_size;
        let (mut end, mut rows) = (0, 0);
        for chunk in batch {
            end += chunk.tokens.len();
            for token in end - chunk.want.answers()..end {
                let from = &buffers.hidden[token * size..][..size];
                let to = &mut buffers.normal[rows * size..][..size];
                normalize(from, &self.model.norm, self.config.norm_epsilon, to);
                rows += 1;
            }
        }
        let to = logits.reset(rows, self.model.head().rows());
        if rows > 0 {
            matmul(self.isa, &buffers.normal[..rows * size], self.model.head(), to, rows);
        }
    }
}

/// Below so many rows, work on single rows stays on one thread.
const SERIAL_ROWS: usize = 32;
/// Below so many multiply-adds, attention stays on one thread.
const SERIAL_ATTENTION: usize = 200_000;

impl Buffers {
    fn resize(&mut self, tokens: usize, engine: &Engine) {
        let config = &engine.config;
        let q = config.heads * config.head_dim;
        let sizes = [
            (&mut self.hidden, config.hidden_size),
            (&mut self.normal, config.hidden_size),
            (&mut self.qkv, q + 2 * config.kv_heads * config.head_dim),
            (&mut self.attended, q),
            (&mut self.gate_up, 2 * config.intermediate_size),
            (&mut self.active, config.intermediate_size),
            (&mut self.delta, config.hidden_size),
        ];
        for (buffer, size) in sizes {
            buffer.resize(tokens * size, 0.0);
        }
    }
}

fn add(to: &mut [f32], from: &[f32]) {
    for (to, from) in to.iter_mut().zip(from) {
        *to += from;
    }
}

/// Runs `work` on each pair of rows.
fn each_row(
    from: &[f32],
    from_size: usize,
    to: &mut [f32],
    to_size: usize,
    work: impl Fn(&[f32], &mut [f32]) + Sync,
) {
    if to.len() / to_size < SERIAL_ROWS {
        from.chunks_exact(from_size).zip(to.chunks_exact_mut(to_size)).for_each(|(from, to)| work(from, to));
    } else {
        from.par_chunks_exact(from_size)
            .zip(to.par_chunks_exact_mut(to_size))
            .with_min_len(SERIAL_ROWS)
            .for_each(|(from, to)| work(from, to));
    }
}
