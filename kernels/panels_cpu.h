// Linear layers whose weights were packed once into panels of 32 outputs: as pairs of bfloat16, or as codes of 4 or 8 bits
// with a scale and a minimum for every group of inputs (panels_cpu.py). For code inside a parallel region.
//
// A panel of codes is unpacked into the cache once for up to ROW_TILE rows, to the very pairs that the bfloat16 weight would
// have: which of the two a layer holds changes its speed and nothing else. Sums over a row's inputs are one chain per output,
// in the order of the inputs, for every number of rows: linear layers are batch invariant.
#pragma once
#include <vector>

#include "vector_cpu.h"

constexpr int PANEL = 32;  // outputs that are packed side by side
constexpr int ROW_BLOCK = LANES == 16 ? 12 : MAX_ROWS;  // rows whose accumulators fill the registers: 12 x 2 vectors
constexpr int CODE_ROWS = LANES == 16 ? 8 : 2;  // rows whose accumulators fit beside the unpacking of codes
constexpr int VECS = PANEL / LANES;
constexpr int ROW_TILE = 256;  // rows of one work item: a panel stays in the cache for all of them

struct Linear {
  const uint8_t* panels;  // [outputs / PANEL] of: [inputs / 2][PANEL] pairs, or [inputs / group] groups
  const bf16* bias;       // [outputs] or null
  const float* table;     // [16] what codes of 4 bits stand for
  int outputs, inputs;
  int bits;   // 16: pairs of bfloat16; 8: signed integers; 4: indices into the table
  int group;  // inputs that share a scale and a minimum: a multiple of 8

  int groups() const { return bits == 16 ? 0 : inputs / group; }
};

// A group of a panel in memory: scale [PANEL] and minimum [PANEL], then its codes.
//   4 bits: [group / 8][PANEL] words of 8 inputs, the first in the lowest bits
//   8 bits: [group][PANEL] bytes
constexpr int GROUP_HEADER = 2 * PANEL * sizeof(float);
static inline size_t group_bytes(const Linear& linear) { return GROUP_HEADER + size_t(linear.group) * PANEL * linear.bits / 8; }

static inline size_t panel_bytes(const Linear& linear) {
  return linear.bits == 16 ? size_t(linear.inputs) * PANEL * 2 : linear.groups() * group_bytes(linear);
}

// a * b + c, rounded once where the CPU can.
static inline Vec multiply_add(Vec a, Vec b, Vec c) {
#ifdef __AVX512F__
  return (Vec)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#else
  return a * b + c;
#endif
}

// ── Unpacking ────────────────────────────────────────────────────────────────────────────────────────────────────────

// Rounds the weights of an even and an odd input to bfloat16: the even one in the lower half of each word.
static inline IntVec to_pairs(Vec even, Vec odd) {
#if defined(__AVX512BF16__) && !defined(PORTABLE)
  const __m512i order = _mm512_set_epi32(0x1f000f, 0x1e000e, 0x1d000d, 0x1c000c, 0x1b000b, 0x1a000a, 0x190009, 0x180008, 0x170007,
                                         0x160006, 0x150005, 0x140004, 0x130003, 0x120002, 0x110001, 0x100000);
  return (IntVec)_mm512_permutexvar_epi16(order, (__m512i)_mm512_cvtne2ps_pbh((__m512)odd, (__m512)even));
#else
  bf16 low[LANES], high[LANES];
  store(low, even), store(high, odd);
  IntVec pairs;
  for (int i = 0; i < LANES; i++) pairs[i] = int32_t(low[i].bits | uint32_t(high[i].bits) << 16);
  return pairs;
#endif
}

static inline Vec bytes_to_floats(const uint8_t* from) {  // signed
#ifdef __AVX512F__
  return (Vec)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)from)));
#else
  typedef int8_t ByteVec __attribute__((vector_size(LANES)));
  ByteVec bytes;
  memcpy(&bytes, from, sizeof bytes);
  return __builtin_convertvector(bytes, Vec);
