//! One file in each directory: found or made, locked, and judged before anything of it is changed.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::os::unix::fs::{DirBuilderExt, FileExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use rustix::fs::{FlockOperation, OFlags, fcntl_getfl, fcntl_setfl, flock};
use rustix::io::Errno;
use tracing::{info, warn};

use super::config::DiskConfig;
use super::error::DiskError;
use super::geometry::{FILES_MAX, Geometry};
use super::header::{FileHeader, HeaderFault, SetState, VERSION};
use crate::store::table::PAGE_BYTES;

/// The file's name in its directory.
const NAME: &str = "kvbm-disk-cache";

/// A file of the set, locked for as long as this lives.
#[derive(Debug)]
pub struct CacheFile {
    /// Where it is.
    pub path: PathBuf,
    /// The file.
    pub file: File,
}

impl CacheFile {
    /// Its size now.
    pub fn bytes(&self) -> Result<u64, DiskError> {
        Ok(self.file.metadata().map_err(DiskError::io("stat", &self.path))?.len())
    }
}

/// A set of files that was there.
#[derive(Debug, Clone, Copy)]
pub struct FoundSet {
    /// Its random name.
    pub set: [u8; 16],
    /// Its form.
    pub geometry: Geometry,
    /// Segments that all of its files have.
    pub segments: u32,
    /// When it was made, in seconds since 1970.
    pub created_at_s: u64,
    /// Whether its daemon closed it.
    pub clean: bool,
}

/// Finds or makes the files and locks them. With `reset` they are empty afterwards.
pub fn open_files(config: &DiskConfig) -> Result<Vec<CacheFile>, DiskError> {
    if config.directories.is_empty() || config.directories.len() > FILES_MAX as usize {
        let count = config.directories.len();
        return Err(DiskError::Config(format!("a disk cache has 1 to {FILES_MAX} directories, not {count}")));
    }
    let mut files: Vec<CacheFile> = Vec::new();
    for directory in &config.directories {
        let file = open_file(directory)?;
        // Seen before it is locked: a second lock on the same file would look like another daemon's.
        for other in &files {
            if identity(&file)? == identity(other)? {
                let directory = directory.display();
                return Err(DiskError::Config(format!("disk directory {directory} is listed twice")));
            }
        }
        flock(&file.file, FlockOperation::NonBlockingLockExclusive).map_err(|errno| {
            let path = file.path.clone();
            if errno == Errno::WOULDBLOCK {
                DiskError::InUse { path }
            } else {
                DiskError::io("lock", path)(errno)
            }
        })?;
        files.push(file);
    }
    if config.reset {
        for file in &files {
            file.file.set_len(0).map_err(DiskError::io("empty", &file.path))?;
        }
        info!("disk cache reset");
    }
    Ok(files)
}

fn open_file(directory: &Path) -> Result<CacheFile, DiskError> {
    DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(directory)
        .map_err(DiskError::io("create directory", directory))?;
    let path = directory.join(NAME);
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .mode(0o600)
        .custom_flags(OFlags::NOFOLLOW.bits().cast_signed())
        .open(&path)
        .map_err(DiskError::io("open", &path))?;
    let metadata = file.metadata().map_err(DiskError::io("stat", &path))?;
    if !metadata.is_file() {
        return Err(DiskError::NotOurs { path });
    }
    if metadata.len() == 0 {
        // The file's name is durable before anything in it is.
        fs::File::open(directory).and_then(|dir| dir.sync_all()).map_err(DiskError::io("sync", directory))?;
    }
    Ok(CacheFile { path, file })
}

fn identity(file: &CacheFile) -> Result<(u64, u64), DiskError> {
    let metadata = file.file.metadata().map_err(DiskError::io("stat", &file.path))?;
    Ok((metadata.dev(), metadata.ino()))
}

