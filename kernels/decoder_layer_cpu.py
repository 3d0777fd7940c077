"""A run of Llama-shaped decoder layers in one C++ call, in bfloat16: what is left of a step at small batches is dispatch.

    h   = norm(x)                                        norm: x / rms(x) * weight, or * (1 + weight) as Gemma has it
    q, k, v = h W_qkv (+ bias)                           each head of q and k normed where the model does
    q, k = rope(q), rope(k);  k, v -> caches             Llama's rotate_half
    x   = x + attention(q, k, v) W_o (+ bias)            attention.py
    h   = norm(x)
    x   = x + (act(h W_gate) * h W_up) W_down (+ bias)   act: SiLU, or GELU by tanh

    x [tokens, hidden] bfloat16; cos, sin [tokens, rotary_dim] bfloat16; the rest as in attention.py.

Weights are packed once into panels (panels_cpu.py), in bfloat16 or left in a checkpoint's 4 or 8 bits. The arithmetic of a
token is bitwise the same for every batch. `unsupported` reads a layer's modules, not its forward: the caller compares
results with the original's before it trusts the fused layer, so that no list of models is kept.
"""

import ctypes
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

if __name__ == "__main__":  # run as a file: stand where serve.py puts this folder
    import sys
    import types

    sys.modules["serve_kernels"] = types.ModuleType("serve_kernels")
    sys.modules["serve_kernels"].__path__ = [str(Path(__file__).parent)]
    __package__ = "serve_kernels"

from . import panels_cpu
from .attention_cpu import Attention
from .compile_cpu import load, problem
from .panels_cpu import PANEL, Linear, joint_weight

SOURCE = Path(__file__).with_suffix(".cpp")


class Norm(ctypes.Structure):
    _fields_ = [("weight", ctypes.c_void_p), ("epsilon", ctypes.c_float), ("plus_one", ctypes.c_int)]


class DecoderLayer(ctypes.Structure):
    """The struct of that name in decoder_layer_cpu.cpp."""

    _fields_ = (
        [("attention", Attention)]
        + [(name, ctypes.c_void_p) for name in ("x", "out", "cos", "sin")]
        + [(name, Linear) for name in ("qkv", "o", "gate_up", "down")]
        + [(name, Norm) for name in ("input_norm", "post_norm", "q_norm", "k_norm")]
        + [(name, ctypes.c_int) for name in ("rotary_dim", "gelu")]
    )


@functools.cache
def _library(*flags: str) -> ctypes.CDLL:
    """Return the compiled kernel. Raises CompileError."""
    library = load(SOURCE, *flags)
    library.decoder_layers.argtypes = ctypes.POINTER(ctypes.POINTER(DecoderLayer)), ctypes.c_int, ctypes.c_int
    library.decoder_layers.restype = None
    return library


@functools.cache
def unavailable() -> str | None:
    """Return why this machine cannot run the kernel, or None where it is compiled and ready."""
    return problem(_library)


