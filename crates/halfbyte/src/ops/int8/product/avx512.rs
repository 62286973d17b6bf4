//! AVX-512 with VNNI: tiles of 12 rows by 32 outputs. Their 24 sums, 2 lines of weights and one
//! broadcast (a load, which needs no arithmetic port) leave both multiply-add ports busy: 24
//! `vpdpbusd` on 14 loads. It multiplies unsigned by signed bytes, so weights are lifted by 128.

use super::{Coming, LANES, Line, Micro, STEP, TOGETHER};
use crate::Element;
#[allow(clippy::wildcard_imports)] // the vocabulary of the file
use std::arch::x86_64::*;

pub(super) struct Avx512;

/// True where the machine has VNNI beside what `Isa::Avx512` promises.
pub(super) fn is_available() -> bool {
    is_x86_feature_detected!("avx512vnni")
}

const ROWS: usize = 12;
const LINES: usize = 2;

impl Micro for Avx512 {
    const ROWS: usize = ROWS;
    const LINES: usize = LINES;
    const GROUP: usize = 4;
    const LIFT: i32 = 128;

    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")]
    unsafe fn pack_panel(rows: &[&[i8]], panel: &mut [Line]) {
        let depth = rows.first().map_or(0, |r| r.len());
        assert!(rows.iter().all(|r| r.len() == depth) && rows.len() <= LINES * LANES);
        assert_eq!(panel.len(), depth.div_ceil(4) * LINES);
        for line in 0..LINES {
            let rows = rows.get(line * LANES..).unwrap_or_default();
            for start in (0..depth).step_by(64) {
                let now = (depth - start).min(64);
                let mask = if now == 64 { !0 } else { (1 << now) - 1 };
                let mut square = [_mm512_setzero_si512(); LANES];
                for (v, row) in square.iter_mut().zip(rows) {
                    // SAFETY: `now` bytes from `start` are inside the row.
                    *v = unsafe { _mm512_maskz_loadu_epi8(mask, row.as_ptr().add(start)) };
                }
                let lift = _mm512_set1_epi8(i8::MIN);
                let square = transpose(&square);
                let lines = panel[start / 4 * LINES..].iter_mut().skip(line).step_by(LINES);
                for (line, v) in lines.zip(square) {
                    store(line, _mm512_xor_si512(v, lift));
                }
            }
        }
    }

    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")]
    unsafe fn multiply(
        rows: &[i32],
        panel: &[Line],
        sums: &mut [Line],
        used: usize,
        coming: &mut Coming,
    ) {
        match used {
            0..=4 => tile::<4>(rows, panel, sums, coming),
            5..=8 => tile::<8>(rows, panel, sums, coming),
            _ => tile::<ROWS>(rows, panel, sums, coming),
        }
    }

    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")]
    unsafe fn multiply_add(rows: &[f32], columns: &[Line], values: &mut [Line]) {
        let (rows, columns) = (rows.as_chunks::<ROWS>().0, columns.as_chunks::<LINES>().0);
        let values: &mut [[Line; LINES]; ROWS] =
            values.as_chunks_mut().0.try_into().expect("a tile of values");
        let mut tile = [[_mm512_setzero_ps(); LINES]; ROWS];
        for m in 0..ROWS {
            for l in 0..LINES {
                tile[m][l] = _mm512_castsi512_ps(load(&values[m][l]));
            }
        }
        for (rows, columns) in rows.iter().zip(columns) {
            let columns =
                [_mm512_castsi512_ps(load(&columns[0])), _mm512_castsi512_ps(load(&columns[1]))];
            for m in 0..ROWS {
                let row = _mm512_set1_ps(rows[m]);
                for l in 0..LINES {
                    tile[m][l] = _mm512_fmadd_ps(row, columns[l], tile[m][l]);
                }
            }
        }
        for m in 0..ROWS {
            for l in 0..LINES {
                store(&mut values[m][l], _mm512_castps_si512(tile[m][l]));
            }
        }
    }

    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")]
    unsafe fn scale(sums: &mut [Line], row: f32, columns: &[Line]) {
        for (sum, column) in sums.iter_mut().zip(columns) {
            let y = _mm512_mul_ps(_mm512_cvtepi32_ps(load(sum)), _mm512_set1_ps(row));
            let y = _mm512_mul_ps(y, _mm512_castsi512_ps(load(column)));
            store(sum, _mm512_castps_si512(y));
        }
    }

    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")]
    unsafe fn add_columns(row: &[f32], columns: &[Line], values: &mut [Line]) {
        let lines = values.len();
        assert_eq!(columns.len(), row.len() * lines);
        for (i, value) in values.iter_mut().enumerate() {
            let mut v = _mm512_castsi512_ps(load(value));
            for (x, columns) in row.iter().zip(columns.chunks_exact(lines)) {
                v = _mm512_fmadd_ps(_mm512_set1_ps(*x), _mm512_castsi512_ps(load(&columns[i])), v);
            }
            store(value, _mm512_castps_si512(v));
        }
    }

    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")]
    unsafe fn finish<T: Element>(values: &[Line], bias: Option<&[T]>, out: &mut [T]) {
        for (i, (line, out)) in values.iter().zip(out.chunks_mut(LANES)).enumerate() {
            let mut v = _mm512_castsi512_ps(load(line));
            if let Some(bias) = bias {
                let bias = &bias[i * LANES..][..out.len()];
                // SAFETY: the array holds 16 elements.
                v = _mm512_add_ps(v, unsafe { T::load16(sixteen(bias).as_ptr()) });
            }
            if let Ok(out) = <&mut [T; LANES]>::try_from(&mut *out) {
                // SAFETY: the array holds 16 elements.
                unsafe { T::store16(out.as_mut_ptr(), v) }
            } else {
                let mut all = [T::default(); LANES];
                // SAFETY: the array holds 16 elements.
                unsafe { T::store16(all.as_mut_ptr(), v) };
                out.copy_from_slice(&all[..out.len()]);
            }
        }
    }

    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")]
    unsafe fn dots<const M: usize>(
        rows: [&[i8]; M],
        weight: [&[i8]; TOGETHER],
    ) -> [[i32; TOGETHER]; M] {
        let depth = weight[0].len();
        assert!(weight.iter().all(|w| w.len() == depth));
        assert!(rows.iter().all(|r| r.len() >= depth.next_multiple_of(64)));
        let mut tile = [[_mm512_setzero_si512(); TOGETHER]; M];
        let whole = depth - depth % 64;
        for start in (0..whole).step_by(64) {
            let mut w = [_mm512_setzero_si512(); TOGETHER];
            for i in 0..TOGETHER {
                // SAFETY: 64 bytes from `start` are inside the row.
                w[i] = unsafe { _mm512_loadu_si512(weight[i].as_ptr().add(start).cast()) };
            }
            add_products(&mut tile, w, rows, start);
        }
        if whole < depth {
            let mut w = [_mm512_setzero_si512(); TOGETHER];
            for i in 0..TOGETHER {
                let mask = (1 << (depth - whole)) - 1;
                // SAFETY: the bytes under the mask are inside the row.
                w[i] = unsafe { _mm512_maskz_loadu_epi8(mask, weight[i].as_ptr().add(whole)) };
            }
            add_products(&mut tile, w, rows, whole);
        }
        let mut sums = [[0; TOGETHER]; M];
        for m in 0..M {
            sums[m] = sum4(tile[m]);
        }
        sums
    }
}

