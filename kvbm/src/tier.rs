//! Where blocks are, and the ways between.

use std::fmt;

/// A level of the hierarchy, fastest first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Tier {
    /// An engine's KV memory (G1).
    Device,
    /// Host memory of the daemon (G2).
    Host,
    /// NVMe (G3).
    Disk,
    /// A remote store (G4).
    Remote,
}

impl Tier {
    /// Lower-case name, as in metrics.
    pub fn name(self) -> &'static str {
        match self {
            Self::Device => "device",
            Self::Host => "host",
            Self::Disk => "disk",
            Self::Remote => "remote",
        }
    }
}

impl fmt::Display for Tier {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// A way that blocks are copied.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Route {
    /// Offload: device to host.
    DeviceToHost,
    /// Onboard: host to device.
    HostToDevice,
    /// Demote: host to disk.
    HostToDisk,
    /// Promote: disk to host.
    DiskToHost,
    /// Onboard: from another device of the node, without a detour over host.
    DeviceToDevice,
}

impl Route {
    /// All routes, in order of [`Route::index`].
    pub const ALL: [Self; 5] =
        [Self::DeviceToHost, Self::HostToDevice, Self::HostToDisk, Self::DiskToHost, Self::DeviceToDevice];

    /// Name as in metrics.
    pub fn name(self) -> &'static str {
        match self {
            Self::DeviceToHost => "d2h",
            Self::HostToDevice => "h2d",
            Self::HostToDisk => "host_to_disk",
            Self::DiskToHost => "disk_to_host",
            Self::DeviceToDevice => "device_to_device",
        }
    }

    /// Position in [`Route::ALL`].
    pub fn index(self) -> usize {
        match self {
            Self::DeviceToHost => 0,
            Self::HostToDevice => 1,
            Self::HostToDisk => 2,
            Self::DiskToHost => 3,
            Self::DeviceToDevice => 4,
        }
    }
}
