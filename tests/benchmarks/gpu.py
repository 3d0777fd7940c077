"""Check and time what runs on a CUDA GPU: one command, a few minutes, no network, models of random weights.

    python tests/benchmarks/gpu.py                  every part but tune, then one table
    python tests/benchmarks/gpu.py decode prefill   these parts
    python tests/benchmarks/gpu.py tune             the speed of other tiles than those attention_triton.py has

Kernels are timed in CUDA graphs, as a step runs them: host time is no part of it, and what cannot be captured fails. A part
that fails is one line and the others still run. "To reach" is what the project asks of itself on an H200, the limit what
was measured there: 4.3 TB/s of copying and 790 TFLOP/s of a bfloat16 matrix product. Model parts import serve.py, and so
want what it imports; the part over HTTP drives the `transformers serve` that is installed here too.
"""

import argparse
import dataclasses
import functools
import itertools
import shutil
import sys
import tempfile
import time
import traceback
import types
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests"))
sys.modules.setdefault("serve_kernels", types.ModuleType("serve_kernels")).__path__ = [str(ROOT / "kernels")]
COPY, PRODUCT = 4.3, 790.0  # TB/s, TFLOP/s
LESS = ("ms", "µs", "% idle")  # units of which less is better


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    name: str
    measured: float
    unit: str
    reach: float | None = None
    limit: float | None = None
    note: str = ""

    def __str__(self) -> str:
        """Say it, with a verdict where there is something to reach."""
        reached = self.reach is not None and (self.measured <= self.reach if self.unit in LESS else self.measured >= self.reach)
        verdict = "" if self.reach is None else "ok" if reached else "MISSED"
        numbers = "".join(f"{'' if x is None else f'{x:.4g}':>9}" for x in (self.measured, self.reach, self.limit))
        return f"{self.name:44}{numbers} {self.unit:9}{verdict:7}{self.note}"


Part = Callable[[], Iterable[Row]]


def seconds(function: Callable[[], Any], calls: int = 10, replays: int = 9) -> float:
    """Return the median time of one call within a CUDA graph of `calls`."""
    for _ in range(2):  # compiles
        function()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(calls):
            function()
    graph.replay()
    times = []
    for _ in range(replays):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return median(times) / calls


def seconds_eager(function: Callable[[], Any], calls: int = 10) -> float:
    """Return the median time of a call with the host's part in it, waiting for the device each time."""
    times = []
    for _ in range(calls + 2):
        torch.cuda.synchronize()
        start = time.perf_counter()
        function()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return median(times[2:])


def bf16(*shape: int) -> Tensor:
    return torch.randn(*shape, device="cuda", dtype=torch.bfloat16)


def ceilings() -> Iterator[Row]:
    """What this GPU can do: the limits of everything below."""
    source = torch.empty(1 << 32, dtype=torch.uint8, device="cuda").random_()
    target = torch.empty_like(source)
    yield Row("copy within the device", 2 * source.nbytes / seconds(lambda: target.copy_(source), 3) / 1e12, "TB/s", None, COPY)
    a, b = bf16(8192, 8192), bf16(8192, 8192)
    yield Row("matrix product, bfloat16", 2 * 8192**3 / seconds(lambda: a @ b) / 1e12, "TFLOP/s", None, PRODUCT)


# ── Agreement ─────────────────────────────────────────────────────────────────────────────────
# Each kernel against its reference, on this GPU: the cases of the tests, and serving shapes.


