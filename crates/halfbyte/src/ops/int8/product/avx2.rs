//! AVX2: tiles of 6 rows by 16 outputs, codes widened to int16 as they are packed. `vpmaddwd` adds
//! two products into an int32, which cannot overflow. (`vpmaddubsw`, on bytes, saturates.)

use super::{Coming, LANES, Line, Micro, STEP, TOGETHER};
use crate::Element;
#[allow(clippy::wildcard_imports)] // the vocabulary of the file
use std::arch::x86_64::*;

pub(super) struct Avx2;

const ROWS: usize = 6;
/// Lanes of a register: half a line.
const HALF: usize = 8;

impl Micro for Avx2 {
    const ROWS: usize = ROWS;
    const LINES: usize = 1;
    const GROUP: usize = 2;
    const LIFT: i32 = 0;

    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn pack_panel(rows: &[&[i8]], panel: &mut [Line]) {
        let depth = rows.first().map_or(0, |r| r.len());
        assert!(rows.iter().all(|r| r.len() == depth) && rows.len() <= LANES);
        assert_eq!(panel.len(), depth.div_ceil(2));
        for half in 0..2 {
            let rows = rows.get(half * HALF..).unwrap_or_default();
            for start in (0..depth).step_by(16) {
                let mut square = [_mm256_setzero_si256(); HALF];
                for (v, row) in square.iter_mut().zip(rows) {
                    *v = widen(&row[start..]);
                }
                let square = transpose(square);
                for (line, v) in panel[start / 2..].iter_mut().zip(square) {
                    store(line, half, v);
                }
            }
        }
    }

    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn multiply(
        rows: &[i32],
        panel: &[Line],
        sums: &mut [Line],
        _: usize,
        coming: &mut Coming,
    ) {
        let rows = rows.as_chunks::<ROWS>().0;
        let sums: &mut [Line; ROWS] = sums.try_into().expect("a tile of sums");
        let mut tile = [[_mm256_setzero_si256(); 2]; ROWS];
        for m in 0..ROWS {
            tile[m] = [load(&sums[m], 0), load(&sums[m], 1)];
        }
        let stretches = rows.chunks(STEP).zip(panel.chunks(STEP));
        for (rows, panel) in stretches {
            coming.step();
            for (rows, weights) in rows.iter().zip(panel) {
                let weights = [load(weights, 0), load(weights, 1)];
                for m in 0..ROWS {
                    let row = _mm256_set1_epi32(rows[m]);
                    for h in 0..2 {
                        let two = _mm256_madd_epi16(weights[h], row);
                        tile[m][h] = _mm256_add_epi32(tile[m][h], two);
                    }
                }
            }
        }
        for m in 0..ROWS {
            store(&mut sums[m], 0, tile[m][0]);
            store(&mut sums[m], 1, tile[m][1]);
        }
    }

    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn multiply_add(rows: &[f32], columns: &[Line], values: &mut [Line]) {
        let rows = rows.as_chunks::<ROWS>().0;
        let values: &mut [Line; ROWS] = values.try_into().expect("a tile of values");
        let mut tile = [[_mm256_setzero_ps(); 2]; ROWS];
        for m in 0..ROWS {
            tile[m] = [float(&values[m], 0), float(&values[m], 1)];
        }
        for (rows, columns) in rows.iter().zip(columns) {
            let columns = [float(columns, 0), float(columns, 1)];
            for m in 0..ROWS {
                let row = _mm256_set1_ps(rows[m]);
                for h in 0..2 {
                    tile[m][h] = _mm256_fmadd_ps(row, columns[h], tile[m][h]);
                }
            }
        }
        for m in 0..ROWS {
            store(&mut values[m], 0, _mm256_castps_si256(tile[m][0]));
            store(&mut values[m], 1, _mm256_castps_si256(tile[m][1]));
        }
    }

    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn scale(sums: &mut [Line], row: f32, columns: &[Line]) {
        for (sum, column) in sums.iter_mut().zip(columns) {
            for h in 0..2 {
                let y = _mm256_mul_ps(_mm256_cvtepi32_ps(load(sum, h)), _mm256_set1_ps(row));
                let y = _mm256_mul_ps(y, float(column, h));
                store(sum, h, _mm256_castps_si256(y));
            }
        }
    }

    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn add_columns(row: &[f32], columns: &[Line], values: &mut [Line]) {
        let lines = values.len();
        assert_eq!(columns.len(), row.len() * lines);
        for (i, value) in values.iter_mut().enumerate() {
            let mut v = [float(value, 0), float(value, 1)];
            for (x, columns) in row.iter().zip(columns.chunks_exact(lines)) {
                let x = _mm256_set1_ps(*x);
                v = [
                    _mm256_fmadd_ps(x, float(&columns[i], 0), v[0]),
                    _mm256_fmadd_ps(x, float(&columns[i], 1), v[1]),
                ];
            }
            store(value, 0, _mm256_castps_si256(v[0]));
            store(value, 1, _mm256_castps_si256(v[1]));
        }
    }

    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn finish<T: Element>(values: &[Line], bias: Option<&[T]>, out: &mut [T]) {
        for (i, out) in out.chunks_mut(HALF).enumerate() {
            let mut v = float(&values[i / 2], i % 2);
            if let Some(bias) = bias {
                let bias = &bias[i * HALF..][..out.len()];
                let mut all = [T::default(); HALF];
                all[..bias.len()].copy_from_slice(bias);
                // SAFETY: the array holds 8 elements.
                v = _mm256_add_ps(v, unsafe { T::load8(all.as_ptr()) });
            }
            let mut all = [T::default(); HALF];
            // SAFETY: the array holds 8 elements.
            unsafe { T::store8(all.as_mut_ptr(), v) };
            out.copy_from_slice(&all[..out.len()]);
        }
    }

    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn dots<const M: usize>(
        rows: [&[i8]; M],
        weight: [&[i8]; TOGETHER],
    ) -> [[i32; TOGETHER]; M] {
        let depth = weight[0].len();
        assert!(weight.iter().all(|w| w.len() == depth));
        assert!(rows.iter().all(|r| r.len() >= depth.next_multiple_of(64)));
        let mut tile = [[_mm256_setzero_si256(); TOGETHER]; M];
        let mut start = 0;
        while start < depth {
            let mut w = [_mm256_setzero_si256(); TOGETHER];
            for i in 0..TOGETHER {
                w[i] = widen(&weight[i][start..]);
            }
            for m in 0..M {
                let row = widen(&rows[m][start..]);
                for i in 0..TOGETHER {
                    tile[m][i] = _mm256_add_epi32(tile[m][i], _mm256_madd_epi16(w[i], row));
                }
            }
            start += 16;
        }
        let mut sums = [[0; TOGETHER]; M];
        for m in 0..M {
            for i in 0..TOGETHER {
                sums[m][i] = sum(tile[m][i]);
            }
        }
        sums
    }
}