/// The first `R` rows of a tile.
#[inline]
#[target_feature(enable = "avx512f,avx512vnni")]
fn tile<const R: usize>(rows: &[i32], panel: &[Line], sums: &mut [Line], coming: &mut Coming) {
    let (rows, panel) = (rows.as_chunks::<ROWS>().0, panel.as_chunks::<LINES>().0);
    let sums: &mut [[Line; LINES]; ROWS] =
        sums.as_chunks_mut().0.try_into().expect("a tile of sums");
    let mut tile = [[_mm512_setzero_si512(); LINES]; R];
    for m in 0..R {
        for l in 0..LINES {
            tile[m][l] = load(&sums[m][l]);
        }
    }
    let stretches = rows.chunks(STEP).zip(panel.chunks(STEP));
    for (rows, panel) in stretches {
        coming.step();
        for (rows, weights) in rows.iter().zip(panel) {
            let weights = [load(&weights[0]), load(&weights[1])];
            for m in 0..R {
                let row = _mm512_set1_epi32(rows[m]);
                for l in 0..LINES {
                    tile[m][l] = _mm512_dpbusd_epi32(tile[m][l], weights[l], row);
                }
            }
        }
    }
    for m in 0..R {
        for l in 0..LINES {
            store(&mut sums[m][l], tile[m][l]);
        }
    }
}

