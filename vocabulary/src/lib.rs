//! The bytes of each token of a tokenizer, in one table: what turns tokens into text one by one, and what a grammar is
//! matched against.
#![forbid(unsafe_code)]

use std::collections::HashSet;

use tokenizers::{DecoderWrapper, Tokenizer};

/// Bytes per token. Special and unknown tokens have none.
pub struct Vocabulary {
    bytes: Vec<u8>,
    /// Token `id` is `bytes[ends[id - 1] .. ends[id]]`.
    ends: Vec<u32>,
    longest: usize,
    alphabet: Alphabet,
}

/// How a tokenizer writes bytes in the text of its tokens.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Alphabet {
    /// Each byte as one character: tokens one after the other are the bytes of the text.
    Bytes,
    /// As text in which a space is a low line (U+2581) and `<0x0A>` a byte: the text of a sequence is that of its
    /// tokens but for spaces at its beginning.
    Pieces,
}

impl Vocabulary {
    /// Reads the table.
    pub fn of(tokenizer: &Tokenizer) -> Self {
        let alphabet = match tokenizer.get_decoder() {
            Some(DecoderWrapper::ByteLevel(_)) => Alphabet::Bytes,
            _ => Alphabet::Pieces,
        };
        let added = tokenizer.get_added_tokens_decoder();
        let special: HashSet<&str> =
            added.values().filter(|token| token.special).map(|token| token.content.as_str()).collect();
        let count = tokenizer.get_vocab(true).into_values().max().map_or(0, |last| last as usize + 1);
        let unicode_bytes = unicode_bytes();
        let mut table = Self { bytes: Vec::new(), ends: Vec::with_capacity(count), longest: 0, alphabet };
        for id in 0..count as u32 {
            if let Some(text) = tokenizer.id_to_token(id).filter(|text| !special.contains(text.as_str())) {
                match alphabet {
                    Alphabet::Bytes => table.append(&text, &unicode_bytes),
                    Alphabet::Pieces => table.append_piece(&text),
                }
            }
            // A table of 4 GB is no vocabulary.
            table.ends.push(u32::try_from(table.bytes.len()).unwrap_or(u32::MAX));
        }
        let longest_special = special.iter().map(|text| text.len()).max().unwrap_or(0);
        table.longest = table.longest.max(longest_special);
        table
    }

    /// How the tokenizer writes bytes.
    pub fn alphabet(&self) -> Alphabet {
        self.alphabet
    }

    /// Number of tokens.
    pub fn len(&self) -> usize {
        self.ends.len()
    }

    /// There are no tokens.
    pub fn is_empty(&self) -> bool {
        self.ends.is_empty()
    }

    fn append_piece(&mut self, text: &str) {
        let start = self.bytes.len();
        let byte = text.strip_prefix("<0x").and_then(|rest| rest.strip_suffix('>'));
        match byte.filter(|hex| hex.len() == 2).and_then(|hex| u8::from_str_radix(hex, 16).ok()) {
            Some(byte) => self.bytes.push(byte),
            None => self.bytes.extend_from_slice(text.replace('\u{2581}', " ").as_bytes()),
        }
        self.longest = self.longest.max(self.bytes.len() - start);
    }

    fn append(&mut self, text: &str, unicode_bytes: &[Option<u8>]) {
        let start = self.bytes.len();
        let decoded: Option<Vec<u8>> =
            text.chars().map(|c| unicode_bytes.get(c as usize).copied().flatten()).collect();
        match decoded {
            Some(decoded) => self.bytes.extend_from_slice(&decoded),
            None => self.bytes.extend_from_slice(text.as_bytes()),
        }
        self.longest = self.longest.max(self.bytes.len() - start);
    }

    /// Bytes of a token's text.
    pub fn bytes(&self, token: u32) -> &[u8] {
        let index = token as usize;
        let Some(&end) = self.ends.get(index) else { return &[] };
        let start = if index == 0 { 0 } else { self.ends[index - 1] };
        &self.bytes[start as usize..end as usize]
    }

    /// Bytes of the longest token.
    pub fn longest(&self) -> usize {
        self.longest
    }
}

/// The alphabet of byte-level tokenizers, by code point: printable bytes stand for themselves, the others in order
/// for 256 and up.
fn unicode_bytes() -> Vec<Option<u8>> {
    let mut table = vec![None; 512];
    let mut next = 256;
    for byte in 0..=255u8 {
        if matches!(byte, b'!'..=b'~' | 0xa1..=0xac | 0xae..=0xff) {
            table[byte as usize] = Some(byte);
        } else {
            table[next] = Some(byte);
            next += 1;
        }
    }
    table
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tokenizer(decoder: &str, tokens: &[&str]) -> Tokenizer {
        let vocab: String = tokens.iter().enumerate().map(|(id, text)| format!("{text:?}: {id},")).collect();
        let json = format!(
            r#"{{"version": "1.0", "truncation": null, "padding": null, "normalizer": null, "pre_tokenizer": null,
                "added_tokens": [{{"id": 0, "content": "<s>", "single_word": false, "lstrip": false,
                "rstrip": false, "normalized": false, "special": true}}], "post_processor": null,
                "decoder": {decoder}, "model": {{"type": "WordLevel", "unk_token": "<s>",
                "vocab": {{{}}}}}}}"#,
            vocab.trim_end_matches(',')
        );
        json.parse().unwrap()
    }

    #[test]
    fn bytes_are_written_one_by_one_or_in_pieces() {
        let level =
            r#"{"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true}"#;
        let bytes = Vocabulary::of(&tokenizer(level, &["<s>", "\u{120}the", "\u{e2}\u{124}", "<tool_call>"]));
        assert_eq!(bytes.alphabet(), Alphabet::Bytes);
        let all = [0, 1, 2, 3, 4].map(|token| bytes.bytes(token));
        assert_eq!(all, [&b""[..], b" the", &[0xe2, 0x82], b"<tool_call>", b""]);
        let pieces = Vocabulary::of(&tokenizer(
            r#"{"type": "ByteFallback"}"#,
            &["<s>", "\u{2581}the", "<0xE2>", "<0xZZ>"],
        ));
        assert_eq!(pieces.alphabet(), Alphabet::Pieces);
        assert_eq!([0, 1, 2, 3].map(|token| pieces.bytes(token)), [&b""[..], b" the", &[0xe2], b"<0xZZ>"]);
        assert_eq!((pieces.len(), bytes.longest()), (4, 11));
    }
}