/// The first 16 codes as int16; zeros behind the end.
#[inline]
#[target_feature(enable = "avx2")]
fn widen(codes: &[i8]) -> __m256i {
    let mut end = [0; 16];
    let codes = codes.first_chunk::<16>().unwrap_or_else(|| {
        end[..codes.len()].copy_from_slice(codes);
        &end
    });
    // SAFETY: the array holds 16 bytes.
    _mm256_cvtepi8_epi16(unsafe { _mm_loadu_si128(codes.as_ptr().cast()) })
}

#[inline]
#[target_feature(enable = "avx2")]
fn load(line: &Line, half: usize) -> __m256i {
    let halves = line.0.as_chunks::<HALF>().0;
    // SAFETY: half a line is a register.
    unsafe { _mm256_loadu_si256(halves[half].as_ptr().cast()) }
}

#[inline]
#[target_feature(enable = "avx2")]
fn float(line: &Line, half: usize) -> __m256 {
    _mm256_castsi256_ps(load(line, half))
}

#[inline]
#[target_feature(enable = "avx2")]
fn store(line: &mut Line, half: usize, v: __m256i) {
    let halves = line.0.as_chunks_mut::<HALF>().0;
    // SAFETY: half a line is a register.
    unsafe { _mm256_storeu_si256(halves[half].as_mut_ptr().cast(), v) }
}

/// The wrapping sum of all lanes.
#[inline]
#[target_feature(enable = "avx2")]
fn sum(v: __m256i) -> i32 {
    let v = _mm_add_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256::<1>(v));
    let v = _mm_add_epi32(v, _mm_shuffle_epi32::<0b00_00_11_10>(v));
    _mm_cvtsi128_si32(_mm_add_epi32(v, _mm_shuffle_epi32::<1>(v)))
}

/// A square of 32-bit lanes: `out[i][j] = rows[j][i]`.
#[inline]
#[target_feature(enable = "avx2")]
fn transpose(r: [__m256i; HALF]) -> [__m256i; HALF] {
    let mut s = [_mm256_setzero_si256(); HALF];
    for i in [0, 4] {
        let a = _mm256_unpacklo_epi32(r[i], r[i + 1]);
        let b = _mm256_unpackhi_epi32(r[i], r[i + 1]);
        let c = _mm256_unpacklo_epi32(r[i + 2], r[i + 3]);
        let d = _mm256_unpackhi_epi32(r[i + 2], r[i + 3]);
        s[i] = _mm256_unpacklo_epi64(a, c);
        s[i + 1] = _mm256_unpackhi_epi64(a, c);
        s[i + 2] = _mm256_unpacklo_epi64(b, d);
        s[i + 3] = _mm256_unpackhi_epi64(b, d);
    }
    let mut out = [_mm256_setzero_si256(); HALF];
    for c in 0..4 {
        out[c] = _mm256_permute2x128_si256::<0x20>(s[c], s[4 + c]);
        out[4 + c] = _mm256_permute2x128_si256::<0x31>(s[c], s[4 + c]);
    }
    out
}
