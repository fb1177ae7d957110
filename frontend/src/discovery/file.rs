//! The list as a file of JSON: read again whenever it was written.

use std::fs::Metadata;
use std::io::Write;
use std::path::Path;
use std::time::Duration;

use tokio::time::sleep;

use super::{Appointed, DiscoveryList};

/// How often the file is looked at.
const PAUSE: Duration = Duration::from_millis(500);

/// What the file says. One that is not there lists nothing.
pub(super) fn read(path: &Path) -> Result<DiscoveryList, String> {
    match std::fs::read(path) {
        Ok(bytes) => serde_json::from_slice(&bytes).map_err(|error| format!("{}: {error}", path.display())),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(DiscoveryList::default()),
        Err(error) => Err(format!("read {}: {error}", path.display())),
    }
}

/// Replaces the file in one step: nobody reads half of it.
pub(super) fn write(path: &Path, list: &DiscoveryList) -> Result<(), String> {
    let failed = |error: std::io::Error| format!("write {}: {error}", path.display());
    let text = serde_json::to_string_pretty(list).map_err(|error| error.to_string())?;
    let fresh = path.with_extension(format!("{}.new", std::process::id()));
    let mut file = std::fs::File::create(&fresh).map_err(failed)?;
    file.write_all(text.as_bytes()).and_then(|()| file.write_all(b"\n")).map_err(failed)?;
    file.sync_all().and_then(|()| std::fs::rename(&fresh, path)).map_err(failed)
}

/// Serves what the file lists, for ever. While it cannot be read, what it said last holds.
pub(super) async fn follow(path: &Path, mut appointed: Appointed) {
    let mut seen = None;
    let mut last_error = String::new();
    loop {
        let written = std::fs::metadata(path).ok().as_ref().map(stamp);
        if seen != Some(written) {
            seen = Some(written);
            match read(path).and_then(|list| list.items()) {
                Ok(items) => {
                    last_error.clear();
                    appointed.become_items(items);
                }
                Err(error) if error != last_error => {
                    tracing::warn!(
                        error,
                        "the discovery file cannot be used, going on with what it said before"
                    );
                    last_error = error;
                }
                Err(_) => {}
            }
        }
        tokio::select! {
            () = sleep(PAUSE) => {}
            () = appointed.reap() => {}
        }
    }
}

fn stamp(metadata: &Metadata) -> (Option<std::time::SystemTime>, u64) {
    (metadata.modified().ok(), metadata.len())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_is_read_and_nonsense_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("fleet.json");
        assert_eq!(read(&path).unwrap(), DiscoveryList::default());
        let upstreams = ["http://h:1".to_owned()].into();
        let list = DiscoveryList { upstreams, ..DiscoveryList::default() };
        write(&path, &list).unwrap();
        assert_eq!(read(&path).unwrap(), list);
        std::fs::write(&path, r#"{"upstream": []}"#).unwrap();
        assert!(read(&path).unwrap_err().contains("upstream"));
        let workers = ["h:1".to_owned()].into();
        let wrong = DiscoveryList { workers, ..DiscoveryList::default() };
        assert!(wrong.items().unwrap_err().contains("\"h:1\""));
    }
}
