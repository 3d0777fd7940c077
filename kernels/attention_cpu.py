"""Paged attention for CPUs in C++: equation, shapes and reference are in attention.py, the arithmetic in attention_cpu.h.

bfloat16 multiplies in pairs where the CPU has AVX512-BF16; float32, and bfloat16 elsewhere, in float. The result of a
token is bitwise the same whatever else is in the batch, however its prompt was chunked and wherever its blocks lie.
Head sizes that are no multiple of 16 or exceed 256, other dtypes, and layers whose v has a head size of its own are
answered by paged_attention_sdpa.
"""

import ctypes
import functools
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

if __name__ == "__main__":  # run as a file: stand where serve.py puts this folder
    import sys
    import types

    sys.modules["serve_kernels"] = types.ModuleType("serve_kernels")
    sys.modules["serve_kernels"].__path__ = [str(Path(__file__).parent)]
    __package__ = "serve_kernels"

from .attention import paged_attention_eager, paged_attention_sdpa
from .compile_cpu import load, problem

SOURCE = Path(__file__).with_suffix(".cpp")


class Attention(ctypes.Structure):
    """The struct of that name in attention_cpu.h, field by field."""

    _fields_ = (
        [(name, ctypes.c_void_p) for name in ("q", "k", "v")]
        + [(f"{name}_{axis}", ctypes.c_ssize_t) for name in ("q", "k", "v") for axis in ("token", "head")]
        + [(name, ctypes.c_void_p) for name in ("k_cache", "v_cache", "out", "slot_mapping", "block_tables")]
        + [(name, ctypes.c_void_p) for name in ("cu_seqlens_q", "seq_lens", "sinks")]
        + [(name, ctypes.c_int) for name in ("sequences", "heads", "kv_heads", "head_dim", "block_size")]
        + [(name, ctypes.c_int) for name in ("max_blocks", "window")]
        + [(name, ctypes.c_float) for name in ("scale", "softcap")]
    )


@functools.cache
def _entry_points(*flags: str) -> dict[torch.dtype, Callable[..., None]]:
    """Return the compiled functions by dtype. Raises CompileError."""
    library = load(SOURCE, *flags)
    functions = {torch.bfloat16: library.paged_attention_bf16, torch.float32: library.paged_attention_f32}
    for function in functions.values():
        function.argtypes, function.restype = (ctypes.POINTER(Attention), ctypes.c_int), None
    return functions


@functools.cache
def unavailable() -> str | None:
    """Return why this machine cannot run the kernel, or None where it is compiled and ready."""
    return problem(_entry_points)


def unsupported(q: Tensor, v: Tensor, k_cache: Tensor) -> str | None:
    """Return why the kernel leaves these inputs to paged_attention_sdpa, or None."""
    dim, block_size = q.shape[2], k_cache.shape[1]
    if q.dtype not in (torch.bfloat16, torch.float32):
        return f"{q.dtype} queries: it multiplies bfloat16 and float32"
    if not q.dtype == v.dtype == k_cache.dtype:
        return f"queries in {q.dtype} against a cache in {k_cache.dtype}"
    if dim != v.shape[2] or dim % 16 or dim > 256:
        return f"head sizes {dim} and {v.shape[2]}: it wants one multiple of 16 up to 256"
    if block_size % 16:
        return f"block size {block_size}: it wants a multiple of 16"
    return None


def paged_attention(
    q: Tensor, k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slot_mapping: Tensor, block_tables: Tensor,
    cu_seqlens_q: Tensor, seq_lens: Tensor, *, scale: float, window: int = 0, softcap: float = 0.0,
    sinks: Tensor | None = None, flags: tuple[str, ...] = (),
) -> Tensor:
    """Write k and v into the caches and attend, in C++. Raises CompileError where unavailable() says why.

    flags choose a compiled variant, for tests: -DPORTABLE is what a CPU without AVX512-BF16 runs.
    """
    if unsupported(q, v, k_cache):
        inputs = (q, k, v, k_cache, v_cache, slot_mapping, block_tables, cu_seqlens_q, seq_lens)
        return paged_attention_sdpa(*inputs, scale=scale, window=window, softcap=softcap, sinks=sinks)
    q, k, v = (x if x.stride(2) == 1 else x.contiguous() for x in (q, k, v))
    out = torch.empty(q.shape, dtype=q.dtype)
    call, _alive = describe(
        q, k, v, k_cache, v_cache, out, slot_mapping, block_tables, cu_seqlens_q, seq_lens, scale, window, softcap, sinks
    )
    _entry_points(*flags)[q.dtype](call, torch.get_num_threads())
    return out


