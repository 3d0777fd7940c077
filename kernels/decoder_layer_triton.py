"""A run of Llama-shaped decoder layers: torch's matrix products, and in Triton what is between them, one pass over memory each.

    rms_norm        x / rms(x) * weight, or * (1 + weight) as Gemma has it; rms(x) = sqrt(mean(x²) + epsilon)
    add_rms_norm    the sum of a block's output and the residual stream, and its norm
    rope_and_write  each head of q and k normed where the model does, then rotated, halves paired as Llama pairs them:
                    low' = low * cos - high * sin, high' = high * cos + low * sin;  k and v -> caches
    silu_mul        act(gate) * up; gelu_mul: by the tanh approximation

    x, residual      [tokens, hidden]; weight [hidden]
    q                [tokens, heads, head_dim]; k, v [tokens, kv_heads, head_dim]: heads may lie apart, as slices do
    cos, sin         [tokens, rotary_dim], rotary_dim <= head_dim; q_weight, k_weight [head_dim] or None
    caches, slots    as in attention.py
    gate, up         [tokens, intermediate]: rows may lie apart

Arithmetic is in float32, rounded to the inputs' dtype where transformers rounds it. `unsupported` reads a layer's modules,
not its forward: the caller compares results with the original's before it trusts the fused layer.
"""

import functools
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor, nn

if __name__ == "__main__":  # run as a file: stand where serve.py puts this folder
    import sys
    import types

    sys.modules["serve_kernels"] = types.ModuleType("serve_kernels")
    sys.modules["serve_kernels"].__path__ = [str(Path(__file__).parent)]
    __package__ = "serve_kernels"

from .attention import write_kv
from .attention_triton import attend
from .decoder_layer_cpu import _activation, _epsilon, _is_plain, _norm_style


def rms_norm_eager(x: Tensor, weight: Tensor, epsilon: float, plus_one: bool = False) -> Tensor:
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + epsilon)
    return (normed * (1 + weight.to(wide.dtype))).to(x.dtype) if plus_one else normed.to(x.dtype) * weight


def add_rms_norm_eager(
    x: Tensor, residual: Tensor, weight: Tensor, epsilon: float, plus_one: bool = False
) -> tuple[Tensor, Tensor]:
    total = x + residual
    return total, rms_norm_eager(total, weight, epsilon, plus_one)


def rope_and_write_eager(
    q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, k_cache: Tensor, v_cache: Tensor, slot_mapping: Tensor,
    q_weight: Tensor | None = None, k_weight: Tensor | None = None, epsilon: float = 0.0, plus_one: bool = False,
) -> Tensor:
    if q_weight is not None:
        q, k = rms_norm_eager(q, q_weight, epsilon, plus_one), rms_norm_eager(k, k_weight, epsilon, plus_one)

    def rotate(x: Tensor) -> Tensor:
        turning, still = x.split([cos.shape[1], x.shape[2] - cos.shape[1]], -1)
        low, high = turning.chunk(2, -1)
        return torch.cat([turning * cos[:, None] + torch.cat([-high, low], -1) * sin[:, None], still], -1)

    write_kv(rotate(k), v, k_cache, v_cache, slot_mapping)
    return rotate(q)


def silu_mul_eager(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate) * up


def gelu_mul_eager(gate: Tensor, up: Tensor) -> Tensor:
    return F.gelu(gate, approximate="tanh") * up


@triton.jit
def _weigh(
    normed,  # float32, x / rms(x)
    weight,  # float32, of the same shape
    DTYPE: tl.constexpr, PLUS_ONE: tl.constexpr,
):  # fmt: skip
    """Return a norm's result, rounded as DTYPE but float32."""
    if PLUS_ONE:
        out = normed * (1 + weight)
    else:
        out = normed.to(DTYPE).to(tl.float32) * weight
    return out.to(DTYPE).to(tl.float32)


