// The plain C entry points of paged attention: see attention_cpu.h for the arithmetic, attention_cpu.py for the caller.
#include "attention_cpu.h"

template <class Body> static void paged_attention(const Attention<typename Body::Stored>& a, int threads) {
  const std::vector<int> first_item = list_items(a);
#pragma omp parallel num_threads(threads)
  {
#pragma omp for schedule(static)
    for (int token = 0; token < a.tokens(); token++) write_token(a, token);
    attend_all<Body>(a, first_item);
  }
}

extern "C" void paged_attention_bf16(const Attention<bf16>* a, int threads) { paged_attention<Bf16Body>(*a, threads); }
extern "C" void paged_attention_f32(const Attention<float>* a, int threads) { paged_attention<Floats<float>>(*a, threads); }
