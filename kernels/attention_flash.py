"""Paged attention by an installed flash-attn: equation, shapes and reference are in attention.py.

flash-attn (Dao, arXiv 2307.08691) reads a paged cache through block tables, in blocks of a multiple of 256 tokens. Nothing is
read back from the device. What it does not take (see `unsupported`) is answered by paged_attention_sdpa.
"""

import torch.nn.functional as F
from flash_attn import flash_attn_varlen_func, flash_attn_with_kvcache
from torch import Tensor

from .attention import paged_attention_sdpa, write_kv

BLOCK = 256  # tokens of a block, or a multiple


def unsupported(q: Tensor, v: Tensor, v_cache: Tensor, sinks: Tensor | None) -> str | None:
    """Return why these inputs are left to paged_attention_sdpa, or None."""
    if sinks is not None:
        return "attention sinks"
    if q.element_size() != 2:
        return f"{q.dtype}: it multiplies bfloat16 and float16"
    if q.shape[2] != v.shape[2] or q.shape[2] > 256:
        return f"head sizes {q.shape[2]} and {v.shape[2]}: it wants one, at most 256"
    return f"blocks of {v_cache.shape[1]} tokens: it wants multiples of {BLOCK}" if v_cache.shape[1] % BLOCK else None


def paged_attention(
    q: Tensor, k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slot_mapping: Tensor, block_tables: Tensor,
    cu_seqlens_q: Tensor, seq_lens: Tensor, *, scale: float, window: int = 0, softcap: float = 0.0,
    sinks: Tensor | None = None,
) -> Tensor:
    """Write k and v into the caches and attend."""
    if unsupported(q, v, v_cache, sinks):
        inputs = (q, k, v, k_cache, v_cache, slot_mapping, block_tables, cu_seqlens_q, seq_lens)
        return paged_attention_sdpa(*inputs, scale=scale, window=window, softcap=softcap, sinks=sinks)
    write_kv(k, v, k_cache, v_cache, slot_mapping)
    options = {"softmax_scale": scale, "causal": True, "window_size": (window - 1, 0) if window else (-1, -1),
               "softcap": softcap, "block_table": block_tables}  # fmt: skip
    tokens, sequences = q.shape[0], seq_lens.shape[0]
    if tokens == sequences:
        return flash_attn_with_kvcache(q[:, None], k_cache, v_cache, cache_seqlens=seq_lens, **options)[:, 0]
    bounds = F.pad(seq_lens.cumsum(0), (1, 0)).int()
    longest_q, longest_k = tokens - sequences + 1, block_tables.shape[1] * v_cache.shape[1]  # as far as the host knows
    return flash_attn_varlen_func(q, k_cache, v_cache, cu_seqlens_q, bounds, longest_q, longest_k, **options)
