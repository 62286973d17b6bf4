//! `dequantize_4bit` equals the core's, bit for bit, on every device at hand.

mod common;
mod placed;

use halfbyte::{BlockSize, Code4, Code8, Element};
use halfbyte_gpu::ops::{self, NestedScales, Scales, Table4};
use halfbyte_gpu::{Error, Stream};
use placed::{Bits, Placed, Random, assert_same, bytes, lengths, nowhere};

/// Where the values of the codes come from.
#[derive(Clone, Copy, Debug)]
enum Table {
    Standard(Code4),
    /// Values that are in no standard table, with a NaN and an infinity.
    Own,
}

const OWN: [f32; 16] = [
    1.5,
    -7.25,
    f32::NAN,
    0.1,
    f32::INFINITY,
    -0.0,
    3e38,
    1e-45,
    -1e-40,
    0.333,
    65504.0,
    65520.0,
    -2.0,
    1e-7,
    5.9e-8,
    2.9e-8,
];

fn check<T: Element + Bits>(
    len: usize,
    blocksize: BlockSize,
    table: Table,
    nested: Option<BlockSize>,
    shift: usize,
) {
    let blocks = blocksize.over(len);
    let packed = bytes(blocks.packed_len());
    let mut random = Random(len as u64);
    // Scales of all sizes, some not finite.
    let scale = |random: &mut Random| match random.below(12) {
        0 => f32::from_bits(random.bits()),
        1 => 0.0,
        _ => random.uniform().abs() * 4.0,
    };
    let plain: Vec<f32> = (0..blocks.count()).map(|_| scale(&mut random)).collect();
    let second = nested.unwrap_or(BlockSize::B256);
    let absmax8 = bytes(blocks.count());
    let absmax2: Vec<f32> =
        (0..second.over(blocks.count()).count()).map(|_| scale(&mut random)).collect();
    let code2 = Code8::dynamic(true).values();
    let offset = 0.37f32;
    let values: [f32; 16] = match table {
        Table::Standard(code) => *code.table(),
        Table::Own => OWN,
    };

    let core_scales = match nested {
        None => halfbyte::Scales::Plain(&plain),
        Some(blocksize) => halfbyte::Scales::Nested(halfbyte::NestedScales {
            absmax: &absmax8,
            code: code2,
            absmax2: &absmax2,
            blocksize,
            offset,
        }),
    };
    let mut expected = vec![T::default(); len];
    halfbyte::dequantize_4bit(&packed, &core_scales, &values, blocksize, &mut expected).unwrap();

    for device in common::portable_devices() {
        let stream = Stream::new(device).unwrap();
        let packed = Placed::new(&stream, &packed, shift);
        let plain = Placed::new(&stream, &plain, shift);
        let absmax8 = Placed::new(&stream, &absmax8, shift);
        let absmax2 = Placed::new(&stream, &absmax2, shift);
        let code2 = Placed::new(&stream, code2, shift);
        let offset = Placed::new(&stream, &[offset], shift);
        let own = Placed::new(&stream, &OWN, shift);
        let out = Placed::<T>::unwritten(&stream, len, shift);
        let scales = match nested {
            None => Scales::Plain(plain.slice()),
            Some(blocksize) => Scales::Nested(NestedScales {
                absmax: absmax8.slice(),
                code: code2.slice(),
                absmax2: absmax2.slice(),
                blocksize,
                offset: offset.slice(),
            }),
        };
        let values = match table {
            Table::Standard(code) => Table4::Standard(code),
            Table::Own => Table4::Device(own.slice()),
        };
        ops::dequantize_4bit(&stream, packed.slice(), &scales, &values, blocksize, out.floats())
            .unwrap();
        let at =
            format!("{device} {table:?} {} {blocks:?} nested {nested:?} shift {shift}", T::DTYPE);
        assert_same(&out.read(&stream), &expected, &at);
    }
}

const TABLES: [Table; 3] = [Table::Standard(Code4::Nf4), Table::Standard(Code4::Fp4), Table::Own];

#[test]
fn every_block_size_dtype_and_length() {
    for (b, blocksize) in BlockSize::ALL.into_iter().enumerate() {
        for (i, len) in lengths(blocksize.get()).into_iter().enumerate() {
            let nested = (i % 2 == 1).then_some(BlockSize::ALL[(b + i) % 8]);
            for_all_dtypes!(check(len, blocksize, TABLES[(b + i) % 3], nested, i % 3));
        }
    }
}

/// Long enough for loads at full width, at every distance from an aligned address.
#[test]
fn any_alignment() {
    for shift in 0..=16 {
        for_all_dtypes!(check(8192 + 511, BlockSize::B64, TABLES[0], None, shift));
    }
}

/// Several blocks of the second level.
#[test]
fn nested_scales() {
    for second in [BlockSize::B64, BlockSize::B256] {
        for table in TABLES {
            for_all_dtypes!(check(20_001, BlockSize::ALL[0], table, Some(second), 0));
        }
    }
}

#[test]
fn buffers_of_another_length_are_refused() {
    let stream = Stream::new(common::portable_devices()[0]).unwrap();
    let out = Placed::<f32>::unwritten(&stream, 65, 0);
    let (floats, codes) = (nowhere::<f32>, nowhere::<u8>);
    let nested = |absmax, code, absmax2, offset| {
        Scales::Nested(NestedScales {
            absmax: codes(absmax),
            code: floats(code),
            absmax2: floats(absmax2),
            blocksize: BlockSize::B256,
            offset: floats(offset),
        })
    };
    let nf4 = Table4::Standard(Code4::Nf4);
    for (bytes, scales, table, what) in [
        (32, Scales::Plain(floats(2)), nf4, "packed"),
        (34, Scales::Plain(floats(2)), nf4, "packed"),
        (33, Scales::Plain(floats(1)), nf4, "absmax"),
        (33, nested(3, 256, 1, 1), nf4, "absmax"),
        (33, nested(2, 255, 1, 1), nf4, "nested code"),
        (33, nested(2, 256, 2, 1), nf4, "absmax2"),
        (33, nested(2, 256, 1, 0), nf4, "offset"),
        (33, Scales::Plain(floats(2)), Table4::Device(floats(15)), "table"),
    ] {
        let result = ops::dequantize_4bit(
            &stream,
            codes(bytes),
            &scales,
            &table,
            BlockSize::B64,
            out.floats(),
        );
        assert!(matches!(result, Err(Error::Length { what: w, .. }) if w == what), "{result:?}");
    }
}
