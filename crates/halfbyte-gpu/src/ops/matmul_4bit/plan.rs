//! Which tile a product takes on tensor cores, and into how many parts its sums are split.

use crate::{Device, Runtime};
use halfbyte::DType;
use std::ffi::CStr;

/// What is multiplied: `out[rows, columns]`, each element a sum over `depth`.
#[derive(Clone, Copy, Debug)]
pub(in crate::ops) struct Product {
    pub(in crate::ops) grad: bool,
    pub(in crate::ops) rows: usize,
    pub(in crate::ops) columns: usize,
    pub(in crate::ops) depth: usize,
}

impl Product {
    pub(in crate::ops) const fn new(
        grad: bool,
        out_features: usize,
        in_features: usize,
        rows: usize,
    ) -> Self {
        let (columns, depth) =
            if grad { (in_features, out_features) } else { (out_features, in_features) };
        Self { grad, rows, columns, depth }
    }

    const fn in_features(&self) -> usize {
        if self.grad { self.columns } else { self.depth }
    }

    /// Whether tensor cores can do it.
    fn fits(&self, machine: &Machine, dtype: DType) -> bool {
        let least = match dtype {
            DType::F16 => 75,
            DType::BF16 => 80,
            DType::F32 => return false,
        };
        machine.capability >= least
            && self.in_features().is_multiple_of(32)
            && self.depth > 0
            && u32::try_from(self.columns).is_ok()
            && u32::try_from(self.depth).is_ok()
    }
}

/// Elements of the depth that a kernel takes at once.
pub(in crate::ops) const STEP: usize = 64;

