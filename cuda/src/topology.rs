//! Which host memory a GPU is close to.

use std::fs;
use std::path::Path;

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

#[cfg(test)]
mod tests {
    use super::*;

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
