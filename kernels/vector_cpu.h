// Arithmetic shared by the CPU kernels: vectors of floats, two ways to multiply, and one small matrix product.
//
// Everything is plain C++ with the vector extensions of GCC and Clang, in vectors as long as the CPU's own: the compilers
// take longer ones apart into scalars. Only bfloat16 pairs (AVX512-BF16) need intrinsics; -DPORTABLE does without them.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#ifdef __AVX512F__
#include <immintrin.h>
#endif

// MAX_ROWS x MAX_VECS: the block of accumulators that the registers hold beside its operands.
#if defined(__AVX512F__)
constexpr int LANES = 16, MAX_VECS = 4;  // 32 registers
#elif defined(__AVX__)
constexpr int LANES = 8, MAX_VECS = 2;  // 16 registers
#elif defined(__aarch64__)
constexpr int LANES = 4, MAX_VECS = 4;  // 32 registers
#else
constexpr int LANES = 4, MAX_VECS = 2;
#endif
constexpr int MAX_ROWS = 6;

typedef float Vec __attribute__((vector_size(4 * LANES)));
typedef int32_t IntVec __attribute__((vector_size(4 * LANES)));
typedef uint16_t ShortVec __attribute__((vector_size(2 * LANES)));

struct bf16 {
  uint16_t bits;
};

static inline float to_float(float x) { return x; }
static inline float to_float(bf16 x) {
  const uint32_t wide = uint32_t(x.bits) << 16;
  float result;
  memcpy(&result, &wide, 4);
  return result;
}

static inline Vec splat(float x) { return Vec{} + x; }
static inline Vec load(const float* from) {
  Vec v;
  memcpy(&v, from, sizeof v);
  return v;
}
static inline void store(float* to, Vec v) { memcpy(to, &v, sizeof v); }

static inline Vec load(const bf16* from) {
  ShortVec bits;
  memcpy(&bits, from, sizeof bits);
  return (Vec)(__builtin_convertvector(bits, IntVec) << 16);
}
static inline void store(bf16* to, Vec v) {  // rounded to nearest, ties to even; a NaN stays one
#if defined(__AVX512BF16__) && !defined(PORTABLE)
  const auto bits = _mm512_cvtneps_pbh((__m512)v);
#else
  const IntVec wide = (IntVec)v, odd = wide >> 16 & 1;
  const IntVec narrow = v == v ? (wide + 0x7fff + odd) >> 16 : IntVec{} + 0x7fc0;
  const ShortVec bits = __builtin_convertvector(narrow, ShortVec);
#endif
  memcpy(to, &bits, sizeof bits);
}

// Rounds to bfloat16 and back: where the torch model stores an intermediate result.
static inline Vec rounded(Vec v) {
  bf16 narrow[LANES];
  store(narrow, v);
  return load(narrow);
}

static inline Vec maximum(Vec a, Vec b) { return a > b ? a : b; }
static inline float largest(Vec v) {
#ifdef __AVX512F__
  return _mm512_reduce_max_ps((__m512)v);
#else
  float best = v[0];
  for (int i = 1; i < LANES; i++) best = std::max(best, v[i]);
  return best;
#endif
}

// Adds the lanes in one fixed order, whatever the CPU.
static inline float sum(Vec v) {
  float x[LANES];
  store(x, v);
  for (int width = LANES / 2; width; width /= 2)
    for (int i = 0; i < width; i++) x[i] += x[i + width];
  return x[0];
}

// exp(x) as 2^n * 2^f with |f| <= 1/2, to about 2e-7 relative; flushes to 1e-38 below -87, saturates above 88.
static inline Vec exponential(Vec x) {
  x = x < -87.f ? splat(-87.f) : x;  // in this order a NaN stays one
  x = x > 88.f ? splat(88.f) : x;
  const Vec t = x * 1.44269504f;
  const Vec rounder = splat(12582912.f);  // 1.5 * 2^23: adding it leaves no room for a fraction
  const Vec n = (t + rounder) - rounder;
  const Vec f = t - n;
  Vec power = splat(1.5403530e-4f);  // the Taylor coefficients of 2^f: ln(2)^k / k!
  for (float c : {1.3333558e-3f, 9.6181291e-3f, 5.5504109e-2f, 2.4022651e-1f, 6.9314718e-1f, 1.f})
    power = power * f + c;
  return (Vec)((IntVec)power + (__builtin_convertvector(n, IntVec) << 23));
}

