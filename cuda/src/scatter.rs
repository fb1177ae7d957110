//! Loads that leave the engine's own work alone: what comes from the host is copied to a place on the GPU first, and a kernel
//! spreads it from there.
//!
//! ```text
//!  host      slot  slot     slot  slot        one copy each, by the copy engine
//!              │     │        │     │
//!  GPU      ┌──▼─────▼──┐  ┌──▼─────▼──┐
//!           │  part 0   │  │  part 1   │      8 MiB each: while one is filled, the other is spread
//!           └┬──┬──┬──┬─┘  └┬──┬──┬──┬─┘
//!            ▼  ▼  ▼  ▼     ▼  ▼  ▼  ▼        a kernel, at the rate of the GPU's memory
//!           pages of the engine
//! ```
//!
//! Where each layer has memory of its own, a copy for each piece would take the driver as long as the bytes take the wire, and
//! meanwhile no other thread of the process would get to launch anything. Blocks of one piece go the same way: between parts the
//! stream waits, and what the engine copies in each of its steps gets its turn.

use std::sync::Arc;

use kvbm_shm::SharedMemory;

use crate::{
    Arguments, BatchCopier, Context, DeviceAddress, DeviceMemory, DeviceRange, Driver, Error, Event,
    Function, Launch, Module, RawCopy, RegisteredMemory, Stream,
};

/// Bytes that are spread at a time.
const PART_BYTES: usize = 8 << 20;
/// Parts that there is room for.
const PARTS: usize = 2;
/// Pieces that are spread at a time, at most.
const PIECES_MAX: usize = 8192;
/// Larger pieces are cut, so that all of the GPU has to do.
const PIECE_BYTES_MAX: usize = 64 << 10;
/// Copies given to the driver in one call: while it takes them, other threads launch nothing.
const COPIES_AT_ONCE: usize = 128;
/// Of a piece in the list: where from, where to, how many bytes.
const ENTRY_BYTES: usize = 24;
const LIST_BYTES: usize = PIECES_MAX * ENTRY_BYTES;
/// Lists that the host may be ahead of the GPU.
const LISTS: usize = 16;
/// What the kernel moves at a time: addresses and sizes are multiples of it.
const WORD_BYTES: u64 = 16;
const THREADS: u32 = 256;

/// spread(list, count): entry e of the list is `from`, `to` and `bytes`, copied by all blocks of threads with e mod their
/// number in words of 16 bytes.
const PTX: &str = "
.version 7.0
.target sm_80
.address_size 64
.visible .entry spread(.param .u64 list, .param .u32 count)
{
    .reg .pred %none, %past;
    .reg .b32 %e, %n, %blocks, %thread, %threads, %w<4>;
    .reg .b64 %list, %entry, %from, %to, %bytes, %at, %step, %a, %b;
    ld.param.u64 %list, [list];
    cvta.to.global.u64 %list, %list;
    ld.param.u32 %n, [count];
    mov.u32 %e, %ctaid.x;
    mov.u32 %blocks, %nctaid.x;
    mov.u32 %thread, %tid.x;
    mov.u32 %threads, %ntid.x;
    mul.wide.u32 %step, %threads, 16;
ENTRY:
    setp.ge.u32 %none, %e, %n;
    @%none bra END;
    mul.wide.u32 %entry, %e, 24;
    add.s64 %entry, %list, %entry;
    ld.global.u64 %from, [%entry];
    ld.global.u64 %to, [%entry+8];
    ld.global.u64 %bytes, [%entry+16];
    cvta.to.global.u64 %from, %from;
    cvta.to.global.u64 %to, %to;
    mul.wide.u32 %at, %thread, 16;
WORD:
    setp.ge.u64 %past, %at, %bytes;
    @%past bra NEXT;
    add.s64 %a, %from, %at;
    add.s64 %b, %to, %at;
    ld.global.v4.u32 {%w0, %w1, %w2, %w3}, [%a];
    st.global.v4.u32 [%b], {%w0, %w1, %w2, %w3};
    add.s64 %at, %at, %step;
    bra WORD;
NEXT:
    add.u32 %e, %e, %blocks;
    bra ENTRY;
END:
    ret;
}
";

