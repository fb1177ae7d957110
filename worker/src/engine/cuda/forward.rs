//! One pass over a batch of chunks of sequences.

use std::f32::consts::LOG2_E;
use std::time::Instant;

use kvbm_cuda::copy_engine::PassKind;
use kvbm_cuda::{DeviceMemory, DeviceRange, Graph};

use super::activations::Addresses;
use super::graphs::{Advice, Key};
use super::kernels::{
    Activate, AttendDecode, AttendPrefill, CudaResult, Embed, KvPlace, Largest, Normalize, RotateStore, Store,
};
use super::step::Step;
use super::{CudaEngine, DevicePool};
use crate::engine::forward::check_batch;
use crate::{Chunk, Logits, Result};

/// Where this step's lists are on the GPU.
struct Lists {
    tiles: u64,
    tokens: u64,
    positions: u64,
    table_starts: u64,
    decode_rows: u64,
    answer_rows: u64,
}

/// A step, with all addresses.
struct Pass {
    rows: usize,
    tiles: usize,
    decode_rows: usize,
    answers: usize,
    splits: usize,
    lists: Lists,
    at: Addresses,
    kv: KvPlace,
}

impl CudaEngine {
    /// Computes the chunks' KV into their blocks, and what else is wanted. After an error nothing can be
    /// computed any more.
    ///
    /// # Panics
    /// When the batch breaks a rule: a token outside the vocabulary, a position behind the context, a block table too
    /// short, a block outside the pool or filled by two chunks, more than the limits, or memory laid out for another model.
    pub fn forward(&mut self, pool: &DevicePool, batch: &[Chunk<'_>], logits: &mut Logits) -> Result<()> {
        check_batch(&self.config, pool.layout(), batch);
        let tokens: usize = batch.iter().map(|chunk| chunk.tokens.len()).sum();
        assert!(tokens <= self.limits.tokens && batch.len() <= self.limits.sequences, "within the limits");
        let answers: usize = batch.iter().map(|chunk| chunk.want.answers()).sum();
        assert!(answers <= self.limits.answers, "no more is wanted than the limits allow");
        assert_eq!(pool.layout(), self.kv_layout(), "blocks are of the size that the engine was made for");
        let in_pool = |chunk: &Chunk<'_>| chunk.blocks.iter().all(|b| (b.0 as usize) < pool.block_count());
        assert!(batch.iter().all(in_pool), "blocks are of the pool");
        if batch.is_empty() {
            logits.clear(self.config.token_count);
            return Ok(());
        }

        let begin = Instant::now();
        if let Some(steps) = &self.steps {
            steps.begin();
        }
        let fill_to = self.graphs.rows_for(batch.len());
        let step = Step::gather(batch, fill_to, self.limits.tokens_per_block);
        let pass = self.pass(pool, &step);
        let stream = self.kernels.stream().clone();
        self.lists.upload(&stream, &step)?;
        let key = Key { rows: pass.rows, splits: pass.splits, pool: pass.kv.base };
        let advice = if Step::only_decodes(batch) { self.graphs.advise(key) } else { Advice::Issue };
        if advice == Advice::Record {
            // SAFETY: recorded, not run; what is launched below is.
            let graph = Graph::record(&stream, || unsafe { self.issue(&pass) })?;
            self.graphs.keep(key, graph);
        }
        // SAFETY: all buffers live as long as the engine and are large enough for its limits; `check_batch` and the
        // assertions above hold the lists within them. The step is waited for before this returns.
        unsafe {
            match advice {
                Advice::Issue => self.issue(&pass)?,
                Advice::Record | Advice::Launch => self.graphs.launch(key, &stream)?,
            }
        }
        self.lists.fetch(&stream, &step, &pass.at, &self.config, logits)?;
        if let Some(steps) = &self.steps {
            let kind = if Step::only_decodes(batch) { PassKind::Decode } else { PassKind::Other };
            steps.end(kind, begin.elapsed());
        }
        Ok(())
    }

    fn pass(&self, pool: &DevicePool, step: &Step) -> Pass {
        let (lists, base) = (step.lists(), self.lists.address());
        let word = |index: usize| base + 4 * index as u64;
        Pass {
            rows: step.rows,
            tiles: step.tiles,
            decode_rows: step.decode_rows,
            answers: step.answer_rows(),
            splits: self.activations.splits(step.decode_rows, step.decode_keys),
            lists: Lists {
                tiles: word(lists.tiles),
                tokens: word(lists.tokens),
                positions: word(lists.positions),
                table_starts: word(lists.table_starts),
                decode_rows: word(lists.decode_rows),
                answer_rows: word(lists.answer_rows),
            },
            at: self.activations.addresses(),
            kv: pool.place(word(lists.tables)),
        }
    }

    /// Issues all kernels of a step.
    ///
    /// # Safety
    /// The lists describe a batch within the limits, and the pool is mapped, until the step has ended.
    unsafe fn issue(&mut self, pass: &Pass) -> CudaResult {
        let (rows, at) = (pass.rows, &pass.at);
        let embed = Embed {
            tokens: pass.lists.tokens,
            table: self.model.embedding.address(),
            hidden: at.hidden,
            size: self.config.hidden_size as u32,
            unused: 0,
        };
        let activate = Activate {
            gate_up: at.gate_up,
            out: at.active,
            size: self.config.intermediate_size as u32,
            unused: 0,
        };
        // SAFETY: the caller's promise.
        unsafe {
            self.kernels.embed(rows, &embed)?;
            for index in 0..self.model.layers.len() {
                self.attention(pass, index)?;
                let layer = &self.model.layers[index];
                self.kernels.multiply(at.attended, &layer.out, at.hidden, rows, Store::Add)?;
                self.kernels.normalize(rows, &self.normalize(pass, &layer.feed_forward_norm, 0))?;
                self.kernels.multiply(at.normal, &layer.gate_up, at.gate_up, rows, Store::Bf16)?;
                self.kernels.activate(rows, &activate)?;
                self.kernels.multiply(at.active, &layer.down, at.hidden, rows, Store::Add)?;
            }
            self.answers(pass)
        }
    }

    /// Normalizes, makes queries, keys and values, stores these two, and attends.
    ///
    /// # Safety
    /// As for [`CudaEngine::issue`].
    unsafe fn attention(&mut self, pass: &Pass, index: usize) -> CudaResult {
        let (at, lists, layer) = (&pass.at, &pass.lists, &self.model.layers[index]);
        let (heads, kv_heads) = (self.config.heads as u32, self.config.kv_heads as u32);
        let kv = KvPlace { layer: index as u32, ..pass.kv };
        let rotate = RotateStore {
            qkv: at.qkv,
            positions: lists.positions,
            table_starts: lists.table_starts,
            angles: self.model.angles.address().0,
            kv,
            heads,
            kv_heads,
            head_dim: self.config.head_dim as u32,
            unused: 0,
        };
        let scale = LOG2_E / (self.config.head_dim as f32).sqrt();
        let (qkv, out) = (at.qkv, at.attended);
        // SAFETY: the caller's promise.
        unsafe {
            self.kernels.normalize(pass.rows, &self.normalize(pass, &layer.attention_norm, 0))?;
            self.kernels.multiply(at.normal, &layer.qkv, at.qkv, pass.rows, Store::Bf16)?;
            self.kernels.rotate_store(pass.rows, &rotate)?;
            if pass.tiles > 0 {
                let arguments =
                    AttendPrefill { qkv, out, tiles: lists.tiles, kv, heads, kv_heads, scale, unused: 0 };
                self.kernels.attend_prefill(pass.tiles, &arguments)?;
            }
            if pass.decode_rows > 0 {
                let arguments = AttendDecode {
                    qkv,
                    parts: at.parts,
                    out,
                    rows: lists.decode_rows,
                    positions: lists.positions,
                    table_starts: lists.table_starts,
                    kv,
                    heads,
                    kv_heads,
                    scale,
                    splits: pass.splits as u32,
                };
                self.kernels.attend_decode(pass.decode_rows, &arguments)?;
            }
        }
        Ok(())
    }

    /// Logits of the rows that want some, and the largest of each.
    ///
    /// # Safety
    /// As for [`CudaEngine::issue`].
    unsafe fn answers(&mut self, pass: &Pass) -> CudaResult {
        if pass.answers == 0 {
            return Ok(());
        }
        let (at, rows) = (&pass.at, pass.answers);
        let largest = Largest {
            logits: at.logits,
            tokens: self.lists.tokens_address(),
            row: self.config.vocab_size as u32,
            length: self.config.token_count as u32,
        };
        // SAFETY: the caller's promise.
        unsafe {
            let normalize = self.normalize(pass, &self.model.norm, pass.lists.answer_rows);
            self.kernels.normalize(rows, &normalize)?;
            self.kernels.multiply(at.normal, self.model.head(), at.logits, rows, Store::F32)?;
            self.kernels.largest(rows, &largest)
        }
    }

    fn normalize(&self, pass: &Pass, weight: &DeviceMemory, rows: u64) -> Normalize {
        Normalize {
            hidden: pass.at.hidden,
            weight: weight.address().0,
            out: pass.at.normal,
            rows,
            size: self.config.hidden_size as u32,
            epsilon: self.config.norm_epsilon,
        }
    }
}