class FusedLayer(nn.Module):
    """A decoder layer's packed weights. Holds nothing of the original layer but an MLP that is no plain one."""

    def __init__(self, layer: nn.Module, *flags: str) -> None:
        """Pack a layer for which `unsupported` returned None."""
        super().__init__()
        attention = layer.self_attn
        self.head_dim, self.hidden = attention.head_dim, attention.q_proj.in_features
        self.own_mlp = None if _is_plain(layer.mlp) else nn.ModuleList([layer.post_attention_layernorm, layer.mlp])
        self.run, self._flags = _library(*flags).decoder_layers, flags
        self._alive: list[Tensor | None] = []  # what the pointers below point at
        self.call = DecoderLayer(
            qkv=self._linear(attention.q_proj, attention.k_proj, attention.v_proj),
            o=self._linear(attention.o_proj),
            input_norm=self._norm(layer.input_layernorm),
            q_norm=self._norm(getattr(attention, "q_norm", None)),
            k_norm=self._norm(getattr(attention, "k_norm", None)),
        )
        if self.own_mlp is None:
            self._take_mlp(layer.mlp, layer.post_attention_layernorm)
        self.call.attention.heads = attention.q_proj.out_features // self.head_dim
        self.call.attention.kv_heads = attention.k_proj.out_features // self.head_dim
        self.call.attention.head_dim = self.head_dim

    @property
    def shape(self) -> tuple[int, ...]:
        """What layers must have in common to be run together."""
        attention = self.call.attention
        alone = 0 if self.own_mlp is None else id(self)  # nothing runs behind an MLP that is not in the call
        return self.hidden, self.call.down.inputs, attention.heads, attention.kv_heads, self.head_dim, alone

    def bind(
        self, k_cache: Tensor, v_cache: Tensor, *, scale: float, window: int = 0, softcap: float = 0.0,
        sinks: Tensor | None = None,
    ) -> None:
        """Set what does not change from step to step: the caches [blocks, block_size, kv_heads, head_dim], the options."""
        assert k_cache.dtype == v_cache.dtype == torch.bfloat16 and k_cache.shape[1] % 16 == 0
        assert k_cache.is_contiguous() and v_cache.is_contiguous()
        sinks = None if sinks is None else sinks.float().contiguous()
        self._bound, attention = (k_cache, v_cache, sinks), self.call.attention
        attention.k_cache, attention.v_cache = k_cache.data_ptr(), v_cache.data_ptr()
        attention.sinks = None if sinks is None else sinks.data_ptr()
        attention.block_size, attention.window = k_cache.shape[1], window
        attention.scale, attention.softcap = scale, softcap

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, k_cache: Tensor, v_cache: Tensor, slot_mapping: Tensor,
        block_tables: Tensor, cu_seqlens_q: Tensor, seq_lens: Tensor, **options: Any,
    ) -> Tensor:
        """Run this layer alone on x [tokens, hidden], writing its keys and values into the caches."""
        self.bind(k_cache, v_cache, **options)
        return FusedLayers([self])(x, cos, sin, slot_mapping, block_tables, cu_seqlens_q, seq_lens)

    def _take_mlp(self, mlp: nn.Module, norm: nn.Module) -> None:
        gates, half = mlp.gate_proj.out_features, PANEL // 2  # a panel: 16 gates, then the 16 ups beside them
        order = torch.arange(2 * gates).view(2, -1, half).transpose(0, 1).flatten()
        self.call.gate_up = self._linear(mlp.gate_proj, mlp.up_proj, order=order)
        self.call.down, self.call.post_norm = self._linear(mlp.down_proj), self._norm(norm)
        self.call.gelu = _activation(mlp.act_fn) == "gelu"

    def _linear(self, *projections: nn.Linear, order: Tensor | None = None) -> Linear:
        """Pack projections of one input as one, their outputs side by side or in another order."""
        weight, biases = joint_weight(list(projections)), [projection.bias for projection in projections]
        if order is not None:
            weight = weight[order] if isinstance(weight, Tensor) else weight.rows(order)
        linear, alive = panels_cpu.pack(weight, None if biases[0] is None else torch.cat(biases), *self._flags)
        self._alive += alive
        return linear

    def _norm(self, norm: nn.Module | None) -> Norm:
        if norm is None:
            return Norm()
        return Norm(self._keep(norm.weight).data_ptr(), _epsilon(norm), _norm_style(norm) == "plus one")

    def _keep(self, tensor: Tensor) -> Tensor:
        self._alive.append(tensor.detach().contiguous())
        return self._alive[-1]


