// The update rules, as crates/halfbyte/src/optim/rules states them with their sources.
//
//     g = gradient * gnorm_scale
//     s, carry = states(g, p, s)
//     p = p + p * shrink + rate * update(s, carry)
//
// A rule has STATES states: FLOATS that are float32 beside 8-bit ones too, first moments, then
// SECOND second moments. `update` looks at `carry` where CARRIES is 1. Where NEAR is 1, updates of
// ordinary numbers go a shorter way. `c` are the rule's own numbers,
// `halfbyte::optim::Coefficients::rule`, in the order of the fields in the core.
#ifndef HALFBYTE_OPTIM_RULES_H
#define HALFBYTE_OPTIM_RULES_H
#include "port.h"

typedef GLOBAL const float* Numbers;

// An exponential moving average; c[0] is beta, c[1] is 1 - beta.
DEVICE float average(Numbers c, float old, float x) { return fma_(old, c[0], x * c[1]); }
DEVICE float average_square(Numbers c, float old, float x) { return fma_(old, c[0], x * c[1] * x); }

// -1, 0 or 1; NaN for NaN.
DEVICE float sign_(float x) {
    u32 bits = as_u32(x);
    u32 magnitude = bits & 0x7FFFFFFFu;
    if (magnitude == 0 || magnitude > 0x7F800000u) return x;
    return as_float((bits & 0x80000000u) | 0x3F800000u);
}

// The new parameter.
DEVICE float stepped(float p, float shrink, float rate, float update) {
    return fma_(update, rate, fma_(p, shrink, p));
}

// Square roots and quotients without asking whether they are special. They are rounded as sqrt_ and
// div_ round: on CUDA by the same steps, which those take in this range too, after they have asked.
#define ORDINARY_M_LOWEST 0x21800000u  // 2^-60
#define ORDINARY_M_HIGHEST 0x5D800000u // 2^60
#define ORDINARY_V_LOWEST 0x0D800000u  // 2^-100
#define ORDINARY_V_HIGHEST 0x71800000u // 2^100

// Of 2^-100 to 2^100.
DEVICE float root_ordinary(float v) {
#if CUDA && !EMULATED
    float near;
    asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(near) : "f"(v));
    float root = v * near, rest = fma_(-root, root, v);
    return fma_(rest, near * 0.5f, root);
#else
    return sqrt_(v);
#endif
}

// Of two numbers of 2^-60 to 2^60.
DEVICE float quotient_ordinary(float a, float b) {
#if CUDA && !EMULATED
    float near;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(near) : "f"(b));
    near = fma_(near, fma_(-b, near, 1.0f), near);
    float quotient = a * near, rest = fma_(-b, quotient, a);
    return fma_(near, rest, quotient);
#else
    return div_(a, b);
#endif
}

#define adam_STATES 2
#define adam_FLOATS 0
#define adam_SECOND 1
#define adam_CARRIES 0
#define adam_NEAR 1
// c: m, v, eps
DEVICE float adam_states(Numbers c, float g, float p, float* s) {
    (void)p;
    s[0] = average(c, s[0], g);
    s[1] = average_square(c + 2, s[1], g);
    return g;
}
DEVICE float adam_update(Numbers c, const float* s, float carry) {
    (void)carry;
    return div_(s[0], sqrt_(s[1]) + c[4]);
}
// Whether the update of eight elements takes no care: `s` are their states, `top` the largest
// magnitudes of each, as bits.
DEVICE u32 adam_is_ordinary(Numbers c, const float (*s)[8], const u32* top) {
    u32 m = 0x7F800000u, v = 0x7F800000u;
    UNROLL
    for (u32 j = 0; j < 8; j++) {
        u32 first = as_u32(s[0][j]) & 0x7FFFFFFFu, second = as_u32(s[1][j]);
        m = min_(m, first), v = min_(v, second);
    }
    u32 eps = as_u32(c[4]);
    return m >= ORDINARY_M_LOWEST && top[0] <= ORDINARY_M_HIGHEST && v >= ORDINARY_V_LOWEST &&
           top[1] <= ORDINARY_V_HIGHEST && eps <= 0x3F800000u;
}
DEVICE float adam_update_ordinary(Numbers c, float m, float v) {
    return quotient_ordinary(m, root_ordinary(v) + c[4]);
}

