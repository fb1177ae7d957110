//! An engine that computes nothing: the bytes of a block are a function of its key, so that each copy can be checked.

use std::path::Path;
use std::time::Duration;

use kvbm_connector::{BlockRef, Client, ClientError, Committed, Release};
use kvbm_hash::{BaseNamespace, Retention, SequenceHash, sequence_hashes};
use kvbm_proto::v1::{self, Refusal};
use kvbm_shm::{PoolLayout, PoolMemory};

use crate::random::Random;

/// Longer than anything takes but a hang.
const DEADLINE: Duration = Duration::from_secs(60);

/// Blocks of one size, as a model would have them.
#[derive(Debug, Clone, Copy)]
pub struct KeyedModel {
    /// Names the base namespace.
    pub number: u8,
    /// Tokens in one block.
    pub tokens_per_block: usize,
    /// Bytes of one block.
    pub block_bytes: usize,
    /// Blocks in the engine's pool.
    pub pool_blocks: u32,
}

/// A sequence of blocks.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KeyedChain {
    /// Cache salt: the namespace.
    pub salt: &'static str,
    /// Keys, from the first block on.
    pub keys: Vec<SequenceHash>,
}

impl KeyedModel {
    fn base(&self) -> BaseNamespace {
        BaseNamespace([self.number; 32])
    }

    /// The chain of some tokens.
    pub fn chain(&self, salt: &'static str, tokens: &[u32]) -> KeyedChain {
        let namespace = self.base().namespace(None, Some(salt));
        KeyedChain { salt, keys: sequence_hashes(namespace, self.tokens_per_block, tokens) }
    }

    /// What is in a block.
    pub fn bytes_of(&self, key: SequenceHash) -> Vec<u8> {
        let (seed, _) = key.0.split_first_chunk().expect("a key has 16 bytes");
        let mut random = Random::new(u64::from_le_bytes(*seed));
        (0..self.block_bytes.div_ceil(8))
            .flat_map(|_| random.below(u64::MAX).to_le_bytes())
            .take(self.block_bytes)
            .collect()
    }
}

