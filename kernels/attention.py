"""Paged attention in torch: the reference every kernel is tested against, and the fallback that needs no compiler.

For query i of sequence s at position p = seq_lens[s] - queries of s + i, and for each of its heads h:

    score[j] = scale * q[h] · K[j, h // group]            softcap: score = softcap * tanh(score / softcap)
    out[h]   = Σ_j exp(score[j]) V[j] / (Σ_j exp(score[j]) + exp(sinks[h]))     over max(0, p - window + 1) <= j <= p

Every implementation has one signature. It writes k and v into the caches, then attends through the block tables:

    q             [tokens, heads, head_dim]         tokens of all sequences, one after the other
    k, v          [tokens, kv_heads, head_dim]      v may have a head_dim of its own
    k_cache       [blocks, block_size, kv_heads, head_dim], v_cache likewise; never-written slots may hold anything
    slot_mapping  [tokens] int64                    where k and v go: block * block_size + offset
    block_tables  [sequences, max_blocks] int32     entries past a sequence's last block are not read
    cu_seqlens_q  [sequences + 1] int32             sequence s owns tokens cu_seqlens_q[s] : cu_seqlens_q[s + 1]
    seq_lens      [sequences] int32                 tokens in the cache after this write
    scale, window (0: none), softcap (0: none), sinks [heads] or None
    returns       [tokens, heads, v_head_dim]
"""

from collections import defaultdict
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

QUERY_TILE = 256  # prefill queries per SDPA call: bounds the mask, and skips keys that the whole tile may not see
DECODE_TILE = 32  # decode rows per SDPA call: bounds the gathered copy of their keys and values


def paged_attention_eager(
    q: Tensor, k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slot_mapping: Tensor, block_tables: Tensor,
    cu_seqlens_q: Tensor, seq_lens: Tensor, *, scale: float, window: int = 0, softcap: float = 0.0,
    sinks: Tensor | None = None,
) -> Tensor:
    """Attend one sequence at a time in fp32 (fp64 for fp64 inputs): the reference."""
    write_kv(k, v, k_cache, v_cache, slot_mapping)
    out, group = q.new_empty(*q.shape[:2], v.shape[-1]), q.shape[1] // k.shape[1]
    wide = torch.promote_types(q.dtype, torch.float32)
    for s, (start, end, length) in enumerate(_spans(cu_seqlens_q, seq_lens)):
        slots = _slots(block_tables[s], torch.arange(length, device=q.device), k_cache.shape[1])
        keys, values = (cache.flatten(0, 1)[slots].to(wide).repeat_interleave(group, 1) for cache in (k_cache, v_cache))
        scores = torch.einsum("qhd,khd->hqk", q[start:end].to(wide), keys) * scale
        if softcap:
            scores = softcap * torch.tanh(scores / softcap)
        position = torch.arange(length - (end - start), length, device=q.device)
        scores = scores.masked_fill(~_visible(position, 0, length, window), -torch.inf)
        if sinks is not None:
            scores = torch.cat([scores, sinks.to(wide).view(-1, 1, 1).expand(-1, end - start, 1)], -1)
        out[start:end] = torch.einsum("hqk,khd->qhd", scores.softmax(-1)[..., :length], values)
    return out


def paged_attention_sdpa(
    q: Tensor, k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slot_mapping: Tensor, block_tables: Tensor,
    cu_seqlens_q: Tensor, seq_lens: Tensor, *, scale: float, window: int = 0, softcap: float = 0.0,
    sinks: Tensor | None = None,
) -> Tensor:
    """Attend with torch's SDPA, the query heads of a group packed as rows so that keys are never repeated.

    Decode rows of similar length share a call; prefills go one by one. SDPA knows no softcap and no sinks: those layers
    take the reference's arithmetic.
    """
    caches = (k_cache, v_cache, slot_mapping, block_tables, cu_seqlens_q, seq_lens)
    if softcap or sinks is not None:
        return paged_attention_eager(q, k, v, *caches, scale=scale, window=window, softcap=softcap, sinks=sinks)
    write_kv(k, v, k_cache, v_cache, slot_mapping)
    out = q.new_empty(*q.shape[:2], v.shape[-1])
    grouped = q.unflatten(1, (k.shape[1], -1))  # [tokens, kv_heads, group, head_dim]
    spans = list(_spans(cu_seqlens_q, seq_lens))
    for rows, lengths, sequences in _decode_tiles(spans, window):
        keys, values, mask = _gather_decode(k_cache, v_cache, block_tables, sequences, lengths, window)
        out[rows] = F.scaled_dot_product_attention(grouped[rows], keys, values, mask, scale=scale).flatten(1, 2)
    for s, (start, end, length) in enumerate(spans):
        for first in range(start, end, QUERY_TILE) if end - start > 1 else ():
            last = min(first + QUERY_TILE, end)
            tile = _attend_tile(grouped[first:last], k_cache, v_cache, block_tables[s], length - end + last, scale, window)
            out[first:last] = tile
    return out


