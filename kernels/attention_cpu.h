// Paged attention for CPUs: the equation and the shapes are in attention.py; this is its arithmetic in tiles.
//
// A work item is ROWS query rows of one sequence and one key/value head: row r is query r / group, head r % group of the
// group. It walks the sequence in tiles of KEYS keys aligned to absolute positions, packs a tile once for all of its rows,
// and keeps an online softmax per row (Milakov and Gimelshein, arXiv 1805.02867).
//
// Batch invariance: a row meets the same tiles in the same order and in the same arithmetic whatever shares its work item,
// its batch or its prompt chunk. Keys outside a row's span weigh exactly zero, and adding zero changes nothing.
#pragma once
#include <omp.h>

#include <vector>

#include "vector_cpu.h"

constexpr int KEYS = 64;      // a tile of keys
constexpr int AHEAD = 32;     // keys between what is packed and what is prefetched
constexpr int ROWS = 48;      // query rows that share a packed tile
constexpr int MAX_DIM = 256;  // head_dim
constexpr float NOTHING = -1e30f;  // a masked score: finite, so that NOTHING - NOTHING is no NaN

template <class T> struct Attention {  // strides count elements
  const T *q, *k, *v;                  // [tokens, heads | kv_heads, head_dim]
  ptrdiff_t q_token, q_head, k_token, k_head, v_token, v_head;
  T *k_cache, *v_cache;          // [blocks, block_size, kv_heads, head_dim]
  T* out;                        // [tokens, heads, head_dim]
  const int64_t* slot_mapping;   // [tokens]
  const int32_t* block_tables;   // [sequences, max_blocks]
  const int32_t* cu_seqlens_q;   // [sequences + 1]
  const int32_t* seq_lens;       // [sequences]
  const float* sinks;            // [heads] or null
  int sequences, heads, kv_heads, head_dim, block_size, max_blocks, window;
  float scale, softcap;

  int tokens() const { return cu_seqlens_q[sequences]; }
  int group() const { return heads / kv_heads; }
};

// ── Packing ──────────────────────────────────────────────────────────────────────────────────────────────────────────
// Words of b[step][lane], so that the tile's lanes lie side by side: keys for the scores, dimensions for the values.
//
// Packing also asks memory for the rows that lie `ahead`: blocks lie anywhere, and no hardware prefetcher follows a
// block table. One line per line packed is the pace that memory keeps up with; the CPU drops what a burst asks for.

template <class Body> struct Packer;

template <class T> struct Packer<Floats<T>> {
  // keys [LANES rows, stride][dim] -> to [dim][KEYS], LANES columns of it
  static void keys(const T* from, ptrdiff_t ahead, size_t stride, int dim, float* to) {
    constexpr int LINE = 64 / sizeof(T);
    for (int line = 0; line < dim; line += LINE) {
      for (int key = 0; key < LANES; key++) __builtin_prefetch(from + ahead + key * stride + line);
      for (int d = line; d < std::min(dim, line + LINE); d++)
        for (int key = 0; key < LANES; key++) to[d * KEYS + key] = to_float(from[key * stride + d]);
    }
  }
  // values [LANES rows, stride][dim] -> to [LANES][dim], where rows from end on become zero
  static void values(const T* from, ptrdiff_t ahead, size_t stride, int dim, int end, float* to) {
    for (int key = 0; key < LANES; key++)
      for (int d = 0; d < dim; d += LANES) {
        __builtin_prefetch(from + ahead + key * stride + d);
        store(to + key * dim + d, key < end ? load(from + key * stride + d) : Vec{});
      }
  }
  static void row(const T* from, int dim, float* to) {
    for (int d = 0; d < dim; d++) to[d] = to_float(from[d]);
  }
  static void weights(const float* from, float* to) { memcpy(to, from, KEYS * sizeof *to); }
};

#if defined(__AVX512BF16__) && !defined(PORTABLE)
static inline __m512i interleave(__m512i a, __m512i b, int step, bool high) {  // units of step floats, per 128-bit lane
  if (step == 1) return high ? _mm512_unpackhi_epi32(a, b) : _mm512_unpacklo_epi32(a, b);
  return high ? _mm512_unpackhi_epi64(a, b) : _mm512_unpacklo_epi64(a, b);
}

