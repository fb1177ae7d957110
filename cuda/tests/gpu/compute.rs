//! Kernels, graphs and matrix products.

use std::sync::Arc;

use kvbm_cuda::{
    Arguments, Blas, DeviceMemory, DeviceRange, Gemm, Graph, Launch, Matrix, Module, Stream, Strides,
};

use crate::{Gpu, Outcome};

/// add(p, n, value): p[i] += value for i < n, as 32-bit numbers.
const PTX: &str = "
.version 7.0
.target sm_80
.address_size 64
.visible .entry add(.param .u64 p, .param .u32 n, .param .u32 value)
{
    .reg .pred %out;
    .reg .b32 %i, %t, %c, %n, %v, %x;
    .reg .b64 %p, %o;
    mov.u32 %i, %ctaid.x;
    mov.u32 %c, %ntid.x;
    mov.u32 %t, %tid.x;
    mad.lo.s32 %i, %i, %c, %t;
    ld.param.u32 %n, [n];
    setp.ge.u32 %out, %i, %n;
    @%out bra END;
    ld.param.u64 %p, [p];
    cvta.to.global.u64 %p, %p;
    mul.wide.u32 %o, %i, 4;
    add.s64 %p, %p, %o;
    ld.param.u32 %v, [value];
    ld.global.u32 %x, [%p];
    add.s32 %x, %x, %v;
    st.global.u32 [%p], %x;
END:
    ret;
}
";

fn text(error: kvbm_cuda::Error) -> String {
    error.to_string()
}

pub fn kernels(gpu: &Gpu) -> Outcome {
    const COUNT: u32 = 100_000;
    let module = Module::load(&gpu.context, PTX.as_bytes()).map_err(text)?;
    let add = module.function("add").map_err(text)?;
    let missing = module.function("subtract").map(|_| ()).expect_err("there is no such kernel").to_string();
    if !missing.contains("kernel subtract") {
        return Err(missing);
    }
    let stream = Stream::new(&gpu.context).map_err(text)?;
    let memory = DeviceMemory::allocate(&gpu.context, COUNT as usize * 4).map_err(text)?;
    memory.fill(0, 0, memory.bytes()).map_err(text)?;
    let launch = Launch { grid: [COUNT.div_ceil(256), 1, 1], block: [256, 1, 1], shared_bytes: 0 };
    let arguments = |value| Arguments::new().address(memory.address()).u32(COUNT).u32(value);
    // SAFETY: these are the arguments that `add` takes, and the memory is mapped until the end.
    let issue = |value| unsafe { add.launch(&stream, launch, &arguments(value)) };
    issue(5).map_err(text)?;
    let mut graph = Graph::record(&stream, || issue(20).and_then(|()| issue(300))).map_err(text)?;
    for _ in 0..3 {
        // SAFETY: as above.
        unsafe { graph.launch(&stream) }.map_err(text)?;
    }
    stream.synchronize().map_err(text)?;
    let mut seen = vec![0; memory.bytes()];
    memory.read(0, &mut seen).map_err(text)?;
    let (words, _) = seen.as_chunks::<4>();
    match words.iter().position(|word| u32::from_le_bytes(*word) != 965) {
        None => Ok("one launch, and two in a graph issued three times".into()),
        Some(at) => Err(format!("word {at} is {:?}", words[at])),
    }
}

/// y[t, out] = x[t, in] · w[out, in]ᵀ with small whole numbers, which bfloat16 holds exactly.
pub fn products(gpu: &Gpu) -> Outcome {
    const TOKENS: usize = 7;
    const INPUTS: usize = 48;
    const OUTPUTS: usize = 24;
    const COUNT: usize = 3;
    let number = |i: usize| ((i * 37 + 11) % 9) as f32 - 4.0;
    let half = |value: f32| ((value.to_bits() >> 16) as u16).to_le_bytes();
    let x: Vec<f32> = (0..COUNT * TOKENS * INPUTS).map(number).collect();
    let w: Vec<f32> = (0..COUNT * OUTPUTS * INPUTS).map(|i| number(i * 5 + 3)).collect();
    let upload = |values: &[f32]| {
        let bytes: Vec<u8> = values.iter().flat_map(|value| half(*value)).collect();
        let memory = DeviceMemory::allocate(&gpu.context, bytes.len())?;
        memory.write(0, &bytes).map(|()| memory)
    };
    let (on_x, on_w) = (upload(&x).map_err(text)?, upload(&w).map_err(text)?);
    let on_y = DeviceMemory::allocate(&gpu.context, COUNT * TOKENS * OUTPUTS * 4).map_err(text)?;
    let mut blas =
        Blas::new(&gpu.driver, Arc::new(Stream::new(&gpu.context).map_err(text)?)).map_err(text)?;
    let gemm = Gemm {
        m: OUTPUTS,
        n: TOKENS,
        k: INPUTS,
        a: Matrix::transposed(on_w.address(), INPUTS),
        b: Matrix::plain(on_x.address(), INPUTS),
        c: Matrix::plain(on_y.address(), OUTPUTS),
        alpha: 1.0,
        beta: 0.0,
        c_is_f32: true,
    };
    let strides = Strides { a: OUTPUTS * INPUTS, b: TOKENS * INPUTS, c: TOKENS * OUTPUTS, count: COUNT };
    for count in [1, COUNT] {
        on_y.fill(0, 0, on_y.bytes()).map_err(text)?;
        // SAFETY: the matrices lie within memory that is mapped until the stream was waited for.
        unsafe { blas.gemm_strided(&gemm, Strides { count, ..strides }) }.map_err(text)?;
        blas.stream().synchronize().map_err(text)?;
        let mut seen = vec![0; count * TOKENS * OUTPUTS * 4];
        on_y.read(0, &mut seen).map_err(text)?;
        for (at, bytes) in seen.as_chunks::<4>().0.iter().enumerate() {
            let (matrix, row, column) = (at / (TOKENS * OUTPUTS), at / OUTPUTS % TOKENS, at % OUTPUTS);
            let expected: f32 = (0..INPUTS)
                .map(|k| {
                    x[(matrix * TOKENS + row) * INPUTS + k] * w[(matrix * OUTPUTS + column) * INPUTS + k]
                })
                .sum();
            let got = f32::from_le_bytes(*bytes);
            if got != expected {
                return Err(format!("y[{matrix}, {row}, {column}] is {got} instead of {expected}"));
            }
        }
    }
    Ok(format!("by {}", blas.library().display()))
}
