//! Compiles the schema with protox: no system protoc is needed.

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let files =
        ["kvbm/v1/admin.proto", "kvbm/v1/cache.proto", "kvbm/v1/registry.proto", "kvbm/v1/worker.proto"];
    for file in files {
        println!("cargo:rerun-if-changed={file}");
    }
    let descriptors = protox::compile(files, ["."])?;
    tonic_prost_build::configure().compile_fds(descriptors)?;
    Ok(())
}
