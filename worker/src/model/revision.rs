//! Which weights these are, exactly.

use std::path::Path;

use super::Weights;
use crate::{Error, Result};

/// BLAKE3 over the content of `config.json` and of the weight files, in hexadecimal. Two folders with the same revision
/// give the same KV; the names of the folders do not count.
pub fn revision(folder: &Path) -> Result<String> {
    let mut all = blake3::Hasher::new_derive_key("kvbm v1 model revision");
    for path in std::iter::once(folder.join("config.json")).chain(Weights::paths(folder)?) {
        let mut file = blake3::Hasher::new();
        file.update_mmap_rayon(&path).map_err(|source| Error::Io {
            op: "read",
            path: path.clone(),
            source,
        })?;
        all.update(file.finalize().as_bytes());
    }
    Ok(all.finalize().to_hex().to_string())
}
