"""Sampling for GPUs in Triton: serve.py's `draw` without a word from the host, so that a CUDA graph can hold it.

    score  = logit / temperature
    cutoff = the highest of  top-k   the k-th highest score
                             top-p   the highest t such that Σ_{score >= t} e^score >= top_p * W, where W is the sum over the
                                     k highest scores, or over all
                             min-p   max score + log(min_p)
    token  = the first i for which Σ_{j <= i, score[j] >= cutoff} e^score[j] exceeds uniform * the whole sum

    logits                      [rows, vocab], rows may lie apart; -inf: never chosen
    temperature, top_p, min_p   [rows] float32: below COLDEST is greedy; 1 and 0 are off
    top_k                       [rows] int32: 0 is off
    uniform                     [rows] float64 in [0, 1): the caller's, of a row's seed and position
    returns                     [rows] int64

Two launches: the first sums a row up in chunks, with all of the GPU, and is all that greedy and plain rows read; the second
searches a row's cutoffs by bisection, a pass over the row each step, and draws. Equal scores are kept or dropped together.
A row's choice depends on nothing but the row: sums are always added in the same order.
"""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

COLDEST = tl.constexpr(1e-5)
CHUNK = 4096


def sample_eager(
    logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor, uniform: Tensor
) -> Tensor:
    """The reference, in float64."""
    cold = temperature < COLDEST.value
    scores = logits.double() / torch.where(cold, 1, temperature)[:, None]
    falling = scores.sort(-1, descending=True).values  # [rows, vocab]
    best, rank = falling[:, :1], torch.arange(scores.shape[1], device=scores.device)
    weight = (falling - best).exp().masked_fill((top_k > 0)[:, None] & (rank >= top_k[:, None]), 0)
    mass = weight.cumsum(-1)
    within = (mass - weight < top_p[:, None] * mass[:, -1:]) | (top_p >= 1)[:, None]
    kept = (weight > 0) & within | (rank == 0)
    cutoff = torch.maximum(falling.masked_fill(~kept, torch.inf).amin(-1), best[:, 0] + min_p.log())
    cutoff = torch.where(cold, best[:, 0], cutoff)
    cumulative = (scores - best).exp().masked_fill(scores < cutoff[:, None], 0).cumsum(-1)
    point = torch.where(cold, 0, uniform) * cumulative[:, -1]
    return torch.searchsorted(cumulative, point[:, None], right=True)[:, 0]


