// Features `first` and on, FEATURES of them, of n rows, 1 to ROWS: the body of matvec_4bit.inc.h. The
// kernel says where row m lies, A_ROW(m) and OUT_ROW(m), and the number of the BLOCK of an element;
// and EVEN_ROWS 1 if it has registers for a shorter way to the scales of rows of whole blocks.
#ifndef EVEN_ROWS
#define EVEN_ROWS 0
#endif
#define OUTPUTS (FEATURES * ROWS)
#define WORDS_AHEAD (ROWS <= 2 ? 2 : 1)
    float sums[OUTPUTS];
    // Where the rows of the weight start: in the flattened weight, as number of the first block and
    // as number of the code in it. Features past the last repeat it.
    u64 starts[FEATURES], blocks[FEATURES];
    u32 skipped[FEATURES];
    UNROLL
    for (u32 f = 0; f < FEATURES; f++) {
        starts[f] = min_(first + f, features - 1) * columns;
        blocks[f] = BLOCK(starts[f]);
        skipped[f] = (u32)starts[f] & ((1u << shift) - 1);
    }
    UNROLL
    for (u32 i = 0; i < OUTPUTS; i++) sums[i] = 0.0f;
    if (THREAD < 16) values[THREAD] = TABLE(THREAD);
    float added = absmax8 ? offset[0] : 0.0f;
    if (absmax8) {
        for (u32 i = THREAD; i < 256; i += 128) second[i] = code2[i];
    }
    BARRIER();

    if (columns % 8 == 0 && IS_ALIGNED(packed, 4) && IS_ALIGNED(a, 16)) {
        u32 words = columns / 8;
        // Where all rows start with a block, a word has the same place in each.
        u32 even = EVEN_ROWS && !absmax8 && (columns & ((1u << shift) - 1)) == 0;
        GLOBAL const float* scales_of[FEATURES];
        UNROLL
        for (u32 f = 0; f < FEATURES; f++) {
            scales_of[f] = ADDRESS(const float, kept_address((u64)(absmax + blocks[f])));
        }
        for (u32 j = THREAD; j < words; j += 128 * WORDS_AHEAD) {
            u32 codes[WORDS_AHEAD * FEATURES], places[WORDS_AHEAD * FEATURES];
            float scales[WORDS_AHEAD * FEATURES];
            // A word past the last repeats it, so that no branch keeps loads apart.
            UNROLL
            for (u32 i = 0; i < WORDS_AHEAD * FEATURES; i++) {
                u32 f = i % FEATURES, ahead = j + 128 * (i / FEATURES);
                u32 word = min_(ahead, words - 1);
                codes[i] = ((GLOBAL const u32*)(packed + starts[f] / 2))[word];
                places[i] = (skipped[f] + 8 * word) >> shift;
            }
            if (even) {
                UNROLL
                for (u32 i = 0; i < WORDS_AHEAD * FEATURES; i++) {
                    u32 ahead = j + 128 * (i / FEATURES);
                    scales[i] = scales_of[i % FEATURES][min_(ahead, words - 1) >> (shift - 3)];
                }
            } else if (absmax8) {
                u32 of[WORDS_AHEAD * FEATURES];
                UNROLL
                for (u32 i = 0; i < WORDS_AHEAD * FEATURES; i++) {
                    u64 block = blocks[i % FEATURES];
                    u32 above = (u32)block & ((1u << shift2) - 1);
                    of[i] = (absmax8 + block)[places[i]];
                    scales[i] = (absmax2 + (block >> shift2))[(above + places[i]) >> shift2];
                }
                UNROLL
                for (u32 i = 0; i < WORDS_AHEAD * FEATURES; i++) {
                    float product = second[of[i]] * scales[i];
                    scales[i] = product + added;
                }
            } else {
                UNROLL
                for (u32 i = 0; i < WORDS_AHEAD * FEATURES; i++) {
                    scales[i] = (absmax + blocks[i % FEATURES])[places[i]];
                }
            }
            UNROLL
            for (u32 ahead = 0; ahead < WORDS_AHEAD; ahead++) {
                u32 word = j + 128 * ahead;
                if (word >= words) break;
                float w[8 * FEATURES];
                UNROLL
                for (u32 f = 0; f < FEATURES; f++) {
                    values8(codes[ahead * FEATURES + f], values, w + 8 * f);
                }
                UNROLL
                for (u32 m = 0; m < ROWS; m++) {
                    float x[8];
                    LOAD8(a + A_ROW(min_(m, n - 1)) * columns + 8 * word, x);
                    UNROLL
                    for (u32 f = 0; f < FEATURES; f++) {
                        float sum = x[0] * w[8 * f];
                        UNROLL
                        for (u32 i = 1; i < 8; i++) sum = fma_(x[i], w[8 * f + i], sum);
                        u32 at = f * ROWS + m;
                        sums[at] = fma_(sum, scales[ahead * FEATURES + f], sums[at]);
                    }
                }
            }
        }
    } else {
        for (u32 k = THREAD; k < columns; k += 128) {
            UNROLL
            for (u32 f = 0; f < FEATURES; f++) {
                u64 i = starts[f] + k;
                u32 byte = packed[i / 2], index = i % 2 ? byte & 15 : byte >> 4;
                float w = values[index] * SCALE(BLOCK(i));
                UNROLL
                for (u32 m = 0; m < ROWS; m++) {
                    float x = LOAD(a, A_ROW(min_(m, n - 1)) * columns + k);
                    sums[f * ROWS + m] = fma_(x, w, sums[f * ROWS + m]);
                }
            }
        }
    }

#if HAVE_SHUFFLE
    UNROLL
    for (u32 i = 0; i < OUTPUTS; i++) {
        UNROLL
        for (u32 mask = 16; mask > 0; mask >>= 1) sums[i] += shuffle_xor(sums[i], mask);
        if (LANE == 0) parts[i * PARTS + THREAD / 32] = sums[i];
    }
#else
    for (u32 i = 0; i < OUTPUTS; i++) parts[i * PARTS + THREAD] = sums[i];
#endif
    BARRIER();
    if (THREAD < OUTPUTS) {
        u64 feature = first + THREAD / ROWS;
        u32 m = THREAD % ROWS;
        if (feature < features && m < n) {
            float sum = 0.0f;
            for (u32 i = 0; i < PARTS; i += 4) {
                LOCAL const float* part = parts + THREAD * PARTS + i;
                sum += (part[0] + part[1]) + (part[2] + part[3]);
            }
            if (bias) sum += LOAD(bias, feature);
            STORE(out, OUT_ROW(m) * features + feature, sum);
        }
    }
#undef OUTPUTS
#undef WORDS_AHEAD