class FusedLayers(nn.Module):
    """Bound layers of one shape, each the next one's input, in one call."""

    def __init__(self, layers: list[FusedLayer]) -> None:
        super().__init__()
        assert len({layer.shape for layer in layers}) == 1
        self.layers = nn.ModuleList(layers)
        self._pointers = (ctypes.POINTER(DecoderLayer) * len(layers))(*(ctypes.pointer(layer.call) for layer in layers))

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, slot_mapping: Tensor, block_tables: Tensor, cu_seqlens_q: Tensor,
        seq_lens: Tensor,
    ) -> Tensor:
        """Return what the last layer makes of x [tokens, hidden]."""
        first = self.layers[0]
        assert x.dtype == cos.dtype == sin.dtype == torch.bfloat16 and cos.shape == sin.shape == (x.shape[0], cos.shape[1])
        assert cos.shape[1] % PANEL == 0 and cos.shape[1] <= first.head_dim and slot_mapping.dtype == torch.int64
        assert block_tables.dtype == cu_seqlens_q.dtype == seq_lens.dtype == torch.int32 and block_tables.is_contiguous()
        x, cos, sin = x.contiguous(), cos.contiguous(), sin.contiguous()
        out = torch.empty_like(x)
        call, attention = first.call, first.call.attention  # the other layers follow the first
        call.x, call.out, call.cos, call.sin = x.data_ptr(), out.data_ptr(), cos.data_ptr(), sin.data_ptr()
        call.rotary_dim = cos.shape[1]
        attention.slot_mapping, attention.block_tables = slot_mapping.data_ptr(), block_tables.data_ptr()
        attention.cu_seqlens_q, attention.seq_lens = cu_seqlens_q.data_ptr(), seq_lens.data_ptr()
        attention.sequences, attention.max_blocks = block_tables.shape
        first.run(self._pointers, len(self.layers), torch.get_num_threads())
        return out if first.own_mlp is None else out + self._run_mlp(*first.own_mlp, out)

    def _run_mlp(self, norm: nn.Module, mlp: nn.Module, x: Tensor) -> Tensor:
        out = mlp(norm(x[None]))  # some return what their router thought as well
        return (out[0] if isinstance(out, tuple) else out).view_as(x)


# ── What the kernel takes ─────────────────────────────────────────────────────────────────────


def unsupported(layer: nn.Module) -> str | None:
    """Return why a layer's modules do not fit the kernel, or None: then their results are still to be compared."""
    try:
        attention, mlp = layer.self_attn, layer.mlp
        projections = [attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj]
        norms, head_dim = [layer.input_layernorm, layer.post_attention_layernorm], attention.head_dim
    except AttributeError as error:
        return f"not shaped like a Llama layer: {error}"
    gated = [mlp.gate_proj, mlp.up_proj, mlp.down_proj] if _is_plain(mlp) else []
    if not all((type(p) is nn.Linear or hasattr(p, "grouped")) and p.weight.dtype == torch.bfloat16
               for p in projections + gated):
        return "its projections are not plain bfloat16 linear layers"
    if any(p.weight.device.type != "cpu" for p in projections):
        return "its weights are not on the CPU"
    if len({p.bias is None for p in projections[:3]}) > 1 or any(p.bias is not None for p in gated[:2]):
        return "biases on some of q, k, v, or on gate and up"
    widths = [attention.q_proj.in_features, *(p.out_features for p in gated[:1])]
    if head_dim > 256 or any(width % PANEL for width in [head_dim, *widths]):
        return f"head size {head_dim} (wants a multiple of {PANEL} up to 256), or widths that are no multiple of {PANEL}"
    if {"pre_feedforward_layernorm", "post_feedforward_layernorm"} & {name for name, _ in layer.named_children()}:
        return "it has norms after its blocks"
    norms += [norm for name in ("q_norm", "k_norm") if (norm := getattr(attention, name, None)) is not None]
    if any(_norm_style(norm) is None for norm in norms):
        return "its norms are not RMSNorm"
    if any(norm.weight.numel() != head_dim for norm in norms[2:]):
        return "q and k are not normed head by head"
    return None if not gated or _activation(mlp.act_fn) else "its activation is neither SiLU nor tanh-GELU"


def _is_plain(mlp: nn.Module) -> bool:
    """Tell whether an MLP is Llama's; a mixture of experts, or whatever else it is, stays what it is."""
    return all(hasattr(mlp, name) for name in ("gate_proj", "up_proj", "down_proj", "act_fn"))


