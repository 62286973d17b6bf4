//! AVX-512: tiles of 3 lines by 8 rows. Their 24 sums, 3 lines and 8 broadcasts (loads, which
//! need no arithmetic port) leave both multiply-add ports busy: 24 fused multiply-adds on 11
//! loads.

use super::{Ahead, LANES, Line, Micro, Run, prefetch};
use crate::Element;
#[allow(clippy::wildcard_imports)] // the vocabulary of the file
use std::arch::x86_64::*;

pub(super) struct Avx512;

const REACH: usize = 8;

impl Micro for Avx512 {
    const LINES: usize = 3;
    const REACH: usize = REACH;

    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
    unsafe fn multiply(
        block: &[Line],
        stride: usize,
        lines: usize,
        panel: &[Line],
        sums: &mut [Line],
        add: bool,
        ahead: &Ahead,
    ) {
        match lines {
            3 => tile::<3>(block, stride, panel, sums, add, ahead),
            2 => tile::<2>(block, stride, panel, sums, add, ahead),
            _ => tile::<1>(block, stride, panel, sums, add, ahead),
        }
    }

    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
    unsafe fn decode4(run: &Run<'_>, out: &mut [Line], stride: usize) {
        let table = load(&Line(*run.table));
        // Eight bytes are two words. Lane `i` takes nibble `i % 8` of word `i / 8`, high nibble of
        // each byte first; the permutation looks at the lowest four bits of a lane only.
        let word = _mm512_setr_epi32(0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1);
        let nibble = _mm512_setr_epi32(4, 0, 12, 8, 20, 16, 28, 24, 4, 0, 12, 8, 20, 16, 28, 24);
        let mut at = 0;
        for (lines, scale) in run.aligned() {
            let scaled = _mm512_mul_ps(table, _mm512_set1_ps(scale));
            for bytes in lines {
                let bytes = _mm_cvtsi64_si128(i64::from_le_bytes(*bytes));
                let words = _mm512_permutexvar_epi32(word, _mm512_castsi128_si512(bytes));
                let codes = _mm512_srlv_epi32(words, nibble);
                store(&mut out[at], _mm512_permutexvar_ps(codes, scaled));
                at += stride;
            }
        }
        // Big-endian: the first code is the highest nibble.
        let nibble = _mm512_setr_epi32(28, 24, 20, 16, 12, 8, 4, 0, 28, 24, 20, 16, 12, 8, 4, 0);
        for i in run.aligned_lines()..run.len.div_ceil(LANES) {
            let group = run.group(i);
            let words = _mm512_mask_set1_epi32(
                _mm512_set1_epi32((group.codes >> 32) as i32),
                0xFF00,
                group.codes as i32,
            );
            let code = _mm512_permutexvar_ps(_mm512_srlv_epi32(words, nibble), table);
            let second = !lanes_below(group.border);
            let [a, b] = group.scales;
            let scale = _mm512_mask_mov_ps(_mm512_set1_ps(a), second, _mm512_set1_ps(b));
            store(&mut out[at], _mm512_maskz_mul_ps(lanes_below(group.len), code, scale));
            at += stride;
        }
    }

    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
    unsafe fn decode8(codes: &[i8], factors: [f32; 2], out: &mut [Line], stride: usize) {
        let factors = factors.map(|f| _mm512_set1_ps(f));
        let wide = |codes: &[i8; LANES]| {
            // SAFETY: the array is 16 bytes.
            let codes = unsafe { _mm_loadu_si128(codes.as_ptr().cast()) };
            let codes = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(codes));
            _mm512_mul_ps(_mm512_mul_ps(codes, factors[0]), factors[1])
        };
        let (full, rest) = codes.as_chunks::<LANES>();
        let mut at = 0;
        for codes in full {
            store(&mut out[at], wide(codes));
            at += stride;
        }
        if !rest.is_empty() {
            let mut end = [0; LANES];
            end[..rest.len()].copy_from_slice(rest);
            store(&mut out[at], wide(&end));
            out[at].0[rest.len()..].fill(0.0); // the factors may be infinite
        }
    }

    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
    unsafe fn widen<T: Element>(elements: &[T], out: &mut [Line], stride: usize) {
        let (full, rest) = elements.as_chunks::<LANES>();
        let mut at = 0;
        for elements in full {
            // SAFETY: the array holds 16 elements.
            store(&mut out[at], unsafe { T::load16(elements.as_ptr()) });
            at += stride;
        }
        if !rest.is_empty() {
            let mut end = [T::default(); LANES];
            end[..rest.len()].copy_from_slice(rest);
            // SAFETY: the array holds 16 elements.
            store(&mut out[at], unsafe { T::load16(end.as_ptr()) });
        }
    }

    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
    unsafe fn narrow<T: Element>(line: &Line, out: &mut [T]) {
        if let Ok(out) = <&mut [T; LANES]>::try_from(&mut *out) {
            // SAFETY: the array holds 16 elements.
            unsafe { T::store16(out.as_mut_ptr(), load(line)) }
        } else {
            let mut all = [T::default(); LANES];
            // SAFETY: the array holds 16 elements.
            unsafe { T::store16(all.as_mut_ptr(), load(line)) };
            out.copy_from_slice(&all[..out.len()]);
        }
    }

    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
    unsafe fn transpose(rows: [&Line; LANES], out: &mut [Line; LANES]) {
        let r: [__m512; LANES] = std::array::from_fn(|i| load(rows[i]));
        // 4x4 squares within the 128-bit quarters: quarter q of s[4 * i + c] is column 4 * q + c of
        // rows 4 * i ..
        let mut s = [_mm512_setzero_ps(); LANES];
        for i in (0..LANES).step_by(4) {
            let a = _mm512_castps_pd(_mm512_unpacklo_ps(r[i], r[i + 1]));
            let b = _mm512_castps_pd(_mm512_unpackhi_ps(r[i], r[i + 1]));
            let c = _mm512_castps_pd(_mm512_unpacklo_ps(r[i + 2], r[i + 3]));
            let d = _mm512_castps_pd(_mm512_unpackhi_ps(r[i + 2], r[i + 3]));
            s[i] = _mm512_castpd_ps(_mm512_unpacklo_pd(a, c));
            s[i + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(a, c));
            s[i + 2] = _mm512_castpd_ps(_mm512_unpacklo_pd(b, d));
            s[i + 3] = _mm512_castpd_ps(_mm512_unpackhi_pd(b, d));
        }
        // Then the 4x4 square of quarters.
        for c in 0..4 {
            let a = _mm512_shuffle_f32x4::<0x44>(s[c], s[4 + c]);
            let b = _mm512_shuffle_f32x4::<0xEE>(s[c], s[4 + c]);
            let d = _mm512_shuffle_f32x4::<0x44>(s[8 + c], s[12 + c]);
            let e = _mm512_shuffle_f32x4::<0xEE>(s[8 + c], s[12 + c]);
            store(&mut out[c], _mm512_shuffle_f32x4::<0x88>(a, d));
            store(&mut out[4 + c], _mm512_shuffle_f32x4::<0xDD>(a, d));
            store(&mut out[8 + c], _mm512_shuffle_f32x4::<0x88>(b, e));
            store(&mut out[12 + c], _mm512_shuffle_f32x4::<0xDD>(b, e));
        }
    }
}

