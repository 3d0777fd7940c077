"""The kernels against fp64, over ragged batches of prefill and decode, and bitwise against themselves."""

import importlib
import os
import platform
import subprocess
import sys
import types
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

KERNELS = Path(__file__).parents[1] / "kernels"
if "serve_kernels" not in sys.modules:  # as serve.py does
    sys.modules["serve_kernels"] = types.ModuleType("serve_kernels")
    sys.modules["serve_kernels"].__path__ = [str(KERNELS)]

from serve_kernels import (  # noqa: E402
    attention,
    attention_cpu,
    compile_cpu,
    decoder_layer_cpu,
    gguf_blocks,
    linear_cpu,
    panels_cpu,
)

PORTABLE = ("-DPORTABLE",)
HASWELL = ("-march=haswell",)  # eight lanes and few registers: blocks of other sizes
needs_compiler = pytest.mark.skipif(attention_cpu.unavailable() is not None, reason=str(attention_cpu.unavailable()))

# (queries, length): prefills from scratch, chunks of longer prompts and decode rows, at block and tile edges ± 1.
RAGGED = [(1, 1), (1, 15), (1, 16), (1, 17), (33, 33), (1, 64), (1, 65), (7, 130), (1, 31), (64, 64), (17, 32), (1, 200)]


@dataclass
class Case:
    """A layer's call, on caches that are NaN wherever no token was written."""

    spans: list[tuple[int, int]]  # (queries, length) of each sequence
    q: list[Tensor]  # of each sequence, for all of its tokens: [length, heads, dim]
    k: list[Tensor]
    v: list[Tensor]
    block_size: int = 16
    layout: int = 0  # seed of the block tables
    options: dict | None = None


def make_case(
    spans: list[tuple[int, int]], heads: int = 6, kv_heads: int = 2, dim: int = 64, v_dim: int | None = None,
    dtype: torch.dtype = torch.bfloat16, block_size: int = 16, **options: object,
) -> Case:
    torch.manual_seed(heads * 1000 + dim)

    def draw(count: int, size: int) -> list[Tensor]:
        return [torch.randn(length, count, size).to(dtype) for _, length in spans]

    q, k, v = draw(heads, dim), draw(kv_heads, dim), draw(kv_heads, v_dim or dim)
    return Case(spans, q, k, v, block_size, options={"scale": dim**-0.5, **options})


