//! A digest that tells the weights of a model from others under the same name.

use std::fs::{self, File};
use std::io::Read;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use pyo3::exceptions::PyOSError;
use pyo3::prelude::*;

/// Pieces of each file of weights that count, spread over its length. Training changes all of them.
const PIECES: u64 = 64;
const PIECE_BYTES: u64 = 4096;

/// Digest of a model's folder: its configuration, and the names, sizes and samples of its weights. Weights that somebody
/// changed in a few places only are not told apart; name a revision then.
#[pyfunction]
pub(crate) fn model_fingerprint(py: Python<'_>, folder: PathBuf) -> PyResult<String> {
    py.detach(|| fingerprint(&folder))
        .map_err(|error| PyOSError::new_err(format!("read {}: {error}", folder.display())))
}

fn fingerprint(folder: &Path) -> std::io::Result<String> {
    let mut paths: Vec<PathBuf> =
        fs::read_dir(folder)?.map(|entry| Ok(entry?.path())).collect::<std::io::Result<_>>()?;
    paths.sort();
    let mut all = blake3::Hasher::new_derive_key("kvbm v1 sampled model revision");
    for path in paths {
        let name = path.file_name().unwrap_or_default().as_encoded_bytes();
        let weights =
            [b".safetensors".as_slice(), b".bin", b".pt", b".pth"].iter().any(|end| name.ends_with(end));
        if !weights && name != b"config.json" && name != b"hf_quant_config.json" {
            continue;
        }
        let mut file = File::open(&path)?;
        let bytes = file.metadata()?.len();
        all.update(&(name.len() as u64).to_le_bytes()).update(name).update(&bytes.to_le_bytes());
        if bytes <= PIECES * PIECE_BYTES {
            let mut content = Vec::new();
            file.read_to_end(&mut content)?;
            all.update(&content);
            continue;
        }
        let mut piece = [0; PIECE_BYTES as usize];
        for index in 0..PIECES {
            let at = u128::from(bytes - PIECE_BYTES) * u128::from(index) / u128::from(PIECES - 1);
            file.read_exact_at(&mut piece, at as u64)?;
            all.update(&piece);
        }
    }
    Ok(all.finalize().to_hex().to_string())
}
