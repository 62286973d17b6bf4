//! Cases and properties over every available instruction set.

use super::*;
use crate::ops::NestedScales;
use crate::{Code4, Error, bf16, f16};
use proptest::prelude::*;

/// The bit patterns of the result, whatever the type; all NaNs as one, since which payload a
/// product of two of them has is not defined.
fn decode_with<T: Element>(
    isa: Isa,
    packed: &[u8],
    scales: &Scales<'_>,
    table: &[f32; 16],
    blocks: Blocks,
) -> Vec<u32> {
    // What no result is, so that an unwritten element shows, and around the buffer, so that a stray
    // write does.
    const GUARD: usize = 64;
    let filler = T::from_f32(-12345.0);
    let mut out = vec![filler; blocks.len() + 2 * GUARD];
    run(isa, packed, scales, table, blocks, &mut out[GUARD..blocks.len() + GUARD]);
    let (before, out) = out.split_at(GUARD);
    let (out, after) = out.split_at(blocks.len());
    assert!(before.iter().chain(after).all(|x| *x == filler), "{isa} wrote past out");
    let bits = |x: f32| if x.is_nan() { f32::NAN.to_bits() } else { x.to_bits() };
    out.iter().map(|x| bits(x.to_f32())).collect()
}

fn assert_all_agree<T: Element>(
    packed: &[u8],
    scales: &Scales<'_>,
    table: &[f32; 16],
    blocks: Blocks,
) {
    let expected = decode_with::<T>(Isa::Scalar, packed, scales, table, blocks);
    for isa in isa::available() {
        let got = decode_with::<T>(isa, packed, scales, table, blocks);
        let at = format!("{isa} {:?} {blocks:?}", T::DTYPE);
        let differs = (0..got.len()).find(|&i| got[i] != expected[i]);
        assert_eq!(differs, None, "element {at}");
    }
}

fn assert_all_types_agree(
    packed: &[u8],
    scales: &Scales<'_>,
    table: &[f32; 16],
    blocksize: BlockSize,
    len: usize,
) {
    let blocks = blocksize.over(len);
    assert_all_agree::<f32>(packed, scales, table, blocks);
    assert_all_agree::<f16>(packed, scales, table, blocks);
    assert_all_agree::<bf16>(packed, scales, table, blocks);
}

/// Every byte value, and scales of all sizes.
fn operands(blocks: Blocks) -> (Vec<u8>, Vec<f32>) {
    let packed = (0..blocks.packed_len()).map(|i| (i * 89 + i / 256) as u8).collect();
    let absmax = (0..blocks.count()).map(|i| 10f32.powi(i as i32 % 11 - 8) * (1.0 + i as f32));
    (packed, absmax.collect())
}

#[test]
fn every_variant_equals_the_definition_for_every_block_size() {
    for blocksize in BlockSize::ALL {
        let b = blocksize.get();
        let sizes = [0, 1, 2, 31, 32, 33, 63, 64, 65, 127, 128, 129, 96 * 64, 3 * TASK + 4133];
        for len in sizes.into_iter().chain([b - 1, b + 1, 3 * b - 2, 3 * b + 33]) {
            let (packed, absmax) = operands(blocksize.over(len));
            for code in Code4::ALL {
                let scales = Scales::Plain(&absmax);
                assert_all_types_agree(&packed, &scales, code.table(), blocksize, len);
            }
        }
    }
}

#[test]
fn nested_scales_agree_with_the_same_scales_decoded_first() {
    let blocks = BlockSize::new(32).unwrap().over(2 * TASK + 999);
    let (packed, _) = operands(blocks);
    let absmax: Vec<u8> = (0..blocks.count()).map(|i| (i * 31) as u8).collect();
    let absmax2: Vec<f32> = (0..absmax.len().div_ceil(256)).map(|i| 0.1 + i as f32).collect();
    let nested = Scales::Nested(NestedScales {
        absmax: &absmax,
        code: crate::Code8::dynamic(true).values(),
        absmax2: &absmax2,
        blocksize: BlockSize::B256,
        offset: 0.3,
    });
    let mut plain = vec![0.0; absmax.len()];
    nested.decode(0, &mut plain);
    let table = Code4::Nf4.table();
    for isa in isa::available() {
        let expected = decode_with::<bf16>(isa, &packed, &Scales::Plain(&plain), table, blocks);
        assert!(decode_with::<bf16>(isa, &packed, &nested, table, blocks) == expected, "{isa}");
    }
}