/// What the files hold. `None`: nothing that could be lost, so a new set may be made of them.
pub fn judge(files: &[CacheFile]) -> Result<Option<FoundSet>, DiskError> {
    let headers = files.iter().map(read_header).collect::<Result<Vec<_>, _>>()?;
    if headers.iter().flatten().all(|header| header.state == SetState::Creating) {
        return Ok(None);
    }
    let known = headers.iter().flatten().next().expect("one of them is not being created");
    let mut segments = u32::MAX;
    for (position, (file, header)) in files.iter().zip(&headers).enumerate() {
        let other = |reason: String| Err(DiskError::OtherSet { path: file.path.clone(), reason });
        let Some(header) = header else {
            return other(format!("is empty, but the others belong to a set of {}", known.geometry.files));
        };
        if header.geometry.files as usize != files.len() {
            return other(format!("is of a set of {} files, not {}", header.geometry.files, files.len()));
        }
        if header.file as usize != position {
            return other(format!("is file {} of its set, not {}", header.file + 1, position + 1));
        }
        if (header.set, header.geometry) != (known.set, known.geometry) {
            return other("is of another set than the first file".to_owned());
        }
        let whole = header.geometry.extents_in(file.bytes()?);
        if whole < header.segments && header.state != SetState::Creating {
            let (path, named) = (file.path.display(), header.segments);
            warn!("{path} has been cut: {whole} of its {named} segments are there, the rest starts empty");
        }
        segments = segments.min(whole).min(header.segments);
    }
    let clean = headers.iter().flatten().all(|header| header.state == SetState::Closed);
    let FileHeader { set, geometry, created_at_s, .. } = *known;
    Ok(Some(FoundSet { set, geometry, segments, created_at_s, clean }))
}

/// The header of a file; `None` if nothing has been written there yet.
fn read_header(file: &CacheFile) -> Result<Option<FileHeader>, DiskError> {
    let mut page = [0; PAGE_BYTES];
    let mut read = 0;
    while read < PAGE_BYTES {
        match file.file.read_at(&mut page[read..], read as u64) {
            Ok(0) => break,
            Ok(bytes) => read += bytes,
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
            Err(error) => return Err(DiskError::io("read header of", &file.path)(error)),
        }
    }
    // A page of zeros is what a power cut may leave of a file that was just being made.
    if file.bytes()? <= PAGE_BYTES as u64 && page.iter().all(|byte| *byte == 0) {
        return Ok(None);
    }
    let path = file.path.clone();
    let known = VERSION;
    match FileHeader::decode(&page) {
        Ok(header) => Ok(Some(header)),
        Err(HeaderFault::NotOurs) => Err(DiskError::NotOurs { path }),
        Err(HeaderFault::Damaged) => Err(DiskError::Damaged { path }),
        Err(HeaderFault::Version(found)) if found > known => Err(DiskError::Newer { path, found, known }),
        Err(HeaderFault::Version(found)) => Err(DiskError::Older { path, found, known }),
    }
}

/// Has the files bypass the page cache from now on, if they can; says if not.
pub fn bypass_page_cache(files: &[CacheFile], wanted: bool) -> Result<(), DiskError> {
    if !wanted {
        info!("disk cache goes through the page cache, as configured");
        return Ok(());
    }
    for file in files {
        match set_direct(file, OFlags::DIRECT) {
            Ok(()) => {}
            Err(Errno::INVAL | Errno::OPNOTSUPP) => {
                let path = file.path.display();
                warn!("{path} cannot bypass the page cache: the disk cache goes through it");
                return use_page_cache(files);
            }
            Err(errno) => return Err(DiskError::io("set O_DIRECT on", &file.path)(errno)),
        }
    }
    Ok(())
}

/// Has all files go through the page cache.
pub fn use_page_cache(files: &[CacheFile]) -> Result<(), DiskError> {
    for file in files {
        set_direct(file, OFlags::empty()).map_err(DiskError::io("clear O_DIRECT on", &file.path))?;
    }
    Ok(())
}

/// Whether the files bypass the page cache.
pub fn is_direct(files: &[CacheFile]) -> bool {
    files.iter().any(|file| fcntl_getfl(&file.file).is_ok_and(|flags| flags.contains(OFlags::DIRECT)))
}

/// Concerns the engine's descriptors too: they are copies of this one.
fn set_direct(file: &CacheFile, direct: OFlags) -> Result<(), Errno> {
    let flags = fcntl_getfl(&file.file)?;
    fcntl_setfl(&file.file, flags.difference(OFlags::DIRECT) | direct)
}