/// A mask of the first `n` lanes; all of them from 16 on.
#[inline]
fn lanes_below(n: usize) -> __mmask16 {
    if n < LANES { (1 << n) - 1 } else { !0 }
}

#[inline]
#[target_feature(enable = "avx512f")]
fn load(line: &Line) -> __m512 {
    // SAFETY: a line is 64 bytes, aligned to 64.
    unsafe { _mm512_load_ps(line.0.as_ptr()) }
}

#[inline]
#[target_feature(enable = "avx512f")]
fn store(line: &mut Line, v: __m512) {
    // SAFETY: a line is 64 bytes, aligned to 64.
    unsafe { _mm512_store_ps(line.0.as_mut_ptr(), v) }
}

/// `L` lines by [`REACH`] rows.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
fn tile<const L: usize>(
    block: &[Line],
    stride: usize,
    panel: &[Line],
    sums: &mut [Line],
    add: bool,
    ahead: &Ahead,
) {
    let panel = panel.as_chunks::<REACH>().0;
    assert!(block.len() >= (L - 1) * stride + panel.len() * LANES && sums.len() == L * REACH);
    let mut tile = [[_mm512_setzero_ps(); REACH]; L];
    let mut lines = block.as_ptr();
    for (rows, ahead) in panel.iter().zip(ahead.steps(panel.len())) {
        prefetch(ahead);
        for t in 0..LANES {
            // SAFETY: `lines` has advanced by 16 per element of `panel`; the furthest line read is
            // `(L - 1) * stride + 16 * panel.len() - 1`, inside the block by the assertion.
            let line: [__m512; L] =
                std::array::from_fn(|l| load(unsafe { &*lines.add(l * stride + t) }));
            for b in 0..REACH {
                let weight = _mm512_set1_ps(rows[b].0[t]);
                for l in 0..L {
                    tile[l][b] = _mm512_fmadd_ps(line[l], weight, tile[l][b]);
                }
            }
        }
        lines = lines.wrapping_add(LANES);
    }
    for (tile, sums) in tile.iter().zip(sums.as_chunks_mut::<REACH>().0) {
        for (tile, sum) in tile.iter().zip(sums) {
            let old = if add { load(sum) } else { _mm512_setzero_ps() };
            store(sum, _mm512_add_ps(old, *tile));
        }
    }
}
