use clap::Parser;

use super::*;

#[derive(Parser)]
struct Line {
    #[command(flatten)]
    args: WorkerArgs,
}

const MODEL: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../models/tiny");

fn check(flags: &[&str]) -> Result<Settings, WorkerError> {
    let line = [&["worker", "--model", MODEL][..], flags].concat();
    let environment = |name: &str| (name == "XDG_STATE_HOME").then(|| "/state".to_owned());
    Settings::check(Line::try_parse_from(line).unwrap().args, environment)
}

#[test]
fn defaults_are_those_of_the_tiny_deployment() {
    let settings = check(&[]).unwrap();
    assert_eq!((settings.served_name.as_str(), settings.tokens_per_block), ("tiny", 32));
    let daemon = settings.daemon.clone().unwrap();
    assert_eq!(daemon.socket, Path::new("/state/kvbm/kvbm.sock"));
    assert_eq!((daemon.init_timeout, daemon.tokens_per_block), (Duration::from_secs(30), 32));
    let beside = format!("unix:/state/kvbm/worker-{}.sock", std::process::id());
    assert_eq!((settings.listen.to_string(), settings.system), (beside, None));
    let model = settings.model_config().unwrap();
    let pool = settings.pool_layout(settings.kv_layout(&model)).unwrap();
    assert!(pool.stride() as u64 * u64::from(pool.block_count) <= 250_000_000);
    assert!(pool.stride() as u64 * u64::from(pool.block_count + 1) > 250_000_000);
}

#[test]
fn blocks_win_over_gigabytes_and_the_context_is_clipped() {
    let flags = ["--device-cache-blocks", "7", "--device-cache-gb", "1", "--context-length", "99"];
    let settings = check(&flags).unwrap();
    let model = settings.model_config().unwrap();
    assert_eq!(model.context_length, 99);
    assert_eq!(settings.pool_layout(settings.kv_layout(&model)).unwrap().block_count, 7);
    assert!(check(&["--no-daemon"]).unwrap().daemon.is_none());
    assert_eq!(check(&["--system-port", "-1"]).unwrap().system, None);
}

#[test]
fn a_gpu_has_larger_steps_and_a_larger_pool() {
    let settings = check(&["--device", "cuda:1", "--no-daemon"]).unwrap();
    assert_eq!(settings.device, Some(DeviceName::Ordinal(1)));
    assert_eq!((settings.max_batch_tokens, settings.pool), (8192, PoolSize::Gigabytes(8.0)));
    let cpu = check(&["--device", "cpu"]).unwrap();
    assert_eq!((cpu.device, cpu.max_batch_tokens, cpu.pool), (None, 512, PoolSize::Gigabytes(0.25)));
    let flags = ["--device", "cuda:0", "--no-daemon", "--max-batch-tokens", "300", "--device-cache-gb", "3"];
    let chosen = check(&flags).unwrap();
    assert_eq!((chosen.max_batch_tokens, chosen.pool), (300, PoolSize::Gigabytes(3.0)));
    assert!(check(&["--device", "cuda:0"]).unwrap().daemon.is_some());
}

#[test]
fn random_weights_have_their_shape_and_the_tokens_of_the_folder() {
    let flags = ["--random-weights", "llama-3-8b", "--context-length", "5000"];
    let settings = check(&flags).unwrap();
    let model = settings.model_config().unwrap();
    assert_eq!(settings.served_name, "llama-3-8b");
    assert_eq!((model.layers, model.vocab_size, model.token_count), (32, 128_256, 4096));
    assert_eq!((model.context_length, model.eos_token_ids), (5000, vec![1]));
    let kv = settings.kv_layout(&settings.model_config().unwrap());
    assert_eq!(kv.block_bytes(), 4 << 20);
}

#[test]
fn what_cannot_be_used_is_named_with_its_value_and_range() {
    for (flags, message) in [
        (&["--block-size", "20"][..], "--block-size 20: expected 16, 32 or 64"),
        (
            &["--device", "gpu"],
            "--device gpu: expected cpu, cuda:<number>, GPU-<uuid> or <bus>:<device>.<function>",
        ),
        (
            &["--device", "0"],
            "--device 0: expected cpu, cuda:<number>, GPU-<uuid> or <bus>:<device>.<function>",
        ),
        (&["--role", "cook"], "--role cook: expected prefill, decode or both"),
        (&["--device-cache-gb", "-1"], "--device-cache-gb -1: expected above 0, up to 65536"),
        (&["--device-cache-blocks", "0"], "--device-cache-blocks 0: expected 1 to 1073741824"),
        (&["--max-batch", "0"], "--max-batch 0: expected 1 to 4096"),
        (
            &["--max-batch", "8", "--max-batch-tokens", "4"],
            "--max-batch-tokens 4: expected at least 8, one token for each sequence of --max-batch",
        ),
        (&["--listen", "w.sock"], "--listen w.sock: expected unix:/path or http://host:port"),
        (&["--init-timeout-seconds", "-2"], "--init-timeout-seconds -2: expected 0 to 86400"),
        (&["--drain-seconds", "NaN"], "--drain-seconds NaN: expected 0 to 3600"),
        (&["--system-port", "70000"], "--system-port 70000: expected 0 to 65535, or -1 for off"),
    ] {
        let error = check(flags).unwrap_err();
        assert_eq!((error.to_string().as_str(), error.exit_code()), (message, 2));
    }
    let settings = check(&["--device-cache-gb", "0.000001"]).unwrap();
    let error = settings.pool_layout(settings.kv_layout(&settings.model_config().unwrap())).unwrap_err();
    assert!(error.to_string().starts_with("--device-cache-gb 0.000001: expected at least 0.0"), "{error}");
}
