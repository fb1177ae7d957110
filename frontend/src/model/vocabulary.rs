//! The bytes of each token of a byte-level tokenizer, in one table.

use std::collections::HashSet;

use tokenizers::{DecoderWrapper, Tokenizer};

/// Bytes per token. Special and unknown tokens have none.
pub struct Vocabulary {
    bytes: Vec<u8>,
    /// Token `id` is `bytes[ends[id - 1] .. ends[id]]`.
    ends: Vec<u32>,
    longest: usize,
}

impl Vocabulary {
    /// `None` when the tokenizer does not decode byte by byte.
    pub fn of(tokenizer: &Tokenizer) -> Option<Self> {
        if !matches!(tokenizer.get_decoder(), Some(DecoderWrapper::ByteLevel(_))) {
            return None;
        }
        let added = tokenizer.get_added_tokens_decoder();
        let special: HashSet<&str> =
            added.values().filter(|token| token.special).map(|token| token.content.as_str()).collect();
        let last = tokenizer.get_vocab(true).into_values().max()?;
        let unicode_bytes = unicode_bytes();
        let mut table = Self { bytes: Vec::new(), ends: Vec::new(), longest: 0 };
        for id in 0..=last {
            if let Some(text) = tokenizer.id_to_token(id).filter(|text| !special.contains(text.as_str())) {
                table.append(&text, &unicode_bytes);
            }
            table.ends.push(u32::try_from(table.bytes.len()).ok()?);
        }
        let longest_special = special.iter().map(|text| text.len()).max().unwrap_or(0);
        table.longest = table.longest.max(longest_special);
        Some(table)
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
