//! Which instruction set the kernels run with.

/// An instruction set for which the kernels are compiled. All give the same bits; they differ in speed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Isa {
    /// No vector instructions beyond the target's own.
    Portable,
    /// AVX2 and FMA.
    Avx2,
    /// AVX-512F.
    Avx512,
}

impl Isa {
    /// The fastest that this processor has.
    pub fn detect() -> Self {
        if Self::Avx512.available() {
            Self::Avx512
        } else if Self::Avx2.available() {
            Self::Avx2
        } else {
            Self::Portable
        }
    }

    /// This processor has it.
    pub fn available(self) -> bool {
        #[cfg(target_arch = "x86_64")]
        return match self {
            Self::Portable => true,
            Self::Avx2 => is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma"),
            Self::Avx512 => {
                is_x86_feature_detected!("avx512f")
                    && is_x86_feature_detected!("avx2")
                    && is_x86_feature_detected!("fma")
            }
        };
        #[cfg(not(target_arch = "x86_64"))]
        return self == Self::Portable;
    }
}

/// Makes a function that runs the generic kernel `$kernel::<L>` with the lanes of an [`Isa`].
///
/// The made function is unsafe with the contract of the kernel; that the processor has the instruction set is checked
/// where an engine is made, and by an assertion in debug builds.
macro_rules! dispatch {
    ($(#[$doc:meta])* fn $name:ident = $kernel:ident($($arg:ident: $type:ty),* $(,)?)) => {
        $(#[$doc])*
        #[allow(clippy::too_many_arguments)]
        pub(super) unsafe fn $name(isa: $crate::engine::Isa, $($arg: $type),*) {
            #[cfg(target_arch = "x86_64")]
            {
                use $crate::engine::lanes_x86::{Avx2, Avx512};

                #[target_feature(enable = "avx2,fma")]
                unsafe fn avx2($($arg: $type),*) {
                    // SAFETY: the contract is the kernel's, and the instruction set is enabled here.
                    unsafe { $kernel::<Avx2>($($arg),*) }
                }

                #[target_feature(enable = "avx512f,avx2,fma")]
                unsafe fn avx512($($arg: $type),*) {
                    // SAFETY: as above.
                    unsafe { $kernel::<Avx512>($($arg),*) }
                }

                debug_assert!(isa.available());
                // SAFETY: an engine is only made with an instruction set that the processor has; the rest is the caller's.
                unsafe {
                    match isa {
                        $crate::engine::Isa::Portable => $kernel::<$crate::engine::lanes::Portable>($($arg),*),
                        $crate::engine::Isa::Avx2 => avx2($($arg),*),
                        $crate::engine::Isa::Avx512 => avx512($($arg),*),
                    }
                }
            }
            #[cfg(not(target_arch = "x86_64"))]
            {
                assert!(isa.available());
                // SAFETY: portable lanes need no instruction set; the rest is the caller's.
                unsafe { $kernel::<$crate::engine::lanes::Portable>($($arg),*) }
            }
        }
    };
}

pub(crate) use dispatch;
