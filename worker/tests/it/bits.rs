//! Batch invariance: the same bits for every chunking, batch, thread count, instruction set, block size and hit length.

use kvbm_worker::{BlockId, Chunk, Engine, Isa, KvMemory, Logits, Want};

use crate::support::{Random, blocks, engine, run};

/// K and V bytes of one token, all layers: the same for every block size.
fn token_kv(kv: &KvMemory, table: &[BlockId], position: usize) -> Vec<u8> {
    let layout = kv.layout();
    let block = kv.read_block(table[position / layout.tokens_per_block]);
    let token_bytes = layout.token_elements() * 2;
    (0..layout.layers * 2)
        .flat_map(|half| {
            let token = half * layout.tokens_per_block + position % layout.tokens_per_block;
            block[token * token_bytes..][..token_bytes].to_vec()
        })
        .collect()
}

fn sequence_kv(kv: &KvMemory, table: &[BlockId], tokens: usize) -> Vec<Vec<u8>> {
    (0..tokens).map(|position| token_kv(kv, table, position)).collect()
}

fn bits(logits: &[f32]) -> Vec<u32> {
    logits.iter().map(|x| x.to_bits()).collect()
}

/// KV of every token, and the logits after the last, computed alone in one chunk.
struct Solo {
    tokens: Vec<u32>,
    kv: Vec<Vec<u8>>,
    logits: Vec<u32>,
}

fn solo(engine: &mut Engine, tokens: Vec<u32>) -> Solo {
    let kv = KvMemory::private(engine.kv_layout(32), tokens.len().div_ceil(32));
    let logits = bits(&run(engine, &kv, &tokens, 0));
    Solo { kv: sequence_kv(&kv, &blocks(kv.block_count()), tokens.len()), tokens, logits }
}

fn random_tokens(random: &mut Random, count: usize) -> Vec<u32> {
    (0..count).map(|_| random.below(4096) as u32).collect()
}

#[test]
fn chunks_batches_threads_and_block_sizes_do_not_matter() {
    let mut random = Random(1);
    let solos: Vec<Solo> = [1, 15, 70, 131, 300, 517]
        .into_iter()
        .map(|count| solo(&mut engine(1, None), random_tokens(&mut random, count)))
        .collect();
    for threads in [1, 2, 3] {
        let mut engine = engine(threads, None);
        for per_block in [16, 32, 64] {
            let kv = KvMemory::private(engine.kv_layout(per_block), 2000 / per_block);
            let mut free = blocks(kv.block_count());
            for i in (1..free.len()).rev() {
                free.swap(i, random.below(i + 1));
            }
            let tables: Vec<Vec<BlockId>> = solos
                .iter()
                .map(|s| free.split_off(free.len() - s.tokens.len().div_ceil(per_block)))
                .collect();
            let mut done = vec![0; solos.len()];
            while (0..solos.len()).any(|i| done[i] < solos[i].tokens.len()) {
                let mut batch = Vec::new();
                let mut members = Vec::new();
                for (i, solo) in solos.iter().enumerate() {
                    let left = solo.tokens.len() - done[i];
                    if left == 0 || random.below(3) == 0 {
                        continue;
                    }
                    let most = [1, 3, 20, 64, 200][random.below(5)];
                    let count = left.min(1 + random.below(most));
                    batch.push(Chunk {
                        tokens: &solo.tokens[done[i]..done[i] + count],
                        first_position: done[i],
                        blocks: &tables[i],
                        want: if count == left { Want::Logits(1) } else { Want::Nothing },
                    });
                    done[i] += count;
                    if count == left {
                        members.push(i);
                    }
                }
                let mut logits = Logits::default();
                engine.forward(&kv, &batch, &mut logits);
                assert_eq!(logits.answers(), members.len());
                for (row, i) in members.into_iter().enumerate() {
                    assert_eq!(
                        bits(logits.row(row)),
                        solos[i].logits,
                        "{threads} threads, {per_block}, sequence {i}"
                    );
                }
            }
            for (solo, table) in solos.iter().zip(&tables) {
                assert_eq!(
                    sequence_kv(&kv, table, solo.tokens.len()),
                    solo.kv,
                    "{threads} threads, {per_block}"
                );
            }
        }
    }
}

#[test]
fn hit_length_does_not_matter() {
    let mut engine = engine(2, None);
    let want = solo(&mut engine, random_tokens(&mut Random(2), 200));
    for per_block in [16, 32, 64] {
        let kv = KvMemory::private(engine.kv_layout(per_block), 256 / per_block);
        run(&mut engine, &kv, &want.tokens, 0);
        for kept in (0..200).step_by(per_block).rev() {
            // All behind what is kept is overwritten by another text, then computed again.
            let other = vec![7; 200 - kept];
            run(&mut engine, &kv, &other, kept);
            let logits = run(&mut engine, &kv, &want.tokens[kept..], kept);
            assert_eq!(bits(&logits), want.logits, "{per_block}, {kept} kept");
            assert_eq!(sequence_kv(&kv, &blocks(kv.block_count()), 200), want.kv);
        }
    }
}

#[test]
fn instruction_sets_agree() {
    let tokens = random_tokens(&mut Random(3), 77);
    let want = solo(&mut engine(2, Some(Isa::Portable)), tokens.clone());
    for isa in [Isa::Avx2, Isa::Avx512].into_iter().filter(|isa| isa.available()) {
        let got = solo(&mut engine(2, Some(isa)), tokens.clone());
        assert!(got.kv == want.kv, "{isa:?}: KV");
        assert!(got.logits == want.logits, "{isa:?}: logits");
    }
}
