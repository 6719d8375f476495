//! Code for the vector registers that this processor has, where the compiler may only assume the oldest ones.

#![allow(unsafe_code)]

/// Runs `work` in a copy that the compiler made for the widest vectors of this processor. `work` must be inlined for that:
/// `#[inline(always)]` on what it calls.
#[inline]
pub fn widest<R>(work: impl FnOnce() -> R) -> R {
    #[cfg(target_arch = "x86_64")]
    if std::arch::is_x86_feature_detected!("avx2") {
        // SAFETY: the processor has what the function was compiled for.
        return unsafe { avx2(work) };
    }
    work()
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
fn avx2<R>(work: impl FnOnce() -> R) -> R {
    work()
}
