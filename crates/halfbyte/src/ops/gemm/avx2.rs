//! AVX2: tiles of one line (two registers) by 6 rows. 12 sums, a line and a broadcast fit the 16
//! registers; 12 fused multiply-adds on 8 loads.

use super::{Ahead, LANES, Line, Micro, Run, prefetch};
use crate::Element;
#[allow(clippy::wildcard_imports)] // the vocabulary of the file
use std::arch::x86_64::*;

pub(super) struct Avx2;

const REACH: usize = 6;
const HALF: usize = LANES / 2;

impl Micro for Avx2 {
    const LINES: usize = 1;
    const REACH: usize = REACH;

    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn multiply(
        block: &[Line],
        _: usize,
        _: usize,
        panel: &[Line],
        sums: &mut [Line],
        add: bool,
        ahead: &Ahead,
    ) {
        let mut tile = [[_mm256_setzero_ps(); 2]; REACH];
        let block = block.as_chunks::<LANES>().0;
        let panel = panel.as_chunks::<REACH>().0;
        for ((rows, lines), ahead) in panel.iter().zip(block).zip(ahead.steps(panel.len())) {
            prefetch(ahead);
            for (t, line) in lines.iter().enumerate() {
                let line = load(line);
                for b in 0..REACH {
                    let weight = _mm256_set1_ps(rows[b].0[t]);
                    tile[b][0] = _mm256_fmadd_ps(line[0], weight, tile[b][0]);
                    tile[b][1] = _mm256_fmadd_ps(line[1], weight, tile[b][1]);
                }
            }
        }
        for (tile, sum) in tile.iter().zip(sums) {
            let old = if add { load(sum) } else { [_mm256_setzero_ps(); 2] };
            store(sum, [_mm256_add_ps(old[0], tile[0]), _mm256_add_ps(old[1], tile[1])]);
        }
    }

    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn decode4(run: &Run<'_>, out: &mut [Line], stride: usize) {
        let table = load(&Line(*run.table));
        // Four bytes are a word. Lane `i` takes nibble `i`, high nibble of each byte first.
        let nibble = _mm256_setr_epi32(4, 0, 12, 8, 20, 16, 28, 24);
        let mut at = 0;
        for (lines, scale) in run.aligned() {
            let scaled = table.map(|half| _mm256_mul_ps(half, _mm256_set1_ps(scale)));
            for bytes in lines {
                let both = u64::from_le_bytes(*bytes);
                let words = [both, both >> 32].map(|word| _mm256_set1_epi32(word as i32));
                store(&mut out[at], words.map(|words| look_up(scaled, words, nibble)));
                at += stride;
            }
        }
        // Big-endian: the first code is the highest nibble.
        let nibble = _mm256_setr_epi32(28, 24, 20, 16, 12, 8, 4, 0);
        let lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
        for i in run.aligned_lines()..run.len.div_ceil(LANES) {
            let group = run.group(i);
            let half = |word: u64, first: i32| {
                let code = look_up(table, _mm256_set1_epi32(word as i32), nibble);
                let lane = _mm256_add_epi32(lane, _mm256_set1_epi32(first));
                let below = |n: usize| {
                    _mm256_castsi256_ps(_mm256_cmpgt_epi32(_mm256_set1_epi32(n as i32), lane))
                };
                let [a, b] = group.scales.map(|s| _mm256_set1_ps(s));
                let scaled = _mm256_mul_ps(code, _mm256_blendv_ps(b, a, below(group.border)));
                _mm256_and_ps(scaled, below(group.len))
            };
            store(&mut out[at], [half(group.codes >> 32, 0), half(group.codes, 8)]);
            at += stride;
        }
    }

    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn decode8(codes: &[i8], factors: [f32; 2], out: &mut [Line], stride: usize) {
        let factors = factors.map(|f| _mm256_set1_ps(f));
        let half = |codes: __m128i| {
            let codes = _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(codes));
            _mm256_mul_ps(_mm256_mul_ps(codes, factors[0]), factors[1])
        };
        let wide = |codes: &[i8; LANES]| {
            // SAFETY: the array is 16 bytes.
            let codes = unsafe { _mm_loadu_si128(codes.as_ptr().cast()) };
            [half(codes), half(_mm_srli_si128::<8>(codes))]
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

    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn widen<T: Element>(elements: &[T], out: &mut [Line], stride: usize) {
        // SAFETY: an array holds 16 elements, twice 8.
        let wide =
            |x: &[T; LANES]| unsafe { [T::load8(x.as_ptr()), T::load8(x.as_ptr().add(HALF))] };
        let (full, rest) = elements.as_chunks::<LANES>();
        let mut at = 0;
        for elements in full {
            store(&mut out[at], wide(elements));
            at += stride;
        }
        if !rest.is_empty() {
            let mut end = [T::default(); LANES];
            end[..rest.len()].copy_from_slice(rest);
            store(&mut out[at], wide(&end));
        }
    }

    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn narrow<T: Element>(line: &Line, out: &mut [T]) {
        let [a, b] = load(line);
        // SAFETY: an array holds 16 elements, twice 8.
        let round = |out: &mut [T; LANES]| unsafe {
            T::store8(out.as_mut_ptr(), a);
            T::store8(out.as_mut_ptr().add(HALF), b);
        };
        if let Ok(out) = <&mut [T; LANES]>::try_from(&mut *out) {
            round(out);
        } else {
            let mut all = [T::default(); LANES];
            round(&mut all);
            out.copy_from_slice(&all[..out.len()]);
        }
    }

    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn transpose(rows: [&Line; LANES], out: &mut [Line; LANES]) {
        for i in [0, 1] {
            for j in [0, 1] {
                // Square (i, j) of 8x8 goes to (j, i).
                let r: [__m256; HALF] = std::array::from_fn(|n| load(rows[HALF * i + n])[j]);
                let columns = transpose8(r);
                for (out, column) in out[HALF * j..].iter_mut().zip(columns) {
                    // SAFETY: a line is 64 bytes, aligned to 64; `i` picks one half.
                    unsafe { _mm256_store_ps(out.0.as_mut_ptr().add(HALF * i), column) }
                }
            }
        }
    }
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn transpose8(r: [__m256; HALF]) -> [__m256; HALF] {
    let mut s = [_mm256_setzero_pd(); HALF];
    for i in (0..HALF).step_by(4) {
        let a = _mm256_castps_pd(_mm256_unpacklo_ps(r[i], r[i + 1]));
        let b = _mm256_castps_pd(_mm256_unpackhi_ps(r[i], r[i + 1]));
        let c = _mm256_castps_pd(_mm256_unpacklo_ps(r[i + 2], r[i + 3]));
        let d = _mm256_castps_pd(_mm256_unpackhi_ps(r[i + 2], r[i + 3]));
        s[i] = _mm256_unpacklo_pd(a, c);
        s[i + 1] = _mm256_unpackhi_pd(a, c);
        s[i + 2] = _mm256_unpacklo_pd(b, d);
        s[i + 3] = _mm256_unpackhi_pd(b, d);
    }
    let s = s.map(|v| _mm256_castpd_ps(v));
    std::array::from_fn(|c| {
        if c < 4 {
            _mm256_permute2f128_ps::<0x20>(s[c], s[4 + c])
        } else {
            _mm256_permute2f128_ps::<0x31>(s[c - 4], s[c])
        }
    })
}

/// `table[(words >> shift) & 15]`.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn look_up(table: [__m256; 2], words: __m256i, shift: __m256i) -> __m256 {
    let code = _mm256_srlv_epi32(words, shift);
    let low = _mm256_permutevar8x32_ps(table[0], code);
    let high = _mm256_permutevar8x32_ps(table[1], code);
    // The blend looks at the sign bit: bit 3 of the code.
    _mm256_blendv_ps(low, high, _mm256_castsi256_ps(_mm256_slli_epi32::<28>(code)))
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn load(line: &Line) -> [__m256; 2] {
    // SAFETY: a line is 64 bytes, aligned to 64.
    unsafe { [_mm256_load_ps(line.0.as_ptr()), _mm256_load_ps(line.0.as_ptr().add(HALF))] }
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn store(line: &mut Line, [a, b]: [__m256; 2]) {
    // SAFETY: a line is 64 bytes, aligned to 64.
    unsafe {
        _mm256_store_ps(line.0.as_mut_ptr(), a);
        _mm256_store_ps(line.0.as_mut_ptr().add(HALF), b);
    }
}