static inline Vec hyperbolic_tangent(Vec x) { return 1.f - 2.f / (exponential(2.f * x) + 1.f); }

// How a body multiplies. A `Word` holds the `DEPTH` consecutive factors that one lane consumes per step.
template <class T> struct Floats {  // any CPU: everything is widened to float when it is packed
  using Stored = T;
  using Word = float;
  static constexpr int DEPTH = 1;
  static inline Vec multiply_add(Vec sum, Word a, const Word* b) { return sum + a * load(b); }
};

struct Pairs {  // a word is two bfloat16: one AVX512-BF16 instruction a step, or the same in two halves
  using Stored = bf16;
  using Word = uint32_t;
  static constexpr int DEPTH = 2;
  static inline Vec multiply_add(Vec sum, Word a, const Word* b) {
#if defined(__AVX512BF16__) && !defined(PORTABLE)
    return (Vec)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_set1_epi32(a), (__m512bh)_mm512_loadu_si512(b));
#else
    const IntVec left = IntVec{} + int32_t(a);
    IntVec right;
    memcpy(&right, b, sizeof right);
    sum += (Vec)(left << 16) * (Vec)(right << 16);
    return sum + (Vec)(left & int32_t(0xffff0000)) * (Vec)(right & int32_t(0xffff0000));
#endif
  }
};

// c[ROWS][VECS * LANES] (+)= a[ROWS][steps] · b[steps][VECS * LANES], every element its own chain in the order of the steps: the
// result of a row does not depend on ROWS or VECS. This is what makes the kernels batch invariant.
template <class Body, bool FRESH, int ROWS, int VECS, class Word = typename Body::Word>
static inline void multiply_block(const Word* a, size_t a_row, const Word* b, size_t b_step, float* c, size_t c_row,
                                  int steps) {
  Vec sums[ROWS][VECS];
  for (int r = 0; r < ROWS; r++)
    for (int v = 0; v < VECS; v++) sums[r][v] = FRESH ? Vec{} : load(c + r * c_row + v * LANES);
  for (int k = 0; k < steps; k++)
    for (int r = 0; r < ROWS; r++)
      for (int v = 0; v < VECS; v++)
        sums[r][v] = Body::multiply_add(sums[r][v], a[r * a_row + k], b + k * b_step + v * LANES);
  for (int r = 0; r < ROWS; r++)
    for (int v = 0; v < VECS; v++) store(c + r * c_row + v * LANES, sums[r][v]);
}

template <class Body, bool FRESH, int ROWS, class Word = typename Body::Word>
static void multiply_rows(const Word* a, size_t a_row, const Word* b, size_t b_step, float* c, size_t c_row, int vecs,
                          int steps) {
  for (; vecs >= MAX_VECS; vecs -= MAX_VECS, b += MAX_VECS * LANES, c += MAX_VECS * LANES)
    multiply_block<Body, FRESH, ROWS, MAX_VECS>(a, a_row, b, b_step, c, c_row, steps);
  if constexpr (MAX_VECS == 4) {
    if (vecs == 3) multiply_block<Body, FRESH, ROWS, 3>(a, a_row, b, b_step, c, c_row, steps);
    if (vecs == 2) multiply_block<Body, FRESH, ROWS, 2>(a, a_row, b, b_step, c, c_row, steps);
  }
  if (vecs == 1) multiply_block<Body, FRESH, ROWS, 1>(a, a_row, b, b_step, c, c_row, steps);
}

// The same for any number of rows up to MAX_ROWS.
template <class Body, bool FRESH, class Word = typename Body::Word>
static void multiply(int rows, const Word* a, size_t a_row, const Word* b, size_t b_step, float* c, size_t c_row,
                     int vecs, int steps) {
  switch (rows) {
    case 1: return multiply_rows<Body, FRESH, 1>(a, a_row, b, b_step, c, c_row, vecs, steps);
    case 2: return multiply_rows<Body, FRESH, 2>(a, a_row, b, b_step, c, c_row, vecs, steps);
    case 3: return multiply_rows<Body, FRESH, 3>(a, a_row, b, b_step, c, c_row, vecs, steps);
    case 4: return multiply_rows<Body, FRESH, 4>(a, a_row, b, b_step, c, c_row, vecs, steps);
    case 5: return multiply_rows<Body, FRESH, 5>(a, a_row, b, b_step, c, c_row, vecs, steps);
    case 6: return multiply_rows<Body, FRESH, 6>(a, a_row, b, b_step, c, c_row, vecs, steps);
  }
}
