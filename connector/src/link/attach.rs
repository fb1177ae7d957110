//! Opening the pool: a fresh one, or the one that the engine kept.

use std::collections::{HashMap, HashSet};

use kvbm_hash::{Namespace, Retention, SequenceHash};
use kvbm_proto::{entry_retention, set_entry_retention, v1};
use kvbm_shm::PoolMemory;
use tokio::task::JoinSet;
use tokio::time::timeout;

use super::{Connection, End, Link, LinkParts, watched};
use crate::ClientError;
use crate::client::Client;
use crate::exchange::{Opened, Opening};
use crate::pool_table::{AdoptionTable, BlockRef, Content};

impl Link {
    pub(super) async fn open(
        &mut self,
        connection: &mut Connection,
        opening: Opening,
    ) -> Result<Opened, End> {
        let deadline = self.parts.config.attach_deadline;
        let client = connection.client.with_deadline(deadline);
        let Self { parts, hangups, attempt, .. } = self;
        let mut namespaces = std::mem::take(&mut connection.namespaces);
        let work = async {
            let fresh = open_message(parts);
            match opening {
                Opening::Fresh => {
                    let (memory, reply) = client.open_pool(fresh).await?;
                    check_reply(parts, &memory, &reply)?;
                    check_memory(parts, &memory)?;
                    let inherited = inherited(&reply)?;
                    Ok(Opened { pool_id: reply.pool_id, memory: Some(memory), inherited })
                }
                Opening::Adoption { memory, epoch, table } => {
                    register(parts, &client, &table, &mut namespaces).await?;
                    let adoption = adoption_message(memory.uuid(), epoch, &table, &namespaces);
                    let open = v1::OpenPool { adoption: Some(adoption), ..fresh };
                    let reply = client.hand_over_pool(&memory, open).await?;
                    check_reply(parts, &memory, &reply)?;
                    Ok(Opened { pool_id: reply.pool_id, memory: None, inherited: Vec::new() })
                }
            }
        };
        let opened = watched(parts, hangups, *attempt, connection, timeout(deadline, work)).await;
        connection.namespaces = namespaces;
        Ok(opened?.unwrap_or(Err(ClientError::Deadline))?)
    }
}

/// Makes every namespace of `table` known, all at once.
async fn register(
    parts: &LinkParts,
    client: &Client,
    table: &AdoptionTable,
    namespaces: &mut HashMap<Namespace, u32>,
) -> Result<(), ClientError> {
    let listed: HashSet<Namespace> = table.entries.iter().map(|entry| entry.content.namespace).collect();
    let mut registrations = JoinSet::new();
    for digest in listed.into_iter().filter(|digest| !namespaces.contains_key(digest)) {
        let (client, base) = (client.clone(), parts.base);
        let (tenant, model) = (parts.tenant(&digest), parts.config.model.clone());
        registrations.spawn(async move {
            let id = client.register_namespace(digest, base, &tenant, &model).await?;
            Ok::<_, ClientError>((digest, id))
        });
    }
    while let Some(registered) = registrations.join_next().await {
        let (digest, id) = registered.map_err(ClientError::unavailable)??;
        namespaces.insert(digest, id);
    }
    Ok(())
}

fn open_message(parts: &LinkParts) -> v1::OpenPool {
    v1::OpenPool {
        mode: v1::PoolMode::Owned.into(),
        base: parts.base.0.to_vec(),
        block_bytes: parts.layout.block_bytes as u64,
        block_count: parts.layout.block_count,
        tokens_per_block: parts.config.tokens_per_block,
        device: parts.config.device.clone(),
        shard: 0,
        shard_count: 1,
        rank: 0,
        fresh: parts.config.fresh,
        adoption: None,
        ..Default::default()
    }
}

fn adoption_message(
    uuid: [u8; 16],
    epoch: u64,
    table: &AdoptionTable,
    namespaces: &HashMap<Namespace, u32>,
) -> v1::Adoption {
    let entries = table.entries.iter().map(|entry| {
        let mut listed = v1::PoolEntry {
            block: Some(entry.block.into()),
            namespace_id: namespaces[&entry.content.namespace],
            key: entry.content.key.0.to_vec(),
            parent: entry.content.parent.map(|parent| parent.0.to_vec()).unwrap_or_default(),
            held: entry.held,
            ..Default::default()
        };
        set_entry_retention(&mut listed, entry.retention);
        listed
    });
    v1::Adoption {
        pool_uuid: uuid.to_vec(),
        epoch,
        entries: entries.collect(),
        held: table.held.iter().map(|&block| block.into()).collect(),
    }
}

/// A pool of another shape than the engine computes with would be wrong KV.
fn check_reply(parts: &LinkParts, memory: &PoolMemory, reply: &v1::PoolReply) -> Result<(), ClientError> {
    let layout = parts.layout;
    let shape = (layout.block_count, layout.stride() as u64, memory.blocks_offset() as u64);
    if reply.pool_id == 0 || (reply.block_count, reply.stride, reply.offset) != shape {
        return Err(ClientError::malformed(format!("a pool of {layout:?} was answered with {reply:?}")));
    }
    Ok(())
}

fn check_memory(parts: &LinkParts, memory: &PoolMemory) -> Result<(), ClientError> {
    if memory.layout() != parts.layout {
        let detail = format!("expected memory of {:?}, got {:?}", parts.layout, memory.layout());
        return Err(ClientError::malformed(detail));
    }
    if memory.device().is_some() != parts.config.is_on_gpu() {
        let detail = format!("the memory of a pool on {} is not there", parts.config.device);
        return Err(ClientError::malformed(detail));
    }
    Ok(())
}

fn inherited(reply: &v1::PoolReply) -> Result<Vec<(BlockRef, Content, Retention)>, ClientError> {
    let mut namespaces = HashMap::new();
    for known in &reply.namespaces {
        namespaces.insert(known.namespace_id, Namespace(kvbm_proto::digest("digest", &known.digest)?));
    }
    let entry = |entry: &v1::PoolEntry| {
        let block = entry.block.ok_or_else(|| ClientError::malformed("an entry without a block"))?;
        let namespace = namespaces.get(&entry.namespace_id);
        let namespace = *namespace.ok_or_else(|| ClientError::malformed("an entry of no namespace"))?;
        let key = SequenceHash(kvbm_proto::key("key", &entry.key)?);
        let parent = kvbm_proto::optional_key("parent", &entry.parent)?.map(SequenceHash);
        let retention = entry_retention(entry).map_err(ClientError::malformed)?;
        Ok((block.into(), Content { namespace, key, parent }, retention))
    };
    reply.entries.iter().map(entry).collect()
}
