//! Whether there is CUDA on this machine, and which GPUs.

use std::ffi::CStr;
use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

use crate::sys::{self, call, cu};
use crate::{Error, library, topology};

/// Oldest driver that has what this crate calls, as CUDA counts: 12.0.
const VERSION_MIN: i32 = 12_000;

/// Proof that the driver was found and initialised. Everything else begins with it.
#[derive(Debug, Clone)]
pub struct Driver {
    version: i32,
    library: PathBuf,
}

/// One GPU.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Device {
    /// CUDA's number for it in this process. CUDA_VISIBLE_DEVICES changes it.
    pub ordinal: u32,
    /// "GPU-…": names it on every machine and in every process.
    pub uuid: String,
    /// Where it is on the PCI bus, as "0000:17:00.0".
    pub pci_bus_id: String,
    /// What the vendor calls it.
    pub name: String,
    /// All of its memory, bytes.
    pub memory_bytes: u64,
    /// Node of host memory that it is closest to, if the machine has several.
    pub numa_node: Option<u32>,
    /// Compute capability, major and minor.
    pub capability: (u32, u32),
    /// Multiprocessors.
    pub multiprocessors: u32,
    /// Copies that it can do at the same time as kernels run.
    pub copy_engines: u32,
    /// Memory can be handed to other processes as a file descriptor.
    pub exports_descriptors: bool,
    /// Memory of the host can be registered for copies.
    pub registers_host_memory: bool,
}

/// How a user names a GPU: an ordinal ("0", "cuda:0"), a UUID ("GPU-…") or a place on the bus ("0000:17:00.0").
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum DeviceName {
    /// CUDA's number.
    Ordinal(u32),
    /// Universally unique.
    Uuid(String),
    /// Domain, bus, device, function.
    PciBusId(String),
}

impl FromStr for DeviceName {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self, Error> {
        let ordinal = text.strip_prefix("cuda:").unwrap_or(text);
        if let Ok(ordinal) = ordinal.parse() {
            return Ok(Self::Ordinal(ordinal));
        }
        if text.starts_with("GPU-") {
            return Ok(Self::Uuid(text.to_owned()));
        }
        if text.matches(':').count() >= 1 && text.contains('.') {
            return Ok(Self::PciBusId(text.to_lowercase()));
        }
        let reason =
            format!("\"{text}\" is neither a number, nor GPU-<uuid>, nor <domain>:<bus>:<device>.<function>");
        Err(Error::refused("name of a GPU", reason))
    }
}

impl fmt::Display for DeviceName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Ordinal(ordinal) => write!(f, "cuda:{ordinal}"),
            Self::Uuid(name) | Self::PciBusId(name) => f.write_str(name),
        }
    }
}

impl DeviceName {
    /// True if `device` is the one that is meant.
    pub fn names(&self, device: &Device) -> bool {
        match self {
            Self::Ordinal(ordinal) => device.ordinal == *ordinal,
            Self::Uuid(uuid) => device.uuid.eq_ignore_ascii_case(uuid),
            // The domain may be left out.
            Self::PciBusId(id) => device.pci_bus_id == *id || device.pci_bus_id == format!("0000:{id}"),
        }
    }
}