/// A session with one pool. Nothing of it is known to earlier or later ones.
pub struct KeyedEngine {
    model: KeyedModel,
    client: Client,
    memory: PoolMemory,
    layout: PoolLayout,
    pool: u32,
    namespaces: Vec<(&'static str, u32)>,
}

/// A prefix that the engine holds, its bytes checked.
struct Held {
    blocks: Vec<v1::BlockRef>,
    on_disk_behind: usize,
}

impl KeyedEngine {
    /// Attaches to the daemon at `socket`.
    pub async fn attach(
        socket: &Path,
        model: KeyedModel,
        salts: &[&'static str],
    ) -> Result<Self, ClientError> {
        let client = Client::connect_as(socket, "keyed-engine", DEADLINE).await?;
        let mut namespaces = Vec::new();
        for salt in salts {
            let digest = model.base().namespace(None, Some(salt));
            let id = client.register_namespace(digest, model.base(), salt, "keyed").await?;
            namespaces.push((*salt, id));
        }
        let open = v1::OpenPool {
            mode: v1::PoolMode::Owned.into(),
            base: model.base().0.to_vec(),
            block_bytes: model.block_bytes as u64,
            block_count: model.pool_blocks,
            tokens_per_block: model.tokens_per_block as u32,
            device: "cpu:0".into(),
            shard_count: 1,
            fresh: true,
            ..v1::OpenPool::default()
        };
        let (memory, reply) = client.open_pool(open).await?;
        let layout = memory.layout();
        Ok(Self { model, client, memory, layout, pool: reply.pool_id, namespaces })
    }

    /// Ends the session once the daemon has heard all that was given back: what a session holds when it ends stays
    /// reserved for as long as this process lives.
    pub async fn detach(self) -> Result<(), ClientError> {
        self.client.ping().await
    }

    fn namespace(&self, chain: &KeyedChain) -> u32 {
        let known = self.namespaces.iter().find(|(salt, _)| *salt == chain.salt);
        known.expect("the salt was named when the engine attached").1
    }

    /// Has what is on disk brought to host memory, and waits for that.
    pub async fn prefetch(&self, chain: &KeyedChain) -> Result<(), ClientError> {
        ignore_refusal(self.client.prefetch_and_wait(self.namespace(chain), &chain.keys).await.map(|_| ()))
    }

    /// Serves a chain as a request would: what is there is loaded and checked, the rest is "computed" and committed, and
    /// all is given back once it is in host memory or cannot get there.
    pub async fn serve(&self, chain: &KeyedChain) -> Result<(), ClientError> {
        let mut blocks = self.load(chain).await?.blocks;
        let loaded = blocks.len();
        if loaded == chain.keys.len() {
            return self.release(&blocks).await;
        }
        let fresh = self.client.request_grants(self.pool, (chain.keys.len() - loaded) as u32).await?;
        for (block, key) in fresh.iter().zip(&chain.keys[loaded..]) {
            self.memory.memory().write(self.layout.offset(block.block), &self.model.bytes_of(*key));
        }
        let keys = chain.keys[loaded..loaded + fresh.len()].to_vec();
        let parent = |i: usize| (loaded + i).checked_sub(1).map(|parent| chain.keys[parent]);
        let parents = (0..keys.len()).map(parent).collect();
        let committed = Committed { blocks: fresh.clone(), keys, parents, retention: vec![] };
        self.client.commit(self.namespace(chain), self.pool, committed).await?;
        ignore_refusal(self.client.offload(self.pool, fresh.clone()).await.map(|_| ()))?;
        blocks.extend(fresh);
        self.release(&blocks).await
    }

    /// Serves a chain from the pool alone, each computed block to be kept as `retention` says; empty: as any other. The last
    /// block is given back first, so that leaves age first. Returns how many blocks the pool had.
    pub async fn serve_kept(
        &self,
        chain: &KeyedChain,
        retention: &[Retention],
    ) -> Result<usize, ClientError> {
        let mut blocks = self.load(chain).await?.blocks;
        let found = blocks.len();
        let fresh = self.client.request_grants(self.pool, (chain.keys.len() - found) as u32).await?;
        for (block, key) in fresh.iter().zip(&chain.keys[found..]) {
            self.memory.memory().write(self.layout.offset(block.block), &self.model.bytes_of(*key));
        }
        let parent = |i: usize| i.checked_sub(1).map(|parent| chain.keys[parent]);
        let committed = Committed {
            blocks: fresh.clone(),
            keys: chain.keys[found..].to_vec(),
            parents: (found..chain.keys.len()).map(parent).collect(),
            retention: retention.iter().skip(found).copied().collect(),
        };
        self.client.commit(self.namespace(chain), self.pool, committed).await?;
        blocks.extend(fresh);
        blocks.reverse();
        self.release(&blocks).await?;
        Ok(found)
    }

    /// Loads all of a chain that the daemon has, checks each byte, gives it back. Returns how many blocks it were.
    pub async fn recall(&self, chain: &KeyedChain) -> Result<usize, ClientError> {
        let mut before = None;
        loop {
            self.prefetch(chain).await?;
            let held = self.load(chain).await?;
            let blocks = held.blocks.len();
            self.release(&held.blocks).await?;
            // Host memory may have room for a part only, so it is asked again while that brings more.
            if held.on_disk_behind == 0 || before == Some(blocks) {
                return Ok(blocks);
            }
            before = Some(blocks);
        }
    }

    async fn load(&self, chain: &KeyedChain) -> Result<Held, ClientError> {
        let reply = self.client.match_prefix(self.namespace(chain), &chain.keys, self.pool).await?;
        let mut blocks = reply.device;
        if reply.lease_id != 0 {
            let targets = self.client.request_grants(self.pool, reply.host_blocks).await?;
            blocks.extend(self.onboard(reply.lease_id, targets).await?);
        }
        for (block, key) in blocks.iter().zip(&chain.keys) {
            let mut found = vec![0; self.model.block_bytes];
            self.memory.memory().read(self.layout.offset(block.block), &mut found);
            assert!(found == self.model.bytes_of(*key), "block {key:?} is not what was stored");
        }
        Ok(Held { blocks, on_disk_behind: reply.disk_blocks as usize })
    }

    /// The targets that were filled; the others are given back.
    async fn onboard(
        &self,
        lease: u64,
        targets: Vec<v1::BlockRef>,
    ) -> Result<Vec<v1::BlockRef>, ClientError> {
        let done = match self.client.onboard(lease, self.pool, targets.clone()).await {
            Ok(done) => done.blocks_done as usize,
            Err(ClientError::Refused { .. }) => {
                self.client.release_lease(lease).await?;
                0
            }
            Err(error) => return Err(error),
        };
        self.release(&targets[done..]).await?;
        Ok(targets[..done].to_vec())
    }

    async fn release(&self, blocks: &[v1::BlockRef]) -> Result<(), ClientError> {
        let releases: Vec<Release> =
            blocks.iter().map(|block| Release { block: BlockRef::from(*block), pins: 1 }).collect();
        self.client.release(self.pool, &releases).await
    }
}

/// A full queue or tier is an answer: one goes on without. A contract that was broken is not.
fn ignore_refusal(result: Result<(), ClientError>) -> Result<(), ClientError> {
    match result {
        Err(ClientError::Refused { refusal: Refusal::Busy | Refusal::Exhausted, .. }) => Ok(()),
        other => other,
    }
}