/// Bytes that are to be spread: a block, or a part of one.
#[derive(Debug, Clone, Default)]
pub struct Spread {
    /// Where they are on the host, in order: places and sizes.
    pub host: Vec<(DeviceAddress, usize)>,
    /// Where they go: the first byte of them, place, size. What no piece names goes nowhere.
    pub pieces: Vec<(usize, DeviceAddress, usize)>,
}

impl Spread {
    /// How many.
    pub fn bytes(&self) -> usize {
        self.host.iter().map(|(_, bytes)| bytes).sum()
    }

    /// Entries of the list.
    fn entries(&self) -> usize {
        self.pieces.iter().map(|(_, _, bytes)| bytes.div_ceil(PIECE_BYTES_MAX)).sum()
    }

    /// Fits, and its pieces lie within it in whole words.
    fn can_be(&self) -> bool {
        let whole = self.bytes();
        let fits = |(at, to, bytes): &(usize, DeviceAddress, usize)| {
            (*at as u64 | to.0 | *bytes as u64).is_multiple_of(WORD_BYTES)
                && at.checked_add(*bytes).is_some_and(|end| end <= whole)
        };
        (whole as u64).is_multiple_of(WORD_BYTES)
            && whole <= Scatter::BYTES_MAX
            && self.entries() <= PIECES_MAX
            && self.pieces.iter().all(fits)
    }
}

/// See the module.
#[derive(Debug)]
pub struct Scatter {
    copier: BatchCopier,
    spread: Function,
    /// What the kernel runs in.
    spreading: Stream,
    /// Parts, each with its list behind it.
    staging: DeviceMemory,
    lists: RegisteredMemory,
    /// When the part with this number, by the number of parts, has come to the GPU.
    copied: Vec<Event>,
    /// When the part with this number, by the number of lists, has been spread.
    done: Vec<Event>,
    /// Number of the next part.
    next: usize,
}

impl Scatter {
    /// What one [`Spread`] may have.
    pub const BYTES_MAX: usize = PART_BYTES;

    /// Takes 16 MiB of the GPU's memory.
    pub fn new(driver: &Driver, context: &Context) -> Result<Self, Error> {
        let lists = SharedMemory::create("kvbm-scatter", LISTS * LIST_BYTES)
            .map_err(|error| Error::refused("memory for lists of pieces", error.to_string()))?;
        let events = |count: usize| (0..count).map(|_| Event::restful(context)).collect::<Result<_, _>>();
        let scatter = Self {
            copier: BatchCopier::new(driver),
            spread: Module::load(context, PTX.as_bytes())?.function("spread")?,
            spreading: Stream::urgent(context)?,
            staging: DeviceMemory::allocate(context, PARTS * (PART_BYTES + LIST_BYTES))?,
            lists: RegisteredMemory::new(context, Arc::new(lists))?,
            copied: events(PARTS)?,
            done: events(LISTS)?,
            next: 0,
        };
        // The first launch brings the code to the GPU, and may wait for all that runs there: not while an engine decodes.
        // SAFETY: a list of nothing is not read.
        unsafe { scatter.launch(scatter.staging.address(), 0) }?;
        scatter.spreading.synchronize()?;
        Ok(scatter)
    }

    /// Whether all of these can go this way.
    pub fn takes(blocks: &[Spread]) -> bool {
        blocks.iter().all(Spread::can_be)
    }

