//! Reads a trace from a file, whatever its format.

use std::fs::File;
use std::io::{BufRead, BufReader};
use std::path::Path;

use super::{Numbered, Trace, mooncake, recorded};

/// The lines of a file, with their numbers.
struct Lines<'a> {
    path: &'a Path,
    input: BufReader<File>,
    number: usize,
    text: String,
    /// A file that is being written may end within a line.
    is_complete: bool,
}

impl<'a> Lines<'a> {
    fn open(path: &'a Path) -> Result<Self, String> {
        let file =
            File::open(path).map_err(|error| format!("cannot read trace {}: {error}", path.display()))?;
        let input = BufReader::with_capacity(1 << 16, file);
        Ok(Self { path, input, number: 0, text: String::new(), is_complete: true })
    }

    /// The next line that is not blank; false at the end.
    fn next(&mut self) -> Result<bool, String> {
        loop {
            self.text.clear();
            self.number += 1;
            let read = self.input.read_line(&mut self.text);
            if read.map_err(|error| self.named(&error.to_string()))? == 0 {
                return Ok(false);
            }
            self.is_complete = self.text.ends_with('\n');
            if !self.text.trim().is_empty() {
                return Ok(true);
            }
        }
    }

    /// With file and line before it.
    fn named(&self, reason: &str) -> String {
        format!("{}, line {}: {reason}", self.path.display(), self.number)
    }
}

/// Reads all of it. An error is one line with the file, the line's number and what was expected. `tokens_per_block`: of
/// formats that do not say it.
pub(in crate::replay) fn open(path: &Path, tokens_per_block: u32) -> Result<Trace, String> {
    let mut lines = Lines::open(path)?;
    if !lines.next()? {
        return Err(format!("trace {} is empty: expected {}", path.display(), mooncake::EXPECTED));
    }
    if recorded::is_header(&lines.text) {
        return read_recorded(&mut lines);
    }
    let mut requests = Numbered::new();
    loop {
        mooncake::read(&lines.text, &mut requests).map_err(|reason| lines.named(&reason))?;
        if !lines.next()? {
            return Ok(requests.finish(tokens_per_block));
        }
    }
}

fn read_recorded(lines: &mut Lines<'_>) -> Result<Trace, String> {
    let mut reader = recorded::Reader::new();
    loop {
        match reader.read(&lines.text) {
            // Whoever wrote it was stopped in the middle of it, or still writes.
            Err(_) if !lines.is_complete => eprintln!("kvbm: {}", lines.named("left out: it is incomplete")),
            read => read.map_err(|reason| lines.named(&reason))?,
        }
        if !lines.next()? {
            return reader.finish().map_err(|reason| format!("trace {}: {reason}", lines.path.display()));
        }
    }
}