/// A tile of `kernels/matmul_4bit.h`, with the same numbers.
#[derive(Debug)]
pub(in crate::ops) struct Shape {
    rows: usize,
    columns: usize,
    threads: u32,
    /// Steps that copies run ahead, and one.
    stages: u32,
    /// The least compute capability that has it.
    capability: u32,
    /// Names of the kernels: forward for float16 and bfloat16, then the gradient's, if any.
    forward: [&'static CStr; 2],
    grad: Option<[&'static CStr; 2]>,
    /// The same of the kernels that pick rows by expert.
    routed: Option<[&'static CStr; 2]>,
    routed_grad: Option<[&'static CStr; 2]>,
}

static SHAPES: [Shape; 5] = [
    Shape {
        rows: 16,
        columns: 64,
        threads: 128,
        stages: 4,
        capability: 75,
        forward: [c"matmul_4bit_16_f16", c"matmul_4bit_16_bf16"],
        grad: None,
        routed: Some([c"experts_matmul_4bit_16_f16", c"experts_matmul_4bit_16_bf16"]),
        routed_grad: None,
    },
    Shape {
        rows: 32,
        columns: 64,
        threads: 128,
        stages: 4,
        capability: 75,
        forward: [c"matmul_4bit_32_f16", c"matmul_4bit_32_bf16"],
        grad: None,
        routed: None,
        routed_grad: None,
    },
    Shape {
        rows: 64,
        columns: 64,
        threads: 128,
        stages: 3,
        capability: 75,
        forward: [c"matmul_4bit_64_f16", c"matmul_4bit_64_bf16"],
        grad: Some([c"matmul_4bit_grad_64_f16", c"matmul_4bit_grad_64_bf16"]),
        routed: Some([c"experts_matmul_4bit_64_f16", c"experts_matmul_4bit_64_bf16"]),
        routed_grad: Some([
            c"experts_matmul_4bit_grad_64_f16",
            c"experts_matmul_4bit_grad_64_bf16",
        ]),
    },
    Shape {
        rows: 128,
        columns: 128,
        threads: 128,
        stages: 2,
        capability: 80,
        forward: [c"matmul_4bit_128_f16", c"matmul_4bit_128_bf16"],
        grad: Some([c"matmul_4bit_grad_128_f16", c"matmul_4bit_grad_128_bf16"]),
        routed: Some([c"experts_matmul_4bit_128_f16", c"experts_matmul_4bit_128_bf16"]),
        routed_grad: Some([
            c"experts_matmul_4bit_grad_128_f16",
            c"experts_matmul_4bit_grad_128_bf16",
        ]),
    },
    Shape {
        rows: 256,
        columns: 128,
        threads: 256,
        stages: 3,
        capability: 80,
        forward: [c"matmul_4bit_256_f16", c"matmul_4bit_256_bf16"],
        grad: Some([c"matmul_4bit_grad_256_f16", c"matmul_4bit_grad_256_bf16"]),
        routed: None,
        routed_grad: None,
    },
];

impl Shape {
    /// The tile for rows of many experts, `product.rows` of them to an expert: the smallest that
    /// has room for these, else the largest. `None` when the plain tile has to do it.
    pub(in crate::ops) fn routed(
        machine: &Machine,
        product: &Product,
        dtype: DType,
    ) -> Option<&'static Self> {
        if !product.fits(machine, dtype) || !product.columns.is_multiple_of(2) {
            return None;
        }
        let usable = |shape: &&Self| {
            let kernels = if product.grad { shape.routed_grad } else { shape.routed };
            kernels.is_some()
                && machine.capability >= shape.capability
                && machine.shared_bytes >= shape.routed_shared_bytes()
        };
        let room = |shape: &&Self| shape.rows >= product.rows;
        SHAPES.iter().filter(usable).find(room).or_else(|| SHAPES.iter().rfind(usable))
    }

    /// As [`Shape::kernel`] for a shape that [`Shape::routed`] gives.
    pub(in crate::ops) fn routed_kernel(&self, grad: bool, dtype: DType) -> &'static CStr {
        let names = if grad { self.routed_grad } else { self.routed };
        names.unwrap_or(self.forward)[usize::from(dtype == DType::BF16)]
    }

    /// As [`Shape::shared_bytes`], with two lists of rows.
    pub(in crate::ops) const fn routed_shared_bytes(&self) -> u32 {
        self.shared_bytes() + 8 * self.rows as u32
    }

    pub(in crate::ops) const fn rows(&self) -> usize {
        self.rows
    }

    pub(in crate::ops) const fn columns(&self) -> usize {
        self.columns
    }

    pub(in crate::ops) const fn threads(&self) -> u32 {
        self.threads
    }

    /// Table and nested code, two decoded tiles, and the rings of packed codes and of inputs.
    pub(super) const fn shared_bytes(&self) -> u32 {
        let (rows, columns) = (self.rows as u32, self.columns as u32);
        1152 + 2 * columns * 128 + self.stages * (columns * 32 + rows * 128)
    }

    /// Groups whose shared memory fits a multiprocessor, which has little more than one can have.
    const fn resident(&self, machine: &Machine) -> u32 {
        machine.shared_bytes / self.shared_bytes()
    }

    pub(super) const fn tiles(&self, product: &Product) -> usize {
        let columns = product.columns.div_ceil(self.columns);
        product.rows.div_ceil(self.rows).saturating_mul(columns)
    }

    pub(super) fn kernel(&self, grad: bool, dtype: DType) -> &'static CStr {
        let names = if grad { self.grad.unwrap_or(self.forward) } else { self.forward };
        names[usize::from(dtype == DType::BF16)]
    }
}

/// What a plan depends on.
pub(in crate::ops) struct Machine {
    /// As 75, 80, 90; zero when it is not CUDA's.
    capability: u32,
    multiprocessors: usize,
    /// Most that one group can have.
    shared_bytes: u32,
}

impl Machine {
    pub(in crate::ops) fn of(device: &Device) -> Self {
        Self {
            capability: if device.runtime() == Runtime::Cuda { device.capability() } else { 0 },
            multiprocessors: device.multiprocessors().max(1) as usize,
            shared_bytes: device.max_shared_bytes(),
        }
    }
}

/// A shape, and into how many parts of how many steps the depth is split.
#[derive(Clone, Copy, Debug)]
pub(super) struct Plan {
    pub(super) shape: &'static Shape,
    pub(super) splits: usize,
    pub(super) steps: usize,
}

impl Plan {
    /// The plan with the least estimated time.
    pub(super) fn best(machine: &Machine, product: &Product, dtype: DType) -> Option<Self> {
        if !product.fits(machine, dtype) {
            return None;
        }
        let steps = product.depth.div_ceil(STEP);
        let mut best: Option<(u64, Self)> = None;
        for shape in &SHAPES {
            if machine.capability < shape.capability
                || machine.shared_bytes < shape.shared_bytes()
                || (product.grad && shape.grad.is_none())
            {
                continue;
            }
            for wanted in 1..=MAX_SPLITS {
                let each = steps.div_ceil(wanted);
                if wanted > 1 && each < MIN_STEPS {
                    break;
                }
                let plan = Self { shape, splits: steps.div_ceil(each), steps: each };
                let cycles = plan.cycles(machine, product);
                if best.is_none_or(|(least, _)| cycles < least) {
                    best = Some((cycles, plan));
                }
            }
        }
        best.map(|(_, plan)| plan)
    }

