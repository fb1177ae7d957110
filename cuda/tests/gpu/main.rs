//! What only a GPU can show. One binary without dependencies, to be copied to a machine with a GPU and run there; without
//! CUDA every test says that it is skipped.
//!
//! `gpu --free` prints how many bytes of the GPU are free. `gpu [FILTER]` runs the tests whose names contain FILTER. `KVBM_GPU_CYCLES` sets how many processes the leak test kills.
//! Processes that share memory with a test are this binary again, with `--role`.

mod batches;
mod compute;
mod engine;
mod graphs;
mod interference;
mod leaks;
mod patterns;
mod peer;
mod scatter;
mod sharing;
mod two_gpus;
mod words;

use std::path::PathBuf;
use std::time::Instant;

use kvbm_cuda::{Context, Driver};

/// What a test has to work with.
struct Gpu {
    driver: Driver,
    context: Context,
}

/// A text for whoever reads, or what went wrong.
type Outcome = Result<String, String>;

type Test = (&'static str, fn(&Gpu) -> Outcome);

const TESTS: [Test; 24] = [
    ("the_gpu_is_described", describe),
    ("each_batch_form_copies_scattered_blocks", batches::each_form),
    ("a_refused_copy_leaves_the_gpu_usable", batches::refused),
    ("copies_cross_the_chunks_of_registered_memory", engine::chunks),
    ("the_copy_engine_moves_both_ways_at_once", engine::both_ways),
    ("a_fence_of_another_process_orders_a_copy", engine::fence),
    ("a_vmm_pool_is_shared_by_descriptor", sharing::vmm),
    ("a_vmm_pool_outlives_its_owner_killed_in_the_middle_of_copies", sharing::vmm_owner_killed),
    ("an_ipc_pool_is_shared_by_handle", sharing::ipc),
    ("an_ipc_pool_is_readable_after_its_owner_was_killed", sharing::ipc_owner_killed),
    ("a_reaped_process_writes_nothing_more", sharing::writer_killed),
    ("host_memory_is_registered_in_two_processes", sharing::registered_twice),
    ("words_order_streams_of_two_processes", words::ping_pong),
    ("a_dead_peers_word_is_written_by_the_host", words::released),
    ("blocks_go_from_gpu_to_gpu", two_gpus::engine),
    ("blocks_of_another_process_go_from_gpu_to_gpu", two_gpus::of_another_process),
    ("each_batch_form_copies_from_gpu_to_gpu", two_gpus::each_form),
    ("host_memory_is_registered_once_for_all_gpus", two_gpus::registered_once),
    ("kernels_and_graphs_run", compute::kernels),
    ("graphs_are_recorded_beside_our_threads", graphs::beside),
    ("blocks_are_spread_on_the_gpu", scatter::spread),
    ("matrix_products_are_right", compute::products),
    ("background_copies_leave_decoding_alone", interference::paced),
    ("killed_processes_leak_nothing", leaks::cycles),
];

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let option = |name: &str| {
        let at = arguments.iter().position(|argument| argument == name)?;
        arguments.get(at + 1).cloned()
    };
    if let Some(role) = option("--role") {
        let socket = PathBuf::from(option("--socket").expect("a role comes with a socket"));
        return peer::play(&role, &socket);
    }
    if let Some(path) = option("--copy-to") {
        return copy_to(&PathBuf::from(path));
    }
    let filter = arguments.iter().find(|argument| !argument.starts_with('-')).cloned().unwrap_or_default();
    let chosen = || TESTS.iter().filter(|(name, _)| name.contains(&filter));
    if arguments.iter().any(|argument| argument == "--list") {
        return chosen().for_each(|(name, _)| println!("{name}: test"));
    }
    let gpu = match open() {
        Ok(gpu) => gpu,
        Err(error) => {
            chosen().for_each(|(name, _)| println!("test {name} ... skipped: no CUDA"));
            println!("no CUDA: {error}");
            return;
        }
    };
    if arguments.iter().any(|argument| argument == "--free") {
        let free = gpu.context.memory().map_or_else(|error| error.to_string(), |(free, _)| free.to_string());
        return println!("{free}");
    }
    let mut failed = 0;
    for (name, test) in chosen() {
        let started = Instant::now();
        let outcome = test(&gpu).and_then(|text| {
            // Work that failed late must not pass.
            gpu.context.synchronize().map(|()| text).map_err(|error| error.to_string())
        });
        let seconds = started.elapsed().as_secs_f64();
        match outcome {
            Ok(text) => println!("test {name} ... ok ({seconds:.2} s) {text}"),
            Err(error) => {
                failed += 1;
                println!("test {name} ... FAILED ({seconds:.2} s): {error}");
            }
        }
    }
    if failed > 0 {
        println!("{failed} failed");
        std::process::exit(1);
    }
}

fn open() -> Result<Gpu, kvbm_cuda::Error> {
    let driver = Driver::load()?;
    let device = driver.device(&"0".parse()?)?;
    let context = Context::open(&driver, &device)?;
    Ok(Gpu { driver, context })
}

/// So that a script need not know where cargo puts it.
fn copy_to(path: &std::path::Path) {
    let program = std::env::current_exe().expect("a running program has a path");
    if let Some(folder) = path.parent() {
        std::fs::create_dir_all(folder).expect("the folder can be made");
    }
    std::fs::copy(program, path).expect("the program can be copied");
}

fn describe(gpu: &Gpu) -> Outcome {
    let device = gpu.context.device();
    let (free, total) = gpu.context.memory().map_err(|error| error.to_string())?;
    if free == 0 || total > device.memory_bytes || device.multiprocessors == 0 {
        return Err(format!("{device:?}, {free} of {total} bytes free"));
    }
    for name in [&device.uuid, &device.pci_bus_id, &format!("cuda:{}", device.ordinal)] {
        let name = name.parse().map_err(|error: kvbm_cuda::Error| error.to_string())?;
        let found = gpu.driver.device(&name).map_err(|error| error.to_string())?;
        if &found != device {
            return Err(format!("{name} names {found:?}"));
        }
    }
    Ok(format!(
        "CUDA {} from {}, {device:?}, batches by {:?}",
        gpu.driver.version(),
        gpu.driver.library().display(),
        kvbm_cuda::BatchCopier::new(&gpu.driver).form()
    ))
}
