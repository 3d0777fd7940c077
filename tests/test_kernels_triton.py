"""The Triton kernels without a GPU: run by Triton's interpreter against fp64, and compiled for a Hopper that is not there.

Triton decides at its import whether it interprets. So each of the two has a process of its own, whatever this one imports.
The interpreter cuts bfloat16 off where a GPU rounds it: errors are up to twice as large here.
"""

import functools
import importlib.util
import os
import re
import subprocess
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from test_kernels import RAGGED, check, make_case, run_case
from torch import Tensor

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
Run = Callable[..., Any]  # a function and its arguments, to be called in another process


def interpret() -> None:
    os.environ["TRITON_INTERPRET"] = "1"


def compile_only(cache: str) -> None:
    """Make Triton compile for an H200, launch nothing, and keep what it compiled in `compiled`."""
    os.environ.pop("TRITON_INTERPRET", None)
    os.environ["TRITON_CACHE_DIR"] = cache
    from serve_kernels import attention_triton
    from triton.backends.compiler import GPUTarget
    from triton.runtime import JITFunction, driver

    target = GPUTarget("cuda", 90, 32)
    driver.set_active(SimpleNamespace(
        get_current_target=lambda: target, get_current_device=lambda: 0, get_current_stream=lambda device: 0))
    run = JITFunction.run

    def compile_instead(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        compiled.append((self.__name__, run(self, *args, grid=grid, warmup=True, **kwargs)))

    JITFunction.run = compile_instead
    attention_triton.processors = lambda device: (132, HOPPER)


compiled: list[tuple[str, Any]] = []
HOPPER = 227 << 10  # bytes of shared memory that one program can have
REGISTERS = 65536  # of a multiprocessor


@pytest.fixture(scope="module")
def interpreter() -> Iterator[Run]:
    with ProcessPoolExecutor(1, get_context("spawn"), interpret) as pool:
        yield lambda *call: pool.submit(*call).result()


@pytest.fixture(scope="module")
def compiler(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    cache = str(tmp_path_factory.mktemp("triton"))
    with ProcessPoolExecutor(1, get_context("spawn"), compile_only, (cache,)) as pool:
        yield lambda *call: pool.submit(*call).result()


# ── Attention ─────────────────────────────────────────────────────────────────────────────────

DECODES = [(1, 1), (1, 16), (1, 31), (1, 33), (1, 64), (1, 65), (1, 200)]
MIXED = [*DECODES, (20, 90), (1, 70), (33, 33)]
FEW = [(1, 70), (40, 90), (1, 16)]
SINKS = torch.linspace(-2, 4, 6)


def attend(
    spans: list[tuple[int, int]], inputs: dict[str, Any], call: dict[str, Any], processors: tuple[int, int] = (1, 0)
) -> None:
    """Compare one batch with the reference, in the interpreter's process."""
    from serve_kernels import attention_triton

    assert attention_triton.INTERPRETED
    attention_triton.processors = lambda device: processors
    check(make_case(spans, **inputs), functools.partial(attention_triton.paged_attention, **call))


@pytest.mark.parametrize("processors", [(1, 0), (16, HOPPER)], ids=["small", "hopper"])  # few parts and many; tiles
@pytest.mark.parametrize("dtype, block_size", [(torch.bfloat16, 16), (torch.float16, 256), (torch.float32, 32)])
def test_ragged(interpreter: Run, processors: tuple[int, int], dtype: torch.dtype, block_size: int) -> None:
    """Every sequence as a prefill, and decodes first with a launch of their own, alone and before prefills."""
    inputs = {"dtype": dtype, "block_size": block_size}
    interpreter(attend, RAGGED, inputs, {}, processors)
    interpreter(attend, DECODES, inputs, {}, processors)
    interpreter(attend, MIXED, inputs, {"decodes": len(DECODES), "max_seq_len": 200}, processors)


@pytest.mark.parametrize("group", [1, 2, 3, 4, 7, 8, 50])
def test_group_sizes(interpreter: Run, group: int) -> None:
    interpreter(attend, FEW, {"heads": 2 * group}, {"decodes": 1}, (4, HOPPER))


@pytest.mark.parametrize("inputs", [{"dim": dim} for dim in (16, 40, 80, 96, 112, 128, 192, 256)] + [
    {"dim": 64, "v_dim": 32}, {"dim": 192, "v_dim": 128}, {"dim": 40, "v_dim": 72}], ids=str)  # fmt: skip
def test_head_sizes(interpreter: Run, inputs: dict[str, int]) -> None:
    interpreter(attend, FEW, inputs, {"decodes": 1}, (4, HOPPER))
    interpreter(attend, FEW, {**inputs, "dtype": torch.float32}, {"decodes": 1})


@pytest.mark.parametrize("options", [
    {"window": 1}, {"window": 37}, {"window": 64}, {"softcap": 3.0}, {"sinks": SINKS},
    {"window": 20, "softcap": 5.0, "sinks": SINKS}], ids="-".join)  # fmt: skip
def test_window_softcap_sinks(interpreter: Run, options: dict[str, Any]) -> None:
    for dtype, processors in ((torch.bfloat16, (1, 0)), (torch.float32, (16, HOPPER))):
        interpreter(attend, MIXED, {"dtype": dtype, **options}, {"decodes": len(DECODES)}, processors)


@pytest.mark.parametrize("inputs", [{"dim": 320}, {"heads": 2 * 130}], ids=str)
def test_falls_through(interpreter: Run, inputs: dict[str, int]) -> None:
    interpreter(attend, FEW, inputs, {"decodes": 1})


def large_scores(sign: int) -> tuple[Tensor, Tensor]:
    """Scores in the hundreds, all of one sign: the result, and what it should be."""
    from serve_kernels import attention, attention_triton

    case = make_case(FEW, dtype=torch.float32)
    case.q, case.k = [x.abs() * 20 for x in case.q], [x.abs() * 20 * sign + 0.01 * x for x in case.k]
    paged_attention = functools.partial(attention_triton.paged_attention, decodes=1)
    return run_case(case, paged_attention).double(), run_case(case, attention.paged_attention_eager, torch.float64)


@pytest.mark.parametrize("sign", [-1, 1])
def test_large_scores(interpreter: Run, sign: int) -> None:
    torch.testing.assert_close(*interpreter(large_scores, sign), atol=2e-2, rtol=2e-2)


def strided(inputs: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """The result for heads that lie apart, and for heads that do not."""
    from serve_kernels import attention_triton

    def slices(q: Tensor, k: Tensor, v: Tensor, *rest: Tensor, **options: Any) -> Tensor:
        fused = torch.cat([q, k, v], 1).transpose(0, 1).contiguous().transpose(0, 1)
        parts = fused.split([q.shape[1], k.shape[1], v.shape[1]], 1)
        return attention_triton.paged_attention(*parts, *rest, **options)

    case = make_case(MIXED, **inputs)
    return run_case(case, slices), run_case(case, attention_triton.paged_attention)


def test_strided_inputs(interpreter: Run) -> None:
    assert torch.equal(*interpreter(strided, {"dtype": torch.float16}))


def padded() -> tuple[Tensor, Tensor]:
    """Two decode rows alone, and among rows that only pad the batch: of no length, and of one token in the trash block."""
    from serve_kernels import attention_triton

    torch.manual_seed(0)
    q, (k, v) = torch.randn(6, 4, 64), torch.randn(2, 6, 2, 64)
    caches = torch.randn(2, 5, 16, 2, 64)
    caches[:, 0] = torch.nan
    slots = torch.tensor([2 * 16 + 3, 4 * 16 + 15, 0, 0, 0, 0])
    tables = torch.tensor([[1, 2], [3, 4], *[[0, 0]] * 4], dtype=torch.int32)
    lengths = torch.tensor([20, 32, 0, 1, 1, 0], dtype=torch.int32)
    out = []
    for rows in (2, 6):
        inputs = q[:rows], k[:rows], v[:rows], *caches.clone(), slots[:rows], tables[:rows]
        bounds = torch.arange(rows + 1, dtype=torch.int32)
        options = {"scale": 0.125, "decodes": rows, "max_seq_len": 1000}
        out.append(attention_triton.paged_attention(*inputs, bounds, lengths[:rows], **options))
    return out


@pytest.mark.parametrize("processors", [(1, 0), (16, HOPPER)], ids=["one part", "parts"])
def test_padded_rows(interpreter: Run, processors: tuple[int, int]) -> None:
    interpreter(attend, FEW, {}, {}, processors)  # sets the number of processors
    alone, among = interpreter(padded)
    torch.testing.assert_close(among[:2], alone, atol=1e-6, rtol=1e-6)
    assert not among[[2, 5]].any() and among[[3, 4]].isfinite().all()


# ── Decoder layer ─────────────────────────────────────────────────────────────────────────────

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
TOLERANCE = {torch.float32: 3e-6, torch.float16: 1e-3, torch.bfloat16: 1.5e-2}


def compare(name: str, *inputs: Any) -> None:
    """Compare a function of decoder_layer_triton with its reference in fp64, and tensors that are written with those."""
    from serve_kernels import decoder_layer_triton

    def wide(x: Any) -> Any:
        return x.double() if isinstance(x, Tensor) and x.is_floating_point() else x

    exact = [wide(x) for x in inputs]
    want, got = getattr(decoder_layer_triton, name + "_eager")(*exact), getattr(decoder_layer_triton, name)(*inputs)
    want, got = (x if isinstance(x, tuple) else (x,) for x in (want, got))
    for w, g in [*zip(want, got), *((w, g) for w, g in zip(exact, inputs) if isinstance(g, Tensor))]:
        if g.is_floating_point():
            assert (g.double() - w).norm() <= TOLERANCE[g.dtype] * w.norm(), name


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("plus_one", [False, True])
@pytest.mark.parametrize("hidden", [64, 576, 1100])
def test_rms_norm(interpreter: Run, dtype: torch.dtype, plus_one: bool, hidden: int) -> None:
    torch.manual_seed(hidden)
    x, residual = torch.randn(2, 4, 2 * hidden).to(dtype)[:, :, :hidden]  # rows lie apart
    weight = torch.randn(hidden).to(dtype)
    interpreter(compare, "rms_norm", 3 * x, weight, 1e-2, plus_one)
    interpreter(compare, "add_rms_norm", x, residual, weight, 1e-5, plus_one)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads, kv_heads, dim, rotary", [(6, 2, 64, 64), (4, 4, 80, 32), (3, 1, 96, 96), (8, 1, 40, 20)])
@pytest.mark.parametrize("norm", [None, False, True], ids=["no norm", "norm", "norm plus one"])
def test_rope_and_write(
    interpreter: Run, dtype: torch.dtype, heads: int, kv_heads: int, dim: int, rotary: int, norm: bool | None
) -> None:
    torch.manual_seed(dim)
    parts = torch.randn(5, heads + 2 * kv_heads, dim).to(dtype).split([heads, kv_heads, kv_heads], 1)
    angle = torch.rand(5, rotary) * 6
    caches, slots = torch.zeros(2, 4, 8, kv_heads, dim, dtype=dtype), torch.tensor([9, 3, 31, 8, 20])
    weights = (None, None) if norm is None else tuple(torch.randn(2, dim).to(dtype))
    rope = angle.cos().to(dtype), angle.sin().to(dtype)
    interpreter(compare, "rope_and_write", *parts, *rope, *caches, slots, *weights, 1e-6, bool(norm))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["silu_mul", "gelu_mul"])
def test_act_mul(interpreter: Run, dtype: torch.dtype, name: str) -> None:
    torch.manual_seed(0)
    for width in (100, 2048, 2500):
        gate, up = (4 * torch.randn(3, 2 * width)).to(dtype).chunk(2, 1)
        interpreter(compare, name, gate, up)


# ── Sampling ──────────────────────────────────────────────────────────────────────────────────


def sample(*inputs: Tensor) -> tuple[Tensor, Tensor]:
    """Return the tokens that the kernel and the reference choose."""
    from serve_kernels import sampling_triton

    sampling_triton.CHUNK = 512
    return sampling_triton.sample(*inputs), sampling_triton.sample_eager(*inputs)


def columns(rows: list[tuple[float, int, float, float, float]]) -> list[Tensor]:
    """Return temperature, top_k, top_p, min_p and uniform as tensors [rows]."""
    temperature, top_k, top_p, min_p, uniform = torch.tensor(rows, dtype=torch.float64).unbind(1)
    return [temperature.float(), top_k.int(), top_p.float(), min_p.float(), uniform.contiguous()]


SAMPLING = [  # temperature, top_k, top_p, min_p
    (0, 0, 1, 0), (1e-6, 5, 0.5, 0), (1, 0, 1, 0), (0.3, 0, 1, 0), (1, 1, 1, 0), (1, 50, 1, 0), (1.5, 1200, 1, 0),
    (1, 9999, 1, 0), (1, 0, 0.9, 0), (2, 0, 0.99, 0), (1, 0, 1e-9, 0), (1, 0, 0.5, 0), (0.7, 20, 0.8, 0), (1, 3, 0.999, 0),
    (1, 0, 1, 0.1), (1, 40, 0.95, 0.05), (1, 0, 1, 1), (1, 3, 0.9, 0), (1, 3, 1, 0.01),
]  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sampling(interpreter: Run, dtype: torch.dtype) -> None:
    """Every kind of row, at both ends of the distribution and within it. In bfloat16, many scores are equal."""
    torch.manual_seed(0)
    uniform = (0, 0.2, 0.5, 0.9, 1 - 1e-9)
    rows = [(*row, uniform[i % 5]) for i, row in enumerate(3 * SAMPLING)]
    logits = (3 * torch.randn(len(rows), 4000)).to(dtype)[:, :1500]
    got, want = interpreter(sample, logits, *columns(rows))
    assert got.dtype == torch.int64 and got.tolist() == want.tolist()


def test_sampling_masked_and_equal(interpreter: Run) -> None:
    """A grammar leaves few tokens, or one; scores are all the same, far apart, as close as can be, or equal at a cutoff."""
    few, one, equal, far, close, tied = torch.full((6, 1500), -torch.inf)
    few[[3, 700, 1499]], one[1033], equal[:], far[:] = torch.tensor([1.0, 2, 3]), -40.0, 5.0, torch.linspace(-3e4, 3e4, 1500)
    close[:] = 1 + torch.randperm(1500, generator=torch.Generator().manual_seed(0)) * 2**-23
    tied[:], tied[[1200, 5]] = 1.0, torch.tensor([3.0, 2])
    rows = [(*row, 0.6) for row in SAMPLING]
    for logits in (few, one, equal, far, close, tied):
        got, want = interpreter(sample, logits.expand(len(rows), -1).contiguous(), *columns(rows))
        assert got.tolist() == want.tolist()
    rows = [(*row, 1 - 2**-53) for row in SAMPLING]  # rounding may push this point past the end
    got, _ = interpreter(sample, few.expand(len(rows), -1).contiguous(), *columns(rows))
    assert few[got].isfinite().all()


def test_sampling_agrees_with_draw(interpreter: Run) -> None:
    """The server's own sampling chooses the same tokens for the same seeds and positions."""
    import serve

    torch.manual_seed(1)
    rows = [row for row in SAMPLING if row[0] >= serve.COLDEST]
    logits = 3 * torch.randn(len(rows), 1500)
    params = [serve.SamplingParams(temperature=t, top_k=k, top_p=p, min_p=m) for t, k, p, m in rows]
    sequences = [serve.Sequence([0] * (i + 1), 1, p, 17 * i, b"", None, 0) for i, p in enumerate(params)]
    uniform = serve.draw_points(sequences)
    got, _ = interpreter(sample, logits, *columns([(*row, u) for row, u in zip(rows, uniform)]))
    assert got.tolist() == serve.draw(logits.clone(), params, uniform).tolist()


def test_sampling_is_independent_of_the_batch(interpreter: Run) -> None:
    """A row alone chooses what it chooses among others."""
    torch.manual_seed(2)
    logits, inputs = 3 * torch.randn(len(SAMPLING), 1500), columns([(*row, 0.37) for row in SAMPLING])
    together, _ = interpreter(sample, logits, *inputs)
    for i in (2, 5, 8, 12):
        alone, _ = interpreter(sample, *(x[i : i + 1] for x in (logits, *inputs)))
        assert alone[0] == together[i]


# ── Layers and graphs, as the server runs them ────────────────────────────────────────────────


def serve_tiny(architecture: str) -> tuple[list[list[int]], list[list[int]], int]:
    """Return a model's answers by the reference, and by these kernels in fused layers and graphs; and how many were fused."""
    import conftest  # noqa: F401 finds serve.py
    import serve
    import transformers
    from serve_kernels import attention_triton

    def answer(kernel: Callable[..., Tensor]) -> tuple[list[list[int]], int]:
        torch.manual_seed(0)
        sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 99,
                 "num_key_value_heads": 1, "head_dim": 32, "max_position_embeddings": 64, "initializer_range": 0.2}
        config = transformers.AutoConfig.for_model(architecture, **sizes, pad_token_id=0, bos_token_id=1, eos_token_id=2)
        network = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval().requires_grad_(False)
        runner = serve.PagedRunner(serve.Model(architecture, network, None, transformers.GenerationConfig(), frozenset(),
                                               frozenset(), 99, 64, 1, False, 0), kernel, 16)
        assert serve.self_test(runner) is None
        if runner.takes_hints:
            serve.fuse_layers(runner)
            serve.capture = lambda function, pool: (function, pool)
            serve.capture_graphs(runner, 3)
            assert list(runner.graphs) == [1, 2, 4]
        sequences, points = serve.scratch_sequences(runner, 21, 5, 17), [0.3] * 3
        sequences[1].sampling = serve.SamplingParams(temperature=1.0, top_p=0.9)
        for _ in range(3):
            batch = {seq: len(seq.token_ids) - seq.num_computed_tokens for seq in sequences}
            logits = runner.forward(runner.lay_out(batch, points), lambda: None)
            chosen = serve.sample(logits[:3], sequences, points, runner.chosen).tolist()
            for seq, id in zip(sequences, chosen):
                seq.num_computed_tokens = len(seq.token_ids)
                seq.token_ids.append(id)
        fused = [len(module.layers) for module in network.modules() if isinstance(module, serve.PatchedLayers)]
        return [seq.generated for seq in sequences], sum(fused)

    with torch.inference_mode():
        want, _ = answer(serve.attention.paged_attention_eager)
        return want, *answer(attention_triton.paged_attention)


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "gemma"])
def test_a_model_in_fused_layers_and_graphs(interpreter: Run, architecture: str) -> None:
    want, got, fused = interpreter(serve_tiny, architecture)
    assert got == want and fused == 2