def on_device(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Return a function of CPU tensors that computes on the GPU."""

    def call(*args: Tensor, **options: Any) -> Tensor:
        options = {name: x.cuda() if isinstance(x, Tensor) else x for name, x in options.items()}
        return function(*(x.cuda() for x in args), **options).cpu()

    return call


def check_attention() -> Iterator[Row]:
    """The tests' cases, by the GPU."""
    import test_kernels_triton as cases
    from serve_kernels import attention_triton

    every = {"window": 20, "softcap": 5.0, "sinks": cases.SINKS}
    inputs = [{"dtype": dtype, "block_size": size} for dtype, size in itertools.product(cases.DTYPES, (16, 256))]
    inputs += [{"heads": 2 * group} for group in (1, 4, 50)] + [{"dim": dim} for dim in (16, 80, 96, 128, 192, 256)]
    inputs += [{"window": 37}, {"softcap": 3.0}, {"sinks": cases.SINKS}, every, {"dtype": torch.float32, **every}]
    for case, decodes in itertools.product(inputs, (0, len(cases.DECODES))):
        attend = functools.partial(attention_triton.paged_attention, decodes=decodes)
        try:
            cases.check(cases.make_case(cases.MIXED, **case), on_device(attend))
        except Exception as error:
            raise RuntimeError(f"{case}, {decodes} decodes: {str(error).strip().splitlines()[0]}") from error
    yield Row("attention: cases that agree", 2 * len(inputs), "cases")


def check_graph() -> Iterator[Row]:
    """A captured decode of an 8B, replayed on other lengths than it was captured on, and with padded rows."""
    from serve_kernels import attention, attention_triton

    cache, worst = Cache(32, 4096), 0.0
    q, out = bf16(32, 32, 128), torch.empty(0)
    step = functools.partial(cache.attend, attention_triton.paged_attention, q, decodes=32, max_seq_len=4096)
    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step()
    for rows in (32, 20):
        cache.set_lengths(torch.randint(1, 4097, (32,), device="cuda"), rows)
        q.normal_()
        graph.replay()
        want = cache.attend(attention.paged_attention_eager, q)[:rows]
        worst = max(worst, difference(out[:rows], want))
        if not worst < 1e-2 or out[rows:].any():
            raise RuntimeError(f"{rows} rows differ by {worst:.1e}")
    yield Row("attention: graph replayed, differs by", worst, "")


def difference(got: Tensor, want: Tensor) -> float:
    return ((got - want).float().norm() / want.float().norm()).item()


def check_layer() -> Iterator[Row]:
    """Norms, rope and activations against fp64."""
    import test_kernels_triton as cases

    shapes = list(itertools.product(cases.DTYPES, (2, 8, 32, 64), (False, True)))
    for dtype, heads, norm in shapes:
        draw = functools.partial(torch.randn, device="cuda", dtype=dtype)
        x, residual, weight = draw(65, 128 * heads), draw(65, 128 * heads), draw(128 * heads)
        cases.compare("rms_norm", x, weight, 1e-6, norm)
        cases.compare("add_rms_norm", x, residual, weight, 1e-6, norm)
        cases.compare("silu_mul", x, residual)
        cases.compare("gelu_mul", x, residual)
        rope, caches, slots = draw(2, 65, 128), draw(2, 9, 32, 2, 128), torch.randperm(288, device="cuda")[:65]
        weights = tuple(draw(2, 128)) if norm else (None, None)
        parts = draw(65, heads + 4, 128).split([heads, 2, 2], 1)
        cases.compare("rope_and_write", *parts, *rope, *caches, slots, *weights, 1e-6)
    yield Row("decoder layer: cases that agree", 5 * len(shapes), "cases")


def check_sampling() -> Iterator[Row]:
    """The tests' kinds of rows over a real vocabulary; a few may lie within rounding of a cutoff."""
    import test_kernels_triton as cases
    from serve_kernels import sampling_triton

    for dtype in (torch.float32, torch.bfloat16):
        rows = [(*row, i % 101 / 101) for i, row in enumerate(16 * cases.SAMPLING)]
        inputs = [(3 * torch.randn(len(rows), 151936, device="cuda")).to(dtype), *(x.cuda() for x in cases.columns(rows))]
        same = sampling_triton.sample(*inputs) == sampling_triton.sample_eager(*inputs)
        yield Row(f"sampling: rows that agree, {str(dtype)[6:]}", 100 * same.float().mean().item(), "%", 98, 100)


# ── Kernels ───────────────────────────────────────────────────────────────────────────────────


class Cache:
    """Sequences in shuffled blocks of a paged cache, and the tensors of a step that adds `queries` tokens to each."""

    def __init__(self, sequences: int, length: int, queries: int = 1) -> None:
        kv_heads, dim, size = 8, 128, 32
        self.sequences, self.queries, self.size = sequences, queries, size
        blocks = -(-length // size)
        shuffled = 1 + torch.randperm(sequences * blocks, device="cuda")
        self.tables = shuffled.view(sequences, blocks).int()
        self.k_cache, self.v_cache = (bf16(sequences * blocks + 1, size, kv_heads, dim) for _ in range(2))
        self.k, self.v = bf16(sequences * queries, kv_heads, dim), bf16(sequences * queries, kv_heads, dim)
        self.bounds = torch.arange(sequences + 1, device="cuda").int() * queries
        self.lengths = torch.zeros(sequences, dtype=torch.int32, device="cuda")
        self.slots = torch.zeros(sequences * queries, dtype=torch.int64, device="cuda")
        self.set_lengths(torch.full((sequences,), length, device="cuda"), sequences)

    def set_lengths(self, lengths: Tensor, rows: int) -> None:
        """Let the first `rows` sequences have these lengths, this step's tokens included; the others only pad the batch."""
        lengths = lengths.where(torch.arange(self.sequences, device="cuda") < rows, 0)
        self.lengths.copy_(lengths)
        positions = lengths[:, None] - self.queries + torch.arange(self.queries, device="cuda")  # [sequences, queries]
        slots = self.tables.long().gather(1, positions.clamp(0) // self.size) * self.size + positions % self.size
        self.slots.copy_(slots.where(positions >= 0, 0).flatten())

    def attend(self, function: Callable[..., Tensor], q: Tensor, **options: Any) -> Tensor:
        inputs = self.k, self.v, self.k_cache, self.v_cache, self.slots, self.tables, self.bounds, self.lengths
        return function(q, *inputs, scale=q.shape[2] ** -0.5, **options)

    @property
    def nbytes(self) -> int:
        """Of the keys and values."""
        return 2 * int(self.lengths.sum()) * self.k_cache[0, 0].nbytes


def decode_speed(sequences: int, length: int) -> float:
    """Return TB/s of keys and values, 32 heads of 128 in groups of 4."""
    from serve_kernels import attention_triton

    cache, q = Cache(sequences, length), bf16(sequences, 32, 128)
    return cache.nbytes / seconds(lambda: cache.attend(attention_triton.paged_attention, q, decodes=sequences)) / 1e12


def prefill_speed(sequences: int, length: int, function: Callable[..., Tensor]) -> float:
    """Return TFLOP/s of causal attention over whole prompts, 32 heads of 128 in groups of 4."""
    cache, q = Cache(sequences, length, length), bf16(sequences * length, 32, 128)
    work = 4 * 128 * 32 * sequences * length * (length + 1) // 2
    return work / seconds(lambda: cache.attend(function, q), 3) / 1e12


def decode() -> Iterator[Row]:
    """Attention of one token each over long contexts."""
    shapes = [(1, 16384), (32, 2048), (32, 16384), (64, 4096), (128, 2048), (128, 8192), (256, 2048), (256, 16384)]
    for sequences, length in shapes:
        reach = 3.4 if sequences >= 32 else None
        yield Row(f"decode attention, {sequences} at {length}", decode_speed(sequences, length), "TB/s", reach, COPY)


def prefill() -> Iterator[Row]:
    """Attention of whole prompts, beside torch's on keys that lie in one piece."""
    from serve_kernels import attention_triton

    for sequences, length in ((1, 8192), (4, 2048), (16, 512)):
        speed = prefill_speed(sequences, length, attention_triton.paged_attention)
        yield Row(f"prefill attention, {sequences} of {length}", speed, "TFLOP/s", 300 if length == 8192 else None, PRODUCT)
    q, (k, v) = bf16(1, 32, 8192, 128), (bf16(1, 8, 8192, 128) for _ in range(2))
    dense = seconds(lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True), 3)
    yield Row("  torch's SDPA, 1 of 8192, not paged", 4 * 128 * 32 * 8192 * 8193 // 2 / dense / 1e12, "TFLOP/s")


def layer() -> Iterator[Row]:
    """The fused kernels between an 8B's matrix products, over a prompt and over a batch of decodes."""
    from serve_kernels import decoder_layer_triton as fused

    for tokens in (8192, 64):
        x, residual, weight, head_weight = bf16(tokens, 4096), bf16(tokens, 4096), bf16(4096), bf16(128)
        q, k, v = bf16(tokens, 48, 128).split([32, 8, 8], 1)
        rope, caches, slots = bf16(2, tokens, 128), bf16(2, tokens // 32 + 1, 32, 8, 128), torch.arange(tokens, device="cuda")
        inputs, (gate, up) = (q, k, v, *rope, *caches, slots), bf16(tokens, 2 * 14336).chunk(2, 1)
        heads = 2 * (q.numel() + k.numel() + v.numel() + rope.numel() // 2)
        cases = [
            ("add + RMSNorm", fused.add_rms_norm, (x, residual, weight, 1e-6), 4 * x.numel()),
            ("rope + KV write", fused.rope_and_write, inputs, heads),
            ("norm + rope + KV write", fused.rope_and_write, (*inputs, head_weight, head_weight, 1e-6), heads),
            ("SiLU · mul", fused.silu_mul, (gate, up), 3 * gate.numel()),
        ]
        for name, function, arguments, numbers in cases:
            took = seconds(functools.partial(function, *arguments))
            note = f"{took * 1e6:.1f} µs"
            yield Row(f"{name}, {tokens} tokens", 2 * numbers / took / 1e12, "TB/s", None, COPY if tokens > 64 else None, note)


KINDS = {"greedy": (0, 0, 1), "plain": (1, 0, 1), "top-k 50": (1, 50, 1), "top-p 0.9": (0.6, 0, 0.9), "both": (0.7, 20, 0.8)}


def sampling() -> Iterator[Row]:
    """Sampling of a batch over 151,936 tokens."""
    import test_kernels_triton as cases
    from serve_kernels import sampling_triton

    for rows, (kind, (temperature, top_k, top_p)) in itertools.product((1, 32, 256), KINDS.items()):
        logits = (2.5 * torch.randn(rows, 151936, device="cuda")).bfloat16()
        columns = [x.cuda() for x in cases.columns([(temperature, top_k, top_p, 0, i / rows) for i in range(rows)])]
        took = seconds(functools.partial(sampling_triton.sample, logits, *columns))
        yield Row(f"sampling, {rows} rows, {kind}", took * 1e6, "µs", None, max(1.0, logits.nbytes / COPY / 1e6))


def sampling_in_torch() -> Iterator[Row]:
    """serve.py's own sampling, with the host in it."""
    serve = import_serve()
    for rows, (kind, (temperature, top_k, top_p)) in itertools.product((1, 256), KINDS.items()):
        logits = (2.5 * torch.randn(rows, 151936, device="cuda")).bfloat16()
        params = serve.SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p)
        sequences = [serve.Sequence([0, 0], 1, params, i, b"", None, 0) for i in range(rows)]
        took = seconds_eager(functools.partial(serve.sample, logits, sequences, serve.draw_points(sequences)), 5)
        yield Row(f"  serve.sample, {rows} rows, {kind}", took * 1e6, "µs")


def tune() -> Iterator[Row]:
    """Other tiles: where one is faster by more than a few per cent, attention_triton.py should have it."""
    from serve_kernels import attention_triton as attention

    had = dict(attention.DECODE), dict(attention.PREFILL)
    for rows, keys, warps, stages in itertools.product((16,), (32, 64, 128), (2, 4, 8), (2, 3, 4)):
        attention.DECODE[128] = attention.Tiles(rows, keys, warps, stages)
        yield from tried("decode", attention.DECODE[128], "TB/s", lambda: decode_speed(64, 4096))
    for rows, keys, warps, stages in itertools.product((64, 128), (32, 64, 128), (4, 8), (2, 3, 4)):
        attention.PREFILL[128] = attention.Tiles(rows, keys, warps, stages)
        yield from tried("prefill", attention.PREFILL[128], "TFLOP/s",
                         lambda: prefill_speed(1, 8192, attention.paged_attention))  # fmt: skip
    attention.DECODE.update(had[0])
    attention.PREFILL.update(had[1])


def tried(name: str, tiles: Any, unit: str, speed: Callable[[], float]) -> Iterator[Row]:
    """Yield the speed, unless these tiles do not fit the GPU."""
    try:
        yield Row(f"{name} {tuple(tiles)}", speed(), unit)
    except Exception as error:  # Triton has several for "out of resources", and the rows of those are of no interest
        print(f"  {name} {tuple(tiles)}: {str(error).strip().splitlines()[-1][:90]}", flush=True)


# ── Models ────────────────────────────────────────────────────────────────────────────────────
# Random weights behind serve.py's own runner and sampling, as they are.


def import_serve() -> types.ModuleType:
    sys.path.insert(0, str(ROOT))
    import serve

    return serve


def random_model(kind: str, dtype: torch.dtype = torch.bfloat16, layers: int | None = None) -> Any:
    """Return a serve.Model without a tokenizer: "0.6B" (Qwen3), "8B" (Llama) or "MoE" (Qwen3, small)."""
    import transformers

    serve = import_serve()
    shared = {"num_key_value_heads": 8, "head_dim": 128, "max_position_embeddings": 32768}
    sizes = {
        "0.6B": (151936, 1024, 3072, 28, 16),
        "8B": (128256, 4096, 14336, 32, 32),
        "MoE": (32000, 1024, 3072, 8, 16),
    }[kind]
    names = "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"
    shared |= dict(zip(names, sizes)) | ({"num_hidden_layers": layers} if layers else {})
    if kind == "MoE":
        config = transformers.Qwen3MoeConfig(moe_intermediate_size=384, num_experts=32, num_experts_per_tok=4, **shared)
    elif kind == "8B":
        config = transformers.LlamaConfig(**shared)
    else:
        config = transformers.Qwen3Config(tie_word_embeddings=True, **shared)
    config.eos_token_id = None
    torch.manual_seed(0)
    with torch.device("cuda"):
        network = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype).eval().requires_grad_(False)
    return serve.Model(
        id=kind, network=network, tokenizer=None, generation=network.generation_config, eos_token_ids=frozenset(),
        special_ids=frozenset(), vocab_size=config.vocab_size, max_model_len=config.max_position_embeddings, longest_token=1,
        byte_level=True, created=0)


def make_runner(model: Any) -> Any:
    """Return serve.py's runner for a model on this GPU."""
    serve = import_serve()
    config = serve.Config(device="cuda", kv_cache_memory=0.6)
    kernel, name = serve.choose_attention(config.attention, model.device)
    print(f"  {model.id}: {name} attention", flush=True)
    return serve.make_runner(model, kernel, config)[0]


def make_sequences(runner: Any, prompts: list[list[int]], room: int) -> list[Any]:
    """Return sequences with blocks for `room` more tokens."""
    serve = import_serve()
    pool = serve.BlockPool(runner.num_blocks, runner.block_size)
    return [serve.Sequence(list(ids), len(ids), serve.SamplingParams(), 0, b"", None, 0,
                           block_table=pool.allocate(pool.blocks_for(len(ids) + room))) for ids in prompts]  # fmt: skip


def greedy(kind: str, layers: int, tokens: int = 24) -> Row:
    """Compare a batch of greedy answers with model.generate's, in float32, where no two scores are equal."""
    model = random_model(kind, torch.float32, layers)
    network, prompts = model.network, [torch.randint(32000, (n,)).tolist() for n in (3, 70, 33, 129)]
    want = [network.generate(torch.tensor([ids], device="cuda"), max_new_tokens=tokens, do_sample=False)[0].tolist()
            for ids in prompts]  # fmt: skip
    runner = make_runner(model)
    sequences = make_sequences(runner, prompts, tokens)
    for _ in range(tokens):
        batch = {seq: len(seq.token_ids) - seq.num_computed_tokens for seq in sequences}
        for seq, id in zip(sequences, launch(runner, batch)()):
            seq.num_computed_tokens = len(seq.token_ids)
            seq.token_ids.append(id)
    same = sum(seq.token_ids == ids for seq, ids in zip(sequences, want))
    return Row(f"greedy as model.generate, {kind}, {type(runner).__name__}", same, "answers", len(want), len(want))


@torch.inference_mode()
def check_greedy() -> Iterator[Row]:
    yield greedy("0.6B", 8)
    yield greedy("MoE", 4)


def launch(runner: Any, batch: dict[Any, int]) -> Callable[[], list[int]]:
    """Launch a step as the engine's thread does; return what waits for its tokens."""
    serve = import_serve()
    sequences = serve.sampled(batch)
    points = serve.draw_points(sequences)
    logits = runner.forward(runner.lay_out(batch, points))
    chosen = serve.sample(logits[:len(sequences)], sequences, points, runner.chosen)
    runner.keep(chosen)
    return serve.on_its_way(chosen)


def step_seconds(runner: Any, batch_size: int, context: int, steps: int = 20) -> tuple[float, float]:
    """Return the time of a decode step, launched before the last one's tokens are read, and how long the GPU was busy."""
    sequences = make_sequences(runner, [[1] * (context + 1)] * batch_size, 0)
    for row, seq in enumerate(sequences):
        seq.num_computed_tokens, seq.num_pending_tokens, seq.row = context, 1, row
        del seq.token_ids[-1]
    batch = dict.fromkeys(sequences, 1)

    def run() -> float:
        read, started = launch(runner, batch), time.perf_counter()
        for _ in range(steps):
            following = launch(runner, batch)
            read()
            read = following
        read()
        return (time.perf_counter() - started) / steps

    run()
    took = min(run() for _ in range(3))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        run()
    busy = sum(event.self_device_time_total for event in profile.key_averages()) / 1e6 / (steps + 1)
    return took, busy


@torch.inference_mode()
def steps() -> Iterator[Row]:
    """A decode step of a model: every weight and every key is read once, so memory is the limit."""
    for kind, shapes in (("0.6B", [(1, 1024, 1.2)]), ("8B", [(1, 1024, 4.6), (32, 4096, 10.0), (256, 512, 14.0)]),
                         ("MoE", [(16, 1024, None)])):  # fmt: skip
        model = random_model(kind)
        weights = sum(x.nbytes for x in {x.data_ptr(): x for x in model.network.parameters()}.values())
        runner = make_runner(model)
        for batch_size, context, reach in shapes:
            (took, busy), name = step_seconds(runner, batch_size, context), f"{kind}, {batch_size} at {context}"
            keys = sum(runner.block_bytes.values()) // runner.block_size * context * batch_size
            graph = "graph" if any(batch_size <= rows for rows in runner.graphs) else "no graph"
            yield Row(f"decode step, {name}", took * 1e3, "ms", reach, (weights + keys) / COPY / 1e9, graph)
            yield Row(f"  between steps, {name}", 100 * max(0.0, 1 - busy / took), "% idle", 3)
        del model, runner
        torch.cuda.empty_cache()


def save_checkpoint(folder: Path) -> Path:
    """Save the 0.6B with a tokenizer of single bytes, so that both servers can load it."""
    import tokenizers
    import transformers

    network, bytes_ = random_model("0.6B").network, sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE({byte: i for i, byte in enumerate(bytes_)}, []))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", pad_token="<pad>")
    fast.chat_template = "{% for message in messages %}{{ message['content'] }}\n{% endfor %}"
    network.save_pretrained(folder)
    fast.save_pretrained(folder)
    return folder


@torch.inference_mode()
def bits() -> Iterator[Row]:
    """Decode steps of the 0.6B in bfloat16, 8 and 4 bits: with others in the batch, fewer bits must not fall behind."""
    serve = import_serve()
    with tempfile.TemporaryDirectory() as scratch:
        checkpoint = serve.Checkpoint(str(save_checkpoint(Path(scratch))))
        for kind in (None, "bnb-8bit", "bnb-4bit"):
            config = serve.Config(device="cuda", quantization=kind)
            model = serve.load_model("0.6B", checkpoint, config, True, lambda stage: None)
            runner = make_runner(model)
            for batch_size in (1, 16):
                took, busy = step_seconds(runner, batch_size, 1024)
                note = f"{batch_size / took:.0f} tokens/s, {model.network.get_memory_footprint() >> 20} MiB of weights"
                yield Row(f"decode step, 0.6B {kind or 'bfloat16'}, {batch_size} at 1024", took * 1e3, "ms", note=note)
            del model, runner
            torch.cuda.empty_cache()


def http() -> Iterator[Row]:
    """Both servers over HTTP, one after the other, on the 0.6B: those that are installed here."""
    sys.path.insert(0, str(ROOT / "tests" / "benchmarks"))
    import serving

    installed = shutil.which("transformers") or str(Path(sys.executable).with_name("transformers"))

    def transformers_cb(model: Path, port: int) -> list[str]:
        return [installed, "serve", str(model), "--port", str(port), "--dtype", "bfloat16", "--continuous-batching"]

    servers = serving.Server("serve.py", serving.serve_py), serving.Server("transformers serve", transformers_cb)
    with tempfile.TemporaryDirectory() as scratch:
        folder = save_checkpoint(Path(scratch))
        torch.cuda.empty_cache()
        for server in servers:
            try:
                yield from http_loads(serving, server, folder)
            except Exception as error:  # the other one is still worth its time
                print(f"  {server.name} failed: {error}", flush=True)


def http_loads(serving: types.ModuleType, server: Any, folder: Path) -> Iterator[Row]:
    """Yield what one server gives under one client and under 16."""
    with serving.running(server, folder) as (process, url):
        served = dataclasses.replace(server, url=url)
        body = serving.request_body(served, str(folder), [{"role": "user", "content": "Hello"}], 8)
        print(f"  {server.name}: first token after {serving.first_token(process, url, body, time.time()):.1f} s", flush=True)
        for name in ("single", "batch"):
            figures = serving.run_load(served, url, serving.served_model(served, folder), name)
            note = f"first token {figures['ttft_p50_ms']:.0f} ms, between tokens {figures['itl_p50_ms']:.1f} ms"
            yield Row(f"HTTP, {server.name}, {name}", figures["tokens_per_s"], "tokens/s", note=note)


# ── Main ──────────────────────────────────────────────────────────────────────────────────────

PARTS: dict[str, Part] = {
    part.__name__: part
    for part in (ceilings, check_attention, check_graph, check_layer, check_sampling, decode, prefill, layer, sampling,
                 sampling_in_torch, check_greedy, steps, bits, http, tune)
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("parts", nargs="*", metavar="part", help=f"of {', '.join(PARTS)}; default: all but tune")
    names = parser.parse_args().parts or [name for name in PARTS if name != "tune"]
    if unknown := [name for name in names if name not in PARTS]:
        parser.error(f"no part is called {unknown[0]}")
    if not torch.cuda.is_available():
        return print("no CUDA device: nothing to check or to time")
    try:
        import triton

        versions = f"triton {triton.__version__}"
    except ImportError as error:
        versions = str(error)
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {versions}")
    rows: list[Row] = []
    for name in names:
        start = time.perf_counter()
        try:
            for row in PARTS[name]():
                rows.append(row)
                print(row, flush=True)
        except Exception as error:  # the other parts are still worth their time
            print(f"{name} failed: {traceback.format_exception_only(error)[-1].strip()}", flush=True)
        torch.cuda.empty_cache()
        print(f"  {name}: {time.perf_counter() - start:.0f} s", flush=True)
    print(f"\n{'':44}{'measured':>9}{'to reach':>9}{'limit':>9}", *rows, sep="\n")


if __name__ == "__main__":
    main()
