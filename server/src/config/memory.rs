//! How much memory this process could still get: the kernel's estimate, and the limits of the control groups it is in.

use std::path::{Path, PathBuf};

/// `None` when neither can be read.
pub(crate) fn available_bytes() -> Option<u64> {
    available_below(Path::new("/"))
}

/// Memory that processes share, in use now.
pub(crate) fn shared_bytes() -> u64 {
    let kernel = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    field(&kernel, "Shmem:").map_or(0, |kibibytes| kibibytes * 1024)
}

fn available_below(root: &Path) -> Option<u64> {
    let kernel = std::fs::read_to_string(root.join("proc/meminfo")).ok();
    let kernel = kernel.and_then(|text| field(&text, "MemAvailable:")).map(|kibibytes| kibibytes * 1024);
    groups(root).filter_map(|group| left_in_group(&group)).chain(kernel).min()
}

/// The control group (version 2) of this process and those around it, as far as they are visible.
fn groups(root: &Path) -> impl Iterator<Item = PathBuf> {
    let own = std::fs::read_to_string(root.join("proc/self/cgroup")).unwrap_or_default();
    let own = own.lines().find_map(|line| line.strip_prefix("0::/")).unwrap_or_default().to_owned();
    let mount = root.join("sys/fs/cgroup");
    let paths: Vec<PathBuf> = Path::new(&own).ancestors().map(|path| mount.join(path)).collect();
    paths.into_iter()
}

/// Limit less what is in use and cannot be reclaimed.
fn left_in_group(group: &Path) -> Option<u64> {
    let read = |name: &str| std::fs::read_to_string(group.join(name)).ok();
    let limit: u64 = read("memory.max")?.trim().parse().ok()?;
    let used: u64 = read("memory.current")?.trim().parse().ok()?;
    let reclaimable = read("memory.stat").and_then(|text| field(&text, "inactive_file")).unwrap_or(0);
    Some(limit.saturating_sub(used.saturating_sub(reclaimable)))
}

fn field(text: &str, name: &str) -> Option<u64> {
    let line = text.lines().find(|line| line.split_whitespace().next() == Some(name))?;
    line.split_whitespace().nth(1)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn put(root: &Path, path: &str, text: &str) {
        let path = root.join(path);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, text).unwrap();
    }

    #[test]
    fn the_tightest_limit_counts() {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path();
        assert_eq!(available_below(root), None);
        put(root, "proc/meminfo", "MemTotal: 9 kB\nMemAvailable:      4 kB\n");
        assert_eq!(available_below(root), Some(4096));
        put(root, "proc/self/cgroup", "0::/a/b\n");
        put(root, "sys/fs/cgroup/a/memory.max", "3000\n");
        put(root, "sys/fs/cgroup/a/memory.current", "2500\n");
        put(root, "sys/fs/cgroup/a/memory.stat", "anon 1\ninactive_file 1000\n");
        put(root, "sys/fs/cgroup/a/b/memory.max", "max\n");
        assert_eq!(available_below(root), Some(1500));
    }

    #[test]
    fn this_machine_has_some() {
        assert!(available_bytes().is_some_and(|bytes| bytes > 0));
    }
}