/// Any table and any scale: products that overflow, underflow, are subnormal or not numbers.
#[test]
fn extreme_tables_and_scales_agree() {
    let blocks = BlockSize::B64.over(64 * 9 + 17);
    let (packed, _) = operands(blocks);
    let mut table = *Code4::Fp4.table();
    table[3] = f32::NAN;
    table[5] = f32::INFINITY;
    table[6] = 1.0 + 2f32.powi(-8); // halfway between two bfloat16
    table[7] = 1.0 + 2f32.powi(-11); // halfway between two float16
    let scales =
        [0.0, -0.0, 1.0, f32::from_bits(1), f32::MAX, f32::INFINITY, f32::NAN, 1e-40, 6e-8, -7e4];
    assert_all_types_agree(&packed, &Scales::Plain(&scales), &table, BlockSize::B64, blocks.len());
}

#[test]
fn the_first_element_is_in_the_high_nibble() {
    let mut out = [0.0f32; 3];
    let table = std::array::from_fn(|i| i as f32);
    dequantize_4bit(&[0x12, 0x3F], &Scales::Plain(&[2.0]), &table, BlockSize::B64, &mut out)
        .unwrap();
    assert_eq!(out, [2.0, 4.0, 6.0]);
}

#[test]
fn any_number_of_threads_gives_the_same_bytes() {
    let blocks = BlockSize::B64.over(5 * TASK + 77);
    let (packed, absmax) = operands(blocks);
    let (scales, table) = (Scales::Plain(&absmax), Code4::Nf4.table());
    let expected = decode_with::<bf16>(Isa::Scalar, &packed, &scales, table, blocks);
    for threads in [1, 2, 3] {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        let got =
            pool.install(|| decode_with::<bf16>(isa::detect(), &packed, &scales, table, blocks));
        assert!(got == expected, "{threads} threads");
    }
}

#[test]
fn buffers_of_another_length_are_refused() {
    for (bytes, scales, which) in
        [(32, 2, "packed"), (34, 2, "packed"), (33, 1, "absmax"), (33, 3, "absmax")]
    {
        let (packed, absmax) = (vec![0; bytes], vec![0.0; scales]);
        let result = dequantize_4bit(
            &packed,
            &Scales::Plain(&absmax),
            Code4::Nf4.table(),
            BlockSize::B64,
            &mut [0.0f32; 65],
        );
        assert!(matches!(result, Err(Error::Length { buffer, .. }) if buffer == which));
    }
}

#[test]
fn nested_scales_of_another_length_are_refused() {
    for (first, second, which) in [(1, 1, "absmax"), (3, 1, "absmax"), (2, 0, "absmax2")] {
        let (absmax, absmax2) = (vec![0; first], vec![0.0; second]);
        let scales = Scales::Nested(NestedScales {
            absmax: &absmax,
            code: crate::Code8::dynamic(true).values(),
            absmax2: &absmax2,
            blocksize: BlockSize::B256,
            offset: 0.0,
        });
        let table = Code4::Nf4.table();
        let result = dequantize_4bit(&[0; 33], &scales, table, BlockSize::B64, &mut [0.0f32; 65]);
        assert!(matches!(result, Err(Error::Length { buffer, .. }) if buffer == which));
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn any_operands_agree(
        packed in prop::collection::vec(any::<u8>(), 1..300),
        odd in 0usize..2,
        size in 0usize..8,
        scale in any::<u32>().prop_map(f32::from_bits),
        table in prop::array::uniform16(any::<u32>().prop_map(f32::from_bits)),
    ) {
        let (blocksize, len) = (BlockSize::ALL[size], packed.len() * 2 - odd);
        let absmax: Vec<f32> =
            (0..blocksize.over(len).count()).map(|i| scale * (1 << i) as f32).collect();
        assert_all_types_agree(&packed, &Scales::Plain(&absmax), &table, blocksize, len);
    }
}