    /// An estimate of the time in cycles, to compare plans by: tensor cores take 1024
    /// multiply-adds a cycle and multiprocessor, 32 codes 7.5 cycles of a quarter of it. Counted
    /// from the instructions; not measured.
    fn cycles(&self, machine: &Machine, product: &Product) -> u64 {
        /// A step of a group alone: copies, barrier, decoding and products one after the other.
        const ALONE: usize = 500;
        /// Steps that a group takes to start and to store.
        const AROUND: usize = 4;
        /// A launch; bytes of sums that the whole device writes or reads in a cycle.
        const LAUNCH: usize = 3000;
        const BYTES: usize = 2000;
        let Shape { rows, columns, .. } = *self.shape;
        let (products, decoding) = (rows * columns * STEP / 1024, columns * 15 / 4);
        // With fewer than eight warps on a multiprocessor the two do not overlap.
        let warps = self.shape.resident(machine) * self.shape.threads / 32;
        let overlap = if warps < 8 { 1 } else { 4 };
        let step = products.max(decoding) + products.min(decoding) / overlap;
        let groups = self.shape.tiles(product).saturating_mul(self.splits);
        let each = groups.div_ceil(machine.multiprocessors);
        let main = each.saturating_mul(step).max(ALONE).saturating_mul(self.steps + AROUND);
        let second = match self.sums(product) {
            0 => 0,
            sums => LAUNCH + sums.saturating_mul(8) / BYTES,
        };
        main.saturating_add(second) as u64
    }

    /// Whether this takes less than the kernel of `matvec_4bit` for five to eight rows, which issues
    /// 16 instructions for 32 codes, at most four a cycle. Counted from the instructions; not
    /// measured.
    pub(super) fn beats_matvec(&self, machine: &Machine, product: &Product) -> bool {
        const CODES: usize = 4 * 32;
        const INSTRUCTIONS: usize = 16;
        let codes = product.columns.saturating_mul(product.depth) / CODES;
        let matvec = codes.saturating_mul(INSTRUCTIONS) / machine.multiprocessors;
        self.cycles(machine, product) < matvec as u64
    }

    /// Number of float32 sums that go through the workspace: none for one split, unless rows of an
    /// odd length forbid to store two elements as one.
    pub(super) const fn sums(&self, product: &Product) -> usize {
        if self.splits == 1 && product.columns.is_multiple_of(2) {
            return 0;
        }
        self.splits.saturating_mul(product.rows).saturating_mul(product.columns)
    }
}

/// Most parts of one sum.
const MAX_SPLITS: usize = 32;
/// Fewest steps of a part.
const MIN_STEPS: usize = 4;

#[cfg(test)]
mod tests {
    use super::*;

    const H100: Machine = Machine { capability: 90, multiprocessors: 132, shared_bytes: 232_448 };
    const T4: Machine = Machine { capability: 75, multiprocessors: 40, shared_bytes: 65_536 };
    const RTX_4090: Machine =
        Machine { capability: 89, multiprocessors: 128, shared_bytes: 101_376 };