def _epsilon(norm: nn.Module) -> float:
    return getattr(norm, "variance_epsilon", None) or getattr(norm, "eps", 0.0)


@torch.no_grad()
def _norm_style(norm: nn.Module, dtype: torch.dtype = torch.bfloat16) -> str | None:
    """Return "plain" or "plus one" by what the norm computes, or None where it is neither RMSNorm in that dtype."""
    weight = getattr(norm, "weight", None)
    if weight is None or weight.dtype != dtype:
        return None
    x = torch.randn(4, weight.numel(), generator=torch.Generator().manual_seed(0)).to(weight)
    normed = F.rms_norm(x.float(), x.shape[1:], eps=_epsilon(norm))
    for style, want in (("plain", normed * weight.float()), ("plus one", normed * (1 + weight.float()))):
        if torch.allclose(norm(x).float(), want, rtol=0.02, atol=1e-3):
            return style
    return None


@torch.no_grad()
def _activation(function: Callable[[Tensor], Tensor]) -> str | None:
    """Return "silu" or "gelu" (by tanh) by what the function computes, or None."""
    x = torch.linspace(-6, 6, 97)
    for name, want in (("silu", F.silu(x)), ("gelu", F.gelu(x, approximate="tanh"))):
        if torch.allclose(function(x), want, rtol=1e-5, atol=1e-5):
            return name
    return None


def benchmark(queries: int, sequences: int, length: int, layers: int = 30) -> None:
    """Time the default model's 30 layers (hidden 576, 9/3 heads of 64, intermediate 1536), fused and through transformers.

    The original's attention is SDPA on the new tokens alone: the price of its dispatch and its linear layers.
    """
    import time

    from transformers import LlamaConfig, LlamaModel

    sizes = {"hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9, "num_key_value_heads": 3}
    model = LlamaModel(LlamaConfig(**sizes, num_hidden_layers=layers, vocab_size=8, pad_token_id=0)).bfloat16().eval()
    fused, tokens, block_size = [FusedLayer(layer) for layer in model.layers], sequences * queries, 32
    blocks = -(-length // block_size)
    caches = torch.randn(layers, 2, sequences * blocks, block_size, 3, 64).bfloat16()
    tables, positions = torch.randperm(sequences * blocks).view(sequences, -1).int(), torch.arange(length - queries, length)
    slots = (tables.long()[:, positions // block_size] * block_size + positions % block_size).flatten()
    bounds, lengths = torch.arange(sequences + 1).int() * queries, torch.full((sequences,), length).int()
    x, rope = torch.randn(tokens, 576).bfloat16(), torch.randn(2, tokens, 64).bfloat16()

    for layer, (k_cache, v_cache) in zip(fused, caches):
        layer.bind(k_cache, v_cache, scale=0.125)
    stack = FusedLayers(fused)

    def run_fused() -> None:
        stack(x, *rope, slots, tables, bounds, lengths)

    def run_original() -> None:
        hidden = x[None]
        for layer in model.layers:
            hidden = layer(hidden, position_embeddings=rope[:, None].unbind())

    work, size = 2 * tokens * layers * 3_538_944, 2 * layers * (3_538_944 + 2 * sequences * length * 192)
    print(f"{queries} queries x {sequences} sequences, length {length}")
    for name, run in (("fused", run_fused), ("transformers", run_original)):
        times, stop = [], time.perf_counter() + 2
        while len(times) < 3 or time.perf_counter() < stop:
            start = time.perf_counter()
            run()
            times.append(time.perf_counter() - start)
        best = min(times)
        print(f"  {name:12} {best * 1e3:8.2f} ms {size / best / 1e9:6.1f} GB/s {work / best / 1e12:6.3f} TFLOP/s in linears")


if __name__ == "__main__":
    print(unavailable() or f"{torch.get_num_threads()} threads")
    with torch.inference_mode():
        for shape in ((1, 1, 16), (1, 1, 512), (1, 4, 512), (1, 16, 512), (1, 64, 128), (256, 1, 256), (256, 1, 1500)):
            benchmark(*shape)
