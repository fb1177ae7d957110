use std::fmt::Write;

use proptest::prelude::*;

use super::*;

fn read(text: &str) -> Result<Trace, String> {
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), text).unwrap();
    open(file.path(), 512)
}

fn mooncake(requests: &[Vec<u64>]) -> Trace {
    let lines = requests.iter().enumerate().fold(String::new(), |mut text, (at, ids)| {
        writeln!(text, "{{\"timestamp\": {at}, \"hash_ids\": {ids:?}}}").unwrap();
        text
    });
    read(&lines).unwrap()
}

fn keys(trace: &Trace, event: usize) -> Vec<SequenceHash> {
    trace.blocks(&trace.events[event]).iter().map(|block| trace.key(*block)).collect()
}

#[test]
fn the_same_number_behind_another_block_is_another_block() {
    let trace = mooncake(&[vec![1, 2, 3], vec![1, 2], vec![7, 2]]);
    assert_eq!(keys(&trace, 0)[..2], keys(&trace, 1));
    assert_ne!(keys(&trace, 0)[1], keys(&trace, 2)[1]);
    assert_eq!((trace.unique_blocks(), trace.block_refs(), trace.requests()), (5, 7, 3));
    let last = trace.blocks(&trace.events[0])[2];
    assert_eq!(trace.chain(last), trace.blocks(&trace.events[0]));
}

const RECORDED: &str = r#"{"kvbm_trace":{"version":1,"unix_ms":1000}}
{"namespace":{"ns":1,"domain":7,"tenant":"","model":"m","tokens_per_block":16,"block_bytes":4096}}
{"match":{"t":5,"ns":1,"hits":[0,0,0],"keys":["000000000000000000000000000000a1","000000000000000000000000000000b2"]}}
{"commit":{"t":9,"ns":1,"like":[0,0,2]}}
{"commit":{"t":12,"ns":1,"parent":"000000000000000000000000000000b2","keys":["000000000000000000000000000000c3"]}}
{"kvbm_trace":{"version":1,"unix_ms":3000}}
{"namespace":{"ns":1,"domain":7,"tenant":"","model":"m","tokens_per_block":16,"block_bytes":4096}}
{"match":{"t":1,"ns":1,"hits":[2,0,0],"keys":["000000000000000000000000000000a1","000000000000000000000000000000b2"]}}
"#;

#[test]
fn a_recording_goes_on_after_a_restart() {
    let trace = read(RECORDED).unwrap();
    assert_eq!((trace.tokens_per_block, trace.block_bytes), (16, Some(4096)));
    let events: Vec<_> = trace.events.iter().map(|event| (event.at_ms, event.kind)).collect();
    use EventKind::{Lookup, Store};
    assert_eq!(events, [(5, Lookup), (9, Store), (12, Store), (2001, Lookup)]);
    assert_eq!(keys(&trace, 0), keys(&trace, 1));
    assert_eq!(keys(&trace, 0), keys(&trace, 3), "keys of one user are the same after a restart");
    let third = trace.blocks(&trace.events[2])[0];
    assert_eq!(trace.chain(third).len(), 3);
    assert_eq!((trace.requests(), trace.block_refs(), trace.unique_blocks()), (2, 4, 3));
}

#[test]
fn a_line_that_was_cut_off_is_left_out_and_one_in_the_middle_is_an_error() {
    let cut = &RECORDED[..RECORDED.len() - 30];
    assert_eq!(read(cut).unwrap().events.len(), 3);
    let error = read(&format!("{cut}\n")).unwrap_err();
    assert!(error.contains("line 8: expected a line of a recorded trace"), "{error}");
}

#[test]
fn a_recording_that_makes_no_sense_is_refused() {
    for (from, to, expected) in [
        ("\"version\":1,\"unix_ms\":1000", "\"version\":2,\"unix_ms\":1000", "line 1: expected version 1"),
        ("\"like\":[0,0,2]", "\"like\":[0,0,3]", "line 4: expected a match 0 back with 3 keys"),
        ("\"like\":[0,0,2]", "\"like\":[1,0,1]", "line 4: expected a match 1 back with 1 keys"),
        ("{\"t\":5,\"ns\":1", "{\"t\":5,\"ns\":2", "line 3: expected a line that describes namespace 2"),
        ("{\"t\":12", "{\"when\":12", "line 5: expected a line of a recorded trace"),
    ] {
        assert!(RECORDED.contains(from));
        let error = read(&RECORDED.replacen(from, to, 1)).unwrap_err();
        assert!(error.contains(expected), "{error}");
    }
    let header = RECORDED.lines().next().unwrap();
    assert!(read(header).unwrap_err().contains("nothing was looked up"));
}

proptest! {
    /// Whatever is done to a trace, two of its sequences agree as far as they did, and parents are where they belong.
    #[test]
    fn cutting_and_repeating_keep_what_is_shared(
        requests in prop::collection::vec(prop::collection::vec(0u64..4, 0..6), 1..12),
        parts in 1u32..5,
        times in 1u32..4,
        fresh: bool,
    ) {
        let whole = mooncake(&requests);
        let trace = whole.clone().with_tokens_per_block(512 / parts.next_power_of_two()).unwrap();
        let parts = parts.next_power_of_two() as usize;
        let trace = trace.repeated(times, fresh).unwrap();
        prop_assert_eq!(trace.events.len(), requests.len() * times as usize);
        prop_assert_eq!(trace.block_refs(), whole.block_refs() * parts as u64 * u64::from(times));
        let kinds = if fresh { times as usize } else { 1 };
        prop_assert_eq!(trace.unique_blocks(), whole.unique_blocks() * parts * kinds);
        prop_assert!(trace.events.is_sorted_by_key(|event| event.at_ms));
        let shared = |a: &[SequenceHash], b: &[SequenceHash]| a.iter().zip(b).take_while(|(a, b)| a == b).count();
        for i in 0..trace.events.len() {
            let blocks = trace.blocks(&trace.events[i]);
            if let Some(last) = blocks.last() {
                prop_assert_eq!(&trace.chain(*last)[..], blocks);
            }
            for j in 0..trace.events.len() {
                let same_time = i / requests.len() == j / requests.len();
                let (a, b) = (i % requests.len(), j % requests.len());
                let expected = if fresh && !same_time { 0 } else { shared(&keys(&whole, a), &keys(&whole, b)) * parts };
                prop_assert_eq!(shared(&keys(&trace, i), &keys(&trace, j)), expected);
            }
        }
    }
}
