"""Paged attention for GPUs in Triton: equation, shapes and reference are in attention.py.

A row is a query and one head of its key/value head's group, so that a tile of keys is loaded once for the whole group.
It keeps an online softmax (Milakov and Gimelshein, arXiv 1805.02867) in base 2, over tiles of keys:

    top = max_j score[j],  total = Σ_j 2^(score[j] - top),  acc = Σ_j 2^(score[j] - top) V[j]       out = acc / total

and is computed by one of two kernels:

    decode   sequences of one query, which come first in the batch: a program has the rows of one key/value head and a part
             of the keys, and parts are merged afterwards; how many parts depends on nothing that lies on the device
    prefill  all others: a program has ROWS rows, tiles of queries times the group, and all keys that they see

Nothing is read back from the device: a CUDA graph can hold the call. Sequences that only pad its batch have length 0 (their
output is zero) or 1, and slots in a block that is nobody's. A sequence's result depends on the batch within rounding,
since the number of parts does. What the kernels do not take (see `unsupported`) is answered by paged_attention_sdpa.
"""

import functools
import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

if __name__ == "__main__":  # run as a file: stand where serve.py puts this folder
    import sys
    import types
    from pathlib import Path

    sys.modules["serve_kernels"] = types.ModuleType("serve_kernels")
    sys.modules["serve_kernels"].__path__ = [str(Path(__file__).parent)]
    __package__ = "serve_kernels"

from .attention import paged_attention_eager, paged_attention_sdpa

NOTHING = tl.constexpr(-1e30)  # a masked score: finite, so that NOTHING - NOTHING is no NaN
LOG2_E = tl.constexpr(math.log2(math.e))
MAX_PARTS = 64  # of a decode row's keys
PROGRAMS_PER_SM = 8  # decode programs worth having: several waves of the two or three that run at once
HOPPER = 227 << 10  # bytes of shared memory
INTERPRETED = triton.knobs.runtime.interpret  # on the CPU, where a bfloat16 dot is not implemented


class Tiles(NamedTuple):
    """How a kernel is cut: rows of a program, keys of a tile, warps, and tiles in flight."""

    rows: int
    keys: int
    warps: int
    stages: int


# By the padded head size. In three stages two tiles are on their way while one is computed with. A prefill program has a
# Hopper multiprocessor to itself, decode programs share it; GPUs with less shared memory than that take SMALL for prefill.
DECODE = {64: Tiles(16, 128, 4, 3), 128: Tiles(16, 64, 4, 3), 256: Tiles(16, 32, 4, 3)}
PREFILL = {64: Tiles(128, 128, 8, 3), 128: Tiles(128, 128, 8, 3), 256: Tiles(128, 32, 8, 3)}
SMALL = {64: Tiles(64, 64, 4, 2), 128: Tiles(64, 64, 4, 2), 256: Tiles(64, 16, 4, 2)}
EXACT = {64: Tiles(16, 64, 8, 2), 128: Tiles(16, 32, 8, 2), 256: Tiles(16, 16, 8, 2)}  # float32, with either kernel


