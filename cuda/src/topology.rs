//! Which host memory, and which cores, a GPU is close to.

use std::fs;
use std::path::Path;

use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};

/// Node of the device at `pci_bus_id`, by the kernel's word; `None` on machines with one node.
pub(crate) fn numa_node(pci_bus_id: &str) -> Option<u32> {
    numa_node_under(Path::new("/sys/bus/pci/devices"), pci_bus_id)
}

fn numa_node_under(devices: &Path, pci_bus_id: &str) -> Option<u32> {
    // The kernel writes four digits of the domain, CUDA sometimes eight.
    let (domain, rest) = pci_bus_id.split_once(':')?;
    let domain = u32::from_str_radix(domain, 16).ok()?;
    let path = devices.join(format!("{domain:04x}:{}", rest.to_lowercase())).join("numa_node");
    // -1: the machine does not say.
    fs::read_to_string(path).ok()?.trim().parse().ok()
}

/// Keeps the calling thread on the cores of a node, as far as it may use them. Where it may use none it stays where it is.
pub(crate) fn stay_on(node: u32) {
    stay_on_under(Path::new("/sys/devices/system/node"), node);
}

fn stay_on_under(nodes: &Path, node: u32) {
    let (Some(near), Ok(allowed)) = (cores_under(nodes, node), sched_getaffinity(None)) else { return };
    let mut both = CpuSet::new();
    near.into_iter().filter(|core| allowed.is_set(*core)).for_each(|core| both.set(core));
    if both.count() > 0
        && let Err(error) = sched_setaffinity(None, &both)
    {
        tracing::warn!(node, %error, "a thread cannot be kept near its GPU");
    }
}

/// The kernel writes ranges: `0-27,56-83`.
fn cores_under(nodes: &Path, node: u32) -> Option<Vec<usize>> {
    let list = fs::read_to_string(nodes.join(format!("node{node}")).join("cpulist")).ok()?;
    let range = |part: &str| {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        Some(first.parse().ok()?..=last.parse::<usize>().ok()?.min(CpuSet::MAX_CPU - 1))
    };
    let ranges: Option<Vec<_>> = list.trim().split(',').filter(|part| !part.is_empty()).map(range).collect();
    Some(ranges?.into_iter().flatten().collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Node 0 has the first core that this thread may use, node 1 cores that are not there, node 2 says nothing.
    #[test]
    fn a_thread_stays_on_the_cores_of_its_node_as_far_as_it_may() {
        let allowed = sched_getaffinity(None).unwrap();
        let mine = (0..CpuSet::MAX_CPU).find(|core| allowed.is_set(*core)).unwrap();
        let root = tempfile::tempdir().unwrap();
        let absent = (0..CpuSet::MAX_CPU).rfind(|core| !allowed.is_set(*core)).unwrap();
        for (node, list) in
            [(0, format!("{mine},{absent}-5000\n")), (1, format!("{absent}\n")), (2, "\n".into())]
        {
            let node = root.path().join(format!("node{node}"));
            fs::create_dir(&node).unwrap();
            fs::write(node.join("cpulist"), list).unwrap();
        }
        let cores_of = |node: u32| {
            let root = root.path().to_owned();
            let ask = move || {
                stay_on_under(&root, node);
                let now = sched_getaffinity(None).unwrap();
                (0..CpuSet::MAX_CPU).filter(|core| now.is_set(*core)).collect::<Vec<_>>()
            };
            std::thread::spawn(ask).join().unwrap()
        };
        assert_eq!(cores_of(0), [mine]);
        for node in [1, 2, 3] {
            assert_eq!(cores_of(node).len(), allowed.count() as usize, "node {node}");
        }
    }

    #[test]
    fn lists_of_cores_are_read_and_nonsense_is_not() {
        let root = tempfile::tempdir().unwrap();
        for (node, list) in ["0-2,8,10-11\n", "x-3\n", "5"].into_iter().enumerate() {
            let node = root.path().join(format!("node{node}"));
            fs::create_dir(&node).unwrap();
            fs::write(node.join("cpulist"), list).unwrap();
        }
        let cores = |node| cores_under(root.path(), node);
        assert_eq!((cores(0), cores(1), cores(2)), (Some(vec![0, 1, 2, 8, 10, 11]), None, Some(vec![5])));
    }

    #[test]
    fn the_node_is_read_whatever_the_number_of_digits() {
        let root = tempfile::tempdir().unwrap();
        for (id, node) in [("0000:17:00.0", "1\n"), ("0000:c8:00.0", "-1\n")] {
            fs::create_dir(root.path().join(id)).unwrap();
            fs::write(root.path().join(id).join("numa_node"), node).unwrap();
        }
        let node = |id| numa_node_under(root.path(), id);
        assert_eq!((node("0000:17:00.0"), node("00000000:17:00.0")), (Some(1), Some(1)));
        assert_eq!((node("0000:C8:00.0"), node("0000:99:00.0"), node("nonsense")), (None, None, None));
    }
}
