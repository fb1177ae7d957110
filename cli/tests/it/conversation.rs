//! Unfolds `tests/data/conversation.txt`, see the README beside it.

use std::collections::HashMap;
use std::fmt::Write;

/// As it was published: Mooncake JSONL.
pub fn mooncake() -> String {
    let mut parents: HashMap<u32, Option<u32>> = HashMap::new();
    let (mut text, mut at_ms, mut next) = (String::new(), 0u64, 0u32);
    for line in include_str!("../data/conversation.txt").lines() {
        let fields: Vec<&str> = line.split(' ').collect();
        let [gap, input, output, known, fresh] = fields[..] else { panic!("{line}") };
        at_ms += gap.parse::<u64>().unwrap();
        let mut last: Option<u32> = known.parse().ok();
        let mut ids: Vec<u32> = std::iter::successors(last, |block| parents[block]).collect();
        ids.reverse();
        for _ in 0..fresh.parse::<u32>().unwrap() {
            parents.insert(next, last);
            last = Some(next);
            ids.push(next);
            next += 1;
        }
        let fields =
            format!("\"timestamp\": {at_ms}, \"input_length\": {input}, \"output_length\": {output}");
        writeln!(text, "{{{fields}, \"hash_ids\": {ids:?}}}").unwrap();
    }
    text
}