def describe(
    q: Tensor, k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, out: Tensor, slot_mapping: Tensor,
    block_tables: Tensor, cu_seqlens_q: Tensor, seq_lens: Tensor, scale: float, window: int, softcap: float,
    sinks: Tensor | None,
) -> tuple[Attention, Tensor | None]:
    """Return the C++ side's view of a call, and the float32 sinks that must outlive it."""
    assert slot_mapping.dtype == torch.int64 and slot_mapping.is_contiguous()
    assert block_tables.dtype == cu_seqlens_q.dtype == seq_lens.dtype == torch.int32
    assert block_tables.is_contiguous() and k_cache.is_contiguous() and v_cache.is_contiguous()
    sinks = None if sinks is None else sinks.float().contiguous()
    call = Attention(
        q.data_ptr(), k.data_ptr(), v.data_ptr(), *q.stride()[:2], *k.stride()[:2], *v.stride()[:2],
        k_cache.data_ptr(), v_cache.data_ptr(), out.data_ptr(), slot_mapping.data_ptr(), block_tables.data_ptr(),
        cu_seqlens_q.data_ptr(), seq_lens.data_ptr(), None if sinks is None else sinks.data_ptr(),
        seq_lens.shape[0], q.shape[1], k.shape[1], q.shape[2], k_cache.shape[1], block_tables.shape[1], window,
        scale, softcap,
    )  # fmt: skip
    return call, sinks


def benchmark(queries: int, sequences: int, length: int, heads: int = 9, kv_heads: int = 3, dim: int = 64) -> None:
    """Time sequences of `queries` new tokens at `length` cached tokens, over eight layers' caches so that none is hot."""
    import itertools
    import time

    layers, block_size = 8, 32
    blocks = -(-length // block_size) * sequences
    k_caches, v_caches = torch.randn(2, layers, blocks, block_size, kv_heads, dim).bfloat16()
    tables = torch.randperm(blocks).view(sequences, -1).int()
    positions = torch.arange(length - queries, length)
    slots = (tables.long()[:, positions // block_size] * block_size + positions % block_size).flatten()
    bounds, lengths = torch.arange(sequences + 1).int() * queries, torch.full((sequences,), length).int()
    q = torch.randn(sequences * queries, heads, dim).bfloat16()
    k, v = torch.randn(2, sequences * queries, kv_heads, dim).bfloat16()
    pairs = sequences * (queries * (length - queries) + queries * (queries + 1) // 2) * heads
    layer = itertools.cycle(range(layers))
    for function in (paged_attention, paged_attention_sdpa, paged_attention_eager):
        times, stop = [], time.perf_counter() + 1
        while len(times) < 3 or time.perf_counter() < stop:
            i = next(layer)
            start = time.perf_counter()
            function(q, k, v, k_caches[i], v_caches[i], slots, tables, bounds, lengths, scale=dim**-0.5)
            times.append(time.perf_counter() - start)
        best = min(times)
        name = f"{function.__module__.removeprefix('serve_kernels.')}.{function.__name__}"
        size = 2 * sequences * length * kv_heads * dim * 2
        print(f"{name:32} {best * 1e3:8.3f} ms {size / best / 1e9:7.1f} GB/s {4 * pairs * dim / best / 1e12:7.3f} TFLOP/s")


if __name__ == "__main__":
    print(unavailable() or f"{torch.get_num_threads()} threads, 9 heads, 3 key/value heads of 64, bfloat16")
    for shape in ((1, 1, 512), (1, 16, 512), (1, 16, 4096), (256, 1, 1500), (512, 1, 512)):
        print("{} queries x {} sequences, length {}".format(*shape))
        benchmark(*shape)
