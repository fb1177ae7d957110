//! Batch copies in every form that the driver has.

use kvbm_cuda::{BatchCopier, BatchForm, DeviceAddress, DeviceMemory, DeviceRange, RawCopy, Stream};

use crate::patterns::{check, fill, host, scatter};
use crate::{Gpu, Outcome};

const BLOCK: usize = 64 << 10;
const BLOCKS: usize = 512;

pub fn each_form(gpu: &Gpu) -> Outcome {
    let text = |error: kvbm_cuda::Error| error.to_string();
    let pool = DeviceMemory::allocate(&gpu.context, BLOCKS * BLOCK).map_err(text)?;
    let host = host(&gpu.context, BLOCKS * BLOCK)?;
    let stream = Stream::new(&gpu.context).map_err(text)?;
    let (near, far) = (scatter(BLOCKS, 3), scatter(BLOCKS, 5));
    let mut seen = vec![0; BLOCK];
    let mut forms = Vec::new();
    for (seed, form) in [BatchForm::V2, BatchForm::V1, BatchForm::Loop].into_iter().enumerate() {
        let Some(mut copier) = BatchCopier::with_form(&gpu.driver, form) else {
            forms.push(format!("{form:?} is not there"));
            continue;
        };
        for block in 0..BLOCKS {
            let mut bytes = vec![0; BLOCK];
            fill(seed as u64 + 1, block, &mut bytes);
            host.memory().write(block * BLOCK, &bytes);
        }
        pool.fill(0, 0, pool.bytes()).map_err(text)?;
        let up: Vec<_> = near
            .iter()
            .zip(&far)
            .map(|(near, far)| RawCopy {
                from: host.device_address(near * BLOCK),
                to: pool.address().plus(far * BLOCK),
                bytes: BLOCK,
            })
            .collect();
        let down: Vec<_> = up.iter().map(|copy| RawCopy { from: copy.to, to: copy.from, ..*copy }).collect();
        // SAFETY: pool and host memory are mapped, and the stream is waited for before they go.
        unsafe { copier.copy(&stream, &up) }.map_err(text)?;
        stream.synchronize().map_err(text)?;
        for (near, far) in near.iter().zip(&far) {
            pool.read(far * BLOCK, &mut seen).map_err(text)?;
            check(seed as u64 + 1, *near, &seen)?;
        }
        for block in 0..BLOCKS {
            host.memory().write(block * BLOCK, &vec![0xEE; BLOCK]);
        }
        // SAFETY: as above.
        unsafe { copier.copy(&stream, &down) }.map_err(text)?;
        stream.synchronize().map_err(text)?;
        for block in 0..BLOCKS {
            host.memory().read(block * BLOCK, &mut seen);
            check(seed as u64 + 1, block, &seen)?;
        }
        forms.push(format!("{form:?} ok"));
    }
    Ok(forms.join(", "))
}

/// Copies between places where nothing is are refused, and do no harm beyond that.
pub fn refused(gpu: &Gpu) -> Outcome {
    let text = |error: kvbm_cuda::Error| error.to_string();
    let stream = Stream::new(&gpu.context).map_err(text)?;
    let pool = DeviceMemory::allocate(&gpu.context, BLOCK).map_err(text)?;
    let mut said = Vec::new();
    for form in [BatchForm::V2, BatchForm::V1] {
        let Some(mut copier) = BatchCopier::with_form(&gpu.driver, form) else { continue };
        // Zero bytes are what the driver refuses without touching anything.
        let nothing = RawCopy { from: pool.address(), to: DeviceAddress(0), bytes: 0 };
        // SAFETY: nothing is copied.
        match unsafe { copier.copy(&stream, &[nothing]) } {
            Ok(()) => said.push(format!("{form:?} takes it")),
            Err(error) if error.is_sticky() => return Err(format!("{form:?}: {error}")),
            Err(error) => said.push(format!("{form:?}: {error}")),
        }
    }
    stream.synchronize().map_err(text)?;
    pool.write(0, &[1, 2, 3]).map_err(text)?;
    Ok(said.join("; "))
}