    /// Issues the copies of blocks that can go this way. What is issued to `stream` afterwards comes behind them. After an
    /// error none goes on beyond `stream`.
    ///
    /// # Safety
    /// The places on the host are registered and those on the GPU mapped, and both are left alone until what was issued has
    /// ended. All calls name the same stream.
    pub unsafe fn issue(&mut self, stream: &Stream, blocks: &[Spread]) -> Result<(), Error> {
        assert!(Self::takes(blocks), "whoever asks has asked whether it can be");
        let mut rest = blocks;
        while !rest.is_empty() {
            let (mut bytes, mut pieces) = (0, 0);
            let count = rest.iter().take_while(|block| {
                (bytes, pieces) = (bytes + block.bytes(), pieces + block.entries());
                bytes <= PART_BYTES && pieces <= PIECES_MAX
            });
            let (part, behind) = rest.split_at(count.count());
            // SAFETY: the caller's promise.
            if let Err(error) = unsafe { self.issue_part(stream, part) } {
                self.spreading.synchronize()?;
                return Err(error);
            }
            rest = behind;
        }
        match self.next.checked_sub(1) {
            Some(last) => stream.wait_event(&self.done[last % LISTS]),
            None => Ok(()),
        }
    }

    /// What fits into one.
    unsafe fn issue_part(&mut self, stream: &Stream, part: &[Spread]) -> Result<(), Error> {
        let number = self.next;
        let (copied, done) = (&self.copied[number % PARTS], &self.done[number % LISTS]);
        // The list that was there before has been read. An event that nobody recorded is reached.
        done.synchronize()?;
        let list = number % LISTS * LIST_BYTES;
        let staged = self.staging.address().plus(number % PARTS * (PART_BYTES + LIST_BYTES));
        let (mut copies, mut at, mut entries) = (Vec::new(), 0, Vec::new());
        for block in part {
            for (offset, to, bytes) in &block.pieces {
                for cut in (0..*bytes).step_by(PIECE_BYTES_MAX) {
                    let (from, to) = (staged.plus(at + offset + cut), to.plus(cut));
                    for word in [from.0, to.0, PIECE_BYTES_MAX.min(bytes - cut) as u64] {
                        entries.extend(word.to_le_bytes());
                    }
                }
            }
            for (from, bytes) in &block.host {
                copies.push(RawCopy { from: *from, to: staged.plus(at), bytes: *bytes });
                at += bytes;
            }
        }
        if entries.is_empty() {
            return Ok(());
        }
        self.lists.memory().write(list, &entries);
        let listed = staged.plus(PART_BYTES);
        copies.push(RawCopy { from: self.lists.device_address(list), to: listed, bytes: entries.len() });
        if let Some(before) = number.checked_sub(PARTS) {
            stream.wait_event(&self.done[before % LISTS])?;
        }
        for copies in copies.chunks(COPIES_AT_ONCE) {
            // SAFETY: the caller's promise for both ends; staging and lists are ours: the stream waits until what was in this
            // part has been spread, the host has waited above until the list was.
            unsafe { self.copier.copy(stream, copies) }?;
        }
        copied.record(stream)?;
        self.spreading.wait_event(copied)?;
        // SAFETY: as above; what the list names was checked.
        unsafe { self.launch(listed, (entries.len() / ENTRY_BYTES) as u32) }?;
        // From here on it counts, also if its event cannot be recorded: nobody writes there before it has ended.
        self.next += 1;
        done.record(&self.spreading)
    }

    /// Spreads what a list names.
    ///
    /// # Safety
    /// The list has so many entries, and what they name is mapped and left alone until this has ended.
    unsafe fn launch(&self, list: DeviceAddress, count: u32) -> Result<(), Error> {
        let launch = Launch { grid: [count.max(1), 1, 1], block: [THREADS, 1, 1], shared_bytes: 0 };
        let arguments = Arguments::new().address(list).u32(count);
        // SAFETY: these are the arguments that the kernel takes; the rest is the caller's promise.
        unsafe { self.spread.launch(&self.spreading, launch, &arguments) }
    }
}

impl Drop for Scatter {
    fn drop(&mut self) {
        // What it reads goes with this.
        let _ = self.spreading.synchronize();
    }
}