@triton.jit
def _scores(
    row_ptr,  # [VOCAB]
    inverse, chunk,
    VOCAB: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Return the scores of a chunk [CHUNK] float32; those past the end are -inf."""
    i = chunk * CHUNK + tl.arange(0, CHUNK)
    return tl.load(row_ptr + i, mask=i < VOCAB, other=-float("inf")).to(tl.float32) * inverse


@triton.jit
def _summarise(
    logits_ptr,       # [rows, VOCAB], rows logits_row apart
    temperature_ptr,  # [rows] float32
    highest_ptr,      # [rows, chunks] float32: a chunk's highest score
    mass_ptr,         # [rows, chunks] float64: Σ e^(score - highest)
    logits_row,
    VOCAB: tl.constexpr, CHUNK: tl.constexpr, COLDEST: tl.constexpr,
):  # fmt: skip
    """Sum a chunk of a row up. Grid [rows, chunks]."""
    row, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    temperature = tl.load(temperature_ptr + row)
    inverse = 1 / tl.where(temperature < COLDEST, 1.0, temperature)
    score = _scores(logits_ptr + row * logits_row, inverse, chunk, VOCAB, CHUNK)  # [CHUNK]
    highest = tl.max(score, 0)
    mass = tl.sum(tl.exp(score - tl.where(highest > -float("inf"), highest, 0.0)).to(tl.float64), 0)
    tl.store(highest_ptr + row * tl.num_programs(1) + chunk, highest)
    tl.store(mass_ptr + row * tl.num_programs(1) + chunk, mass)


@triton.jit
def _measure(
    row_ptr,  # [VOCAB]
    inverse, best, t,
    VOCAB: tl.constexpr, CHUNK: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    """Return the count and Σ e^(score - best) of the scores from t on, the lowest of them, and the highest other score."""
    count = tl.zeros([CHUNK], tl.float32)
    mass = tl.zeros([CHUNK], tl.float32)
    lowest = tl.full([CHUNK], float("inf"), tl.float32)
    below = tl.full([CHUNK], -float("inf"), tl.float32)
    for chunk in tl.range(0, CHUNKS, num_stages=3):
        score = _scores(row_ptr, inverse, chunk, VOCAB, CHUNK)  # [CHUNK]
        kept = score >= t
        count += tl.where(kept, 1.0, 0.0)
        mass += tl.where(kept, tl.exp(score - best), 0.0)
        lowest = tl.minimum(lowest, tl.where(kept, score, float("inf")))
        below = tl.maximum(below, tl.where(kept, -float("inf"), score))
    return tl.sum(count, 0), tl.sum(mass.to(tl.float64), 0), tl.min(lowest, 0), tl.max(below, 0)


@triton.jit
def _cutoff(
    row_ptr,  # [VOCAB]
    inverse, best, low, target,
    COUNT: tl.constexpr, VOCAB: tl.constexpr, CHUNK: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    """Return the highest score from which on there is enough: `target` scores if COUNT, else mass. From low on there is."""
    high = best
    while low < high:  # low <= the cutoff <= high, and high is a score
        middle = low + (high - low) / 2
        middle = tl.where(middle > low, middle, high)
        count, mass, lowest, below = _measure(row_ptr, inverse, best, middle, VOCAB, CHUNK, CHUNKS)
        if COUNT:
            enough = count >= target
        else:
            enough = mass >= target
        low = tl.where(enough, lowest, low)
        high = tl.where(enough, high, below)
    return low


@triton.jit
def _choose(
    logits_ptr,       # [rows, VOCAB], rows logits_row apart
    temperature_ptr,  # [rows] float32
    top_k_ptr,        # [rows] int32
    top_p_ptr,        # [rows] float32
    min_p_ptr,        # [rows] float32
    uniform_ptr,      # [rows] float64
    highest_ptr,      # [rows, CHUNKS] float32
    mass_ptr,         # [rows, CHUNKS] float64
    out_ptr,          # [rows] int64
    logits_row,
    VOCAB: tl.constexpr, CHUNK: tl.constexpr, CHUNKS: tl.constexpr, CHUNKS_TILE: tl.constexpr, COLDEST: tl.constexpr,
):  # fmt: skip
    """Choose one row's token. Grid [rows]."""
    row, each = tl.program_id(0).to(tl.int64), tl.arange(0, CHUNKS_TILE)
    row_ptr = logits_ptr + row * logits_row
    highest = tl.load(highest_ptr + row * CHUNKS + each, mask=each < CHUNKS, other=-float("inf"))  # [CHUNKS_TILE]
    masses = tl.load(mass_ptr + row * CHUNKS + each, mask=each < CHUNKS, other=0.0)  # [CHUNKS_TILE]
    best = tl.max(highest, 0)
    masses *= tl.exp((highest - best).to(tl.float64))
    whole = tl.sum(masses, 0)
    temperature, uniform = tl.load(temperature_ptr + row), tl.load(uniform_ptr + row)
    cold = temperature < COLDEST
    inverse = 1 / tl.where(cold, 1.0, temperature)
    top_k, top_p, min_p = tl.load(top_k_ptr + row), tl.load(top_p_ptr + row), tl.load(min_p_ptr + row)
    cutoff = -float("inf") + 0 * best
    if cold:
        cutoff = best
        uniform = uniform * 0
    else:
        if (top_k > 0) & (top_k < VOCAB):
            count, reach = 0 * best, 0.25 + 0 * best
            while (count < top_k) & (reach < 1000):  # the k-th is hardly ever more than 16 below the best
                reach *= 64
                count, mass, lowest, below = _measure(row_ptr, inverse, best, best - reach, VOCAB, CHUNK, CHUNKS)
            if count >= top_k:  # else fewer weigh anything at all
                cutoff = _cutoff(row_ptr, inverse, best, best - reach, top_k, True, VOCAB, CHUNK, CHUNKS)
                if top_p < 1:
                    count, mass, lowest, below = _measure(row_ptr, inverse, best, cutoff, VOCAB, CHUNK, CHUNKS)
                    whole = mass - (count - top_k) * tl.exp(cutoff - best)  # of equal scores only as many as k has room for
        if top_p < 1:
            # All scores below this weigh less together than what top-p may leave out.
            floor = best + tl.log(((1 - top_p) * whole / (2 * VOCAB)).to(tl.float32))
            floor = tl.maximum(cutoff, floor)
            cutoff = _cutoff(row_ptr, inverse, best, floor, top_p * whole, False, VOCAB, CHUNK, CHUNKS)
        if min_p > 0:
            cutoff = tl.maximum(cutoff, best + tl.log(min_p))
    if cutoff > -float("inf"):
        for chunk in range(CHUNKS):
            score = _scores(row_ptr, inverse, chunk, VOCAB, CHUNK)
            mass = tl.sum(tl.where(score >= cutoff, tl.exp(score - best), 0.0).to(tl.float64), 0)
            masses = tl.where(each == chunk, mass, masses)
    cumulative = tl.cumsum(masses, 0)  # [CHUNKS_TILE]
    point = uniform * tl.sum(masses, 0)
    last = tl.max(tl.where(masses > 0, each, 0), 0)  # where rounding pushes a point past the end
    chunk = tl.min(tl.where(cumulative > point, each, last), 0)
    before = tl.sum(tl.where(each < chunk, masses, 0.0), 0)
    score = _scores(row_ptr, inverse, chunk, VOCAB, CHUNK)  # [CHUNK]
    i = chunk * CHUNK + tl.arange(0, CHUNK)
    kept = (score >= cutoff) & (score > -float("inf"))
    weight = tl.where(kept, tl.exp(score - best), 0.0).to(tl.float64)
    last = tl.max(tl.where(kept, i, 0), 0)
    token = tl.min(tl.where(before + tl.cumsum(weight, 0) > point, i, last), 0)
    tl.store(out_ptr + row, token.to(tl.int64))


def sample(
    logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor, uniform: Tensor
) -> Tensor:
    """Choose a token per row, without waiting for the device."""
    assert logits.stride(1) == 1 and uniform.dtype == torch.float64 and top_k.dtype == torch.int32
    (rows, vocab), chunks = logits.shape, triton.cdiv(logits.shape[1], CHUNK)
    highest = logits.new_empty(rows, chunks, dtype=torch.float32)
    mass, out = torch.empty_like(highest, dtype=torch.float64), logits.new_empty(rows, dtype=torch.int64)
    _summarise[(rows, chunks)](
        logits, temperature, highest, mass, logits.stride(0), vocab, CHUNK, COLDEST.value, num_warps=16
    )
    _choose[(rows,)](
        logits, temperature, top_k, top_p, min_p, uniform, highest, mass, out, logits.stride(0), vocab, CHUNK, chunks,
        max(2, triton.next_power_of_2(chunks)), COLDEST.value, num_warps=8,
    )  # fmt: skip
    return out


def benchmark(rows: int, vocab: int = 151936) -> None:
    """Time rows of bfloat16 logits that fall like a model's, against as much memory read once."""
    device = "cuda"
    logits = (torch.randn(rows, vocab, device=device) * 2.5).bfloat16()
    uniform = torch.rand(rows, device=device, dtype=torch.float64)
    for name, temperature, top_k, top_p in (("greedy", 0, 0, 1), ("plain", 1, 0, 1), ("top-k 50", 1, 50, 1),
                                            ("top-p 0.9", 0.6, 0, 0.9), ("both", 0.7, 20, 0.8)):  # fmt: skip
        columns = [torch.full((rows,), x, device=device).float() for x in (temperature, top_p, 0)]
        inputs = logits, columns[0], torch.full((rows,), top_k, device=device).int(), *columns[1:], uniform
        same = (sample(*inputs) == sample_eager(*inputs)).float().mean().item()
        times = [triton.testing.do_bench(functools.partial(f, *inputs), return_mode="median")
                 for f in (sample, sample_eager)]
        print(f"{rows:4} rows  {name:10} {times[0] * 1e3:8.1f} µs  {logits.nbytes / times[0] / 1e6:6.0f} GB/s  "
              f"{times[1] * 1e3:9.1f} µs (torch, float64)  {same:.1%} the same")  # fmt: skip


if __name__ == "__main__":
    print(torch.cuda.get_device_name() if torch.cuda.is_available() else "no CUDA device")
    for count in (1, 32, 256) if torch.cuda.is_available() else ():
        benchmark(count)