@triton.jit
def _rms_norm(
    x_ptr,         # [tokens, HIDDEN], rows x_row apart
    residual_ptr,  # [tokens, HIDDEN], rows residual_row apart
    total_ptr,     # [tokens, HIDDEN]: x + residual
    weight_ptr,    # [HIDDEN]
    out_ptr,       # [tokens, HIDDEN]
    x_row, residual_row, epsilon,
    HIDDEN: tl.constexpr, TILE: tl.constexpr, ADD: tl.constexpr, PLUS_ONE: tl.constexpr,
):  # fmt: skip
    """Norm one row, of the sum if ADD. Grid [tokens]."""
    token, i = tl.program_id(0).to(tl.int64), tl.arange(0, TILE)
    mask = i < HIDDEN
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    x = tl.load(x_ptr + token * x_row + i, mask=mask, other=0.0).to(tl.float32)  # [TILE]
    weight = tl.load(weight_ptr + i, mask=mask, other=0.0).to(tl.float32)  # [TILE]
    if ADD:
        residual = tl.load(residual_ptr + token * residual_row + i, mask=mask, other=0.0)
        total = (x + residual.to(tl.float32)).to(dtype)
        tl.store(total_ptr + token * HIDDEN + i, total, mask=mask)
        x = total.to(tl.float32)
    normed = x * tl.rsqrt(tl.sum(x * x, 0) / HIDDEN + epsilon)
    tl.store(out_ptr + token * HIDDEN + i, _weigh(normed, weight, dtype, PLUS_ONE).to(dtype), mask=mask)


@triton.jit
def _rotate(
    from_ptr,    # [ROWS, 1] pointers to heads of D
    to_ptr,      # [ROWS, 1] pointers to heads of D
    used,        # [ROWS, 1]
    weight_ptr,  # [D]
    cos_ptr,     # [ROTARY], of the token
    sin_ptr,     # [ROTARY]
    epsilon,
    D: tl.constexpr, ROTARY: tl.constexpr, HALF_TILE: tl.constexpr, REST_TILE: tl.constexpr, NORM: tl.constexpr,
    PLUS_ONE: tl.constexpr,
):  # fmt: skip
    """Norm, if NORM, and rotate heads of one token."""
    HALF: tl.constexpr = ROTARY // 2
    dtype: tl.constexpr = cos_ptr.dtype.element_ty
    i, j = tl.arange(0, HALF_TILE)[None, :], ROTARY + tl.arange(0, REST_TILE)[None, :]
    half, rest = i < HALF, j < D
    low = tl.load(from_ptr + i, mask=used & half, other=0.0).to(tl.float32)  # [ROWS, HALF_TILE]
    high = tl.load(from_ptr + HALF + i, mask=used & half, other=0.0).to(tl.float32)  # [ROWS, HALF_TILE]
    still = tl.load(from_ptr + j, mask=used & rest, other=0.0).to(tl.float32)  # [ROWS, REST_TILE]
    if NORM:
        squares = tl.sum(low * low, 1) + tl.sum(high * high, 1) + tl.sum(still * still, 1)
        scale = tl.rsqrt(squares / D + epsilon)[:, None]
        low = _weigh(low * scale, tl.load(weight_ptr + i, mask=half, other=0.0).to(tl.float32), dtype, PLUS_ONE)
        high = _weigh(high * scale, tl.load(weight_ptr + HALF + i, mask=half, other=0.0).to(tl.float32), dtype, PLUS_ONE)
        still = _weigh(still * scale, tl.load(weight_ptr + j, mask=rest, other=0.0).to(tl.float32), dtype, PLUS_ONE)
    low_cos = (low * tl.load(cos_ptr + i, mask=half, other=0.0).to(tl.float32)).to(dtype).to(tl.float32)
    low_sin = (low * tl.load(sin_ptr + HALF + i, mask=half, other=0.0).to(tl.float32)).to(dtype).to(tl.float32)
    high_cos = (high * tl.load(cos_ptr + HALF + i, mask=half, other=0.0).to(tl.float32)).to(dtype).to(tl.float32)
    high_sin = (high * tl.load(sin_ptr + i, mask=half, other=0.0).to(tl.float32)).to(dtype).to(tl.float32)
    tl.store(to_ptr + i, (low_cos - high_sin).to(dtype), mask=used & half)
    tl.store(to_ptr + HALF + i, (high_cos + low_sin).to(dtype), mask=used & half)
    tl.store(to_ptr + j, still.to(dtype), mask=used & rest)