impl Driver {
    /// Finds and initialises the driver. The error says what is missing and what to do about it.
    pub fn load() -> Result<Self, Error> {
        let library = library::open_first(&["libcuda.so.1", "libcuda.so"]).map_err(|error| match error {
            Error::Missing { reason, .. } => Error::missing(
                "the NVIDIA driver (libcuda.so.1)",
                reason,
                "install the driver, or start the container with its GPUs; without a GPU kvbm serves from host memory",
            ),
            other => other,
        })?;
        // SAFETY: asks the dynamic linker only.
        if !unsafe { cu::is_culib_present() } {
            let reason = format!("{} was opened, but is not found by its name", library.display());
            return Err(Error::missing("libcuda.so.1", reason, "name its folder in LD_LIBRARY_PATH"));
        }
        if let Some(function) = sys::missing_function() {
            return Err(Error::missing(
                format!("{function} in {}", library.display()),
                "the driver does not have it",
                "install driver 525 (CUDA 12.0) or newer",
            ));
        }
        // SAFETY: initialises the driver; may be called any number of times.
        unsafe { call!(cuInit(0)) }.map_err(|error| initialisation(&library, error))?;
        let mut version = 0;
        // SAFETY: writes one number.
        unsafe { call!(cuDriverGetVersion(&mut version)) }?;
        if version < VERSION_MIN {
            return Err(Error::missing(
                "CUDA 12.0 or newer",
                format!("{} gives CUDA {}", library.display(), version_text(version)),
                "install driver 525 or newer",
            ));
        }
        Ok(Self { version, library })
    }

    /// CUDA's version that the driver supports, as "13.0".
    pub fn version(&self) -> String {
        version_text(self.version)
    }

    /// What was opened.
    pub fn library(&self) -> &std::path::Path {
        &self.library
    }

    /// All GPUs that this process may use, in the order of their ordinals.
    pub fn devices(&self) -> Result<Vec<Device>, Error> {
        let mut count = 0;
        // SAFETY: writes one number.
        unsafe { call!(cuDeviceGetCount(&mut count)) }?;
        (0..count).map(|ordinal| self.describe(ordinal)).collect()
    }

    /// The GPU of that name.
    pub fn device(&self, name: &DeviceName) -> Result<Device, Error> {
        let devices = self.devices()?;
        let known: Vec<_> =
            devices.iter().map(|device| format!("{} ({})", device.ordinal, device.uuid)).collect();
        devices.into_iter().find(|device| name.names(device)).ok_or_else(|| {
            let reason = if known.is_empty() {
                "this process sees no GPU".into()
            } else {
                format!("this process sees {}", known.join(", "))
            };
            Error::missing(format!("GPU {name}"), reason, "check the name and CUDA_VISIBLE_DEVICES")
        })
    }

