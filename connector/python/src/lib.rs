//! The native module of the Python package `kvbm_connector`: translates, and decides nothing.
//!
//! Nothing of this crate panics into the engine: what goes wrong here is an exception of the engine's language.

mod cuda;
mod engine;
mod model;
mod numbers;
mod options;
mod requests;
mod serving;

/// The engine's side of the daemon, for Python.
#[pyo3::pymodule]
mod _native {
    #[pymodule_export]
    use crate::engine::Engine;
    #[pymodule_export]
    use crate::engine::socket_of;
    #[pymodule_export]
    use crate::model::model_fingerprint;
    #[pymodule_export]
    use crate::requests::pack_tokens;
    #[pymodule_export]
    use crate::serving::Worker;
}
