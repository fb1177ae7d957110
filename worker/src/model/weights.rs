//! Weights in safetensors files, one or several, mapped and read where they lie.

use std::borrow::Cow;
use std::collections::{BTreeSet, HashMap};
use std::fs::File;
use std::path::{Path, PathBuf};

use half::{bf16, f16};
use memmap2::Mmap;
use safetensors::{Dtype, SafeTensors};

use super::RandomTensor;
use super::config::read_json;
use crate::{Error, Result};

/// The weights of a model folder, or random ones.
pub struct Weights(Source);

enum Source {
    Files(Files),
    Random,
}

struct Files {
    files: Vec<(PathBuf, Mmap)>,
    tensors: HashMap<String, Place>,
}

/// A tensor, wherever it comes from.
pub(crate) enum Origin<'a> {
    /// Of a file.
    Bits(Cow<'a, [u16]>),
    /// To be made.
    Random(RandomTensor),
    /// All elements are 1.
    Ones,
}

/// Where a tensor is.
struct Place {
    file: usize,
    begin: usize,
    end: usize,
    dtype: Dtype,
    shape: Vec<usize>,
}

/// A tensor as bf16, row-major.
pub struct Tensor<'a> {
    /// Its elements' bits.
    pub bits: Cow<'a, [u16]>,
}

impl Weights {
    /// Maps `model.safetensors`, or the files that `model.safetensors.index.json` names.
    pub fn open(folder: &Path) -> Result<Self> {
        let mut files = Files { files: Vec::new(), tensors: HashMap::new() };
        for path in Self::paths(folder)? {
            files.add(path)?;
        }
        Ok(Self(Source::Files(files)))
    }

    /// Random weights of any shape. Vectors, which are factors of normalization, are all 1.
    pub fn random() -> Self {
        Self(Source::Random)
    }

    /// The tensor of this name, which must have this shape.
    pub(crate) fn origin(&self, name: &str, shape: &[usize]) -> Result<Origin<'_>> {
        match (&self.0, shape) {
            (Source::Files(files), _) => files.tensor(name, shape).map(Origin::Bits),
            (Source::Random, [_]) => Ok(Origin::Ones),
            (Source::Random, [.., columns]) => Ok(Origin::Random(RandomTensor::new(name, *columns))),
            (Source::Random, []) => Ok(Origin::Ones),
        }
    }

    /// The tensor of this name, which must have this shape, as bf16; f16 and f32 are rounded.
    pub fn tensor(&self, name: &str, shape: &[usize]) -> Result<Tensor<'_>> {
        let count = shape.iter().product();
        let bits = match self.origin(name, shape)? {
            Origin::Bits(bits) => bits,
            Origin::Random(tensor) => tensor.bits(count).into(),
            Origin::Ones => vec![bf16::ONE.to_bits(); count].into(),
        };
        Ok(Tensor { bits })
    }

    /// A tensor with that name is there.
    pub fn contains(&self, name: &str) -> bool {
        match &self.0 {
            Source::Files(files) => files.tensors.contains_key(name),
            Source::Random => true,
        }
    }

    /// The files of a model folder, in order of their names.
    pub(super) fn paths(folder: &Path) -> Result<Vec<PathBuf>> {
        let single = folder.join("model.safetensors");
        let index = folder.join("model.safetensors.index.json");
        if single.exists() || !index.exists() {
            return Ok(vec![single]);
        }
        let malformed = |detail: String| Error::Malformed { path: index.clone(), detail };
        let json = read_json(&index)?;
        let map = json.get("weight_map").and_then(|map| map.as_object());
        let map = map.ok_or_else(|| malformed("weight_map is missing".into()))?;
        let mut names = BTreeSet::new();
        for (tensor, file) in map {
            let name =
                file.as_str().ok_or_else(|| malformed(format!("weight_map.{tensor} is not a name")))?;
            if Path::new(name).file_name() != Some(name.as_ref()) {
                return Err(malformed(format!("weight_map.{tensor}: {name} is not a plain file name")));
            }
            names.insert(name);
        }
        Ok(names.into_iter().map(|name| folder.join(name)).collect())
    }
}

impl Files {
    fn add(&mut self, path: PathBuf) -> Result<()> {
        let map = map_file(&path)?;
        let malformed = |error: safetensors::SafeTensorError| Error::Malformed {
            path: path.clone(),
            detail: error.to_string(),
        };
        let (header_bytes, metadata) = SafeTensors::read_metadata(&map).map_err(malformed)?;
        for (name, info) in metadata.tensors() {
            let base = header_bytes + 8;
            let place = Place {
                file: self.files.len(),
                begin: base + info.data_offsets.0,
                end: base + info.data_offsets.1,
                dtype: info.dtype,
                shape: info.shape.clone(),
            };
            self.tensors.insert(name, place);
        }
        self.files.push((path, map));
        Ok(())
    }

    fn tensor(&self, name: &str, shape: &[usize]) -> Result<Cow<'_, [u16]>> {
        let place = self.tensors.get(name).ok_or_else(|| Error::MissingTensor { name: name.into() })?;
        if place.shape != shape {
            return Err(Error::WrongShape {
                name: name.into(),
                expected: shape.to_vec(),
                found: place.shape.clone(),
            });
        }
        let (path, map) = &self.files[place.file];
        let bytes = map.get(place.begin..place.end).ok_or_else(|| Error::Malformed {
            path: path.clone(),
            detail: format!("tensor {name} ends behind the file"),
        })?;
        let bits = match place.dtype {
            Dtype::BF16 => as_bits(bytes),
            Dtype::F16 => Cow::Owned(
                elements(bytes).map(|b| bf16::from_f32(f16::from_le_bytes(b).to_f32()).to_bits()).collect(),
            ),
            Dtype::F32 => {
                Cow::Owned(elements(bytes).map(|b| bf16::from_f32(f32::from_le_bytes(b)).to_bits()).collect())
            }
            other => return Err(Error::WrongType { name: name.into(), found: format!("{other:?}") }),
        };
        if bits.len() != shape.iter().product::<usize>() {
            return Err(Error::Malformed {
                path: path.clone(),
                detail: format!("tensor {name} has too few bytes"),
            });
        }
        Ok(bits)
    }
}

/// Little-endian bf16 where it lies, if it lies well.
fn as_bits(bytes: &[u8]) -> Cow<'_, [u16]> {
    if cfg!(target_endian = "little") && bytes.as_ptr().addr().is_multiple_of(2) {
        // SAFETY: the address is a multiple of 2, the length is rounded down, and any bits are a u16.
        #[allow(unsafe_code)]
        return Cow::Borrowed(unsafe { std::slice::from_raw_parts(bytes.as_ptr().cast(), bytes.len() / 2) });
    }
    Cow::Owned(elements(bytes).map(u16::from_le_bytes).collect())
}

fn elements<const N: usize>(bytes: &[u8]) -> impl Iterator<Item = [u8; N]> + '_ {
    bytes.as_chunks::<N>().0.iter().copied()
}

fn map_file(path: &Path) -> Result<Mmap> {
    let error = |op| move |source| Error::Io { op, path: path.to_path_buf(), source };
    let file = File::open(path).map_err(error("open"))?;
    // SAFETY: the mapping is read-only. Model files are replaced, not written in place; whoever does so nonetheless gets
    // wrong weights or a fault of this process, never memory of another object.
    #[allow(unsafe_code)]
    unsafe { Mmap::map(&file) }.map_err(error("map"))
}
