//! Whatever a body is, it is understood or refused.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|body: &[u8]| kvbm_frontend::read_body(body));