def run_case(case: Case, function: types.FunctionType, dtype: torch.dtype | None = None) -> Tensor:
    """Write what is older than the queries into fresh caches, and call the function with the rest."""
    size, counts = case.block_size, [-(-length // case.block_size) for _, length in case.spans]
    shuffled = torch.randperm(sum(counts) + 3, generator=torch.Generator().manual_seed(case.layout)).int()
    tables = torch.full((len(counts), max(counts) + 1), -1, dtype=torch.int32)
    for table, blocks in zip(tables, shuffled.split([*counts, 3])):
        table[: len(blocks)] = blocks
    slots = [table.long().repeat_interleave(size) * size + torch.arange(len(table) * size) % size for table in tables]
    (q, k, v), dtype = (case.q, case.k, case.v), dtype or case.q[0].dtype
    k_cache, v_cache = (torch.full((len(shuffled), size, *x[0].shape[1:]), torch.nan, dtype=dtype) for x in (k, v))
    for s, (queries, length) in enumerate(case.spans):
        old = slots[s][: length - queries]
        k_cache.flatten(0, 1)[old] = k[s][: length - queries].to(dtype)
        v_cache.flatten(0, 1)[old] = v[s][: length - queries].to(dtype)
    new = [(s, length - queries, length) for s, (queries, length) in enumerate(case.spans)]
    q, k, v = (torch.cat([x[s][start:end] for s, start, end in new]).to(dtype) for x in (q, k, v))
    mapping = torch.cat([slots[s][start:end] for s, start, end in new])
    bounds = torch.tensor([0] + [queries for queries, _ in case.spans]).cumsum(0).int()
    lengths = torch.tensor([length for _, length in case.spans], dtype=torch.int32)
    return function(q, k, v, k_cache, v_cache, mapping, tables, bounds, lengths, **case.options)


def native(*args: Tensor, **options: object) -> Tensor:
    return attention_cpu.paged_attention(*args, **options)


def portable(*args: Tensor, **options: object) -> Tensor:
    return attention_cpu.paged_attention(*args, **options, flags=PORTABLE)


def haswell(*args: Tensor, **options: object) -> Tensor:
    return attention_cpu.paged_attention(*args, **options, flags=HASWELL)


needs_x86 = pytest.mark.skipif(platform.machine() != "x86_64", reason="needs an x86 CPU")
IMPLEMENTATIONS = [
    pytest.param(attention.paged_attention_eager, id="eager"),
    pytest.param(attention.paged_attention_sdpa, id="sdpa"),
    pytest.param(native, id="native", marks=needs_compiler),
    pytest.param(portable, id="portable", marks=needs_compiler),
    pytest.param(haswell, id="haswell", marks=[needs_compiler, needs_x86]),
]
COMPILED = IMPLEMENTATIONS[2:]
DTYPES = [torch.float32, torch.bfloat16]


def check(case: Case, function: types.FunctionType) -> None:
    """Compare with the fp64 reference on the same inputs, within what rounding the result to its dtype may cost."""
    want, got = run_case(case, attention.paged_attention_eager, torch.float64), run_case(case, function)
    assert got.dtype == case.q[0].dtype and not got.isnan().any()
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}[got.dtype]
    torch.testing.assert_close(got.double(), want, atol=tolerance, rtol=tolerance)
    assert (got.double() - want).norm() / want.norm() < tolerance / 2


# ── Attention ─────────────────────────────────────────────────────────────────────────────────


def test_reference_against_sdpa() -> None:
    """The reference itself, on whole prompts, against torch's causal attention."""
    case = make_case([(5, 5), (40, 40)], heads=4, kv_heads=4, dtype=torch.float64)
    got = run_case(case, attention.paged_attention_eager)
    each = [[x[s].transpose(0, 1) for x in (case.q, case.k, case.v)] for s in (0, 1)]
    want = [F.scaled_dot_product_attention(*qkv, is_causal=True).transpose(0, 1) for qkv in each]
    torch.testing.assert_close(got, torch.cat(want))


def test_reference_sinks_window_softcap() -> None:
    """The reference's options, spelled out for the last query of one sequence."""
    case = make_case([(1, 20)], heads=1, kv_heads=1, dtype=torch.float64, window=5, softcap=2.0, sinks=torch.tensor([0.7]))
    scores = 2 * torch.tanh(case.k[0][15:, 0] @ case.q[0][19, 0] * case.options["scale"] / 2)
    want = scores.exp() @ case.v[0][15:, 0] / (scores.exp().sum() + torch.tensor(0.7).exp())
    torch.testing.assert_close(run_case(case, attention.paged_attention_eager)[0, 0], want)


@pytest.mark.parametrize("function", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("block_size", [16, 32])
def test_ragged(function: types.FunctionType, dtype: torch.dtype, block_size: int) -> None:
    check(make_case(RAGGED, dtype=dtype, block_size=block_size), function)


@pytest.mark.parametrize("function", IMPLEMENTATIONS[1:])
@pytest.mark.parametrize("group", [1, 2, 3, 4, 7, 8, 50])
def test_group_sizes(function: types.FunctionType, group: int) -> None:
    check(make_case([(1, 70), (40, 90), (1, 16)], heads=2 * group), function)


@pytest.mark.parametrize("function", IMPLEMENTATIONS[1:])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [16, 64, 80, 96, 112, 128, 256, 40, 72, 320])
def test_head_sizes(function: types.FunctionType, dtype: torch.dtype, dim: int) -> None:
    check(make_case([(1, 70), (20, 90), (1, 16)], dim=dim, dtype=dtype), function)


@pytest.mark.parametrize("function", IMPLEMENTATIONS[1:])
@pytest.mark.parametrize("options", [{"v_dim": 32}, {"dtype": torch.float16}, {"block_size": 8}])
def test_falls_through(function: types.FunctionType, options: dict) -> None:
    check(make_case([(1, 70), (20, 90), (1, 16)], **options), function)


@pytest.mark.parametrize("function", IMPLEMENTATIONS[1:])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "options",
    [
        {"window": 1},
        {"window": 37},
        {"window": 64},
        {"softcap": 3.0},
        {"sinks": torch.linspace(-2, 4, 6)},
        {"window": 20, "softcap": 5.0, "sinks": torch.linspace(-2, 4, 6)},
    ],
    ids=lambda options: "-".join(options),
)
def test_window_softcap_sinks(function: types.FunctionType, dtype: torch.dtype, options: dict) -> None:
    check(make_case(RAGGED, dtype=dtype, **options), function)