// Transposes sixteen rows of sixteen 32-bit words.
static inline void transpose(__m512i x[16]) {
  __m512i y[16];
  for (int i = 0; i < 16; i += 2) {
    y[i] = interleave(x[i], x[i + 1], 1, false);
    y[i + 1] = interleave(x[i], x[i + 1], 1, true);
  }
  for (int i = 0; i < 16; i += 4)
    for (int j = 0; j < 2; j++) {
      x[i + 2 * j] = interleave(y[i + j], y[i + j + 2], 2, false);
      x[i + 2 * j + 1] = interleave(y[i + j], y[i + j + 2], 2, true);
    }
  for (int i = 0; i < 4; i++)  // x[4 r + i] holds word 4 l + i of rows 4 r .. 4 r + 3 in its 128-bit lane l
    for (int half = 0; half < 2; half++) {
      y[i + 4 * half] = _mm512_shuffle_i32x4(x[i + 8 * half], x[i + 4 + 8 * half], 0x88);       // lanes 0, 2
      y[i + 8 + 4 * half] = _mm512_shuffle_i32x4(x[i + 8 * half], x[i + 4 + 8 * half], 0xdd);   // lanes 1, 3
    }
  for (int i = 0; i < 4; i++) {
    x[i] = _mm512_shuffle_i32x4(y[i], y[i + 4], 0x88);
    x[i + 8] = _mm512_shuffle_i32x4(y[i], y[i + 4], 0xdd);
    x[i + 4] = _mm512_shuffle_i32x4(y[i + 8], y[i + 12], 0x88);
    x[i + 12] = _mm512_shuffle_i32x4(y[i + 8], y[i + 12], 0xdd);
  }
}

