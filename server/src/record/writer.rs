//! The thread that writes the file.

use std::fs::{File, OpenOptions};
use std::io::{BufRead, BufReader, BufWriter, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::mpsc::{Receiver, RecvTimeoutError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use super::line::{Commit, Header, Line, Match, VERSION};
use super::window::Window;
use super::{Entry, Figures};
use crate::StartError;

/// How long lines may wait to be written while nothing else comes.
const FLUSH: Duration = Duration::from_millis(200);

/// Opens a file to record into: a new one, or one of ours to be continued. Its size now, too.
pub(super) fn open(path: &Path) -> Result<(File, u64), StartError> {
    let io = |op| StartError::io(op, path);
    let misfit = |reason: &'static str| StartError::Record { path: path.to_owned(), reason };
    let mut options = OpenOptions::new();
    options.read(true).append(true).create(true).mode(0o600);
    // A pipe that nobody reads would hold up the start.
    options.custom_flags(rustix::fs::OFlags::NONBLOCK.bits() as i32);
    let mut file = options.open(path).map_err(io("open trace"))?;
    let metadata = file.metadata().map_err(io("look at trace"))?;
    if !metadata.is_file() {
        return Err(misfit("it is not a regular file"));
    }
    rustix::fs::flock(&file, rustix::fs::FlockOperation::NonBlockingLockExclusive)
        .map_err(|_| misfit("another process records into it"))?;
    if metadata.len() == 0 {
        return Ok((file, 0));
    }
    let mut first = String::new();
    let read = BufReader::new((&file).take(4096)).read_line(&mut first);
    let is_ours = read.is_ok() && matches!(serde_json::from_str(&first), Ok(Line::KvbmTrace(_)));
    if !is_ours {
        return Err(misfit("it exists and is not a recorded trace: name another file, or remove it"));
    }
    let whole = end_of_last_line(&mut file, metadata.len()).map_err(io("read trace"))?;
    file.set_len(whole).map_err(io("cut trace"))?;
    Ok((file, whole))
}

/// One behind the last line end: what a killed daemon wrote of a line is void.
fn end_of_last_line(file: &mut File, length: u64) -> std::io::Result<u64> {
    let mut end = length;
    let mut piece = [0; 4096];
    while end > 0 {
        let start = end.saturating_sub(piece.len() as u64);
        let part = &mut piece[..(end - start) as usize];
        file.seek(SeekFrom::Start(start))?;
        file.read_exact(part)?;
        if let Some(at) = part.iter().rposition(|byte| *byte == b'\n') {
            return Ok(start + at as u64 + 1);
        }
        end = start;
    }
    Ok(0)
}

/// Writes what comes until it is told to stop, the file is full or cannot be written.
pub(super) struct Writer {
    pub path: PathBuf,
    pub file: BufWriter<File>,
    pub written: u64,
    pub bytes_max: u64,
    pub figures: Arc<Figures>,
    pub window: Window,
    pub last_ms: u64,
}

impl Writer {
    pub fn run(mut self, entries: &Receiver<Entry>) {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let header = Header { version: VERSION, unix_ms: u64::try_from(now.as_millis()).unwrap_or(0) };
        let mut going = self.write(&[Line::KvbmTrace(header)]);
        while going {
            going = match entries.recv_timeout(FLUSH) {
                Ok(Entry::Stop) | Err(RecvTimeoutError::Disconnected) => break,
                Err(RecvTimeoutError::Timeout) => self.flush(),
                Ok(entry) => {
                    let lines = self.lines(entry);
                    self.write(&lines)
                }
            };
        }
        self.flush();
    }

    fn lines(&mut self, entry: Entry) -> Vec<Line> {
        match entry {
            Entry::Namespace(namespace) => vec![Line::Namespace(namespace)],
            Entry::Match { at_ms, ns, keys, hits } => {
                self.figures.keys_queued.fetch_sub(keys.len(), Relaxed);
                let chain = self.window.shorten_match(ns, keys, hits[0] as usize + hits[1] as usize);
                vec![Line::Match(Match { t: self.time(at_ms), ns, hits, chain })]
            }
            Entry::Commit { at_ms, ns, blocks } => {
                self.figures.keys_queued.fetch_sub(blocks.len(), Relaxed);
                let t = self.time(at_ms);
                let follows = |(before, _): &(_, _), (_, parent): &(_, Option<_>)| *parent == Some(*before);
                let runs = blocks.chunk_by(follows);
                runs.map(|run| {
                    let keys: Vec<_> = run.iter().map(|(key, _)| *key).collect();
                    let parent = run[0].1;
                    let (chain, parent_said) = self.window.shorten_commit(ns, parent, &keys);
                    let parent = parent.filter(|_| !parent_said).map(super::line::BlockKey);
                    Line::Commit(Commit { t, ns, parent, chain })
                })
                .collect()
            }
            Entry::Stop => Vec::new(),
        }
    }

    /// Sessions are side by side: what they tell may come a little out of order.
    fn time(&mut self, at_ms: u64) -> u64 {
        self.last_ms = self.last_ms.max(at_ms);
        self.last_ms
    }

    /// False: there will be no more.
    fn write(&mut self, lines: &[Line]) -> bool {
        for line in lines {
            let mut text = serde_json::to_vec(line).expect("lines have no maps with keys that are no text");
            text.push(b'\n');
            let size = text.len() as u64;
            if self.written + size > self.bytes_max {
                let (path, bytes) = (self.path.display(), self.written);
                tracing::warn!(%path, bytes, "the trace has its full size: nothing more is recorded");
                return false;
            }
            if let Err(error) = self.file.write_all(&text) {
                return self.failed(&error);
            }
            self.written += size;
            self.figures.lines.fetch_add(1, Relaxed);
            self.figures.bytes.store(self.written, Relaxed);
        }
        true
    }

    fn flush(&mut self) -> bool {
        match self.file.flush() {
            Ok(()) => true,
            Err(error) => self.failed(&error),
        }
    }

    fn failed(&self, error: &std::io::Error) -> bool {
        tracing::warn!(path = %self.path.display(), %error, "the trace cannot be written: nothing more is recorded");
        false
    }
}