@pytest.mark.parametrize("function", IMPLEMENTATIONS[1:])
def test_large_scores(function: types.FunctionType) -> None:
    """Scores in the hundreds, all of one sign or the other: the softmax must neither overflow nor vanish."""
    case = make_case([(1, 70), (20, 90)], dtype=torch.float32)
    for sign in (-1, 1):
        far = replace(case, q=[x.abs() * 20 for x in case.q], k=[x.abs() * 20 * sign for x in case.k])
        far.k = [x + 0.01 * y for x, y in zip(far.k, case.k)]
        want, got = run_case(far, attention.paged_attention_eager, torch.float64), run_case(far, function)
        torch.testing.assert_close(got.double(), want, atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize("function", IMPLEMENTATIONS)
def test_strided_inputs(function: types.FunctionType) -> None:
    """transformers hands over [1, heads, tokens, dim] transposed, or slices of a fused projection."""
    case = make_case(RAGGED)

    def strided(q: Tensor, k: Tensor, v: Tensor, *rest: Tensor, **options: object) -> Tensor:
        fused = torch.cat([x.flatten(1) for x in (k, v)], 1)
        k, v = (x.unflatten(1, k.shape[1:]) for x in fused.split(k[0].numel(), 1))
        return function(q.transpose(0, 1).contiguous().transpose(0, 1), k, v, *rest, **options)

    torch.testing.assert_close(run_case(case, strided), run_case(case, function), atol=0, rtol=0)


# ── Batch invariance ──────────────────────────────────────────────────────────────────────────

OPTIONS = [{}, {"heads": 2}, {"window": 50}, {"softcap": 4.0, "sinks": torch.linspace(-2, 4, 6)}]


@pytest.mark.parametrize("function", COMPILED)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", OPTIONS, ids=["plain", "one-head-a-group", "window", "softcap-sinks"])
def test_batch_invariance(function: types.FunctionType, dtype: torch.dtype, options: dict) -> None:
    """Bitwise: alone, in a batch, prefilled at once, in chunks or token by token, in any blocks, on any number of threads."""
    length = 150
    whole = make_case([(length, length)], dtype=dtype, **options)
    want = run_case(whole, function)

    def rows(case: Case, sequence: int = 0) -> Tensor:
        out = run_case(case, function)
        return out.split([queries for queries, _ in case.spans])[sequence]

    for chunk in (1, 5, 16, 64, 97):
        for end in range(chunk, length + 1, chunk):
            assert torch.equal(rows(replace(whole, spans=[(chunk, end)])), want[end - chunk : end]), (chunk, end)
    assert torch.equal(rows(replace(whole, layout=7)), want)
    assert torch.equal(rows(replace(whole, block_size=48)), want)
    other = make_case(RAGGED, dtype=dtype, heads=options.get("heads", 6))
    mixed = replace(
        whole, spans=other.spans + [(30, length)], **{x: getattr(other, x) + getattr(whole, x) for x in ("q", "k", "v")}
    )
    assert torch.equal(rows(mixed, -1), want[-30:])
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(threads % 2 + 1)
        assert torch.equal(rows(whole), want)
    finally:
        torch.set_num_threads(threads)


# ── Linear layers ─────────────────────────────────────────────────────────────────────────────

needs_onednn = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this torch has no oneDNN")


def make_linear(out_features: int, in_features: int, dtype: torch.dtype, bias: bool = False) -> nn.Linear:
    torch.manual_seed(out_features + in_features)
    linear = nn.Linear(in_features, out_features, bias, dtype=dtype).requires_grad_(False)
    if not linear_cpu.packable(linear):
        pytest.skip(f"oneDNN does not multiply {dtype} on this CPU")
    return linear


@needs_onednn
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(960, 576), (576, 1536), (100, 72), (33, 130), (1, 64)])
def test_packed_linear(dtype: torch.dtype, bias: bool, shape: tuple[int, int]) -> None:
    linear = make_linear(*shape, dtype, bias)
    packed = linear_cpu.PackedLinear(linear)
    for size in [(1,), (7,), (1, 1), (2, 3), (0,), (1, 0)]:
        x = torch.randn(*size, shape[1]).to(dtype)
        want = F.linear(x.double(), linear.weight.double(), linear.bias.double() if bias else None)
        tolerance = 1e-5 if dtype == torch.float32 else 1e-2
        torch.testing.assert_close(packed(x).double(), want, atol=tolerance, rtol=tolerance)
    assert packed(torch.randn(shape[1]).to(dtype)[None, None]).shape == (1, 1, shape[0])


