//! Finds shared libraries of CUDA where the dynamic linker would not look.
//!
//! A library that was opened by its absolute path is found by its name from then on, so the bindings need not know where
//! it was.

use std::collections::BTreeSet;
use std::env;
use std::ffi::{CStr, CString};
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use crate::Error;

/// Folders of drivers and toolkits on the usual systems.
const SYSTEM: [&str; 8] = [
    "/usr/local/nvidia/lib64",
    "/usr/local/nvidia/lib",
    "/usr/lib/x86_64-linux-gnu",
    "/usr/lib/aarch64-linux-gnu",
    "/usr/lib64",
    "/usr/lib/wsl/lib",
    "/run/opengl-driver/lib",
    "/usr/local/cuda/lib64",
];

/// Opens the first of `names` that is found, for this process and for libraries that are opened later. It stays open.
/// Returns what was opened.
pub(crate) fn open_first(names: &[&str]) -> Result<PathBuf, Error> {
    let folders = folders(&Surroundings::of_this_process());
    let mut reasons = Vec::new();
    for name in names {
        let candidates =
            std::iter::once(PathBuf::from(name)).chain(folders.iter().map(|folder| folder.join(name)));
        for path in candidates.filter(|path| path.is_relative() || path.exists()) {
            match open(&path) {
                Ok(()) => return Ok(path),
                Err(reason) if path.is_absolute() => reasons.push(reason),
                Err(_) => {}
            }
        }
    }
    let looked: Vec<_> = folders.iter().map(|folder| folder.display().to_string()).collect();
    let reason = if reasons.is_empty() {
        format!("not in the dynamic linker's path nor in {}", looked.join(", "))
    } else {
        reasons.join("; ")
    };
    Err(Error::missing(names[0], reason, "install it, or name its folder in LD_LIBRARY_PATH"))
}

fn open(path: &Path) -> Result<(), String> {
    let c_path = CString::new(path.as_os_str().as_bytes()).map_err(|error| error.to_string())?;
    // SAFETY: opening runs the library's initialisers; libraries of CUDA may be opened at any time, from any thread.
    let handle = unsafe { libc::dlopen(c_path.as_ptr(), libc::RTLD_NOW | libc::RTLD_GLOBAL) };
    if !handle.is_null() {
        return Ok(());
    }
    // SAFETY: the reason of the call before, of this thread; a constant string until the next one.
    let reason = unsafe { libc::dlerror() };
    if reason.is_null() {
        return Err(format!("{} cannot be opened", path.display()));
    }
    // SAFETY: as above.
    Err(unsafe { CStr::from_ptr(reason) }.to_string_lossy().into_owned())
}

/// What of the environment says where libraries are.
#[derive(Debug, Default)]
struct Surroundings {
    /// Folders of libraries, named outright.
    libraries: Vec<PathBuf>,
    /// Roots of CUDA toolkits.
    toolkits: Vec<PathBuf>,
    /// Roots of Python environments, whose wheels bring libraries along.
    pythons: Vec<PathBuf>,
}

impl Surroundings {
    fn of_this_process() -> Self {
        let paths = |name| env::var_os(name).map(|all| env::split_paths(&all).collect()).unwrap_or_default();
        let one = |name| env::var_os(name).filter(|path| !path.is_empty()).map(PathBuf::from);
        let mut libraries: Vec<PathBuf> = paths("LD_LIBRARY_PATH");
        libraries.extend(SYSTEM.map(PathBuf::from));
        let mut toolkits: Vec<PathBuf> = ["CUDA_HOME", "CUDA_PATH"].into_iter().filter_map(one).collect();
        toolkits.extend(children(Path::new("/usr/local")).into_iter().filter(|path| named(path, "cuda")));
        let mut pythons: Vec<PathBuf> = ["VIRTUAL_ENV", "CONDA_PREFIX"].into_iter().filter_map(one).collect();
        // The interpreter that a user would start: <root>/bin/python3.
        pythons.extend(
            paths("PATH")
                .into_iter()
                .filter(|folder: &PathBuf| folder.join("python3").exists())
                .filter_map(|folder| folder.parent().map(Path::to_path_buf)),
        );
        Self { libraries, toolkits, pythons }
    }
}

/// Where to look, in this order, each folder once.
fn folders(surroundings: &Surroundings) -> Vec<PathBuf> {
    let mut all = surroundings.libraries.clone();
    for toolkit in &surroundings.toolkits {
        all.extend([toolkit.join("lib64"), toolkit.join("lib"), toolkit.join("targets/x86_64-linux/lib")]);
    }
    for root in &surroundings.pythons {
        for python in children(&root.join("lib")).into_iter().filter(|path| named(path, "python3")) {
            for packages in ["site-packages/nvidia", "dist-packages/nvidia"] {
                all.extend(children(&python.join(packages)).into_iter().map(|wheel| wheel.join("lib")));
            }
        }
    }
    let mut seen = BTreeSet::new();
    all.retain(|folder| folder.is_dir() && seen.insert(folder.clone()));
    all
}

fn named(path: &Path, prefix: &str) -> bool {
    path.file_name().is_some_and(|name| name.as_bytes().starts_with(prefix.as_bytes()))
}

/// What is in a folder, in the order of names; nothing if it cannot be read.
fn children(folder: &Path) -> Vec<PathBuf> {
    let mut found: Vec<_> =
        fs::read_dir(folder).into_iter().flatten().flatten().map(|entry| entry.path()).collect();
    found.sort();
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn toolkits_and_wheels_are_searched_after_the_named_folders_each_once() {
        let root = tempfile::tempdir().unwrap();
        let folder = |path: &str| {
            let path = root.path().join(path);
            fs::create_dir_all(&path).unwrap();
            path
        };
        let named = folder("lib");
        let toolkit = folder("cuda-13.0/lib64");
        let wheels = [
            folder("env/lib/python3.12/site-packages/nvidia/cu13/lib"),
            folder("env/lib/python3.12/site-packages/nvidia/cublas/lib"),
        ];
        folder("env/lib/other/site-packages/nvidia/cu13/lib");
        let surroundings = Surroundings {
            libraries: vec![named.clone(), named.clone(), root.path().join("absent")],
            toolkits: vec![root.path().join("cuda-13.0")],
            pythons: vec![root.path().join("env"), root.path().join("nowhere")],
        };
        let [thirteen, blas] = wheels;
        assert_eq!(folders(&surroundings), [named, toolkit, thirteen, blas]);
    }

    #[test]
    fn a_library_that_is_nowhere_is_said_to_be_missing_and_where_it_was_looked_for() {
        let error = open_first(&["libkvbm-no-such-library.so.7"]).unwrap_err().to_string();
        assert!(
            error.starts_with("find libkvbm-no-such-library.so.7: not in the dynamic linker's path"),
            "{error}"
        );
        assert!(error.contains("LD_LIBRARY_PATH"), "{error}");
    }

    #[test]
    fn a_file_that_is_no_library_is_refused_with_the_linkers_reason() {
        let root = tempfile::tempdir().unwrap();
        let path = root.path().join("libfake.so");
        fs::write(&path, b"not a library").unwrap();
        let reason = open(&path).unwrap_err();
        assert!(reason.contains("libfake.so"), "{reason}");
    }
}
