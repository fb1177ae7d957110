//! The format that `kvbm daemon --record` writes; see `docs/replay.md`.

use std::collections::{HashMap, VecDeque};

use kvbm_server::record::{Chain, Commit, Header, Like, Line, MATCHES_BACK_MAX, Match, Namespace, VERSION};

use super::builder::Builder;
use super::{BlockId, EventKind, Trace};

/// True if a file that begins with this line is of this format, readable or not.
pub(super) fn is_header(text: &str) -> bool {
    text.trim_start().starts_with("{\"kvbm_trace\"")
}

/// Identity of a block: who may see it, and its key. Keys already contain the namespace.
type Identity = (u32, [u8; 16]);

/// Reads line after line.
pub(super) struct Reader {
    builder: Builder,
    known: HashMap<Identity, BlockId>,
    /// By number, since the last header.
    domains: HashMap<u32, u32>,
    /// Blocks of matches since the last header, the last one first.
    matches: VecDeque<(u32, Vec<BlockId>)>,
    /// Tokens per block and bytes of a block, of all namespaces.
    sizes: Option<(u32, u64)>,
    first_unix_ms: Option<u64>,
    /// What is added to `t`.
    offset_ms: u64,
}

impl Reader {
    pub(super) fn new() -> Self {
        let (known, domains, matches, sizes, first_unix_ms, offset_ms) = Default::default();
        Self { builder: Builder::new(), known, domains, matches, sizes, first_unix_ms, offset_ms }
    }

    pub(super) fn read(&mut self, text: &str) -> Result<(), String> {
        let line = serde_json::from_str(text)
            .map_err(|error| format!("expected a line of a recorded trace: {error}"))?;
        match line {
            Line::KvbmTrace(header) => self.header(&header),
            Line::Namespace(namespace) => self.namespace(&namespace),
            Line::Match(line) => self.matched(line),
            Line::Commit(line) => self.committed(line),
        }
    }

    pub(super) fn finish(self) -> Result<Trace, String> {
        let (tokens_per_block, bytes) = self.sizes.ok_or("nothing was looked up or stored in it")?;
        Ok(self.builder.finish(tokens_per_block, Some(bytes).filter(|bytes| *bytes > 0)))
    }

    fn header(&mut self, header: &Header) -> Result<(), String> {
        if header.version != VERSION {
            return Err(format!("expected version {VERSION} of the format, not {}", header.version));
        }
        let first = *self.first_unix_ms.get_or_insert(header.unix_ms);
        // A clock that was set back does not make time go backwards.
        self.offset_ms = header.unix_ms.saturating_sub(first).max(self.builder.last_ms());
        self.domains.clear();
        self.matches.clear();
        Ok(())
    }

    fn namespace(&mut self, namespace: &Namespace) -> Result<(), String> {
        let sizes = (namespace.tokens_per_block, namespace.block_bytes);
        let known = *self.sizes.get_or_insert(sizes);
        if known.0 != sizes.0 {
            return Err(format!(
                "namespace {} has {} tokens in a block, those before it have {}: only traces of one block size are \
                 replayed",
                namespace.ns, sizes.0, known.0
            ));
        }
        self.sizes = Some((known.0, known.1.max(sizes.1)));
        self.domains.insert(namespace.ns, namespace.domain);
        Ok(())
    }

    fn matched(&mut self, line: Match) -> Result<(), String> {
        let blocks = self.blocks(line.ns, None, &line.chain)?;
        let at_ms = self.time(line.t);
        self.builder.event(at_ms, EventKind::Lookup, &blocks);
        self.matches.push_front((line.ns, blocks));
        self.matches.truncate(MATCHES_BACK_MAX);
        Ok(())
    }

    fn committed(&mut self, line: Commit) -> Result<(), String> {
        let domain = self.domain(line.ns)?;
        let parent = match line.parent {
            None => None,
            Some(key) => {
                let known = self.known.get(&(domain, key.0.0)).copied();
                match known {
                    Some(parent) => Some(parent),
                    // What it follows was dropped from the trace: it stands for all of it.
                    None => Some(self.block(domain, None, key.0)?),
                }
            }
        };
        let blocks = self.blocks(line.ns, parent, &line.chain)?;
        let at_ms = self.time(line.t);
        self.builder.event(at_ms, EventKind::Store, &blocks);
        Ok(())
    }

    /// Time never goes backwards, whatever the file says.
    fn time(&self, t: u64) -> u64 {
        (self.offset_ms + t).max(self.builder.last_ms())
    }

    fn domain(&self, ns: u32) -> Result<u32, String> {
        let domain = self.domains.get(&ns).copied();
        domain.ok_or_else(|| format!("expected a line that describes namespace {ns} before this one"))
    }

    fn blocks(&mut self, ns: u32, parent: Option<BlockId>, chain: &Chain) -> Result<Vec<BlockId>, String> {
        let domain = self.domain(ns)?;
        let mut blocks = chain.like.map_or(Ok(Vec::new()), |like| self.like(ns, like))?;
        for key in &chain.keys {
            let before = blocks.last().copied().or(parent);
            blocks.push(self.block(domain, before, key.0)?);
        }
        Ok(blocks)
    }

    fn like(&self, ns: u32, like: Like) -> Result<Vec<BlockId>, String> {
        let Like { back, skip, keep } = like;
        let (skip, keep) = (skip as usize, keep as usize);
        let of = self.matches.get(back as usize).filter(|(of, _)| *of == ns);
        let part = of.and_then(|(_, blocks)| blocks.get(skip..)?.get(..keep));
        part.map(<[BlockId]>::to_vec).ok_or_else(|| {
            format!("expected a match {back} back with {} keys of namespace {ns} to refer to", skip + keep)
        })
    }

    /// A key that was seen is that block, wherever it is met again.
    fn block(
        &mut self,
        domain: u32,
        before: Option<BlockId>,
        key: kvbm_hash::SequenceHash,
    ) -> Result<BlockId, String> {
        let identity = (domain, key.0);
        if let Some(known) = self.known.get(&identity) {
            return Ok(*known);
        }
        let block = self.builder.add(before, super::keyed(domain, key))?;
        self.known.insert(identity, block);
        Ok(block)
    }
}