template <> struct Packer<Pairs> {
  // keys [16 rows, stride][dim] -> to [dim / 2][KEYS], sixteen columns of it
  static void keys(const bf16* from, ptrdiff_t ahead, size_t stride, int dim, uint32_t* to) {
    for (int word = 0; word < dim / 2; word += 16) {
      const int count = std::min(16, dim / 2 - word);
      const __mmask16 inside = (1u << count) - 1;
      __m512i x[16];
      for (int key = 0; key < 16; key++) {
        const bf16* part = from + key * stride + 2 * word;
        __builtin_prefetch(part + ahead);
        x[key] = _mm512_maskz_loadu_epi32(inside, part);
      }
      transpose(x);
      if (count == 16)  // constant bounds keep x in registers
        for (int i = 0; i < 16; i++) _mm512_store_si512(to + (word + i) * KEYS, x[i]);
      else
        for (int i = 0; i < 8; i++) _mm512_store_si512(to + (word + i) * KEYS, x[i]);
    }
  }
  // values [16 rows, stride][dim] -> to [8 pairs of rows][dim], where rows from end on become zero
  static void values(const bf16* from, ptrdiff_t ahead, size_t stride, int dim, int end, uint32_t* to) {
    for (int pair = 0; pair < 8; pair++, from += 2 * stride, to += dim) {
      const __mmask16 even = 2 * pair < end ? 0xffff : 0;
      const __mmask16 odd = 2 * pair + 1 < end ? 0xffff : 0;
      for (int d = 0; d < dim; d += LANES) {
        __builtin_prefetch(from + ahead + d + (d & LANES ? stride : 0));  // a line holds two vectors: one row each
        const __m512i low = _mm512_maskz_cvtepu16_epi32(even, _mm256_loadu_si256((const __m256i*)(from + d)));
        const __m512i high = _mm512_maskz_cvtepu16_epi32(odd, _mm256_loadu_si256((const __m256i*)(from + stride + d)));
        _mm512_storeu_si512(to + d, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
      }
    }
  }
  static void row(const bf16* from, int dim, uint32_t* to) { memcpy(to, from, dim * sizeof *from); }
  static void weights(const float* from, uint32_t* to) {
    for (int i = 0; i < KEYS; i += LANES) store((bf16*)to + i, load(from + i));
  }
};
#endif

#if defined(__AVX512BF16__) && !defined(PORTABLE)
using Bf16Body = Pairs;
#else
using Bf16Body = Floats<bf16>;
#endif

// ── One work item ────────────────────────────────────────────────────────────────────────────────────────────────────

template <class Body> struct Scratch {  // what one item keeps at hand; only rows of head_dim are touched
  using Word = typename Body::Word;
  alignas(64) Word q[ROWS * MAX_DIM / Body::DEPTH];     // [ROWS][head_dim / DEPTH]
  alignas(64) Word keys[MAX_DIM / Body::DEPTH * KEYS];  // [head_dim / DEPTH][KEYS]
  alignas(64) Word values[KEYS / Body::DEPTH * MAX_DIM];  // [KEYS / DEPTH][head_dim]
  alignas(64) float sums[ROWS * MAX_DIM];               // [ROWS][head_dim] weighted values so far
  alignas(64) float scores[MAX_ROWS * KEYS];
  alignas(64) Word weights[MAX_ROWS * KEYS / Body::DEPTH];
  Vec total[ROWS];               // the softmax denominator so far, by lane
  float highest[ROWS];           // the largest score so far
  int first[ROWS], end[ROWS];    // the row's span of keys
};

// Turns scores [KEYS] of a row into weights, and returns by how much what the row has summed so far must shrink.
template <class Body>
static float soften(const Attention<typename Body::Stored>& a, Scratch<Body>& s, int row, int tile, float* scores) {
  const int vecs = (std::min(KEYS, s.end[row] - tile) + LANES - 1) / LANES;
  IntVec lane;
  for (int i = 0; i < LANES; i++) lane[i] = i;
  const bool whole = s.first[row] <= tile && tile + KEYS <= s.end[row];
  IntVec visible[KEYS / LANES];
  Vec best = splat(s.highest[row]);
  for (int i = 0; i < vecs; i++) {
    Vec score = load(scores + i * LANES) * a.scale;
    if (a.softcap > 0) score = a.softcap * hyperbolic_tangent(score / a.softcap);
    if (!whole) {
      const IntVec key = lane + (tile + i * LANES);
      visible[i] = (key >= s.first[row]) & (key < s.end[row]);
      score = visible[i] ? score : splat(NOTHING);
    }
    store(scores + i * LANES, score);
    best = maximum(score, best);
  }
  const float highest = largest(best);
  Vec total = {};
  for (int i = 0; i < KEYS / LANES; i++) {
    Vec weight = {};
    if (i < vecs) {
      weight = exponential(load(scores + i * LANES) - highest);
      if (!whole) weight = visible[i] ? weight : Vec{};
    }
    store(scores + i * LANES, weight);
    total += weight;
  }
  const float shrink = highest == s.highest[row] ? 1 : exponential(splat(s.highest[row] - highest))[0];
  s.total[row] = s.total[row] * shrink + total;
  s.highest[row] = highest;
  return shrink;
}

// Attends with rows row : row + count (at most MAX_ROWS) to the packed tile of keys.
template <class Body>
static void attend_block(const Attention<typename Body::Stored>& a, Scratch<Body>& s, int row, int count, int tile) {
  const int seen = std::min(KEYS, s.end[row + count - 1] - tile);  // keys up to the block's last query
  if (seen <= 0 || tile + KEYS <= s.first[row]) return;
  const int dim = a.head_dim, words = dim / Body::DEPTH, weight_row = KEYS / Body::DEPTH;
  multiply<Body, true>(count, s.q + row * words, words, s.keys, KEYS, s.scores, KEYS, (seen + LANES - 1) / LANES, words);
  for (int r = 0; r < count; r++) {
    if (tile >= s.end[row + r] || tile + KEYS <= s.first[row + r]) {
      memset(s.weights + r * weight_row, 0, weight_row * sizeof *s.weights);
      continue;
    }
    const float shrink = soften(a, s, row + r, tile, s.scores + r * KEYS);
    Packer<Body>::weights(s.scores + r * KEYS, s.weights + r * weight_row);
    float* sums = s.sums + (row + r) * dim;
    for (int d = 0; d < dim && shrink != 1; d += LANES) store(sums + d, load(sums + d) * shrink);
  }
  multiply<Body, false>(count, s.weights, weight_row, s.values, dim, s.sums + row * dim, dim, dim / LANES,
                        (seen + Body::DEPTH - 1) / Body::DEPTH);
}

template <class T> static size_t slot_of(const Attention<T>& a, const int32_t* table, int position) {
  return size_t(table[position / a.block_size]) * a.block_size + position % a.block_size;
}

// Packs keys first:end of the tile. Values that were never written become zero, for zero times NaN is NaN; scores of keys
// outside the span are masked, whatever they are.
template <class Body, class T = typename Body::Stored>
static void pack_tile(const Attention<T>& a, Scratch<Body>& s, const int32_t* table, int head, int tile, int first,
                      int end) {
  const int dim = a.head_dim;
  const size_t stride = size_t(a.kv_heads) * dim;
  for (int i = 0; i < KEYS; i += LANES) {
    const int position = tile + i;
    if (position + LANES <= first || position >= end) {
      memset(s.values + i / Body::DEPTH * dim, 0, LANES / Body::DEPTH * dim * sizeof *s.values);
      continue;
    }
    const size_t offset = slot_of(a, table, position) * stride + size_t(head) * dim;
    const size_t next = slot_of(a, table, position + AHEAD < end ? position + AHEAD : position);
    const ptrdiff_t ahead = ptrdiff_t(next * stride + size_t(head) * dim) - ptrdiff_t(offset);
    Packer<Body>::keys(a.k_cache + offset, ahead, stride, dim, s.keys + i);
    Packer<Body>::values(a.v_cache + offset, ahead, stride, dim, end - position, s.values + i / Body::DEPTH * dim);
  }
}

template <class Body, class T = typename Body::Stored>
static void start_row(const Attention<T>& a, Scratch<Body>& s, int sequence, int kv_head, int row, int first_row) {
  const int begin = a.cu_seqlens_q[sequence], queries = a.cu_seqlens_q[sequence + 1] - begin;
  const int query = (first_row + row) / a.group(), head = kv_head * a.group() + (first_row + row) % a.group();
  s.end[row] = a.seq_lens[sequence] - queries + query + 1;
  s.first[row] = a.window > 0 ? std::max(0, s.end[row] - a.window) : 0;
  s.highest[row] = a.sinks ? a.sinks[head] : NOTHING;
  s.total[row] = Vec{a.sinks ? 1.f : 0.f};
  memset(s.sums + row * a.head_dim, 0, a.head_dim * sizeof *s.sums);
  Packer<Body>::row(a.q + (begin + query) * a.q_token + head * a.q_head, a.head_dim,
                    s.q + row * a.head_dim / Body::DEPTH);
}

template <class Body, class T = typename Body::Stored>
static void finish_row(const Attention<T>& a, const Scratch<Body>& s, int sequence, int kv_head, int row, int first_row) {
  const int query = (first_row + row) / a.group(), head = kv_head * a.group() + (first_row + row) % a.group();
  T* out = a.out + (size_t(a.cu_seqlens_q[sequence] + query) * a.heads + head) * a.head_dim;
  const float* sums = s.sums + row * a.head_dim;
  const float scale = 1 / sum(s.total[row]);
  for (int d = 0; d < a.head_dim; d += LANES) store(out + d, load(sums + d) * scale);
}

// Attends with up to ROWS query rows of a sequence, from first_row, to its keys under one key/value head.
template <class Body, class T = typename Body::Stored>
static void attend(const Attention<T>& a, int sequence, int kv_head, int first_row) {
  Scratch<Body> s;
  const int queries = a.cu_seqlens_q[sequence + 1] - a.cu_seqlens_q[sequence];
  const int rows = std::min(ROWS, queries * a.group() - first_row);
  const int32_t* table = a.block_tables + size_t(sequence) * a.max_blocks;
  for (int r = 0; r < rows; r++) start_row(a, s, sequence, kv_head, r, first_row);
  const int first = s.first[0], end = s.end[rows - 1];
  for (int tile = first / KEYS * KEYS; tile < end; tile += KEYS) {
    pack_tile(a, s, table, kv_head, tile, first, end);
    for (int r = 0; r < rows; r += MAX_ROWS) attend_block(a, s, r, std::min(MAX_ROWS, rows - r), tile);
  }
  for (int r = 0; r < rows; r++) finish_row(a, s, sequence, kv_head, r, first_row);
}

// ── The whole call ───────────────────────────────────────────────────────────────────────────────────────────────────

template <class T> static void write_token(const Attention<T>& a, int token) {
  const size_t bytes = a.head_dim * sizeof(T), slot = a.slot_mapping[token];
  for (int h = 0; h < a.kv_heads; h++) {
    const size_t offset = (slot * a.kv_heads + h) * a.head_dim;
    memcpy(a.k_cache + offset, a.k + token * a.k_token + h * a.k_head, bytes);
    memcpy(a.v_cache + offset, a.v + token * a.v_token + h * a.v_head, bytes);
  }
}

// Returns [sequences + 1]: the first work item of each sequence, counting row tiles and not yet heads.
template <class T> static std::vector<int> list_items(const Attention<T>& a) {
  std::vector<int> first_item(a.sequences + 1);
  for (int s = 0; s < a.sequences; s++) {
    const int rows = (a.cu_seqlens_q[s + 1] - a.cu_seqlens_q[s]) * a.group();
    first_item[s + 1] = first_item[s] + (rows + ROWS - 1) / ROWS;
  }
  return first_item;
}

// Runs all work items on the threads of the enclosing parallel region, and waits for them.
template <class Body, class T = typename Body::Stored>
static void attend_all(const Attention<T>& a, const std::vector<int>& first_item) {
  const int items = first_item.back() * a.kv_heads;
#pragma omp for schedule(dynamic, 1)
  for (int i = items - 1; i >= 0; i--) {  // from the back: the last tiles of a prompt see the most keys
    const int tile = i / a.kv_heads;
    const int sequence = int(std::upper_bound(first_item.begin(), first_item.end(), tile) - first_item.begin()) - 1;
    attend<Body>(a, sequence, i % a.kv_heads, (tile - first_item[sequence]) * ROWS);
  }
}