@needs_onednn
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(960, 576), (576, 576), (3072, 576), (576, 1536), (1536, 4864), (33, 130), (8192, 576)])
def test_packed_linear_batch_invariance(dtype: torch.dtype, shape: tuple[int, int]) -> None:
    """Bitwise: a row's result does not depend on how many rows are in the call."""
    packed = linear_cpu.PackedLinear(make_linear(*shape, dtype))
    x = torch.randn(256, shape[1]).to(dtype)
    want = packed(x)
    for rows in (1, 2, 3, 7, 16, 64):
        got = torch.cat([packed(part) for part in x[:64].split(rows)])
        assert torch.equal(got, want[:64]), rows


@needs_onednn
def test_pack_linears() -> None:
    """Plain layers go, subclasses and hooked layers stay, shared layers stay shared, tied weights survive in the embedding."""

    class Special(nn.Linear):
        pass

    plain = make_linear(32, 16, torch.float32)
    layers = {"plain": plain, "again": nn.Sequential(plain), "special": Special(16, 32), "head": nn.Linear(16, 50)}
    model = nn.ModuleDict({"embedding": nn.Embedding(50, 16), "hooked": nn.Linear(16, 16), **layers})
    model["hooked"].register_forward_hook(lambda *_: None)
    model["head"].weight = model["embedding"].weight
    x = torch.randn(3, 16)
    want = {name: model[name](x) for name in ("plain", "head")}
    assert linear_cpu.pack_linears(model) == 2
    assert model["again"][0] is model["plain"] and type(model["plain"]) is linear_cpu.PackedLinear
    assert type(model["special"]) is Special and type(model["hooked"]) is nn.Linear
    assert model["embedding"].weight.shape == (50, 16)
    for name, result in want.items():
        torch.testing.assert_close(model[name](x), result, atol=1e-5, rtol=1e-5)
    assert "plain.weight" not in model.state_dict()
    weight = model["plain"].weight  # what transformers asks a layer's weight for
    assert (weight.dtype, weight.device.type, tuple(weight.shape)) == (torch.float32, "cpu", (32, 16))


# ── Panels ────────────────────────────────────────────────────────────────────────────────────

BODIES = [
    pytest.param((), id="native"),
    pytest.param(PORTABLE, id="portable"),
    pytest.param(HASWELL, id="haswell", marks=needs_x86),
]