@triton.jit
def _rope_and_write(
    q_ptr,         # [tokens, heads, D], strides q_token and q_head
    k_ptr,         # [tokens, KV_HEADS, D], strides k_token and k_head
    v_ptr,         # [tokens, KV_HEADS, V_D], strides v_token and v_head
    cos_ptr,       # [tokens, ROTARY]
    sin_ptr,       # [tokens, ROTARY]
    q_weight_ptr,  # [D]
    k_weight_ptr,  # [D]
    slots_ptr,     # [tokens] int64
    k_cache_ptr,   # [slots, KV_HEADS, D]
    v_cache_ptr,   # [slots, KV_HEADS, V_D]
    out_ptr,       # [tokens, heads, D]
    q_token, q_head, k_token, k_head, v_token, v_head, epsilon,
    GROUP: tl.constexpr, KV_HEADS: tl.constexpr, D: tl.constexpr, V_D: tl.constexpr, ROTARY: tl.constexpr,
    ROWS: tl.constexpr, HALF_TILE: tl.constexpr, REST_TILE: tl.constexpr, V_TILE: tl.constexpr, NORM: tl.constexpr,
    PLUS_ONE: tl.constexpr,
):  # fmt: skip
    """Rotate the query heads of one group and its key head, and write its key and value. Grid [tokens, KV_HEADS]."""
    token, kv_head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    slot = tl.load(slots_ptr + token) * KV_HEADS + kv_head
    cos_ptr += token * ROTARY
    sin_ptr += token * ROTARY
    row = tl.arange(0, ROWS)[:, None]
    head, one = kv_head * GROUP + row, tl.arange(0, 1)[:, None]
    _rotate(
        q_ptr + token * q_token + head * q_head, out_ptr + (token * (KV_HEADS * GROUP) + head) * D, row < GROUP,
        q_weight_ptr, cos_ptr, sin_ptr, epsilon, D, ROTARY, HALF_TILE, REST_TILE, NORM, PLUS_ONE,
    )  # fmt: skip
    _rotate(
        k_ptr + token * k_token + kv_head * k_head + one, k_cache_ptr + slot * D + one, one == 0,
        k_weight_ptr, cos_ptr, sin_ptr, epsilon, D, ROTARY, HALF_TILE, REST_TILE, NORM, PLUS_ONE,
    )  # fmt: skip
    i = tl.arange(0, V_TILE)
    v = tl.load(v_ptr + token * v_token + kv_head * v_head + i, mask=i < V_D)  # [V_TILE]
    tl.store(v_cache_ptr + slot * V_D + i, v, mask=i < V_D)


@triton.jit
def _act_mul(
    gate_ptr,  # [tokens, WIDTH], rows gate_row apart
    up_ptr,    # [tokens, WIDTH], rows up_row apart
    out_ptr,   # [tokens, WIDTH]
    gate_row, up_row,
    WIDTH: tl.constexpr, TILE: tl.constexpr, GELU: tl.constexpr,
):  # fmt: skip
    """Activate and multiply a piece of a row. Grid [tokens, pieces]."""
    token, i = tl.program_id(0).to(tl.int64), tl.program_id(1) * TILE + tl.arange(0, TILE)
    mask = i < WIDTH
    dtype: tl.constexpr = gate_ptr.dtype.element_ty
    gate = tl.load(gate_ptr + token * gate_row + i, mask=mask, other=0.0).to(tl.float32)  # [TILE]
    up = tl.load(up_ptr + token * up_row + i, mask=mask, other=0.0).to(tl.float32)  # [TILE]
    if GELU:
        argument = 1.5957691216057308 * (gate + 0.044715 * gate * gate * gate)  # (1 + tanh(x)) / 2 = 1 / (1 + exp(-2 x))
    else:
        argument = gate
    active = gate / (1 + tl.exp(-argument))
    tl.store(out_ptr + token * WIDTH + i, (active.to(dtype).to(tl.float32) * up).to(dtype), mask=mask)