# ── Compiled for an H200 ──────────────────────────────────────────────────────────────────────
# Tensors have no data here, so that a call that reads one on the host fails.

meta = functools.partial(torch.empty, device="meta")
bf16 = functools.partial(meta, dtype=torch.bfloat16)
int32 = functools.partial(meta, dtype=torch.int32)
int64 = functools.partial(meta, dtype=torch.int64)


def usage() -> list[dict[str, Any]]:
    """Return what each kernel compiled since the last look takes, by ptxas's account."""
    import triton

    cuobjdump, found = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump", []
    for name, kernel in compiled:
        file = Path(os.environ["TRITON_CACHE_DIR"]) / "kernel.cubin"
        file.write_bytes(kernel.asm["cubin"])
        text = subprocess.run([cuobjdump, "-res-usage", file], capture_output=True, text=True, check=True).stdout
        registers, stack, local = (int(re.search(rf"\b{key}:(\d+)", text)[1]) for key in ("REG", "STACK", "LOCAL"))
        ptx = kernel.asm["ptx"]
        found.append({"name": name, "registers": registers, "stack": stack + local, "shared": kernel.metadata.shared,
                      "threads": 32 * kernel.metadata.num_warps, "wgmma": "wgmma.mma_async" in ptx,
                      "mma": "mma.sync" in ptx, "async": "cp.async" in ptx})  # fmt: skip
    compiled.clear()
    return found


