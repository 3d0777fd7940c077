// Packing linear layers into panels, running one alone, and the greedy choice behind the last of them: see panels_cpu.py.
#include "panels_cpu.h"

// Packs weight [outputs, inputs] into panels of pairs.
extern "C" void pack_pairs(const bf16* weight, uint32_t* panels, int outputs, int inputs) {
  const int words = inputs / 2;
#pragma omp parallel for
  for (int output = 0; output < outputs; output++) {
    uint32_t* to = panels + size_t(output / PANEL) * words * PANEL + output % PANEL;
    for (int i = 0; i < words; i++) memcpy(to + size_t(i) * PANEL, weight + size_t(output) * inputs + 2 * i, 4);
  }
}

// Packs codes [outputs, inputs] (one a byte) with scale and minimum [outputs, inputs / group] into the panels of `linear`.
extern "C" void pack_groups(const uint8_t* codes, const float* scale, const float* minimum, uint8_t* panels,
                            const Linear* linear) {
  const int group = linear->group, groups = linear->groups();
#pragma omp parallel for
  for (int output = 0; output < linear->outputs; output++) {
    const int lane = output % PANEL;
    uint8_t* to = panels + output / PANEL * panel_bytes(*linear);
    const uint8_t* from = codes + size_t(output) * linear->inputs;
    for (int g = 0; g < groups; g++, to += group_bytes(*linear), from += group) {
      memcpy(to + 4 * lane, scale + size_t(output) * groups + g, 4);
      memcpy(to + 4 * (PANEL + lane), minimum + size_t(output) * groups + g, 4);
      uint8_t* body = to + GROUP_HEADER;
      for (int k = 0; linear->bits == 8 && k < group; k++) body[k * PANEL + lane] = from[k];
      for (int word = 0; linear->bits == 4 && word < group / 8; word++) {
        uint32_t eight = 0;
        for (int k = 0; k < 8; k++) eight |= uint32_t(from[word * 8 + k]) << 4 * k;
        memcpy(body + (word * PANEL + lane) * 4, &eight, 4);
      }
    }
  }
}

// out [tokens, outputs] = x [tokens, inputs] times the packed weight, plus bias.
extern "C" void linear(const Linear* layer, const bf16* x, bf16* out, int tokens, int threads) {
#pragma omp parallel num_threads(threads)
  multiply_linear(x, tokens, *layer, [&](int row, int panel, const float* sums) {
    bf16* to = out + size_t(row) * layer->outputs + panel * PANEL;
    for (int i = 0; i < PANEL; i += LANES) store(to + i, with_bias(*layer, panel, i, sums));
  });
}

// best [rows]: the first of each row's highest columns of x [rows, columns].
extern "C" void argmax(const bf16* x, int64_t* best, int rows, int columns, int threads) {
  constexpr int TILE = 1024;
#pragma omp parallel for num_threads(std::min(rows, threads)) if (rows * int64_t(columns) > 1 << 20)  // to wake them takes longer
  for (int row = 0; row < rows; row++) {
    const bf16* from = x + size_t(row) * columns;
    float highest = -INFINITY;
    int start = 0, at = 0;
    for (; at + TILE <= columns; at += TILE) {
      Vec tile = load(from + at);
      for (int i = LANES; i < TILE; i += LANES) tile = maximum(load(from + at + i), tile);
      if (const float found = largest(tile); found > highest) highest = found, start = at;
    }
    for (; at < columns; at++)
      if (const float found = to_float(from[at]); found > highest) highest = found, start = at;
    while (start < columns - 1 && to_float(from[start]) < highest) start++;
    best[row] = start;
  }
}
