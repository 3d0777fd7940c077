// A run of decoder layers in one call and one parallel region: see decoder_layer_cpu.py for the equation and the caller.
//
// Every phase reads what the one before it wrote, so a barrier stands between them. Intermediate results are rounded to
// bfloat16 where the transformers model rounds them. Sums over a row's inputs are one chain per output, in the order of
// the inputs, for every number of rows: the layer is batch invariant.
#include <vector>

#include "attention_cpu.h"
#include "panels_cpu.h"

struct Norm {
  const bf16* weight;  // [size], or null: no norm here
  float epsilon;
  int plus_one;  // Gemma multiplies by 1 + weight before it rounds, everyone else by weight after
};

struct DecoderLayer {
  Attention<bf16> attention;  // q, k, v, out and their strides are filled in below
  const bf16* x;              // [tokens, hidden]
  bf16* out;                  // [tokens, hidden]
  const bf16 *cos, *sin;      // [tokens, rotary_dim]
  Linear qkv, o, gate_up, down;  // gate_up: each panel holds 16 gates, then the 16 ups beside them; down: none, and no MLP
  Norm input_norm, post_norm, q_norm, k_norm;
  int rotary_dim, gelu;
};

// ── Pieces of arithmetic ─────────────────────────────────────────────────────────────────────────────────────────────

static void normalise(const bf16* x, const Norm& norm, int size, bf16* y) {
  Vec squares = {};
  for (int d = 0; d < size; d += LANES) squares += load(x + d) * load(x + d);
  const float scale = 1 / std::sqrt(sum(squares) / size + norm.epsilon);
  for (int d = 0; d < size; d += LANES) {
    const Vec scaled = load(x + d) * scale, weight = load(norm.weight + d);
    store(y + d, norm.plus_one ? scaled * (1.f + weight) : rounded(scaled) * weight);
  }
}

// Rotates the first rotary_dim dimensions of a head in place, halves paired as Llama pairs them.
static void rotate(bf16* x, const bf16* cos, const bf16* sin, int rotary_dim) {
  const int half = rotary_dim / 2;
  for (int d = 0; d < half; d += LANES) {
    const Vec low = load(x + d), high = load(x + half + d);
    store(x + d, rounded(low * load(cos + d)) - rounded(high * load(sin + d)));
    store(x + half + d, rounded(high * load(cos + half + d)) + rounded(low * load(sin + half + d)));
  }
}

static inline Vec silu(Vec x) { return x / (1.f + exponential(-x)); }

static inline Vec gelu(Vec x) {  // the tanh approximation
  return 0.5f * x * (1.f + hyperbolic_tangent(0.79788456f * (x + 0.044715f * x * x * x)));
}

// ── The layer ────────────────────────────────────────────────────────────────────────────────────────────────────────

struct Workspace {     // grows to the largest batch so far
  std::vector<bf16> normed;  // [tokens, hidden]
  std::vector<bf16> qkv;     // [tokens, heads + 2 kv_heads, head_dim]
  std::vector<bf16> mixed;   // [tokens, heads, head_dim] what attention returns
  std::vector<bf16> middle;  // [tokens, hidden] the residual between attention and MLP
  std::vector<bf16> active;  // [tokens, intermediate]

  void grow(const DecoderLayer& layer) {
    const size_t tokens = layer.attention.tokens();
    const auto reserve = [&](std::vector<bf16>& buffer, int width) {
      if (buffer.size() < tokens * width) buffer.resize(tokens * width);
    };
    reserve(normed, layer.qkv.inputs);
    reserve(qkv, layer.qkv.outputs);
    reserve(mixed, layer.o.inputs);
    reserve(middle, layer.o.outputs);
    reserve(active, layer.down.inputs);
  }
};

static void normalise_rows(const bf16* x, const Norm& norm, int tokens, int hidden, bf16* y) {
#pragma omp for schedule(static)
  for (int token = 0; token < tokens; token++) normalise(x + size_t(token) * hidden, norm, hidden, y + size_t(token) * hidden);
}

// Normalises (where the model does) and rotates a token's queries and keys in place, then writes its keys and values.
static void prepare_token(const DecoderLayer& layer, bf16* qkv, int token) {
  const Attention<bf16>& a = layer.attention;
  for (int h = 0; h < a.heads + a.kv_heads; h++) {
    bf16* head = qkv + size_t(token) * layer.qkv.outputs + h * a.head_dim;
    const Norm& norm = h < a.heads ? layer.q_norm : layer.k_norm;
    if (norm.weight) normalise(head, norm, a.head_dim, head);
    const size_t offset = size_t(token) * layer.rotary_dim;
    rotate(head, layer.cos + offset, layer.sin + offset, layer.rotary_dim);
  }
  write_token(a, token);
}

