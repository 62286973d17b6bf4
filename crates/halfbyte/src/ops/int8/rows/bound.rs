//! The threshold, as a bound on bits: magnitudes compare like the integers that hold them.

use crate::Element;

/// The signed integer that holds an element. A magnitude is not negative.
pub(super) trait Bits: Copy + Default + Ord {
    /// No magnitude is above.
    const MAX: Self;
    fn magnitude(self) -> Self;
    fn next(self) -> Self;
    /// The integer before, of one above 0.
    fn before(self) -> Self;
}

macro_rules! bits {
    ($int:ty) => {
        impl Bits for $int {
            const MAX: Self = Self::MAX;
            #[inline(always)]
            fn magnitude(self) -> Self {
                self & Self::MAX
            }
            fn next(self) -> Self {
                self + 1
            }
            fn before(self) -> Self {
                self - 1
            }
        }
    };
}
bits!(i16);
bits!(i32);

/// Elements as integers of the same size.
pub(super) fn bits<T: Element, B: Bits>(elements: &[T]) -> &[B] {
    assert!(size_of::<T>() == size_of::<B>() && align_of::<T>() == align_of::<B>());
    // SAFETY: the layouts are equal; `Element` is a float of 16 or 32 bits and `Bits` an integer,
    // for which any bits will do.
    unsafe { std::slice::from_raw_parts(elements.as_ptr().cast(), elements.len()) }
}

/// Outliers are the elements of a magnitude above `limit` and up to `infinity`; NaN lies above.
#[derive(Clone, Copy, Debug)]
pub(super) struct Bound<B> {
    pub(super) limit: B,
    pub(super) infinity: B,
}

impl<B: Bits> Bound<B> {
    /// No element is an outlier.
    pub(super) const NONE: Self = Self { limit: B::MAX, infinity: B::MAX };

    /// For elements of type `T`.
    pub(super) fn new<T: Element>(threshold: f32) -> Self {
        if threshold > 0.0 {
            let nearest = T::from_f32(threshold);
            let bits: B = of(nearest);
            let least = if nearest.to_f32() < threshold { bits.next() } else { bits };
            Self { limit: least.before(), infinity: of(T::from_f32(f32::INFINITY)) }
        } else {
            Self::NONE
        }
    }
}

fn of<T: Element, B: Bits>(x: T) -> B {
    bits(&[x])[0]
}

/// The largest magnitude of a group, outliers left out, which are flagged.
#[allow(clippy::inline_always)] // to be compiled for the caller's instruction set
#[inline(always)]
pub(super) fn screen<B: Bits>(group: &[B], bound: Bound<B>, flags: &mut [u8]) -> B {
    let mut most = B::default();
    for (x, flag) in group.iter().zip(flags) {
        let x = x.magnitude();
        #[allow(clippy::needless_bitwise_bool)] // a branch would not become a vector
        let outlier = (x > bound.limit) & (x <= bound.infinity);
        *flag |= u8::from(outlier);
        most = most.max(if outlier { B::default() } else { x });
    }
    most
}

/// The flags from a column on; none where there are none.
pub(super) fn after(flags: &mut [u8], column: usize) -> &mut [u8] {
    flags.get_mut(column..).unwrap_or_default()
}
