use std::path::{Path, PathBuf};
use std::process::Command;

use super::*;

fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("kernels")
}

/// BLAKE3 over the sources in the order of their names, as the script does.
fn digest_of_sources() -> String {
    let mut sources: Vec<PathBuf> = std::fs::read_dir(folder())
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.extension().is_some_and(|kind| kind == "cu" || kind == "cuh"))
        .collect();
    sources.sort();
    assert!(sources.len() >= 5, "{sources:?}");
    let mut all = blake3::Hasher::new();
    for path in sources {
        all.update(&std::fs::read(path).unwrap());
    }
    all.finalize().to_hex().to_string()
}

#[test]
fn the_code_was_made_from_these_sources() {
    let line = PTX.lines().find_map(|line| line.strip_prefix("// sources: ")).expect("build.sh writes it");
    assert_eq!(line, digest_of_sources(), "run worker/kernels/build.sh");
    assert!(PTX.contains(".target sm_80"), "it runs from capability 8.0 on");
}

/// Bytes of a kernel's only parameter.
fn parameter_bytes(kernel: &str) -> usize {
    let declaration = format!(".param .align 8 .b8 {kernel}_param_0[");
    let found: Vec<&str> = PTX.lines().filter_map(|line| line.trim().strip_prefix(&declaration)).collect();
    assert_eq!(found.len(), 1, "{kernel}");
    assert!(!PTX.contains(&format!("{kernel}_param_1")), "{kernel} takes one structure");
    found[0].split(']').next().unwrap().parse().unwrap()
}

#[test]
fn structures_are_as_large_as_the_kernels_take_them() {
    let kernels = [
        ("embed", size_of::<Embed>()),
        ("normalize", size_of::<Normalize>()),
        ("rotate_store", size_of::<RotateStore>()),
        ("activate", size_of::<Activate>()),
        ("attend_prefill_64", size_of::<AttendPrefill>()),
        ("attend_prefill_128", size_of::<AttendPrefill>()),
        ("attend_decode_64", size_of::<AttendDecode>()),
        ("attend_decode_128", size_of::<AttendDecode>()),
        ("join_parts", size_of::<AttendDecode>()),
        ("largest", size_of::<Largest>()),
        ("fill_random", size_of::<FillRandom>()),
    ];
    for (kernel, bytes) in kernels {
        assert_eq!(parameter_bytes(kernel), bytes, "{kernel}");
    }
}

// The kernels' arithmetic, on this processor: see worker/kernels/emulated.
#[test]
fn kernels_agree_with_plain_arithmetic() {
    let compiler = std::env::var("CXX").unwrap_or_else(|_| "c++".into());
    let target = tempfile::tempdir().unwrap();
    let program = target.path().join("check");
    let mut build = Command::new(&compiler);
    build.args([
        "-std=c++20",
        "-O2",
        "-fno-strict-aliasing",
        "-I",
        "emulated",
        "-I",
        ".",
        "emulated/main.cpp",
        "-o",
    ]);
    let built = match build.arg(&program).current_dir(folder()).output() {
        Err(error) => {
            eprintln!("skipped: no compiler for C++ ({compiler}: {error})");
            return;
        }
        Ok(built) => built,
    };
    assert!(built.status.success(), "{}", String::from_utf8_lossy(&built.stderr));
    let run = Command::new(&program).output().unwrap();
    assert!(run.status.success(), "{}", String::from_utf8_lossy(&run.stdout));
}