def rms_norm(x: Tensor, weight: Tensor, epsilon: float, plus_one: bool = False) -> Tensor:
    """Return the norm of x [tokens, hidden]."""
    return _launch_rms_norm(x, None, weight, epsilon, plus_one)[1]


def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, epsilon: float, plus_one: bool = False
) -> tuple[Tensor, Tensor]:
    """Return x + residual and its norm, both [tokens, hidden]."""
    return _launch_rms_norm(x, residual, weight, epsilon, plus_one)


def _launch_rms_norm(
    x: Tensor, residual: Tensor | None, weight: Tensor, epsilon: float, plus_one: bool
) -> tuple[Tensor, Tensor]:
    (tokens, hidden), other = x.shape, x if residual is None else residual
    assert x.stride(1) == other.stride(1) == 1 and x.dtype == other.dtype and weight.is_contiguous()
    out, tile = x.new_empty(x.shape), triton.next_power_of_2(hidden)
    total = out if residual is None else torch.empty_like(out)
    _rms_norm[(tokens,)](
        x, other, total, weight, out, x.stride(0), other.stride(0), epsilon, hidden, tile, residual is not None, plus_one,
        num_warps=min(16, max(1, tile // 512)),
    )  # fmt: skip
    return total, out


def rope_and_write(
    q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, k_cache: Tensor, v_cache: Tensor, slot_mapping: Tensor,
    q_weight: Tensor | None = None, k_weight: Tensor | None = None, epsilon: float = 0.0, plus_one: bool = False,
) -> Tensor:
    """Return the rotated q [tokens, heads, head_dim]; rotated k, and v, are in the caches."""
    assert k_cache.is_contiguous() and v_cache.is_contiguous() and slot_mapping.is_contiguous()
    assert q.stride(2) == k.stride(2) == v.stride(2) == 1 and (q_weight is None) == (k_weight is None)
    (tokens, heads, dim), (_, kv_heads, v_dim), rotary = q.shape, v.shape, cos.shape[1]
    cos, sin, out, group = cos.contiguous(), sin.contiguous(), q.new_empty(q.shape), heads // kv_heads
    sizes = (group, rotary // 2, max(1, dim - rotary), v_dim)
    _rope_and_write[(tokens, kv_heads)](
        q, k, v, cos, sin, cos if q_weight is None else q_weight, cos if k_weight is None else k_weight, slot_mapping,
        k_cache, v_cache, out, *q.stride()[:2], *k.stride()[:2], *v.stride()[:2], epsilon, group, kv_heads, dim, v_dim,
        rotary, *map(triton.next_power_of_2, sizes), q_weight is not None, plus_one, num_warps=1 if group <= 4 else 4,
    )  # fmt: skip
    return out


def silu_mul(gate: Tensor, up: Tensor) -> Tensor:
    """Return SiLU(gate) * up [tokens, intermediate]."""
    return _launch_act_mul(gate, up, False)


def gelu_mul(gate: Tensor, up: Tensor) -> Tensor:
    """Return GELU(gate) * up [tokens, intermediate]."""
    return _launch_act_mul(gate, up, True)


def _launch_act_mul(gate: Tensor, up: Tensor, gelu: bool, tile: int = 2048) -> Tensor:
    assert gate.stride(1) == up.stride(1) == 1 and gate.dtype == up.dtype
    (tokens, width), out = gate.shape, gate.new_empty(gate.shape)
    _act_mul[(tokens, triton.cdiv(width, tile))](gate, up, out, gate.stride(0), up.stride(0), width, tile, gelu)
    return out


# ── Layers ────────────────────────────────────────────────────────────────────────────────────


class Beside(nn.ModuleList):
    """Projections of one input that cannot be one product: those of quantised weights."""

    def forward(self, x: Tensor) -> Tensor:
        """Return the outputs side by side."""
        return torch.cat([linear(x) for linear in self], -1)


def join(*linears: nn.Module) -> nn.Module:
    """Return projections of one input as one, their outputs side by side."""
    if any(type(linear) is not nn.Linear or (linear.bias is None) != (linears[0].bias is None) for linear in linears):
        return Beside(linears)
    joined = nn.Linear(linears[0].in_features, sum(linear.out_features for linear in linears), device="meta")
    for name in ("weight", "bias"):
        parts = [getattr(linear, name) for linear in linears]
        value = None if parts[0] is None else nn.Parameter(torch.cat([part.data for part in parts]), requires_grad=False)
        setattr(joined, name, value)
    return joined


class FusedLayer(nn.Module):
    """A decoder layer's modules, its projections joined. Holds nothing of the original layer that it does not use."""

    def __init__(self, layer: nn.Module) -> None:
        """Take over a layer for which `unsupported` returned None."""
        super().__init__()
        attention = layer.self_attn
        self.qkv, self.o = join(attention.q_proj, attention.k_proj, attention.v_proj), attention.o_proj
        self.input_norm, self.post_norm = layer.input_layernorm, layer.post_attention_layernorm
        self.q_norm, self.k_norm = getattr(attention, "q_norm", None), getattr(attention, "k_norm", None)
        self.head_dim = attention.head_dim
        heads = [linear.out_features // self.head_dim for linear in (attention.q_proj, attention.k_proj, attention.v_proj)]
        self.heads = heads  # of q, k and v
        self.plus_one = _norm_style(self.input_norm, self.input_norm.weight.dtype) == "plus one"
        if _is_plain(layer.mlp):
            self.gate_up, self.down = join(layer.mlp.gate_proj, layer.mlp.up_proj), layer.mlp.down_proj
            self.act_mul = gelu_mul if _activation(layer.mlp.act_fn) == "gelu" else silu_mul
        else:
            self.own_mlp, self.gate_up = layer.mlp, None

    @property
    def shape(self) -> tuple[int, ...]:
        """What layers must have in common to be run together."""
        return (self.input_norm.weight.numel(),)

    def bind(self, k_cache: Tensor, v_cache: Tensor, **options: Any) -> None:
        """Set what does not change from step to step: the caches [blocks, block_size, kv_heads, head_dim], the options."""
        self.caches, self.options = (k_cache, v_cache), options

    def attend(self, x: Tensor, cos: Tensor, sin: Tensor, slot_mapping: Tensor, *batch: Tensor, **hints: int) -> Tensor:
        """Return what the attention makes of normed x [tokens, hidden]."""
        q, k, v = self.qkv(x).view(x.shape[0], -1, self.head_dim).split(self.heads, 1)
        norms = () if self.q_norm is None else (self.q_norm.weight, self.k_norm.weight, _epsilon(self.q_norm), self.plus_one)
        q = rope_and_write(q, k, v, cos, sin, *self.caches, slot_mapping, *norms)
        return self.o(attend(q, *self.caches, *batch, **self.options, **hints).flatten(1))

    def feed(self, x: Tensor) -> Tensor:
        """Return what the MLP makes of normed x [tokens, hidden]."""
        if self.gate_up is not None:
            return self.down(self.act_mul(*self.gate_up(x).chunk(2, -1)))
        out = self.own_mlp(x[None])  # some return what their router thought as well
        return (out[0] if isinstance(out, tuple) else out).view_as(x)


class FusedLayers(nn.Module):
    """Bound layers, each the next one's input: a layer's last sum and the next one's norm are one pass."""

    def __init__(self, layers: list[FusedLayer]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, slot_mapping: Tensor, block_tables: Tensor, cu_seqlens_q: Tensor,
        seq_lens: Tensor, **hints: int,
    ) -> Tensor:
        """Return what the last layer makes of x [tokens, hidden]; hints: `decodes` and `max_seq_len` of the attention."""
        batch, rope = (slot_mapping, block_tables, cu_seqlens_q, seq_lens), (cos.contiguous(), sin.contiguous())
        first, *others = self.layers
        x, normed = x.contiguous(), rms_norm(x.contiguous(), *_norm(first.input_norm, first.plus_one))
        for layer, following in zip(self.layers, [*others, None]):
            out = layer.attend(normed, *rope, *batch, **hints)
            x, normed = add_rms_norm(out, x, *_norm(layer.post_norm, layer.plus_one))
            out = layer.feed(normed)
            if following is None:
                return x + out
            x, normed = add_rms_norm(out, x, *_norm(following.input_norm, following.plus_one))


def _norm(norm: nn.Module, plus_one: bool) -> tuple[Tensor, float, bool]:
    return norm.weight, _epsilon(norm), plus_one


def unsupported(layer: nn.Module) -> str | None:
    """Return why a layer's modules do not fit, or None: then their results are still to be compared."""
    try:
        attention, mlp = layer.self_attn, layer.mlp
        projections = [attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj]
        norms, head_dim = [layer.input_layernorm, layer.post_attention_layernorm], attention.head_dim
        dtype = norms[0].weight.dtype
    except AttributeError as error:
        return f"not shaped like a Llama layer: {error}"
    if head_dim > 256 or any(projection.out_features % head_dim for projection in projections[:3]):
        return f"head size {head_dim}"
    if {"pre_feedforward_layernorm", "post_feedforward_layernorm"} & {name for name, _ in layer.named_children()}:
        return "it has norms after its blocks"
    norms += [norm for name in ("q_norm", "k_norm") if (norm := getattr(attention, name, None)) is not None]
    styles = {_norm_style(norm, dtype) for norm in norms}
    if styles not in ({"plain"}, {"plus one"}):
        return "its norms are not RMSNorm of one kind"
    if any(norm.weight.numel() != head_dim for norm in norms[2:]):
        return "q and k are not normed head by head"
    return None if not _is_plain(mlp) or _activation(mlp.act_fn) else "its activation is neither SiLU nor tanh-GELU"


def benchmark(tokens: int, hidden: int = 4096, heads: int = 32, kv_heads: int = 8, dim: int = 128, width: int = 14336) -> None:
    """Time every kernel at a Llama 8B's sizes beside torch's operations."""
    options = {"device": "cuda", "dtype": torch.bfloat16}
    x, residual = torch.randn(2, tokens, hidden, **options)
    weight, head_weight = torch.randn(hidden, **options), torch.randn(dim, **options)
    q, k, v = torch.randn(tokens, heads + 2 * kv_heads, dim, **options).split([heads, kv_heads, kv_heads], 1)
    cos, sin = torch.randn(2, tokens, dim, **options)
    caches, slots = torch.zeros(2, tokens // 32 + 1, 32, kv_heads, dim, **options), torch.randperm(tokens, device="cuda")
    gate, up = torch.randn(tokens, 2 * width, **options).chunk(2, 1)
    rope = q, k, v, cos, sin, *caches, slots
    cases = [
        (rms_norm, rms_norm_eager, (x, weight, 1e-6), 2 * x.numel()),
        (add_rms_norm, add_rms_norm_eager, (x, residual, weight, 1e-6), 4 * x.numel()),
        (rope_and_write, rope_and_write_eager, rope, 2 * (q.numel() + k.numel() + v.numel() + cos.numel())),
        (rope_and_write, rope_and_write_eager, (*rope, head_weight, head_weight, 1e-6),
         2 * (q.numel() + k.numel() + v.numel() + cos.numel())),
        (silu_mul, silu_mul_eager, (gate, up), 3 * gate.numel()),
        (gelu_mul, gelu_mul_eager, (gate, up), 3 * gate.numel()),
    ]  # fmt: skip
    for function, eager, inputs, numbers in cases:
        times = [triton.testing.do_bench(functools.partial(f, *inputs), return_mode="median") / 1e3 for f in (function, eager)]
        speeds = " ".join(f"{seconds * 1e6:8.1f} µs {2 * numbers / seconds / 1e9:6.0f} GB/s" for seconds in times)
        print(f"{tokens:5} tokens  {function.__name__:16} {speeds} (torch)")


if __name__ == "__main__":
    print(torch.cuda.get_device_name() if torch.cuda.is_available() else "no CUDA device")
    for rows in (1, 64, 8192) if torch.cuda.is_available() else ():
        benchmark(rows)