#endif
}

// Looks up the values of the codes in the lowest bits of each word.
static inline Vec look_up(IntVec codes, const float* table) {
#ifdef __AVX512F__
  return (Vec)_mm512_permutexvar_ps((__m512i)codes, _mm512_loadu_ps(table));
#else
  Vec values;
  for (int i = 0; i < LANES; i++) values[i] = table[codes[i] & 15];
  return values;
#endif
}

// Calls use(step, v, pairs) for every vector of a panel of codes, unpacked to pairs of bfloat16; the steps in order.
template <class Use>
static inline __attribute__((always_inline)) void unpack(const Linear& linear, const uint8_t* from, const Use& use) {
  for (int g = 0, step = 0; g < linear.groups(); g++, from += group_bytes(linear)) {
    const float* header = (const float*)from;
    const uint8_t *codes = from + GROUP_HEADER, *ahead = codes + panel_bytes(linear);
    const auto use_pair = [&](int at, int v, Vec even, Vec odd) __attribute__((always_inline)) {
      const Vec scale = load(header + v * LANES), minimum = load(header + PANEL + v * LANES);
      use(at, v, to_pairs(multiply_add(even, scale, minimum), multiply_add(odd, scale, minimum)));
    };
    if (linear.bits == 4) {
      for (int word = 0; word < linear.group / 8; word++, step += 4, codes += 4 * PANEL, ahead += 4 * PANEL)
        for (int pair = 0; pair < 4; pair++)
          for (int v = 0; v < VECS; v++) {
            IntVec eight;
            memcpy(&eight, codes + 4 * v * LANES, sizeof eight);
            if (pair == 0) __builtin_prefetch(ahead + 4 * v * LANES);
            use_pair(step + pair, v, look_up(eight >> 8 * pair, linear.table), look_up(eight >> (8 * pair + 4), linear.table));
          }
    } else {
      for (int pair = 0; pair < linear.group / 2; pair++, step++, codes += 2 * PANEL, ahead += 2 * PANEL) {
        __builtin_prefetch(ahead);
        for (int v = 0; v < VECS; v++)
          use_pair(step, v, bytes_to_floats(codes + v * LANES), bytes_to_floats(codes + PANEL + v * LANES));
      }
    }
  }
}

// ── Products ─────────────────────────────────────────────────────────────────────────────────────────────────────────

// Multiplies rows with a panel of pairs, and asks memory for what lies ahead: the next panel, at the pace of the product.
template <int ROWS>
static void multiply_panel(const uint32_t* x, size_t x_row, const uint32_t* panel, const uint8_t* ahead, float* to, int steps) {
  constexpr int BLOCK = std::min(VECS, MAX_VECS);
  for (int i = 0; i < PANEL; i += BLOCK * LANES) {
    Vec sums[ROWS][BLOCK] = {};
    for (int k = 0; k < steps; k++) {
      for (int line = 0; i == 0 && line < 4 * PANEL; line += 64) __builtin_prefetch(ahead + 4 * k * PANEL + line);
      for (int r = 0; r < ROWS; r++)
        for (int v = 0; v < BLOCK; v++)
          sums[r][v] = Pairs::multiply_add(sums[r][v], x[r * x_row + k], panel + k * PANEL + i + v * LANES);
    }
    for (int r = 0; r < ROWS; r++)
      for (int v = 0; v < BLOCK; v++) store(to + r * PANEL + i + v * LANES, sums[r][v]);
  }
}
constexpr decltype(&multiply_panel<1>) MULTIPLY_PANEL[] = {  // by rows - 1
    multiply_panel<1>, multiply_panel<2>, multiply_panel<3>, multiply_panel<4>, multiply_panel<5>, multiply_panel<6>,
#ifdef __AVX512F__
    multiply_panel<7>, multiply_panel<8>, multiply_panel<9>, multiply_panel<10>, multiply_panel<11>, multiply_panel<12>,
#endif
};

