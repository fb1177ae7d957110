//! Blocks that are spread on the GPU.

use std::sync::Arc;

use kvbm_cuda::{DeviceMemory, DeviceRange, RegisteredMemory, Scatter, Spread, Stream};
use kvbm_shm::SharedMemory;

use crate::{Gpu, Outcome};

/// Blocks of 3 MiB in 32 pieces, each of which the kernel takes in two; more of them than are staged at once, in memory that is
/// registered in chunks.
const PIECE: usize = 96 << 10;
const PIECES: usize = 32;
const BLOCK: usize = PIECE * PIECES;
const BLOCKS: usize = 40;
const CHUNK: usize = 8 << 20;
const ROUNDS: usize = 7;

fn text(error: kvbm_cuda::Error) -> String {
    error.to_string()
}

pub fn spread(gpu: &Gpu) -> Outcome {
    let host = SharedMemory::create("kvbm-gpu-test", BLOCK * BLOCKS).map_err(|error| error.to_string())?;
    let byte = |block: usize, at: usize| {
        (((block << 24 | at) as u64).wrapping_mul(0x9E37_79B9_7F4A_7C15) >> 56) as u8
    };
    for block in 0..BLOCKS {
        let bytes: Vec<u8> = (0..BLOCK).map(|at| byte(block, at)).collect();
        host.write(block * BLOCK, &bytes);
    }
    let mut host = RegisteredMemory::begin(&gpu.context, Arc::new(host), CHUNK).map_err(text)?;
    while host.register_next().map_err(text)? {}
    let memory = DeviceMemory::allocate(&gpu.context, BLOCK * BLOCKS).map_err(text)?;
    memory.fill(0, 0xEE, memory.bytes()).map_err(text)?;
    // Layer by layer, pages in another order. One piece of each block has no place.
    let page = |block: usize| (block * 7 + 3) % BLOCKS;
    let place = |block: usize, piece: usize| (piece * BLOCKS + page(block)) * PIECE;
    let absent = |block: usize| block % PIECES;
    let block_of = |block: usize| {
        let mut spread = Spread::default();
        let (mut at, end) = (block * BLOCK, (block + 1) * BLOCK);
        while at < end {
            let part = (end - at).min(CHUNK - at % CHUNK);
            spread.host.push((host.device_address(at), part));
            at += part;
        }
        let placed = (0..PIECES).filter(|piece| *piece != absent(block));
        let to = |piece: usize| (piece * PIECE, memory.address().plus(place(block, piece)), PIECE);
        spread.pieces.extend(placed.map(to));
        spread
    };
    let blocks: Vec<Spread> = (0..BLOCKS).map(block_of).collect();
    if !Scatter::takes(&blocks) {
        return Err("these blocks can be spread".into());
    }
    let mut odd = blocks[..1].to_vec();
    odd[0].pieces[0].2 -= 1;
    if Scatter::takes(&odd) {
        return Err("a piece of an odd size cannot be spread".into());
    }
    let stream = Stream::new(&gpu.context).map_err(text)?;
    let mut scatter = Scatter::new(&gpu.driver, &gpu.context).map_err(text)?;
    // More often than there are lists, each time in another order, so that each list has other content than before.
    for round in 0..ROUNDS {
        if round + 1 == ROUNDS {
            stream.synchronize().map_err(text)?;
            memory.fill(0, 0xEE, memory.bytes()).map_err(text)?;
        }
        let mut order = blocks.clone();
        order.rotate_left(round * 7 % BLOCKS);
        // SAFETY: host and memory live until the stream was waited for.
        unsafe { scatter.issue(&stream, &order) }.map_err(text)?;
    }
    stream.synchronize().map_err(text)?;
    let mut seen = vec![0; memory.bytes()];
    memory.read(0, &mut seen).map_err(text)?;
    for block in 0..BLOCKS {
        for piece in 0..PIECES {
            let at = place(block, piece);
            let expected = |in_piece: usize| match piece == absent(block) {
                true => 0xEE,
                false => byte(block, piece * PIECE + in_piece),
            };
            if let Some(wrong) = (0..PIECE).find(|in_piece| seen[at + in_piece] != expected(*in_piece)) {
                return Err(format!("block {block}, piece {piece}, byte {wrong} is {:#x}", seen[at + wrong]));
            }
        }
    }
    Ok(format!("{BLOCKS} blocks of {PIECES} pieces, seven times"))
}
