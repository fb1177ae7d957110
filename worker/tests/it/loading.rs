//! Model folders: sharded and whole, complete and not.

use std::collections::HashMap;
use std::fs;
use std::path::Path;

use kvbm_worker::model::{Weights, revision};
use kvbm_worker::{Engine, EngineOptions, KvMemory};
use safetensors::tensor::{Dtype, SafeTensors, TensorView, serialize_to_file};
use serde_json::{Value, json};

use crate::support::{engine, model, run};

fn config() -> Value {
    serde_json::from_slice(&fs::read(model().join("config.json")).unwrap()).unwrap()
}

fn write(folder: &Path, name: &str, value: &Value) {
    fs::write(folder.join(name), value.to_string()).unwrap();
}

/// Writes the bundled model in several files, with `change` applied to each tensor's name: `None` drops it.
fn write_shards(folder: &Path, shards: usize, change: impl Fn(&str) -> Option<String>) {
    let bytes = fs::read(model().join("model.safetensors")).unwrap();
    let tensors = SafeTensors::deserialize(&bytes).unwrap();
    let mut files: Vec<HashMap<String, TensorView<'_>>> = vec![HashMap::new(); shards];
    let mut map = serde_json::Map::new();
    let mut named = tensors.tensors();
    named.sort_by(|a, b| a.0.cmp(&b.0));
    for (i, (name, view)) in named.into_iter().enumerate() {
        let Some(name) = change(&name) else { continue };
        map.insert(name.clone(), json!(format!("model-{}.safetensors", i % shards)));
        files[i % shards].insert(name, view);
    }
    for (i, file) in files.into_iter().enumerate() {
        serialize_to_file(file, None, &folder.join(format!("model-{i}.safetensors"))).unwrap();
    }
    write(folder, "model.safetensors.index.json", &json!({"metadata": {}, "weight_map": map}));
    write(folder, "config.json", &config());
}

fn load(folder: &Path) -> Result<Engine, kvbm_worker::Error> {
    Engine::load(folder, &EngineOptions { threads: 1, ..EngineOptions::default() })
}

fn logits(engine: &mut Engine) -> Vec<f32> {
    let kv = KvMemory::private(engine.kv_layout(16), 4);
    run(engine, &kv, &[0, 920, 263, 2537, 415], 0)
}

#[test]
fn shards_load_as_one_file_does() {
    let folder = tempfile::tempdir().unwrap();
    write_shards(folder.path(), 3, |name| Some(name.into()));
    assert_eq!(logits(&mut load(folder.path()).unwrap()), logits(&mut engine(1, None)));
}

#[test]
fn the_revision_follows_content_not_place() {
    let (a, b) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    for folder in [&a, &b] {
        write_shards(folder.path(), 2, |name| Some(name.into()));
    }
    let first = revision(a.path()).unwrap();
    assert_eq!(first, revision(b.path()).unwrap());
    assert_eq!(load(a.path()).unwrap().revision(), first);
    let mut changed = config();
    changed["rms_norm_eps"] = json!(2e-5);
    write(b.path(), "config.json", &changed);
    assert_ne!(first, revision(b.path()).unwrap());
    let shard = a.path().join("model-1.safetensors");
    let mut bytes = fs::read(&shard).unwrap();
    *bytes.last_mut().unwrap() ^= 1;
    fs::write(&shard, bytes).unwrap();
    assert_ne!(first, revision(a.path()).unwrap());
}

#[test]
fn missing_and_misshapen_tensors_are_named() {
    let folder = tempfile::tempdir().unwrap();
    let gone = "model.layers.3.mlp.up_proj.weight";
    write_shards(folder.path(), 2, |name| (name != gone).then(|| name.into()));
    let error = load(folder.path()).err().unwrap().to_string();
    assert_eq!(error, format!("tensor {gone} is missing"));

    write_shards(folder.path(), 2, |name| Some(name.into()));
    let mut wide = config();
    wide["intermediate_size"] = json!(720);
    write(folder.path(), "config.json", &wide);
    let error = load(folder.path()).err().unwrap().to_string();
    assert!(error.contains("mlp.gate_proj.weight: expected shape [720, 256], found [704, 256]"), "{error}");

    let empty = tempfile::tempdir().unwrap();
    assert!(load(empty.path()).err().unwrap().to_string().contains("config.json"));
    write(empty.path(), "config.json", &config());
    assert!(load(empty.path()).err().unwrap().to_string().contains("model.safetensors"));
    fs::write(empty.path().join("model.safetensors"), b"not a safetensors file").unwrap();
    assert!(load(empty.path()).err().unwrap().to_string().contains("model.safetensors"));
}

#[test]
fn other_float_types_are_converted() {
    let folder = tempfile::tempdir().unwrap();
    let f32s: Vec<u8> = [1.0f32, -2.5, 0.1, 3.0].iter().flat_map(|x| x.to_le_bytes()).collect();
    let f16s: Vec<u8> = [1.0f32, -2.5].iter().flat_map(|x| half::f16::from_f32(*x).to_le_bytes()).collect();
    let ints = [0u8; 8];
    let views = HashMap::from([
        ("a", TensorView::new(Dtype::F32, vec![2, 2], &f32s).unwrap()),
        ("b", TensorView::new(Dtype::F16, vec![2], &f16s).unwrap()),
        ("c", TensorView::new(Dtype::I64, vec![1], &ints).unwrap()),
    ]);
    serialize_to_file(views, None, &folder.path().join("model.safetensors")).unwrap();
    let weights = Weights::open(folder.path()).unwrap();
    assert_eq!(&*weights.tensor("a", &[2, 2]).unwrap().bits, &[0x3f80, 0xc020, 0x3dcd, 0x4040]);
    assert_eq!(&*weights.tensor("b", &[2]).unwrap().bits, &[0x3f80, 0xc020]);
    assert!(weights.contains("c") && !weights.contains("d"));
    assert!(weights.tensor("c", &[1]).err().unwrap().to_string().contains("I64"));
}