// Multiplies a few rows with a panel of codes that never leave the registers.
template <int ROWS>
static void multiply_codes(const uint32_t* x, size_t x_row, const Linear& linear, const uint8_t* codes, float* to) {
  Vec sums[ROWS][VECS] = {};
  unpack(linear, codes, [&](int step, int v, IntVec pairs) __attribute__((always_inline)) {
    for (int r = 0; r < ROWS; r++) sums[r][v] = Pairs::multiply_add(sums[r][v], x[r * x_row + step], (const uint32_t*)&pairs);
  });
  for (int r = 0; r < ROWS; r++)
    for (int v = 0; v < VECS; v++) store(to + r * PANEL + v * LANES, sums[r][v]);
}
constexpr decltype(&multiply_codes<1>) MULTIPLY_CODES[] = {
    multiply_codes<1>, multiply_codes<2>, multiply_codes<3>, multiply_codes<4>, multiply_codes<5>, multiply_codes<6>,
    multiply_codes<7>, multiply_codes<8>};

// Multiplies rows first:end (at most ROW_TILE) of x [tokens, inputs] with one panel, and hands each row's sums [PANEL] to
// finish. Blocks of rows are nearly equal in size.
template <class Finish>
static void linear_item(const bf16* x, int first, int end, const Linear& linear, int panel, const Finish& finish) {
  static thread_local std::vector<uint32_t> unpacked;
  alignas(64) float sums[ROW_BLOCK * PANEL];
  const size_t words = linear.inputs / 2;
  const uint8_t* packed = linear.panels + panel * panel_bytes(linear);
  const uint8_t* ahead = packed + panel_bytes(linear);
  const uint32_t *pairs = (const uint32_t*)x, *weights = (const uint32_t*)packed;
  const bool on_the_fly = linear.bits != 16 && end - first <= CODE_ROWS;
  if (linear.bits != 16 && !on_the_fly) {
    if (unpacked.size() < words * PANEL) unpacked.resize(words * PANEL);
    uint32_t* const to = unpacked.data();
    unpack(linear, packed, [&](int step, int v, IntVec pairs) { memcpy(to + step * PANEL + v * LANES, &pairs, sizeof pairs); });
    weights = to;
  }
  const int blocks = (end - first + ROW_BLOCK - 1) / ROW_BLOCK, size = (end - first + blocks - 1) / blocks;
  for (int row = first; row < end; row += size) {
    const int rows = std::min(size, end - row);
    if (on_the_fly) MULTIPLY_CODES[rows - 1](pairs + row * words, words, linear, packed, sums);
    else MULTIPLY_PANEL[rows - 1](pairs + row * words, words, weights, row == first ? ahead : (const uint8_t*)weights, sums, int(words));
    for (int r = 0; r < rows; r++) finish(row + r, panel, sums + r * PANEL);
  }
}

static inline Vec with_bias(const Linear& linear, int panel, int i, const float* sums) {
  return linear.bias ? load(sums + i) + load(linear.bias + panel * PANEL + i) : load(sums + i);
}

// Shares the panels out over the enclosing parallel region, and waits for all of them.
template <class Finish>
static void multiply_linear(const bf16* x, int tokens, const Linear& linear, const Finish& finish) {
  const int panels = linear.outputs / PANEL, tiles = (tokens + ROW_TILE - 1) / ROW_TILE;
  if (tiles == 1) {  // bound by memory: each thread streams through one stretch of the weights
#pragma omp for schedule(static)
    for (int panel = 0; panel < panels; panel++) linear_item(x, 0, tokens, linear, panel, finish);
  } else {
#pragma omp for schedule(dynamic, 1)
    for (int item = 0; item < panels * tiles; item++) {
      const int first = item % tiles * ROW_TILE;
      linear_item(x, first, std::min(tokens, first + ROW_TILE), linear, item / tiles, finish);
    }
  }
}