@triton.jit
def _walk(
    acc,        # [ROWS, V_TILE] float32
    top,        # [ROWS] float32
    total,      # [ROWS] float32
    q,          # [ROWS, D_TILE]
    position,   # [ROWS] int32, of the row's query in its sequence
    k_ptr,      # [blocks, BLOCK, KV_HEADS, D]
    v_ptr,      # [blocks, BLOCK, KV_HEADS, V_D]
    table_ptr,  # [blocks of the sequence] int32
    kv_head, start, end, scale, inner_scale,
    KV_HEADS: tl.constexpr, D: tl.constexpr, V_D: tl.constexpr, D_TILE: tl.constexpr, V_TILE: tl.constexpr,
    BLOCK: tl.constexpr, KEYS: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, MASKED: tl.constexpr,
    PRECISION: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """Take the keys start:end into the rows' softmax; start is a multiple of KEYS, and so is end unless MASKED."""
    offset, dim, v_dim = tl.arange(0, KEYS), tl.arange(0, D_TILE), tl.arange(0, V_TILE)
    block = tl.load(table_ptr + (start + offset) // BLOCK, mask=start + offset < end, other=0)  # [KEYS]
    for first in range(start, end, KEYS):
        key = first + offset  # [KEYS]
        slot = (block.to(tl.int64) * BLOCK + key % BLOCK) * KV_HEADS + kv_head  # [KEYS]
        block = tl.load(table_ptr + (key + KEYS) // BLOCK, mask=key + KEYS < end, other=0)  # a tile ahead of its use
        k = tl.load(k_ptr + (slot * D)[:, None] + dim[None, :], mask=(dim < D)[None, :], other=0.0)  # [KEYS, D_TILE]
        score = tl.dot(q, k.to(q.dtype).T, input_precision=PRECISION)  # [ROWS, KEYS]
        if SOFTCAP:
            score = 1 - 2 / (1 + tl.exp2(score * inner_scale))  # tanh
        v_mask = (v_dim < V_D)[None, :]
        if MASKED:
            seen = key[None, :] <= position[:, None]
            if WINDOW:
                seen &= key[None, :] > position[:, None] - WINDOW
            score = tl.where(seen, score, NOTHING)
            v_mask &= (key < end)[:, None]  # never-written slots hold any bits, and 0 * NaN is NaN
        v = tl.load(v_ptr + (slot * V_D)[:, None] + v_dim[None, :], mask=v_mask, other=0.0)  # [KEYS, V_TILE]
        highest = tl.maximum(top, tl.max(score, 1) * scale)
        weight = tl.exp2(score * scale - highest[:, None])
        fade = tl.exp2(top - highest)
        total = total * fade + tl.sum(weight, 1)
        acc = acc * fade[:, None]
        if INTERPRETED:
            v = v.to(tl.float32)
        acc = tl.dot(weight.to(v.dtype), v, acc, input_precision=PRECISION)
        top = highest
    return acc, top, total


@triton.jit(do_not_specialize=["parts", "table_width"])
def _decode(
    q_ptr,            # [tokens, heads, D], strides q_token and q_head
    k_ptr,            # [blocks, BLOCK, KV_HEADS, D]
    v_ptr,            # [blocks, BLOCK, KV_HEADS, V_D]
    out_ptr,          # [tokens, heads, V_D]
    part_ptr,         # [decodes, heads, parts, V_D] float32: acc
    top_ptr,          # [decodes, heads, parts] float32
    total_ptr,        # [decodes, heads, parts] float32
    tables_ptr,       # [sequences, table_width] int32
    seq_lens_ptr,     # [sequences] int32
    sinks_ptr,        # [heads]
    q_token, q_head, table_width, parts, scale, inner_scale,
    GROUP: tl.constexpr, KV_HEADS: tl.constexpr, D: tl.constexpr, V_D: tl.constexpr, D_TILE: tl.constexpr,
    V_TILE: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr, SINKS: tl.constexpr, SPLIT: tl.constexpr, PRECISION: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """Attend with the heads of one group of one decode row to a part of its keys. Grid [KV_HEADS, parts, decodes]."""
    kv_head, part, s = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    length = tl.load(seq_lens_ptr + s)
    row, dim, v_dim = tl.arange(0, ROWS), tl.arange(0, D_TILE), tl.arange(0, V_TILE)
    head = kv_head * GROUP + row  # [ROWS]
    used = row < GROUP
    start = 0
    if WINDOW:
        start = tl.maximum(length - WINDOW, 0) // KEYS * KEYS
    span = tl.cdiv(tl.cdiv(length - start, KEYS), parts) * KEYS
    start += part * span
    end = tl.minimum(start + span, length)
    q_mask = used[:, None] & (dim < D)[None, :]
    q = tl.load(q_ptr + s * q_token + head[:, None] * q_head + dim[None, :], mask=q_mask, other=0.0)  # [ROWS, D_TILE]
    if INTERPRETED:
        q = q.to(tl.float32)
    acc = tl.zeros([ROWS, V_TILE], tl.float32)
    top = tl.full([ROWS], NOTHING, tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    if SINKS:
        if part == 0:
            top = tl.load(sinks_ptr + head, mask=used, other=0.0).to(tl.float32) * LOG2_E
            total = tl.full([ROWS], 1.0, tl.float32)
    acc, top, total = _walk(
        acc, top, total, q, tl.zeros([ROWS], tl.int32) + length - 1, k_ptr, v_ptr, tables_ptr + s * table_width, kv_head,
        start, end, scale, inner_scale, KV_HEADS, D, V_D, D_TILE, V_TILE, BLOCK, KEYS, WINDOW, SOFTCAP, True, PRECISION,
        INTERPRETED,
    )  # fmt: skip
    out_row = s * (KV_HEADS * GROUP) + head  # [ROWS]
    out_mask = used[:, None] & (v_dim < V_D)[None, :]
    if SPLIT:
        part_row = out_row * parts + part
        tl.store(top_ptr + part_row, top, mask=used)
        tl.store(total_ptr + part_row, total, mask=used)
        tl.store(part_ptr + (part_row * V_D)[:, None] + v_dim[None, :], acc, mask=out_mask & (total > 0)[:, None])
    else:
        out = acc / tl.where(total > 0, total, 1.0)[:, None]  # [ROWS, V_TILE]
        tl.store(out_ptr + (out_row * V_D)[:, None] + v_dim[None, :], out.to(out_ptr.dtype.element_ty), mask=out_mask)


@triton.jit(do_not_specialize=["parts"])
def _merge(
    part_ptr,   # [rows, parts, V_D] float32
    top_ptr,    # [rows, parts] float32
    total_ptr,  # [rows, parts] float32: 0 where a part had no keys, and then its acc was not written
    out_ptr,    # [rows, V_D]
    parts,
    V_D: tl.constexpr, V_TILE: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """Merge the parts of one decode row and head. Grid [rows]."""
    row = tl.program_id(0).to(tl.int64)
    part, v_dim = tl.arange(0, PARTS), tl.arange(0, V_TILE)
    top = tl.load(top_ptr + row * parts + part, mask=part < parts, other=NOTHING)  # [PARTS]
    total = tl.load(total_ptr + row * parts + part, mask=part < parts, other=0.0)
    mask = (total > 0)[:, None] & (v_dim < V_D)[None, :]
    acc = tl.load(part_ptr + ((row * parts + part) * V_D)[:, None] + v_dim[None, :], mask=mask, other=0.0)  # [PARTS, V_TILE]
    weight = tl.exp2(top - tl.max(top, 0))
    total = tl.sum(total * weight, 0)
    out = tl.sum(acc * weight[:, None], 0) / tl.where(total > 0, total, 1.0)
    tl.store(out_ptr + row * V_D + v_dim, out.to(out_ptr.dtype.element_ty), mask=v_dim < V_D)


@triton.jit(do_not_specialize=["decodes", "sequences", "table_width"])
def _prefill(
    q_ptr,         # [tokens, heads, D], strides q_token and q_head
    k_ptr,         # [blocks, BLOCK, KV_HEADS, D]
    v_ptr,         # [blocks, BLOCK, KV_HEADS, V_D]
    out_ptr,       # [tokens, heads, V_D]
    tables_ptr,    # [sequences, table_width] int32
    bounds_ptr,    # [sequences + 1] int32: cu_seqlens_q
    seq_lens_ptr,  # [sequences] int32
    sinks_ptr,     # [heads]
    q_token, q_head, table_width, decodes, sequences, scale, inner_scale,
    GROUP: tl.constexpr, KV_HEADS: tl.constexpr, D: tl.constexpr, V_D: tl.constexpr, D_TILE: tl.constexpr,
    V_TILE: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr, SINKS: tl.constexpr, PRECISION: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """Attend with a tile of QUERIES queries of one sequence, with the heads of one group. Grid [KV_HEADS, tiles].

    Sequence s owns the tiles bounds[s] // QUERIES + s and on, up to the next one's: enough for its queries wherever they
    start, so that the host need not know bounds. Tiles run last first: those see most keys.
    """
    QUERIES: tl.constexpr = ROWS // GROUP
    kv_head, tile = tl.program_id(0), tl.num_programs(1) - 1 - tl.program_id(1)
    skipped = tl.load(bounds_ptr + decodes)
    s, beyond = decodes, sequences
    while beyond - s > 1:
        middle = (s + beyond) // 2
        if (tl.load(bounds_ptr + middle) - skipped) // QUERIES + middle - decodes <= tile:
            s = middle
        else:
            beyond = middle
    first = tl.load(bounds_ptr + s)  # the sequence's first token
    queries = tl.load(bounds_ptr + s + 1) - first
    length = tl.load(seq_lens_ptr + s)
    query = (tile - ((first - skipped) // QUERIES + s - decodes)) * QUERIES  # the tile's first, within the sequence
    if query >= queries:
        return
    row, dim, v_dim = tl.arange(0, ROWS), tl.arange(0, D_TILE), tl.arange(0, V_TILE)
    head = kv_head * GROUP + row % GROUP  # [ROWS]
    used = (row < QUERIES * GROUP) & (query + row // GROUP < queries)
    token = (first + query + row // GROUP).to(tl.int64)  # [ROWS]
    lowest = length - queries + query  # the position of the tile's first query
    end = tl.minimum(lowest + QUERIES, length)
    q_mask = used[:, None] & (dim < D)[None, :]
    q = tl.load(q_ptr + (token * q_token + head * q_head)[:, None] + dim[None, :], mask=q_mask, other=0.0)  # [ROWS, D_TILE]
    if INTERPRETED:
        q = q.to(tl.float32)
    acc = tl.zeros([ROWS, V_TILE], tl.float32)
    top = tl.full([ROWS], NOTHING, tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    if SINKS:
        top = tl.load(sinks_ptr + head, mask=used, other=0.0).to(tl.float32) * LOG2_E
        total = tl.full([ROWS], 1.0, tl.float32)
    position = lowest + row // GROUP  # [ROWS]
    table = tables_ptr + s.to(tl.int64) * table_width
    if WINDOW:
        masked = tl.maximum(lowest - WINDOW + 1, 0) // KEYS * KEYS
    else:
        masked = (lowest + 1) // KEYS * KEYS  # every row sees every key before this one
        acc, top, total = _walk(
            acc, top, total, q, position, k_ptr, v_ptr, table, kv_head, 0, masked, scale, inner_scale, KV_HEADS, D, V_D,
            D_TILE, V_TILE, BLOCK, KEYS, WINDOW, SOFTCAP, False, PRECISION, INTERPRETED,
        )  # fmt: skip
    acc, top, total = _walk(
        acc, top, total, q, position, k_ptr, v_ptr, table, kv_head, masked, end, scale, inner_scale, KV_HEADS, D, V_D,
        D_TILE, V_TILE, BLOCK, KEYS, WINDOW, SOFTCAP, True, PRECISION, INTERPRETED,
    )  # fmt: skip
    out = acc / tl.where(total > 0, total, 1.0)[:, None]  # [ROWS, V_TILE]
    out_row = token * (KV_HEADS * GROUP) + head
    out_mask = used[:, None] & (v_dim < V_D)[None, :]
    tl.store(out_ptr + (out_row * V_D)[:, None] + v_dim[None, :], out.to(out_ptr.dtype.element_ty), mask=out_mask)


@triton.jit
def _write(
    k_ptr,        # [tokens, KV_HEADS, D], strides k_token and k_head
    v_ptr,        # [tokens, KV_HEADS, V_D], strides v_token and v_head
    k_cache_ptr,  # [slots, KV_HEADS, D]
    v_cache_ptr,  # [slots, KV_HEADS, V_D]
    slots_ptr,    # [tokens] int64
    k_token, k_head, v_token, v_head,
    KV_HEADS: tl.constexpr, D: tl.constexpr, V_D: tl.constexpr, K_TILE: tl.constexpr, V_TILE: tl.constexpr,
):  # fmt: skip
    """Write one token's keys and values, all heads side by side, into its slot. Grid [tokens]."""
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots_ptr + token)
    i, j = tl.arange(0, K_TILE), tl.arange(0, V_TILE)
    k = tl.load(k_ptr + token * k_token + i // D * k_head + i % D, mask=i < KV_HEADS * D)  # [K_TILE]
    v = tl.load(v_ptr + token * v_token + j // V_D * v_head + j % V_D, mask=j < KV_HEADS * V_D)  # [V_TILE]
    tl.store(k_cache_ptr + slot * (KV_HEADS * D) + i, k, mask=i < KV_HEADS * D)
    tl.store(v_cache_ptr + slot * (KV_HEADS * V_D) + j, v, mask=j < KV_HEADS * V_D)


@functools.cache
def unavailable() -> str | None:
    """Return why this machine cannot run the kernels, or None."""
    if not torch.cuda.is_available():
        return "no CUDA device"
    major, minor = torch.cuda.get_device_capability()
    return None if major >= 8 else f"compute capability {major}.{minor}: it wants 8.0"


@functools.cache
def processors(device: torch.device) -> tuple[int, int]:
    """Return the number of multiprocessors, and the bytes of shared memory that a program can have."""
    if device.type != "cuda":
        return 1, 0
    properties = torch.cuda.get_device_properties(device)
    return properties.multi_processor_count, properties.shared_memory_per_block_optin


def choose_parts(rows: int, tiles: int, count: int) -> int:
    """Return into how many parts to cut the keys, up to `tiles` tiles, of `rows` pairs of sequence and head."""
    return max(1, min(MAX_PARTS, tiles, -(-PROGRAMS_PER_SM * count // rows)))


def unsupported(q: Tensor, v: Tensor, k_cache: Tensor) -> str | None:
    """Return why the kernels leave these inputs to paged_attention_sdpa, or None."""
    group = q.shape[1] // k_cache.shape[2]
    if q.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return f"{q.dtype} queries: they multiply bfloat16, float16 and float32"
    if not q.dtype == v.dtype == k_cache.dtype:
        return f"queries in {q.dtype} against a cache in {k_cache.dtype}"
    if max(q.shape[2], v.shape[2]) > 256:
        return f"head sizes {q.shape[2]} and {v.shape[2]}: they want at most 256"
    return f"{group} heads in a group: they want at most 128" if group > 128 else None


def paged_attention(
    q: Tensor, k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slot_mapping: Tensor, block_tables: Tensor,
    cu_seqlens_q: Tensor, seq_lens: Tensor, *, scale: float, window: int = 0, softcap: float = 0.0,
    sinks: Tensor | None = None, decodes: int | None = None, max_seq_len: int | None = None,
) -> Tensor:
    """Write k and v into the caches and attend, without waiting for the device.

    The first `decodes` sequences have one query each (None: all if there are as many tokens, else none), and no decode
    is longer than `max_seq_len` (None: than its block table).
    """
    if unsupported(q, v, k_cache):
        inputs = (q, k, v, k_cache, v_cache, slot_mapping, block_tables, cu_seqlens_q, seq_lens)
        return paged_attention_sdpa(*inputs, scale=scale, window=window, softcap=softcap, sinks=sinks)
    write_kv(k, v, k_cache, v_cache, slot_mapping)
    return attend(q, k_cache, v_cache, block_tables, cu_seqlens_q, seq_lens, scale=scale, window=window, softcap=softcap,
                  sinks=sinks, decodes=decodes, max_seq_len=max_seq_len)  # fmt: skip


def write_kv(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slot_mapping: Tensor) -> None:
    """Write k and v [tokens, kv_heads, head_dim] into their slots of the caches."""
    assert k_cache.is_contiguous() and v_cache.is_contiguous() and slot_mapping.is_contiguous()
    k, v = (x if x.stride(2) == 1 else x.contiguous() for x in (k, v))
    kv_heads, dim, v_dim = *k.shape[1:], v.shape[2]
    tiles = triton.next_power_of_2(kv_heads * dim), triton.next_power_of_2(kv_heads * v_dim)
    _write[(k.shape[0],)](k, v, k_cache, v_cache, slot_mapping, *k.stride()[:2], *v.stride()[:2], kv_heads, dim, v_dim, *tiles)


def attend(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, block_tables: Tensor, cu_seqlens_q: Tensor, seq_lens: Tensor, *,
    scale: float, window: int = 0, softcap: float = 0.0, sinks: Tensor | None = None, decodes: int | None = None,
    max_seq_len: int | None = None,
) -> Tensor:
    """Attend with q [tokens, heads, head_dim] to caches that hold this step's keys and values already."""
    assert block_tables.dtype == cu_seqlens_q.dtype == seq_lens.dtype == torch.int32
    assert k_cache.is_contiguous() and v_cache.is_contiguous() and block_tables.is_contiguous()
    q = q if q.stride(2) == 1 else q.contiguous()
    (tokens, heads, dim), (_, block_size, kv_heads, v_dim), (sequences, width) = q.shape, v_cache.shape, block_tables.shape
    if decodes is None:
        decodes = sequences if tokens == sequences else 0
    out, group = q.new_empty(tokens, heads, v_dim), heads // kv_heads
    count, shared = processors(q.device)
    padded = max(64, triton.next_power_of_2(max(dim, v_dim)))
    constants = {
        "GROUP": group, "KV_HEADS": kv_heads, "D": dim, "V_D": v_dim, "D_TILE": max(16, triton.next_power_of_2(dim)),
        "V_TILE": max(16, triton.next_power_of_2(v_dim)), "BLOCK": block_size, "WINDOW": window, "SOFTCAP": softcap > 0,
        "SINKS": sinks is not None, "PRECISION": "ieee" if q.dtype == torch.float32 else "tf32", "INTERPRETED": INTERPRETED,
    }  # fmt: skip
    outer = (softcap or scale) * LOG2_E.value  # times score, of the tanh if there is a softcap, is the exponent of 2
    scales = outer, 2 * LOG2_E.value * scale / (softcap or 1)
    sinks = seq_lens if sinks is None else sinks.contiguous()  # some pointer: it is not read
    if decodes:
        tiles = (EXACT if q.dtype == torch.float32 else DECODE)[padded]
        longest = max_seq_len or width * block_size
        parts = choose_parts(decodes * kv_heads, min(longest, window or longest) // tiles.keys + 1, count)
        acc = q.new_empty(decodes, heads, parts if parts > 1 else 0, v_dim, dtype=torch.float32)
        top, total = q.new_empty(2, decodes, heads, parts, dtype=torch.float32)
        rows = max(tiles.rows, triton.next_power_of_2(group))
        _decode[(kv_heads, parts, decodes)](
            q, k_cache, v_cache, out, acc, top, total, block_tables, seq_lens, sinks, *q.stride()[:2], width, parts,
            *scales, **constants, ROWS=rows, KEYS=tiles.keys, SPLIT=parts > 1, num_warps=tiles.warps,
            num_stages=tiles.stages,
        )  # fmt: skip
        if parts > 1:
            _merge[(decodes * heads,)](acc, top, total, out, parts, v_dim, constants["V_TILE"], triton.next_power_of_2(parts))
    if decodes < sequences:
        tiles = (EXACT if q.dtype == torch.float32 else PREFILL if shared >= HOPPER else SMALL)[padded]
        rows = max(tiles.rows, triton.next_power_of_2(group))
        grid = kv_heads, (tokens - decodes) // (rows // group) + sequences - decodes
        _prefill[grid](
            q, k_cache, v_cache, out, block_tables, cu_seqlens_q, seq_lens, sinks, *q.stride()[:2], width, decodes,
            sequences, *scales, **constants, ROWS=rows, KEYS=tiles.keys, num_warps=tiles.warps, num_stages=tiles.stages,
        )  # fmt: skip
    return out


def benchmark(queries: int, sequences: int, length: int, heads: int = 32, kv_heads: int = 8, dim: int = 128) -> None:
    """Time sequences of `queries` new tokens at `length` cached tokens beside torch's SDPA on keys that lie in one piece."""
    block_size, options = 32, {"device": "cuda", "dtype": torch.bfloat16}
    blocks = -(-length // block_size) * sequences
    tables = torch.randperm(blocks, device="cuda").view(sequences, -1).int()
    k_cache, v_cache = torch.randn(2, blocks, block_size, kv_heads, dim, **options)
    positions = torch.arange(length - queries, length, device="cuda")
    slots = (tables.long()[:, positions // block_size] * block_size + positions % block_size).flatten()
    bounds, lengths = torch.arange(sequences + 1).int().cuda() * queries, torch.full((sequences,), length).int().cuda()
    q = torch.randn(sequences * queries, heads, dim, **options)
    k, v = torch.randn(2, sequences * queries, kv_heads, dim, **options)
    dense_q = q.view(sequences, queries, heads, dim).transpose(1, 2)
    dense_k, dense_v = torch.randn(2, sequences, kv_heads, length, dim, **options)

    def paged() -> Tensor:
        return paged_attention(q, k, v, k_cache, v_cache, slots, tables, bounds, lengths, scale=dim**-0.5)

    def dense() -> Tensor:
        return F.scaled_dot_product_attention(dense_q, dense_k, dense_v, is_causal=queries > 1, enable_gqa=True)

    want = paged_attention_eager(q, k, v, k_cache, v_cache, slots, tables, bounds, lengths, scale=dim**-0.5)
    error = ((paged() - want).float().norm() / want.float().norm()).item()
    print(f"{queries} queries x {sequences} sequences, length {length}: differs from the reference by {error:.1e}")
    size = 2 * sequences * length * kv_heads * dim * 2
    pairs = sequences * (queries * (length - queries) + queries * (queries + 1) // 2) * heads
    for name, function in (("paged_attention", paged), ("SDPA, not paged", dense)):
        seconds = triton.testing.do_bench(function, return_mode="median") / 1e3
        speed = f"{size / seconds / 1e9:7.0f} GB/s {4 * pairs * dim / seconds / 1e12:6.1f} TFLOP/s"
        print(f"  {name:16} {seconds * 1e3:8.3f} ms {speed}")


if __name__ == "__main__":
    print(unavailable() or f"{torch.cuda.get_device_name()}, 32 heads, 8 key/value heads of 128, bfloat16")
    shapes = (1, 1, 8192), (1, 32, 2048), (1, 64, 4096), (1, 256, 2048), (1024, 8, 1024), (4096, 1, 4096)
    for shape in () if unavailable() else shapes:
        benchmark(*shape)