// Every thread of the parallel region runs this; each `omp for` ends in a barrier.
static void run_layer(const DecoderLayer& layer, Workspace& w, const std::vector<int>& first_item) {
  const Attention<bf16>& a = layer.attention;
  const int tokens = a.tokens(), hidden = layer.qkv.inputs;
  const auto project = [&](int row, int panel, const float* sums) {
    bf16* to = w.qkv.data() + size_t(row) * layer.qkv.outputs + panel * PANEL;
    for (int i = 0; i < PANEL; i += LANES) store(to + i, with_bias(layer.qkv, panel, i, sums));
  };
  const auto add_to = [hidden](const Linear& linear, const bf16* residual, bf16* out) {
    return [=, &linear](int row, int panel, const float* sums) {
      const size_t at = size_t(row) * hidden + panel * PANEL;
      for (int i = 0; i < PANEL; i += LANES)
        store(out + at + i, load(residual + at + i) + rounded(with_bias(linear, panel, i, sums)));
    };
  };
  const auto activate = [&](int row, int panel, const float* sums) {
    bf16* to = w.active.data() + size_t(row) * layer.down.inputs + panel * PANEL / 2;
    for (int i = 0; i < PANEL / 2; i += LANES) {
      const Vec gate = rounded(load(sums + i)), up = rounded(load(sums + PANEL / 2 + i));
      store(to + i, rounded(layer.gelu ? gelu(gate) : silu(gate)) * up);
    }
  };

  normalise_rows(layer.x, layer.input_norm, tokens, hidden, w.normed.data());
  multiply_linear(w.normed.data(), tokens, layer.qkv, project);
#pragma omp for schedule(static)
  for (int token = 0; token < tokens; token++) prepare_token(layer, w.qkv.data(), token);
  attend_all<Bf16Body>(a, first_item);
  bf16* const middle = layer.down.outputs ? w.middle.data() : layer.out;
  multiply_linear(w.mixed.data(), tokens, layer.o, add_to(layer.o, layer.x, middle));
  if (!layer.down.outputs) return;  // the MLP is the caller's
  normalise_rows(middle, layer.post_norm, tokens, hidden, w.normed.data());
  multiply_linear(w.normed.data(), tokens, layer.gate_up, activate);
  multiply_linear(w.active.data(), tokens, layer.down, add_to(layer.down, middle, layer.out));
}

// Points the attention at the workspace: queries, keys and values are slices of one row of the qkv product.
static void bind(DecoderLayer& layer, Workspace& w) {
  Attention<bf16>& a = layer.attention;
  a.q = w.qkv.data();
  a.k = a.q + a.heads * a.head_dim;
  a.v = a.k + a.kv_heads * a.head_dim;
  a.out = w.mixed.data();
  a.q_token = a.k_token = a.v_token = layer.qkv.outputs;
  a.q_head = a.k_head = a.v_head = a.head_dim;
}

// Gives a layer the first one's batch; its input is what the layer before it wrote, in place.
static void follow(DecoderLayer& layer, const DecoderLayer& first) {
  Attention<bf16>& a = layer.attention;
  a.slot_mapping = first.attention.slot_mapping;
  a.block_tables = first.attention.block_tables;
  a.cu_seqlens_q = first.attention.cu_seqlens_q;
  a.seq_lens = first.attention.seq_lens;
  a.sequences = first.attention.sequences;
  a.max_blocks = first.attention.max_blocks;
  layer.x = layer.out = first.out;
  layer.cos = first.cos, layer.sin = first.sin, layer.rotary_dim = first.rotary_dim;
}

// Runs layers of one shape, the output of each being the next one's input. The batch is described in the first alone.
extern "C" void decoder_layers(DecoderLayer* const* layers, int count, int threads) {
  static thread_local Workspace workspace;
  Workspace& shared = workspace;  // the caller's, for every thread of the region
  shared.grow(*layers[0]);
  for (int i = 0; i < count; i++) {
    if (i > 0) follow(*layers[i], *layers[0]);
    bind(*layers[i], shared);
  }
  const std::vector<int> first_item = list_items(layers[0]->attention);
#pragma omp parallel num_threads(threads)
  for (int i = 0; i < count; i++) run_layer(*layers[i], shared, first_item);
}
