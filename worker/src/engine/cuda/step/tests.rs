use super::*;
use crate::BlockId;

fn chunk<'a>(tokens: &'a [u32], first_position: usize, blocks: &'a [BlockId], want: Want) -> Chunk<'a> {
    Chunk { tokens, first_position, blocks, want }
}

fn list(step: &Step, begin: usize, count: usize) -> &[u32] {
    &step.words[begin..begin + count]
}

#[test]
fn prompts_become_tiles_and_single_tokens_decode() {
    let blocks: Vec<BlockId> = [9, 4, 7, 1, 3, 5, 6, 8, 2, 0].map(BlockId).into();
    let prompt: Vec<u32> = (100..300).collect();
    let batch = [
        chunk(&[11], 40, &blocks[..2], Want::Largest),
        chunk(&prompt, 64, &blocks, Want::Nothing),
        chunk(&[12], 0, &blocks[3..], Want::Logits(1)),
        // A prompt's last part may be one token of which nothing is wanted.
        chunk(&[13], 31, &blocks[5..], Want::Nothing),
    ];
    let step = Step::gather(&batch, 512, 32);
    assert_eq!((step.rows, step.tiles, step.decode_rows, step.decode_keys), (203, 2, 3, 41));
    assert_eq!(step.answers, [Fetched::Largest, Fetched::Logits]);
    let lists = step.lists();
    // Two blocks of the first sequence come before those of the second; the tile with more keys comes first.
    assert_eq!(list(&step, lists.tiles, 8), [129, 72, 192, 2, 1, 128, 64, 2]);
    assert_eq!(list(&step, lists.tokens, 2), [11, 100]);
    assert_eq!(list(&step, lists.positions + 200, 3), [263, 0, 31]);
    assert_eq!(list(&step, lists.table_starts + 199, 4), [2, 2, 11, 12]);
    assert_eq!(list(&step, lists.decode_rows, 3), [0, 201, 202]);
    assert_eq!(list(&step, lists.answer_rows, 2), [0, 201]);
    assert_eq!(step.words[lists.tables..], [9, 4, 9, 4, 7, 1, 3, 5, 6, 8, 2, 1, 5]);
    let limits = BatchLimits { tokens: 203, sequences: 4, answers: 4, tokens_per_block: 32 };
    assert!(step.words.len() <= Step::words_max(limits, 10));
}

#[test]
fn decodes_are_filled_up_with_rows_that_nobody_asked_for() {
    let blocks = [BlockId(6), BlockId(2)];
    let batch = [chunk(&[1], 5, &blocks, Want::Logits(1)), chunk(&[2], 33, &blocks, Want::Largest)];
    assert!(Step::only_decodes(&batch));
    let step = Step::gather(&batch, 4, 32);
    assert_eq!((step.rows, step.decode_rows, step.answer_rows(), step.decode_keys), (4, 4, 4, 34));
    assert_eq!(step.answers, [Fetched::Logits, Fetched::Largest]);
    let lists = step.lists();
    assert_eq!(list(&step, lists.positions, 4), [5, 33, u32::MAX, u32::MAX]);
    assert_eq!(list(&step, lists.answer_rows, 4), [0, 1, 2, 3]);
    assert_eq!(step.words[lists.tables..], [6, 6, 2]);
    let prompt = [chunk(&[1], 5, &blocks, Want::Nothing)];
    assert!(!Step::only_decodes(&prompt));
    let step = Step::gather(&prompt, 4, 32);
    assert_eq!((step.rows, step.answer_rows()), (1, 0));
}

#[test]
fn single_tokens_of_which_some_want_nothing_are_not_filled_up() {
    let blocks = [BlockId(6), BlockId(2)];
    let batch = [chunk(&[1], 5, &blocks, Want::Nothing), chunk(&[2], 33, &blocks, Want::Largest)];
    let step = Step::gather(&batch, 4, 32);
    assert_eq!((step.rows, step.decode_rows, step.answer_rows()), (2, 2, 1));
    let lists = step.lists();
    assert_eq!(list(&step, lists.answer_rows, 1), [1]);
    assert_eq!(step.words[lists.tables..], [6, 6, 2]);
}

#[test]
fn logits_of_several_tokens_are_as_many_rows() {
    let blocks: Vec<BlockId> = (0..10).map(BlockId).collect();
    let prompt: Vec<u32> = (100..120).collect();
    let batch = [
        chunk(&prompt, 0, &blocks, Want::Logits(20)),
        chunk(&prompt[..5], 7, &blocks, Want::Logits(2)),
        chunk(&[12], 0, &blocks, Want::Largest),
    ];
    let step = Step::gather(&batch, 512, 32);
    let rows: Vec<u32> = (0..20).chain([23, 24, 25]).collect();
    assert_eq!(list(&step, step.lists().answer_rows, 23), rows);
    assert_eq!((step.answers[21], step.answers[22]), (Fetched::Logits, Fetched::Largest));
    let limits = BatchLimits { tokens: 26, sequences: 3, answers: 23, tokens_per_block: 32 };
    assert!(step.words.len() <= Step::words_max(limits, 10));
}