    fn describe(&self, ordinal: i32) -> Result<Device, Error> {
        let device = handle(ordinal)?;
        let (mut name, mut bus, mut uuid, mut bytes) = ([0; 256], [0; 64], cu::CUuuid { bytes: [0; 16] }, 0);
        // SAFETY: each writes within the buffer whose size it was told.
        unsafe {
            call!(cuDeviceGetName(name.as_mut_ptr(), name.len() as i32, device))?;
            call!(cuDeviceGetPCIBusId(bus.as_mut_ptr(), bus.len() as i32, device))?;
            call!(cuDeviceGetUuid_v2(&mut uuid, device))?;
            call!(cuDeviceTotalMem_v2(&mut bytes, device))?;
        }
        let is = |which| attribute(device, which).map(|value| value != 0);
        let count = |which| attribute(device, which).map(|value| value.max(0) as u32);
        use cu::CUdevice_attribute_enum as Attribute;
        let pci_bus_id = c_text(&bus).to_lowercase();
        Ok(Device {
            ordinal: ordinal as u32,
            uuid: uuid_text(uuid.bytes.map(|byte| byte as u8)),
            numa_node: topology::numa_node(&pci_bus_id),
            pci_bus_id,
            name: c_text(&name),
            memory_bytes: bytes as u64,
            capability: (
                count(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?,
                count(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?,
            ),
            multiprocessors: count(Attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?,
            copy_engines: count(Attribute::CU_DEVICE_ATTRIBUTE_ASYNC_ENGINE_COUNT)?,
            exports_descriptors: is(
                Attribute::CU_DEVICE_ATTRIBUTE_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR_SUPPORTED,
            )?,
            registers_host_memory: is(Attribute::CU_DEVICE_ATTRIBUTE_HOST_REGISTER_SUPPORTED)?,
        })
    }
}

/// CUDA's handle of a device.
pub(crate) fn handle(ordinal: i32) -> Result<cu::CUdevice, Error> {
    let mut device = 0;
    // SAFETY: writes one number.
    unsafe { call!(cuDeviceGet(&mut device, ordinal)) }?;
    Ok(device)
}

fn attribute(device: cu::CUdevice, which: cu::CUdevice_attribute) -> Result<i32, Error> {
    let mut value = 0;
    // SAFETY: writes one number.
    unsafe { call!(cuDeviceGetAttribute(&mut value, which, device)) }?;
    Ok(value)
}

/// Why the driver does not start, in words that lead somewhere.
fn initialisation(library: &std::path::Path, error: Error) -> Error {
    let Error::Call { code, name, .. } = &error else { return error };
    let remedy = match code {
        34 => "this is a stub for building programs: remove its folder from LD_LIBRARY_PATH",
        100 => "no GPU is visible: check nvidia-smi, the container's devices and CUDA_VISIBLE_DEVICES",
        803 | 804 => {
            "the library is of another version than the kernel's driver: restart the machine or the container"
        }
        _ => "check nvidia-smi and the kernel's log",
    };
    Error::missing(
        "a usable GPU",
        format!("{} says {name} ({code}) when initialised", library.display()),
        remedy,
    )
}

fn version_text(version: i32) -> String {
    format!("{}.{}", version / 1000, version % 1000 / 10)
}

fn c_text(bytes: &[std::ffi::c_char]) -> String {
    let bytes: Vec<u8> = bytes.iter().map(|byte| *byte as u8).collect();
    CStr::from_bytes_until_nul(&bytes).map(|text| text.to_string_lossy().into_owned()).unwrap_or_default()
}

/// As nvidia-smi prints it.
fn uuid_text(bytes: [u8; 16]) -> String {
    let hex: String = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
    format!("GPU-{}-{}-{}-{}-{}", &hex[..8], &hex[8..12], &hex[12..16], &hex[16..20], &hex[20..])
}

#[cfg(test)]
mod tests {
    use super::*;

    fn device() -> Device {
        Device {
            ordinal: 1,
            uuid: uuid_text(std::array::from_fn(|i| i as u8 * 0x11)),
            pci_bus_id: "0000:17:00.0".into(),
            name: "Test".into(),
            memory_bytes: 1 << 30,
            numa_node: None,
            capability: (9, 0),
            multiprocessors: 132,
            copy_engines: 3,
            exports_descriptors: true,
            registers_host_memory: true,
        }
    }

    #[test]
    fn a_gpu_has_three_names() {
        let device = device();
        assert_eq!(device.uuid, "GPU-00112233-4455-6677-8899-aabbccddeeff");
        for name in ["1", "cuda:1", "GPU-00112233-4455-6677-8899-AABBCCDDEEFF", "0000:17:00.0", "17:00.0"] {
            assert!(name.parse::<DeviceName>().unwrap().names(&device), "{name}");
        }
        for name in ["0", "cuda:0", "GPU-00112233", "0000:18:00.0"] {
            assert!(!name.parse::<DeviceName>().unwrap().names(&device), "{name}");
        }
        for name in ["", "gpu", "cuda", "cuda:", "-1"] {
            let error = name.parse::<DeviceName>().unwrap_err().to_string();
            assert!(error.starts_with("refuse name of a GPU"), "{error}");
        }
    }

    #[test]
    fn versions_and_names_are_as_the_vendor_prints_them() {
        assert_eq!((version_text(13_000), version_text(12_080)), ("13.0".into(), "12.8".into()));
        assert_eq!(c_text(&[b'H' as _, b'1' as _, 0, b'x' as _]), "H1");
    }

    #[test]
    fn loading_says_no_and_why_or_finds_at_least_one_gpu() {
        match Driver::load() {
            Ok(driver) => assert!(!driver.devices().unwrap().is_empty()),
            Err(error) => {
                assert!(matches!(error, Error::Missing { .. }), "{error}");
                assert!(error.to_string().contains("; "), "it says what to do: {error}");
            }
        }
    }
}