def make_codes(bits: int, group: int, outputs: int, inputs: int) -> panels_cpu.Grouped:
    """Return random codes, with scales and minima of few digits: their products with a code are exact."""
    torch.manual_seed(bits + group + inputs)
    scale, minimum = (torch.randn(outputs, inputs // group).half().float() for _ in range(2))
    table = torch.randn(16).bfloat16().float() if bits == 4 else None
    return panels_cpu.Grouped(bits, torch.randint(1 << bits, (outputs, inputs), dtype=torch.uint8), scale, minimum, table)


@needs_compiler
@pytest.mark.parametrize("flags", BODIES)
@pytest.mark.parametrize("bits, group, inputs",
                         [(4, 32, 576), (8, 32, 576), (4, 64, 192), (8, 96, 96), (8, 16, 64), (4, 8, 32)])
def test_panels(bits: int, group: int, inputs: int, flags: tuple[str, ...]) -> None:
    """Against fp64; codes and the bfloat16 they stand for are bitwise the same, and so is a row in any company."""
    codes, bias = make_codes(bits, group, 96, inputs), torch.randn(96).bfloat16()
    weight = codes.dequantised().bfloat16()
    packed, plain = panels_cpu.PanelLinear(codes, bias, *flags), panels_cpu.PanelLinear(weight, bias, *flags)
    x = torch.randn(200, inputs).bfloat16()
    whole, exact = packed(x), F.linear(x.double(), weight.double(), bias.double())
    assert ((whole.double() - exact).norm(dim=1) / exact.norm(dim=1)).max() < 0.004
    for rows in (1, 2, 3, 8, 9, 12, 13, 30, 96, 97, 200):
        assert torch.equal(packed(x[:rows]), whole[:rows]) and torch.equal(plain(x[:rows]), whole[:rows]), rows
    assert packed(x[:0]).shape == (0, 96) and packed(x[None, :2]).shape == (1, 2, 96)


@needs_compiler
def test_panels_of_several_layers() -> None:
    """Layers of one input become one; where their groups differ, bytes with the smallest group hold both."""
    four, eight = make_codes(4, 32, 32, 64), make_codes(8, 16, 64, 64)
    four = panels_cpu.Grouped(4, four.codes, four.scale, four.minimum, torch.arange(16.0))
    for parts in ([four, eight], [eight, eight], [four, four]):
        joint = panels_cpu.concatenate(parts)
        assert torch.equal(joint.dequantised(), torch.cat([part.dequantised() for part in parts]))
        assert panels_cpu.unsupported(joint) is None
    linears = [nn.Linear(64, 32), nn.Linear(64, 32)]
    linears[0].grouped = four  # the other has none: both by their weights
    assert isinstance(panels_cpu.joint_weight(linears), Tensor)
    assert "multiples" in panels_cpu.unsupported(torch.empty(33, 64, dtype=torch.bfloat16))
    assert "bfloat16" in panels_cpu.unsupported(torch.empty(32, 64))


@needs_compiler
@pytest.mark.parametrize("columns", [1, 3, 31, 1024, 1025, 5000, 49152])
def test_argmax(columns: int) -> None:
    """The first of the highest columns, as in float32; bfloat16 has many ties."""
    x = torch.randn(40, columns, generator=torch.Generator().manual_seed(columns)).bfloat16()
    x[3], x[4], x[5, :-1], x[6, 0] = 0, -torch.inf, -torch.inf, torch.inf
    want = [row.tolist().index(row.max().item()) for row in x.float()]
    assert panels_cpu.argmax(x).tolist() == want and panels_cpu.argmax(x[7:8]).tolist() == want[7:8]


@pytest.mark.parametrize("kind", gguf_blocks.FORMATS)
def test_gguf_blocks(kind: str) -> None:
    """Random blocks of every format, bitwise against the gguf package, as a matrix and multiplied."""
    quantisation = gguf.GGMLQuantizationType[kind]
    weights, size = gguf.GGML_QUANT_SIZES[quantisation]
    random = np.random.default_rng(0)
    blocks = random.integers(0, 256, (64, 512 // weights, size), dtype=np.uint8)
    for at in [208] if kind == "Q6_K" else [0, 2] if kind.endswith(("_1", "_K")) else [0]:
        blocks[..., at:at + 2] = random.normal(size=(*blocks.shape[:2], 1)).astype(np.float16).view(np.uint8)
    data = blocks.reshape(64, -1)
    codes = gguf_blocks.read_blocks(types.SimpleNamespace(tensor_type=quantisation, shape=[512, 64], data=data))
    expected = torch.from_numpy(gguf.dequantize(data, quantisation))
    assert torch.equal(codes.dequantised(), expected) and codes.bits == (4 if kind.startswith("Q4") else 8)
    if not panels_cpu.unavailable():
        packed = panels_cpu.PanelLinear(codes, None)
        assert torch.equal(packed(torch.eye(512).bfloat16()), expected.bfloat16().T)


# ── Decoder layer ─────────────────────────────────────────────────────────────────────────────

HIDDEN, DIM, HEADS, KV_HEADS = 192, 32, 6, 2


def make_layer(name: str = "llama", dim: int = DIM, **options: object) -> nn.Module:
    """One decoder layer of a transformers architecture with random bfloat16 weights; norms and biases random too."""
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {"hidden_size": HIDDEN, "intermediate_size": 160, "num_hidden_layers": 1, "head_dim": dim, "vocab_size": 9}
    heads = {"num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS}
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    torch.manual_seed(len(name))
    config = AutoConfig.for_model(name, **{**sizes, **heads, **tokens, **options})
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").bfloat16().eval().requires_grad_(False)
    layer = model.get_decoder().layers[0]
    for parameter in layer.parameters():
        parameter += 0.1 * torch.randn_like(parameter)
    return layer


def make_rope(tokens: int, dim: int = DIM) -> tuple[Tensor, Tensor]:
    angles = torch.arange(tokens)[:, None] * (0.5 ** torch.arange(dim // 2)).repeat(2)
    return angles.cos().bfloat16(), angles.sin().bfloat16()


def run_original(layer: nn.Module, x: Tensor) -> Tensor:
    """Run a transformers layer over one prompt x [tokens, hidden] from its first token, in x's dtype."""
    cos, sin = (part[None].to(x.dtype) for part in make_rope(len(x), layer.self_attn.head_dim))
    mask = torch.full((len(x), len(x)), torch.finfo(x.dtype).min, dtype=x.dtype).triu(1)[None, None]
    out = layer.to(x.dtype)(x[None], attention_mask=mask, position_embeddings=(cos, sin))
    layer.bfloat16()
    return (out[0] if isinstance(out, tuple) else out).view_as(x)


def run_fused(fused: nn.Module, prompts: list[Tensor], chunks: list[int]) -> list[Tensor]:
    """Run prompts [tokens, hidden] side by side, at most `chunk` tokens of each a step, on caches full of NaN."""
    size, blocks = 32, [-(-len(prompt) // 32) for prompt in prompts]
    tables = torch.full((len(prompts), max(blocks)), -1, dtype=torch.int32)
    order = torch.randperm(sum(blocks), generator=torch.Generator().manual_seed(sum(chunks))).int()
    for table, part in zip(tables, order.split(blocks)):
        table[: len(part)] = part
    dim = fused.head_dim
    caches = torch.full((2, sum(blocks), size, KV_HEADS, dim), torch.nan).bfloat16()
    done, outs = [0] * len(prompts), [[] for _ in prompts]
    cos, sin = make_rope(max(map(len, prompts)), dim)
    while active := [s for s, prompt in enumerate(prompts) if done[s] < len(prompt)]:
        spans = [torch.arange(done[s], min(done[s] + chunks[s], len(prompts[s]))) for s in active]
        positions, counts = torch.cat(spans), [len(span) for span in spans]
        x = torch.cat([prompts[s][span] for s, span in zip(active, spans)])
        rows = tables[active].long().repeat_interleave(torch.tensor(counts), 0)
        slots = rows.gather(1, positions[:, None] // size)[:, 0] * size + positions % size
        bounds, lengths = torch.tensor([0, *counts]).cumsum(0).int(), torch.stack([span[-1] + 1 for span in spans]).int()
        table = tables[active].contiguous()
        out = fused(x, cos[positions], sin[positions], *caches, slots, table, bounds, lengths, scale=dim**-0.5)
        for s, part in zip(active, out.split(counts)):
            outs[s].append(part)
            done[s] += len(part)
    return [torch.cat(out) for out in outs]


@needs_compiler
@pytest.mark.parametrize("flags", BODIES)
@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3", "gemma", "mistral"])
def test_decoder_layer(name: str, flags: tuple[str, ...]) -> None:
    """As near to the layer in fp32 as the original in bfloat16 is: biases, q and k norms, 1 + weight norms, GELU."""
    layer = make_layer(name)
    assert decoder_layer_cpu.unsupported(layer) is None
    fused = decoder_layer_cpu.FusedLayer(layer, *flags)
    prompts = [torch.randn(tokens, HIDDEN).bfloat16() for tokens in (1, 40, 130)]
    for prompt, got in zip(prompts, run_fused(fused, prompts, [1, 7, 113])):
        exact, eager = run_original(layer, prompt.float()), run_original(layer, prompt)
        assert (got.float() - exact).norm() <= 1.2 * (eager.float() - exact).norm()
        assert ((got.float() - eager.float()).norm(dim=1) / eager.float().norm(dim=1)).max() < 0.02  # every token


@needs_compiler
@pytest.mark.parametrize("flags", BODIES)
def test_decoder_layer_batch_invariance(flags: tuple[str, ...]) -> None:
    """Bitwise: a prompt at once, in chunks, token by token, beside others, on any number of threads."""
    fused = decoder_layer_cpu.FusedLayer(make_layer("qwen3", dim=64), *flags)
    prompt, *others = [torch.randn(tokens, HIDDEN).bfloat16() for tokens in (150, 1, 90, 33, 150)]
    (want,) = run_fused(fused, [prompt], [150])
    assert not want.isnan().any()
    for chunk in (1, 2, 5, 13, 100):
        assert torch.equal(run_fused(fused, [prompt], [chunk])[0], want), chunk
    assert torch.equal(run_fused(fused, [others[1], prompt, *others], [9, 11, 1, 40, 3, 150])[1], want)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(threads % 2 + 1)
        assert torch.equal(run_fused(fused, [prompt], [150])[0], want)
    finally:
        torch.set_num_threads(threads)


@needs_compiler
def test_decoder_layer_holds_only_packed_weights() -> None:
    layer = make_layer()
    fused = decoder_layer_cpu.FusedLayer(layer)
    prompt = torch.randn(20, HIDDEN).bfloat16()
    (want,) = run_fused(fused, [prompt], [20])
    for parameter in layer.parameters():
        if parameter.dim() > 1:
            parameter.fill_(torch.nan)
    assert torch.equal(run_fused(fused, [prompt], [20])[0], want)


@needs_compiler
@pytest.mark.parametrize(
    "name, options, reason",
    [
        ("gemma2", {}, "norms after"),
        ("olmo2", {}, "not shaped like"),
        ("llama", {"dim": 48}, "head size 48"),
        ("llama", {"intermediate_size": 100}, "widths"),
        ("llama", {"mlp_bias": True}, "bias"),
        ("llama", {"hidden_act": "relu"}, "activation"),
    ],
)
def test_decoder_layer_unsupported(name: str, options: dict, reason: str) -> None:
    layer = make_layer(name, **options)
    assert reason in decoder_layer_cpu.unsupported(layer)


def test_decoder_layer_wants_bfloat16() -> None:
    assert "bfloat16" in decoder_layer_cpu.unsupported(make_layer().float())


# ── Compilation ───────────────────────────────────────────────────────────────────────────────


def python(code: str, **environment: str) -> str:
    """Run code in a fresh interpreter that has `serve_kernels`, and return what it prints."""
    setup = f"import sys, types\nm = types.ModuleType('serve_kernels')\nm.__path__ = [{str(KERNELS)!r}]\n"
    setup += "sys.modules['serve_kernels'] = m\n"
    result = subprocess.run(
        [sys.executable, "-c", setup + code], env={**os.environ, **environment}, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_no_compiler_is_a_reason(tmp_path: Path) -> None:
    code = "from serve_kernels import attention_cpu\nprint(attention_cpu.unavailable())"
    assert "no C++ compiler" in python(code, PATH=str(tmp_path), SERVE_CACHE=str(tmp_path / "cache"))


def test_failed_compilation_is_a_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = "case $* in *version*) exit 0;; esac\necho 'x.cpp:1: error: bad day' >&2\nexit 1\n"
    (tmp_path / "g++").write_text("#!/bin/sh\n" + script)
    (tmp_path / "g++").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("SERVE_CACHE", str(tmp_path / "cache"))
    with pytest.raises(compile_cpu.CompileError, match="bad day"):
        compile_cpu.load(attention_cpu.SOURCE)
    assert list((tmp_path / "cache" / "kernels").iterdir()) == []  # nothing half-written stays behind


def test_unwritable_cache_is_a_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("SERVE_CACHE", str(tmp_path / "file"))
    with pytest.raises(compile_cpu.CompileError):
        compile_cpu.load(attention_cpu.SOURCE)


@needs_compiler
def test_compiled_once_then_cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SERVE_CACHE", str(tmp_path))
    source = tmp_path / "answer.cpp"
    source.write_text('extern "C" int answer() { return VALUE; }')
    assert compile_cpu.load(source, "-DVALUE=41").answer() == 41
    assert compile_cpu.load(source, "-DVALUE=42").answer() == 42  # other flags, another library
    stamps = {file: file.stat().st_mtime_ns for file in (tmp_path / "kernels").iterdir()}
    assert len(stamps) == 2 and all(file.suffix == ".so" for file in stamps)
    assert compile_cpu.load(source, "-DVALUE=42").answer() == 42
    assert stamps == {file: file.stat().st_mtime_ns for file in (tmp_path / "kernels").iterdir()}


@needs_compiler
@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs Linux's /proc")
def test_one_openmp_runtime() -> None:
    """The kernel must join torch's OpenMP: a second runtime's threads would spin against the first's."""
    code = (
        "import re\nfrom serve_kernels import attention_cpu\nassert attention_cpu.unavailable() is None\n"
        "print(len(set(re.findall(r'\\S*lib(?:gomp|omp|iomp5)[^/\\s]*\\.so\\S*', open('/proc/self/maps').read()))))"
    )
    assert python(code).strip() == "1"


# ── flash-attn, as it is documented, by the reference ─────────────────────────────────────────


@pytest.fixture
def flash(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The adapter over a package of the same signatures, which computes by the reference and is strict about what it gets."""
    called = []

    def attend(q: Tensor, k_cache: Tensor, v_cache: Tensor, bounds: Tensor, lengths: Tensor, softmax_scale: float, causal: bool,
               window_size: tuple[int, int], softcap: float, block_table: Tensor) -> Tensor:
        assert causal and k_cache.shape[1] % 256 == 0 and block_table.dtype == bounds.dtype == lengths.dtype == torch.int32
        assert window_size == (-1, -1) or window_size[1] == 0
        none, nowhere = k_cache.new_zeros(0, *k_cache.shape[2:]), torch.zeros(0, dtype=torch.int64)
        return attention.paged_attention_eager(q, none, none, k_cache, v_cache, nowhere, block_table, bounds, lengths,
                                               scale=softmax_scale, window=window_size[0] + 1, softcap=softcap)

    def varlen(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, **options):
        called.append("varlen")
        lengths = cu_seqlens_k.diff().int()
        assert cu_seqlens_q.diff().max() <= max_seqlen_q and lengths.max() <= max_seqlen_k
        return attend(q, k, v, cu_seqlens_q, lengths, **options)

    def kvcache(q, k_cache, v_cache, *, cache_seqlens, **options):
        called.append("kvcache")
        assert q.dim() == 4 and q.shape[:2] == (len(cache_seqlens), 1)
        bounds = torch.arange(len(q) + 1).int()
        return attend(q[:, 0], k_cache, v_cache, bounds, cache_seqlens, **options)[:, None]

    package = types.ModuleType("flash_attn")
    package.flash_attn_varlen_func, package.flash_attn_with_kvcache = varlen, kvcache
    monkeypatch.setitem(sys.modules, "flash_attn", package)
    monkeypatch.delitem(sys.modules, "serve_kernels.attention_flash", raising=False)
    module = importlib.import_module("serve_kernels.attention_flash")
    monkeypatch.delitem(sys.modules, "serve_kernels.attention_flash")
    return module, called


@pytest.mark.parametrize("options", [{}, {"window": 37}, {"softcap": 3.0}], ids=str)
@pytest.mark.parametrize("spans, name", [([(1, 1), (1, 300), (1, 64)], "kvcache"), ([(1, 70), (40, 290), (33, 33)], "varlen")])
def test_flash(flash: Any, options: dict[str, Any], spans: list[tuple[int, int]], name: str) -> None:
    module, called = flash
    case = make_case(spans, block_size=256, dtype=torch.bfloat16, **options)
    check(case, module.paged_attention)
    assert called == [name]


@pytest.mark.parametrize("case", [{"block_size": 32}, {"block_size": 256, "sinks": torch.linspace(-2, 4, 6)},
                                  {"block_size": 256, "dtype": torch.float32}], ids=["blocks", "sinks", "float32"])
def test_what_flash_does_not_take(flash: Any, case: dict[str, Any]) -> None:
    module, called = flash
    check(make_case([(1, 70), (33, 33)], **{"dtype": torch.bfloat16, **case}), module.paged_attention)
    assert not called