    #[test]
    fn plans_cover_the_depth_and_fit_the_machine() {
        for machine in [H100, T4, RTX_4090] {
            for dtype in DType::ALL {
                for grad in [false, true] {
                    for (out, columns) in [(1, 32), (70, 96), (4096, 4096), (14_336, 4096)] {
                        for rows in [1, 9, 16, 40, 130, 4096] {
                            let product = Product::new(grad, out, columns, rows);
                            let plan = Plan::best(&machine, &product, dtype);
                            let least = if dtype == DType::F16 { 75 } else { 80 };
                            let expected = dtype != DType::F32 && machine.capability >= least;
                            assert_eq!(plan.is_some(), expected, "{product:?} {dtype}");
                            let Some(plan) = plan else { continue };
                            let steps = product.depth.div_ceil(STEP);
                            assert!(plan.shape.shared_bytes() <= machine.shared_bytes, "{plan:?}");
                            assert!(plan.shape.capability <= machine.capability, "{plan:?}");
                            assert!(plan.steps * plan.splits >= steps, "{plan:?}");
                            assert!(
                                plan.steps * (plan.splits - 1) < steps,
                                "no empty part: {plan:?}"
                            );
                            assert!(!grad || plan.shape.grad.is_some(), "{plan:?}");
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn tiles_grow_with_the_rows() {
        let rows_of = |rows| {
            let product = Product::new(false, 4096, 4096, rows);
            Plan::best(&H100, &product, DType::BF16).unwrap().shape.rows
        };
        let tiles = [9, 32, 64, 512, 4096].map(rows_of);
        assert_eq!(tiles, [16, 32, 64, 128, 256]);
    }

    /// What `tests/matmul_4bit.rs` relies on: products that the emulator can do reach every tile.
    #[test]
    fn four_multiprocessors_reach_every_tile() {
        let emulated = Machine { capability: 80, multiprocessors: 4, shared_bytes: 166_912 };
        let rows_of = |grad, rows, out, columns| {
            let product = Product::new(grad, out, columns, rows);
            Plan::best(&emulated, &product, DType::BF16).unwrap().shape.rows
        };
        assert_eq!(rows_of(false, 9, 70, 96), 16);
        assert_eq!(rows_of(false, 31, 201, 320), 32);
        assert_eq!(rows_of(false, 64, 64, 1024), 64);
        assert_eq!(rows_of(true, 9, 70, 96), 64);
        assert_eq!(rows_of(false, 256, 256, 96), 128);
        assert_eq!(rows_of(true, 250, 104, 256), 128);
        assert_eq!(rows_of(false, 512, 250, 64), 256);
        assert_eq!(rows_of(true, 500, 72, 256), 256);
    }

    #[test]
    fn rows_of_experts_get_the_smallest_tile_with_room() {
        let rows_of = |machine, grad, rows| {
            let product = Product::new(grad, 4096, 4096, rows);
            Shape::routed(machine, &product, DType::F16).unwrap().rows
        };
        assert_eq!(
            [1, 16, 17, 64, 65, 1000].map(|n| rows_of(&H100, false, n)),
            [16, 16, 64, 64, 128, 128]
        );
        assert_eq!([1, 65].map(|n| rows_of(&H100, true, n)), [64, 128]);
        assert_eq!([1, 65].map(|n| rows_of(&T4, false, n)), [16, 64]);
        let odd = Product::new(false, 33, 64, 4);
        assert!(Shape::routed(&H100, &odd, DType::F16).is_none(), "no two elements as one");
    }

    #[test]
    fn a_row_of_32_codes_or_none() {
        let plan = |columns| Plan::best(&H100, &Product::new(false, 64, columns, 16), DType::F16);
        assert!(plan(96).is_some() && plan(80).is_none() && plan(0).is_none());
    }

    #[test]
    fn tensor_cores_take_few_rows_of_large_weights() {
        let beats = |machine: &Machine, rows, out, columns| {
            let product = Product::new(false, out, columns, rows);
            let plan = Plan::best(machine, &product, DType::F16).unwrap();
            plan.beats_matvec(machine, &product)
        };
        for machine in [H100, T4, RTX_4090] {
            for rows in [5, 8] {
                assert!(beats(&machine, rows, 4096, 4096));
                assert!(beats(&machine, rows, 14_336, 4096));
                assert!(!beats(&machine, rows, 256, 256));
            }
        }
        assert!(!beats(&H100, 8, 1024, 1024));
    }
}