def write_kv(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slot_mapping: Tensor) -> None:
    """Write k and v [tokens, kv_heads, head_dim] into their slots of the caches."""
    k_cache.view(-1, *k.shape[1:])[slot_mapping] = k
    v_cache.view(-1, *v.shape[1:])[slot_mapping] = v


def _spans(cu_seqlens_q: Tensor, seq_lens: Tensor) -> Iterator[tuple[int, int, int]]:
    """Yield (first token, end token, length in the cache) of each sequence."""
    bounds = cu_seqlens_q.tolist()
    return zip(bounds, bounds[1:], seq_lens.tolist())


def _slots(block_table: Tensor, positions: Tensor, block_size: int) -> Tensor:
    """Return the cache slots of positions [keys] of one sequence, or [rows, keys] under tables [rows, max_blocks]."""
    blocks = block_table.long().gather(-1, positions // block_size)
    return blocks * block_size + positions % block_size


def _visible(position: Tensor, first: int, end: int, window: int) -> Tensor:
    """Return the mask [queries, keys] of keys first:end that queries at position [queries] attend to."""
    key = torch.arange(first, end, device=position.device)
    visible = key <= position[:, None]
    return visible & (key > position[:, None] - window) if window else visible


def _decode_tiles(spans: list[tuple[int, int, int]], window: int) -> Iterator[tuple[list[int], list[int], list[int]]]:
    """Yield (token rows, lengths, sequences) of single-query sequences whose spans of keys differ less than twofold."""
    tiles = defaultdict(list)
    for s, (start, end, length) in enumerate(spans):
        if end - start == 1:
            tiles[min(length, window or length).bit_length()].append((start, length, s))
    for tile in tiles.values():
        for first in range(0, len(tile), DECODE_TILE):
            rows, lengths, sequences = zip(*tile[first : first + DECODE_TILE])
            yield list(rows), list(lengths), list(sequences)


def _gather_decode(
    k_cache: Tensor, v_cache: Tensor, block_tables: Tensor, sequences: list[int], lengths: list[int], window: int
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Gather keys and values [rows, kv_heads, span, head_dim] of decode rows, with a mask where their spans differ."""
    end = torch.tensor(lengths, device=k_cache.device)[:, None]
    count = end.clamp(max=window) if window else end  # [rows, 1] visible keys
    span = torch.arange(int(count.max()), device=k_cache.device)
    # Padding repeats the row's last key: a masked weight of zero must meet a finite value, and empty slots hold any bits.
    positions = torch.minimum(end - count + span, end - 1)
    slots = _slots(block_tables[sequences], positions, k_cache.shape[1])
    keys, values = (cache.flatten(0, 1)[slots].transpose(1, 2) for cache in (k_cache, v_cache))
    mask = None if bool((count == count[0]).all()) else (span < count)[:, None, None]
    return keys, values, mask


def _attend_tile(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, block_table: Tensor, end: int, scale: float, window: int
) -> Tensor:
    """Attend with consecutive queries q [queries, kv_heads, group, head_dim], the last at position end - 1."""
    queries, _, group, _ = q.shape
    position = torch.arange(end - queries, end, device=q.device)
    first = max(0, end - queries + 1 - window) if window else 0
    slots = _slots(block_table, torch.arange(first, end, device=q.device), k_cache.shape[1])
    keys, values = (cache.flatten(0, 1)[slots].transpose(0, 1)[None] for cache in (k_cache, v_cache))
    packed = q.transpose(0, 1).flatten(1, 2)[None]  # [1, kv_heads, queries * group, head_dim]
    mask = _visible(position, first, end, window).repeat_interleave(group, 0)
    out = F.scaled_dot_product_attention(packed, keys, values, mask, scale=scale)[0]
    return out.unflatten(1, (queries, group)).transpose(0, 1).flatten(1, 2)