#define ademamix_STATES 3
#define ademamix_FLOATS 0
#define ademamix_SECOND 1
#define ademamix_CARRIES 0
#define ademamix_NEAR 0
// c: m1, m2, v, alpha, 1 / c1, 1 / c2, eps
DEVICE float ademamix_states(Numbers c, float g, float p, float* s) {
    (void)p;
    s[0] = average(c, s[0], g);
    s[1] = average(c + 2, s[1], g);
    s[2] = average_square(c + 4, s[2], g);
    return g;
}
DEVICE float ademamix_update(Numbers c, const float* s, float carry) {
    (void)carry;
    float mixed = fma_(s[0], c[7], s[1] * c[6]);
    return div_(mixed, fma_(sqrt_(s[2]), c[8], c[9]));
}

#define momentum_STATES 1
#define momentum_FLOATS 0
#define momentum_SECOND 0
#define momentum_CARRIES 0
#define momentum_NEAR 0
// c: beta, weight decay
DEVICE float momentum_states(Numbers c, float g, float p, float* s) {
    g = fma_(p, c[1], g);
    s[0] = fma_(s[0], c[0], g);
    return g;
}
DEVICE float momentum_update(Numbers c, const float* s, float carry) {
    (void)c, (void)carry;
    return s[0];
}

#define lion_STATES 1
#define lion_FLOATS 0
#define lion_SECOND 0
#define lion_CARRIES 1
#define lion_NEAR 0
// c: u, m
DEVICE float lion_states(Numbers c, float g, float p, float* s) {
    (void)p;
    float u = average(c, s[0], g);
    s[0] = average(c + 2, s[0], g);
    return u;
}
DEVICE float lion_update(Numbers c, const float* s, float carry) {
    (void)c, (void)s;
    return sign_(carry);
}

#define rmsprop_STATES 1
#define rmsprop_FLOATS 0
#define rmsprop_SECOND 0 /* its state is encoded as a first moment's */
#define rmsprop_CARRIES 1
#define rmsprop_NEAR 0
// c: v, weight decay, eps
DEVICE float rmsprop_states(Numbers c, float g, float p, float* s) {
    g = fma_(p, c[2], g);
    s[0] = average_square(c, s[0], g);
    return g;
}
DEVICE float rmsprop_update(Numbers c, const float* s, float carry) {
    return div_(carry, sqrt_(s[0]) + c[3]);
}

#define adagrad_STATES 1
#define adagrad_FLOATS 0
#define adagrad_SECOND 0 /* its state is encoded as a first moment's */
#define adagrad_CARRIES 1
#define adagrad_NEAR 0
// c: weight decay, eps
DEVICE float adagrad_states(Numbers c, float g, float p, float* s) {
    g = fma_(p, c[0], g);
    s[0] = fma_(g, g, s[0]);
    return g;
}
DEVICE float adagrad_update(Numbers c, const float* s, float carry) {
    return div_(carry, sqrt_(s[0]) + c[1]);
}

#define schedule_free_adamw_STATES 2
#define schedule_free_adamw_FLOATS 1
#define schedule_free_adamw_SECOND 1
#define schedule_free_adamw_CARRIES 1
#define schedule_free_adamw_NEAR 0
// c: v, eps, correction, weight decay, z's rate, the average's weight, y's rate
DEVICE float schedule_free_adamw_states(Numbers c, float g, float y, float* s) {
    float z = s[0];
    s[1] = average_square(c, s[1], g);
    float u = div_(g, sqrt_(s[1]) + c[2]) * c[3];
    u = fma_(y, c[4], u);
    s[0] = fma_(u, c[5], z);
    return fma_(fma_(y, -1.0f, z), c[6], u * c[7]);
}
DEVICE float schedule_free_adamw_update(Numbers c, const float* s, float carry) {
    (void)c, (void)s;
    return carry;
}

#endif
