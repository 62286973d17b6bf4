//! The choice between the ways: every number of rows, on both sides of the border.

use super::{Weight4, matmul_4bit};
use crate::ops::Scales;
use crate::{BlockSize, Code4, NonFinite, isa};

#[test]
fn every_number_of_rows_lies_near_the_exact_product() {
    let (n, k) = (21, 70);
    let value = |i: usize| ((i * 7919 % 1000) as f32 - 500.0) / 500.0;
    let dense: Vec<f32> = (0..n * k).map(value).collect();
    let blocks = BlockSize::ALL[0].over(n * k);
    let (mut packed, mut absmax) = (vec![0; blocks.packed_len()], vec![0.0; blocks.count()]);
    let (code, refuse) = (Code4::Nf4, NonFinite::Refuse);
    crate::quantize_4bit(&dense, code, BlockSize::ALL[0], refuse, &mut packed, &mut absmax)
        .unwrap();
    let scales = Scales::Plain(&absmax);
    let weight = Weight4::new(&packed, scales, code.table(), BlockSize::ALL[0], n, k).unwrap();
    let mut decoded = vec![0.0f32; n * k];
    crate::dequantize_4bit(&packed, &scales, code.table(), BlockSize::ALL[0], &mut decoded)
        .unwrap();
    let bias: Vec<f32> = (0..n).map(|i| value(i + 3)).collect();
    for rows in 0..60 {
        let input: Vec<f32> = (0..rows * k).map(|i| value(i * 13 + 5)).collect();
        let mut out = vec![f32::NAN; rows * n];
        matmul_4bit(&input, rows, &weight, Some(&bias), &mut out).unwrap();
        for (i, &got) in out.iter().enumerate() {
            let (x, w) = (&input[i / n * k..][..k], &decoded[i % n * k..][..k]);
            let products = || x.iter().zip(w).map(|(x, w)| f64::from(*x) * f64::from(*w));
            let exact = products().sum::<f64>() + f64::from(bias[i % n]);
            let bound = products().map(f64::abs).sum::<f64>() * 1e-5 + 1e-6;
            assert!((f64::from(got) - exact).abs() <= bound, "{:?} {rows} rows", isa::selected());
        }
    }
}