/// Adds the products of 64 columns of every row with every weight. The rows hold 64 from `start`.
#[inline]
#[target_feature(enable = "avx512f,avx512vnni")]
fn add_products<const M: usize>(
    tile: &mut [[__m512i; TOGETHER]; M],
    w: [__m512i; TOGETHER],
    rows: [&[i8]; M],
    start: usize,
) {
    let lift = _mm512_set1_epi8(i8::MIN);
    let mut lifted = w;
    for i in 0..TOGETHER {
        lifted[i] = _mm512_xor_si512(w[i], lift);
    }
    for m in 0..M {
        // SAFETY: `dots`, the only caller, has checked that the row goes on to a multiple of 64.
        let row = unsafe { _mm512_loadu_si512(rows[m].as_ptr().add(start).cast()) };
        for i in 0..TOGETHER {
            tile[m][i] = _mm512_dpbusd_epi32(tile[m][i], lifted[i], row);
        }
    }
}

/// The sums of all lanes of four vectors.
#[inline]
#[target_feature(enable = "avx512f,avx512dq,avx2")]
fn sum4([a, b, c, d]: [__m512i; 4]) -> [i32; 4] {
    let ab = _mm512_add_epi32(_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b));
    let cd = _mm512_add_epi32(_mm512_unpacklo_epi32(c, d), _mm512_unpackhi_epi32(c, d));
    let all = _mm512_add_epi32(_mm512_unpacklo_epi64(ab, cd), _mm512_unpackhi_epi64(ab, cd));
    let half = _mm256_add_epi32(_mm512_castsi512_si256(all), _mm512_extracti64x4_epi64::<1>(all));
    let v = _mm_add_epi32(_mm256_castsi256_si128(half), _mm256_extracti128_si256::<1>(half));
    let mut sums = [0; 4];
    // SAFETY: the array holds 16 bytes.
    unsafe { _mm_storeu_si128(sums.as_mut_ptr().cast(), v) };
    sums
}

/// Up to 16 elements, filled up with zeros.
#[inline]
fn sixteen<T: Element>(elements: &[T]) -> [T; LANES] {
    elements.first_chunk().copied().unwrap_or_else(|| {
        let mut all = [T::default(); LANES];
        all[..elements.len()].copy_from_slice(elements);
        all
    })
}

#[inline]
#[target_feature(enable = "avx512f")]
fn load(line: &Line) -> __m512i {
    // SAFETY: a line is 64 bytes, aligned to 64.
    unsafe { _mm512_load_si512(line.0.as_ptr().cast()) }
}

#[inline]
#[target_feature(enable = "avx512f")]
fn store(line: &mut Line, v: __m512i) {
    // SAFETY: a line is 64 bytes, aligned to 64.
    unsafe { _mm512_store_si512(line.0.as_mut_ptr().cast(), v) }
}

/// A square of 32-bit lanes: `out[i][j] = rows[j][i]`.
#[inline]
#[target_feature(enable = "avx512f")]
fn transpose(r: &[__m512i; LANES]) -> [__m512i; LANES] {
    // 4x4 squares within the 128-bit quarters: quarter q of s[4 * i + c] is column 4 * q + c of
    // rows 4 * i ..
    let mut s = [_mm512_setzero_si512(); LANES];
    for i in [0, 4, 8, 12] {
        let a = _mm512_unpacklo_epi32(r[i], r[i + 1]);
        let b = _mm512_unpackhi_epi32(r[i], r[i + 1]);
        let c = _mm512_unpacklo_epi32(r[i + 2], r[i + 3]);
        let d = _mm512_unpackhi_epi32(r[i + 2], r[i + 3]);
        s[i] = _mm512_unpacklo_epi64(a, c);
        s[i + 1] = _mm512_unpackhi_epi64(a, c);
        s[i + 2] = _mm512_unpacklo_epi64(b, d);
        s[i + 3] = _mm512_unpackhi_epi64(b, d);
    }
    // Then the 4x4 square of quarters.
    let mut out = [_mm512_setzero_si512(); LANES];
    for c in 0..4 {
        let a = _mm512_shuffle_i32x4::<0x44>(s[c], s[4 + c]);
        let b = _mm512_shuffle_i32x4::<0xEE>(s[c], s[4 + c]);
        let d = _mm512_shuffle_i32x4::<0x44>(s[8 + c], s[12 + c]);
        let e = _mm512_shuffle_i32x4::<0xEE>(s[8 + c], s[12 + c]);
        out[c] = _mm512_shuffle_i32x4::<0x88>(a, d);
        out[4 + c] = _mm512_shuffle_i32x4::<0xDD>(a, d);
        out[8 + c] = _mm512_shuffle_i32x4::<0x88>(b, e);
        out[12 + c] = _mm512_shuffle_i32x4::<0xDD>(b, e);
    }
    out
}