def compile_attention(shape: dict[str, int], options: dict[str, Any], dtype: torch.dtype) -> list[dict[str, Any]]:
    """Compile a batch of 4 decodes, one of 256, and two prefills of 1000 tokens, in a cache of 32k tokens a sequence."""
    from serve_kernels import attention_triton

    heads, kv_heads, dim, block_size = (shape[key] for key in ("heads", "kv_heads", "dim", "block_size"))
    cache = meta(2048, block_size, kv_heads, dim, dtype=dtype)
    if "sinks" in options:
        options = {**options, "sinks": bf16(heads)}
    for decodes, prefills in ((4, 0), (256, 0), (0, 2)):
        tokens, sequences = decodes + 1000 * prefills, decodes + prefills
        q, k = meta(tokens, heads, dim, dtype=dtype), meta(tokens, kv_heads, dim, dtype=dtype)
        attention_triton.paged_attention(
            q, k, k, cache, cache, int64(tokens), int32(sequences, 32768 // block_size), int32(sequences + 1),
            int32(sequences), scale=0.1, **options)
    return usage()


QWEN3_06B = {"heads": 16, "kv_heads": 8, "dim": 128, "block_size": 32}
LLAMA_8B = {"heads": 32, "kv_heads": 8, "dim": 128, "block_size": 32}
ATTENTION = [
    pytest.param(LLAMA_8B, {}, torch.bfloat16, id="llama-8b"),
    pytest.param(QWEN3_06B, {}, torch.bfloat16, id="qwen3-0.6b"),
    pytest.param({**LLAMA_8B, "kv_heads": 32}, {}, torch.float16, id="no-groups-fp16"),
    pytest.param({**LLAMA_8B, "heads": 9, "kv_heads": 3, "dim": 64}, {}, torch.bfloat16, id="smollm2"),
    pytest.param({**LLAMA_8B, "heads": 64, "dim": 64}, {"window": 128, "sinks": True}, torch.bfloat16, id="gpt-oss"),
    pytest.param({**LLAMA_8B, "dim": 80, "block_size": 256}, {}, torch.bfloat16, id="dim-80-block-256"),
    pytest.param({**LLAMA_8B, "heads": 16, "dim": 256}, {}, torch.bfloat16, id="dim-256"),
    pytest.param({**LLAMA_8B, "heads": 16, "dim": 256}, {"window": 4096, "softcap": 50.0}, torch.bfloat16, id="gemma2"),
    pytest.param(LLAMA_8B, {}, torch.float32, id="float32"),
]


def check_usage(kernels: list[dict[str, Any]]) -> None:
    """Nothing is spilled to memory, and what each program takes is there."""
    for kernel in kernels:
        print(kernel)
        assert kernel["stack"] == 0, kernel
        assert kernel["shared"] <= HOPPER and kernel["registers"] * kernel["threads"] <= REGISTERS, kernel


@pytest.mark.parametrize("shape, options, dtype", ATTENTION)
def test_attention_compiles(compiler: Run, shape: dict[str, int], options: dict[str, Any], dtype: torch.dtype) -> None:
    """Without spills; keys and values come by asynchronous copies; 16 bits multiply on tensor cores, prefill by wgmma."""
    kernels = compiler(compile_attention, shape, options, dtype)
    check_usage(kernels)
    assert {kernel["name"] for kernel in kernels} == {"_write", "_decode", "_merge", "_prefill"}
    for kernel in kernels:
        if kernel["name"] in ("_decode", "_prefill"):
            assert kernel["async"]
            if dtype != torch.float32:
                assert kernel["wgmma"] if kernel["name"] == "_prefill" else kernel["mma"]
        if kernel["name"] == "_decode" and dtype != torch.float32:  # three at once, so that memory is never idle
            assert 3 * kernel["shared"] <= HOPPER and 3 * kernel["registers"] * kernel["threads"] <= REGISTERS


def compile_layer(hidden: int, heads: int, kv_heads: int, dim: int, width: int) -> list[dict[str, Any]]:
    from serve_kernels import decoder_layer_triton as layer

    x, weight, head_weight, rope, cache = bf16(64, hidden), bf16(hidden), bf16(dim), bf16(64, dim), bf16(100, 32, kv_heads, dim)
    q, k, v = bf16(64, heads + 2 * kv_heads, dim).split([heads, kv_heads, kv_heads], 1)
    gate, up = bf16(64, 2 * width).chunk(2, 1)
    layer.rms_norm(x, weight, 1e-6)
    layer.add_rms_norm(x, x, weight, 1e-6)
    layer.rope_and_write(q, k, v, rope, rope, cache, cache, int64(64))
    layer.rope_and_write(q, k, v, rope, rope, cache, cache, int64(64), head_weight, head_weight, 1e-6)
    layer.silu_mul(gate, up)
    layer.gelu_mul(gate, up)
    return usage()


@pytest.mark.parametrize("sizes", [(4096, 32, 8, 128, 14336), (1024, 16, 8, 128, 3072), (3584, 16, 8, 256, 14336)], ids=str)
def test_decoder_layer_compiles(compiler: Run, sizes: tuple[int, ...]) -> None:
    kernels = compiler(compile_layer, *sizes)
    check_usage(kernels)
    assert len(kernels) == 6


def compile_sampling(vocab: int, dtype: torch.dtype) -> list[dict[str, Any]]:
    from serve_kernels import sampling_triton

    column = functools.partial(meta, 64)
    sampling_triton.sample(meta(64, vocab, dtype=dtype), column(), int32(64), column(), column(), column(dtype=torch.float64))
    return usage()


@pytest.mark.parametrize("vocab", [49152, 151936])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_sampling_compiles(compiler: Run, vocab: int, dtype: torch.dtype) -> None:
    check_usage(compiler(compile_sampling, vocab, dtype))
