"""Runners against `model.generate` in float32: the same tokens, and the same log-probabilities, on real model classes."""
import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import serve
import torch
import transformers
import trio
from conftest import collect, running

VOCAB, LENGTH = 1000, 8
PROMPT_LENGTHS = (23, 5, 12, 1)  # longer than a window, than a step's budget and than a block; and a single token
IDS = {"vocab_size": VOCAB, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
LLAMA = IDS | {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
               "num_key_value_heads": 2, "max_position_embeddings": 128, "initializer_range": 0.2, "tie_word_embeddings": False}
GPT2 = IDS | {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 128, "initializer_range": 0.2}
MAMBA = IDS | {"hidden_size": 64, "state_size": 8, "num_hidden_layers": 2, "initializer_range": 0.2}
BART = IDS | {"d_model": 64, "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 96, "decoder_ffn_dim": 96,
              "encoder_attention_heads": 4, "decoder_attention_heads": 4, "max_position_embeddings": 128, "init_std": 0.2,
              "forced_eos_token_id": None, "decoder_start_token_id": 1}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 48}
WINDOW = {"sliding_window": 8, "head_dim": 16}

PAGED = {
    "Qwen2": LLAMA,  # biases
    "Qwen3": LLAMA | {"head_dim": 16},  # norms of queries and keys
    "Mistral": LLAMA | {"sliding_window": 8},
    "Gemma2": LLAMA | WINDOW | {"query_pre_attn_scalar": 16, "attn_logit_softcapping": 5.0, "final_logit_softcapping": 10.0},
    "Gemma3Text": LLAMA | WINDOW | {"num_hidden_layers": 3, "layer_types": ["sliding_attention", "full_attention",
                                                                            "sliding_attention"]},
    "GptOss": LLAMA | WINDOW | {"num_local_experts": 4, "num_experts_per_tok": 2},  # sinks
    "Mixtral": LLAMA | {"num_local_experts": 4},
    "Qwen3Moe": LLAMA | EXPERTS | {"num_experts": 4, "head_dim": 16},
    "DeepseekV3": LLAMA | EXPERTS | {"num_key_value_heads": 4, "n_routed_experts": 4, "n_group": 1, "topk_group": 1,
                                     "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16,
                                     "v_head_dim": 16, "first_k_dense_replace": 1},  # values narrower than keys
    "Phi": LLAMA,
    "GPT2": GPT2,
    "OPT": IDS | {"hidden_size": 64, "num_hidden_layers": 2, "ffn_dim": 96, "num_attention_heads": 4, "init_std": 0.2,
                  "max_position_embeddings": 128, "word_embed_proj_dim": 64},
    "GPTNeoX": LLAMA,
}
SEQUENTIAL = {
    "Mamba": MAMBA,
    "Mamba2": MAMBA | {"num_heads": 8, "head_dim": 16, "n_groups": 2, "chunk_size": 8},
    "Rwkv": IDS | {"hidden_size": 64, "num_hidden_layers": 2, "context_length": 128},
    "Falcon": IDS | {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "alibi": True,
                     "initializer_range": 0.2},
    "Bloom": IDS | {"hidden_size": 64, "n_layer": 2, "n_head": 4, "initializer_range": 0.2},
    "Mpt": IDS | {"d_model": 64, "n_heads": 4, "n_layers": 2, "max_seq_len": 128, "expansion_ratio": 2,
                  "initializer_range": 0.2},
    "GPTJ": GPT2 | {"rotary_dim": 8},
    "GPTNeo": IDS | {"hidden_size": 64, "num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]],
                     "window_size": 8, "max_position_embeddings": 128, "initializer_range": 0.2},
    "Llama4Text": LLAMA | {"head_dim": 16, "num_local_experts": 2, "attention_chunk_size": 8, "intermediate_size_mlp": 96},
    "T5": IDS | {"d_model": 64, "d_kv": 16, "d_ff": 96, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0},
    "Bart": BART,
    "Jamba": LLAMA | {"num_hidden_layers": 4, "attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2,
                      "num_experts": 2, "num_experts_per_tok": 1, "mamba_d_state": 8, "mamba_dt_rank": 8},
    "Qwen3Next": LLAMA | EXPERTS | {"head_dim": 16, "layer_types": ["linear_attention", "full_attention"], "num_experts": 4,
                                    "linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 16,
                                    "linear_value_head_dim": 16, "shared_expert_intermediate_size": 48},
    "Lfm2": LLAMA | {"layer_types": ["conv", "full_attention"]},
}
REFUSED = {"RecurrentGemma": LLAMA | {"num_hidden_layers": 3, "lru_width": 64, "attention_window_size": 64}}


def random_checkpoint(name: str, folder: Path, tokenizer: Path) -> Path:
    """Save a small model of a real class: its weights are random, and large enough for each token to matter."""
    torch.manual_seed(0)
    config = getattr(transformers, name + "Config")(**{**PAGED, **SEQUENTIAL, **REFUSED}[name])
    auto = transformers.AutoModelForSeq2SeqLM if config.is_encoder_decoder else transformers.AutoModelForCausalLM
    auto.from_config(config).save_pretrained(folder)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tokenizer / file, folder)
    return folder


def load(folder: Path, **settings: object) -> serve.Runner:
    config = serve.Config(device="cpu", **{"dtype": "float32", "block_size": 4, "kv_cache_memory": 4 << 20, **settings})
    model = serve.load_model("random", serve.Checkpoint(str(folder)), config, False, lambda stage: None)
    kernel, _ = serve.choose_attention(config.attention, model.device)
    return serve.make_runner(model, kernel, config)[0]


def generate(network: transformers.PreTrainedModel, prompt: list[int], length: int) -> tuple[list[int], list[float]]:
    """Return what `model.generate` answers, and the log-probabilities of its tokens."""
    ids = torch.tensor([prompt])
    out = network.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=length, do_sample=False, eos_token_id=None,
                           pad_token_id=0, return_dict_in_generate=True, output_logits=True)
    answer = out.sequences[0, -len(out.logits):].tolist()
    return answer, [logits[0].log_softmax(-1)[id].item() for logits, id in zip(out.logits, answer)]


def random_prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(3, VOCAB, (length,), generator=generator).tolist() for length in PROMPT_LENGTHS]


async def answers(runner: serve.Runner, prompts: list[list[int]], length: int, **engine: int) -> list[list[serve.Token]]:
    async with running(runner, **engine) as batch:
        sampling = serve.SamplingParams(max_tokens=length, logprobs=0)
        return await collect(batch.submit([serve.Prompt(ids) for ids in prompts], sampling))


@pytest.mark.parametrize("name", [*PAGED, *SEQUENTIAL])
async def test_random_weights(name: str, checkpoint: Path, tmp_path: Path) -> None:
    folder = random_checkpoint(name, tmp_path, checkpoint)
    runner = load(folder)
    assert isinstance(runner, serve.PagedRunner if name in PAGED else serve.SequentialRunner)
    encodes = runner.model.network.config.is_encoder_decoder
    reference = transformers.AutoModelForSeq2SeqLM if encodes else transformers.AutoModelForCausalLM
    reference = reference.from_pretrained(folder, dtype=torch.float32)
    prompts = random_prompts()
    got = await answers(runner, prompts, LENGTH, max_batch_tokens=7)
    for prompt, tokens in zip(prompts, got):
        ids, logprobs = generate(reference, prompt, LENGTH)
        assert [token.id for token in tokens] == ids
        assert [token.logprob for token in tokens] == pytest.approx(logprobs, abs=1e-4)


@pytest.mark.parametrize("name, kernel", [("Gemma2", "auto"), ("Gemma2", "sdpa"), ("Gemma2", "eager"), ("GptOss", "auto"), (
    "DeepseekV3", "auto"), ("GPT2", "auto"), ("Mamba", "auto"), ("Falcon", "auto")])
async def test_prompts_are_scored(name: str, kernel: str, checkpoint: Path, tmp_path: Path) -> None:
    """In chunks, side by side and from the cache: log-probabilities are those of one forward pass over the whole prompt."""
    folder = random_checkpoint(name, tmp_path, checkpoint)
    runner = load(folder, attn_implementation=kernel)
    reference = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    first, *others = random_prompts()
    prompts = [first, first[:12], [*first[:16], *others[1]], *others]
    async with running(runner, max_batch_tokens=7) as engine:
        for cached in (False, True):
            sampling = serve.SamplingParams(max_tokens=2, logprobs=3, score_prompt=True)
            stream = engine.submit([serve.Prompt(ids) for ids in prompts], sampling)
            await collect(stream)
            assert bool(stream.sequences[0].num_cached_tokens) == (cached and runner.paged)
            for prompt, seq in zip(prompts, stream.sequences):
                (none, *tokens), logits = sum(seq.scores, []), reference(torch.tensor([prompt])).logits[0].log_softmax(-1)
                assert none == serve.Token(prompt[0]) and [token.id for token in tokens] == prompt[1:]
                values = logits[range(len(prompt) - 1), prompt[1:]].tolist()
                assert [token.logprob for token in tokens] == pytest.approx(values, abs=1e-4)
                tops = logits[:-1].topk(3).values.flatten().tolist()
                assert [logprob for token in tokens for _, logprob in token.top] == pytest.approx(tops, abs=1e-4)


@pytest.mark.parametrize("weights", ["packed", "dequantised"])
async def test_bfloat16_follows_float32(weights: str, checkpoint: Path) -> None:
    """Teacher-forced on real text, in chunks and token by token: the likeliest token is float32's, unless that is near a tie,
    or transformers' own bfloat16 has another too (at one of 198 places with a margin over 0.25)."""
    runner = load(checkpoint, dtype="bfloat16", gguf_weights=weights, block_size=32, kv_cache_memory=64 << 20)
    reference, plain = (transformers.AutoModelForCausalLM.from_pretrained(checkpoint, dtype=dtype)
                        for dtype in (torch.float32, torch.bfloat16))
    lines = (Path(__file__).parent / "lm_eval_tasks" / "prose.jsonl").read_text().splitlines()[:4]
    prompts = [runner.model.tokenizer.encode(json.loads(line)["text"]) for line in lines]
    clear = 0
    for step, chosen in ((256, prompts), (1, prompts[:1])):
        async with running(runner, max_batch_tokens=step) as engine:
            sampling = serve.SamplingParams(max_tokens=0, logprobs=1, score_prompt=True)
            stream = engine.submit([serve.Prompt(ids) for ids in chosen], sampling)
            await collect(stream)
        for prompt, seq in zip(chosen, stream.sequences):
            _, *tokens = sum(seq.scores, [])
            best = reference(torch.tensor([prompt])).logits[0, :-1].topk(2)
            others = plain(torch.tensor([prompt])).logits[0, :-1].argmax(-1).tolist()
            for token, other, ids, values in zip(tokens, others, best.indices.tolist(), best.values.tolist(), strict=True):
                if values[0] - values[1] > 0.25 and other == ids[0]:
                    assert token.top[0][0] == ids[0]
                    clear += 1
    assert clear > 150


@pytest.mark.parametrize("name", ["Mamba2", "Bart", "Falcon"])
async def test_preempted_without_paging(name: str, checkpoint: Path, tmp_path: Path) -> None:
    runner = load(random_checkpoint(name, tmp_path, checkpoint))
    prompts = random_prompts()[1:3]
    alone = [await answers(runner, [prompt], LENGTH) for prompt in prompts]
    blocks = 1 + sum(-(-len(prompt) // 8) for prompt in prompts)  # each prompt fits, both answers do not
    together = await answers(runner, prompts, LENGTH, num_blocks=blocks)
    assert [[token.id for token in tokens] for tokens in together] == [[token.id for token in tokens] for tokens, in alone]


async def test_the_built_in_model(exact: serve.Runner, checkpoint: Path) -> None:
    reference = transformers.AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    texts = ["The capital of France is", "def fibonacci(n):\n", "Once upon a time, in a land far away, there lived a king who "
             "had three daughters, and the youngest of them was so fair that the sun itself", "1, 2, 3, 4,"]
    prompts = [exact.model.tokenizer(text)["input_ids"] for text in texts]
    got = await answers(exact, prompts, 12, max_batch_tokens=9)
    for prompt, tokens in zip(prompts, got):
        ids, logprobs = generate(reference, prompt, 12)
        assert [token.id for token in tokens] == ids
        assert [token.logprob for token in tokens] == pytest.approx(logprobs, abs=1e-3)


@pytest.mark.parametrize("settings", [{"attn_implementation": "eager"}, {"attn_implementation": "sdpa"}, {"block_size": 1},
                                      {"block_size": 256}], ids=str)
async def test_settings_change_no_token(settings: dict, checkpoint: Path, tmp_path: Path) -> None:
    folder = random_checkpoint("Gemma2", tmp_path, checkpoint)
    runner, reference = load(folder, **settings), transformers.AutoModelForCausalLM.from_pretrained(folder)
    prompts = random_prompts()
    got = await answers(runner, prompts, LENGTH, max_batch_tokens=7)
    assert [[token.id for token in tokens] for tokens in got] == [generate(reference, prompt, LENGTH)[0] for prompt in prompts]


@pytest.mark.parametrize("kind, problem", [("flash", "flash"), ("triton", "triton")])
def test_attention_that_cannot_run_here(kind: str, problem: str) -> None:
    with pytest.raises(serve.APIError, match=problem):
        serve.choose_attention(kind, torch.device("cpu"))


@pytest.mark.parametrize("setting, free, expected", [
    (None, 4 * serve.GIB, int(1.6 * serve.GIB)), (None, 64 * serve.GIB, 4 * serve.GIB), (0.5, 4 * serve.GIB, 2 * serve.GIB),
    (1.0, 100, 100), (2.0**20, 1, 2**20)])
def test_cache_bytes(setting: float | None, free: int, expected: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serve, "available_memory", lambda device: free)
    assert serve.cache_bytes(serve.Config(kv_cache_memory=setting), torch.device("cpu")) == expected


def test_the_cache_has_the_size_that_was_asked_for(tiny: Path) -> None:
    runner = load(tiny, kv_cache_memory=1 << 17)
    (size,) = runner.block_bytes.values()
    assert sum(cache.nbytes for pair in runner.caches.values() for cache in pair) == runner.num_blocks * size
    assert size == 2 * 2 * 4 * 2 * 8 * 4  # layers, keys and values, tokens, heads, dimensions, bytes
    assert runner.num_blocks == (1 << 17) // size


def test_a_cache_on_two_devices(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a model that is spread, the device with the least room decides; a layer's batch is where its queries are."""
    sizes = serve.Counter({torch.device("cuda:0"): 1000, torch.device("cuda:1"): 3000})
    monkeypatch.setattr(serve.PagedRunner, "block_bytes", sizes)
    monkeypatch.setattr(serve, "step_peaks", lambda runner, tokens: {})
    monkeypatch.setattr(serve, "available_memory", lambda device: 1_000_000 if device.index else 800_000)
    assert load(tiny, kv_cache_memory=0.9).num_blocks == 300
    batch = serve.ragged({serve.Sequence([1, 2, 3], 3, serve.SamplingParams(), 0, b"", None, 0, block_table=[1]): 3}, 4,
                         torch.device("cpu"))
    elsewhere = batch.to(torch.device("meta"))
    assert batch.to(torch.device("cpu")) is batch
    values = [getattr(elsewhere, f.name) for f in serve.fields(elsewhere)]
    assert {value.device.type for value in values if isinstance(value, torch.Tensor)} == {"meta"}


def test_a_device_map(tiny: Path) -> None:
    """Where there is one device, a model that is spread over all of them is the same."""
    config = serve.Config(device="cpu", device_map="auto")
    model = serve.load_model("some-name", serve.Checkpoint(str(tiny)), config, True, lambda stage: None)
    plain, ids = load(tiny, kv_cache_memory=1 << 17).model.network, torch.arange(9)[None]
    with torch.inference_mode():
        assert model.network.dtype == plain.dtype and model.device.type == "cpu"
        spread = serve.make_runner(model, serve.attention.paged_attention_sdpa, config)[0]
        assert spread.paged and spread.model.network.get_input_embeddings()(ids).equal(plain.get_input_embeddings()(ids))


def test_a_batch_as_tensors() -> None:
    make = partial(serve.Sequence, sampling=serve.SamplingParams(), seed=0, salt=b"", stream=None, index=0)
    chunk = make([10, 11, 12, 13, 14], 5, num_computed_tokens=1, block_table=[4, 2, 7])
    decode = make([20, 21, 22], 2, num_computed_tokens=2, block_table=[5, 1])
    batch = serve.ragged({decode: 1, chunk: 3}, 2, torch.device("cpu"))
    assert batch.input_ids.tolist() == [[22, 11, 12, 13]]
    assert batch.positions.tolist() == [[2, 1, 2, 3]]
    assert batch.slot_mapping.tolist() == [1 * 2 + 0, 4 * 2 + 1, 2 * 2 + 0, 2 * 2 + 1]
    assert batch.block_tables.tolist() == [[5, 1, 0], [4, 2, 7]]
    assert batch.cu_seqlens_q.tolist() == [0, 1, 4]
    assert batch.seq_lens.tolist() == [3, 4]
    assert batch.logits_rows.tolist() == [0]
    assert serve.sampled({decode: 1, chunk: 3}) == [decode]


def test_a_batch_of_scored_prompts_as_tensors() -> None:
    """Rows that choose a token come first; a token that is there already goes to block 0, which nobody reads."""
    make = partial(serve.Sequence, sampling=serve.SamplingParams(score_prompt=True, logprobs=0), seed=0, salt=b"", stream=None,
                   index=0)
    chunk = make([10, 11, 12, 13, 14], 5, block_table=[4, 2, 7])
    hit = make([20, 21, 22, 23], 4, num_computed_tokens=1, num_shared_tokens=2, block_table=[5, 1])
    decode = make([30, 31, 32], 2, num_computed_tokens=2, num_shared_tokens=2, block_table=[6, 3])
    batch = serve.ragged({chunk: 3, hit: 3, decode: 1}, 2, torch.device("cpu"))
    assert batch.slot_mapping.tolist() == [8, 9, 4, 0, 2, 3, 6]
    assert batch.positions.tolist() == [[0, 1, 2, 1, 2, 3, 2]]
    assert batch.logits_rows.tolist() == [5, 6, 0, 1, 2, 3, 4]
    assert [list(seq.scored(count)) for seq, count in ((chunk, 3), (hit, 3), (decode, 1))] == [[1, 2, 3], [2, 3], []]


# What a GPU does, as far as it can be seen without one.


def replayed(function: Callable[[], None], pool: object) -> tuple[Callable[[], None], object]:
    """Stand for a CUDA graph, which reads what lies in its inputs when it is launched: call the function again."""
    return function, pool


def choose(logits: torch.Tensor, sampling: torch.Tensor) -> torch.Tensor:
    """Choose by columns as `sample` does by sequences."""
    rows = [serve.Sequence([0], 1, serve.SamplingParams(temperature=t, top_k=int(k), top_p=p, min_p=m), 0, b"", None, 0)
            for t, k, p, m, _ in sampling.tolist()]
    return serve.sample(logits, rows, sampling[:, 4].tolist())


async def test_decodes_in_graphs(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Padded to captured sizes, from inputs that lie where they lay: the answers are those without graphs."""
    runner, prompts = load(tiny), random_prompts()
    params = [serve.SamplingParams(max_tokens=n, temperature=n % 3 / 2, top_p=0.9, seed=n) for n in (3, 4, 9, 13, 20, 6)]
    params += [serve.SamplingParams(max_tokens=8, repetition_penalty=1.5), serve.SamplingParams(max_tokens=5, logprobs=2)]

    async def answer() -> list[list[serve.Token]]:
        got = {}
        async with running(runner, max_running=7) as engine, trio.open_nursery() as nursery:
            for i, sampling in enumerate(params):
                async def ask(i: int = i, sampling: serve.SamplingParams = sampling) -> None:
                    got[i], = await collect(engine.submit([serve.Prompt(prompts[i % 4][i // 4:])], sampling))
                nursery.start_soon(ask)
        return [got[i] for i in range(len(params))]

    prompts[3] = [7, 8]
    plain = await answer()
    monkeypatch.setattr(serve, "capture", replayed)
    monkeypatch.setattr(serve, "choose_on_gpu", choose)
    with torch.inference_mode():
        serve.capture_graphs(runner, 7)
    assert list(runner.graphs) == [1, 2, 4, 8]
    sizes, replay = [], runner.replay
    monkeypatch.setattr(runner, "replay", lambda batch: (sizes.append(len(batch.seq_lens)), replay(batch))[1])
    with_graphs = await answer()
    for one, other in zip(plain, with_graphs, strict=True):
        assert [token.id for token in one] == [token.id for token in other]
        assert [token.logprob or 0 for token in one] == pytest.approx([token.logprob or 0 for token in other], abs=1e-4)
    assert set(sizes) == {1, 2, 4, 8}


def test_padding_is_written_where_nobody_reads() -> None:
    params = serve.SamplingParams(temperature=0.5, top_k=3)
    make = partial(serve.Sequence, sampling=params, seed=0, salt=b"", stream=None, index=0)
    one, two = (make([20, 21, 22], 2, num_computed_tokens=2, block_table=[5, 1]),
                make([30], 1, num_computed_tokens=1, num_pending_tokens=1, row=1, block_table=[3]))
    batch = serve.ragged({one: 1, two: 1}, 2, torch.device("cpu"), 4, [0.25, 0.5])
    assert batch.slot_mapping.tolist() == [2, 7, 0, 0] and batch.seq_lens.tolist() == [3, 2, 0, 0]
    assert batch.block_tables.tolist() == [[5, 1], [3, 0], [0, 0], [0, 0]] and batch.cu_seqlens_q.tolist() == [0, 1, 2, 3, 4]
    assert batch.input_ids.tolist() == [[22, 0, 0, 0]] and batch.sources.tolist() == [0, 4 + 1, 2, 3]
    assert batch.sampling.tolist() == [[0.5, 3, 1, 0, 0.25], [0.5, 3, 1, 0, 0.5], [0] * 5, [0] * 5]
    assert (batch.decodes, batch.max_seq_len, batch.logits_rows.tolist()) == (4, 3, [0, 1, 2, 3])
    part = batch.first(2)
    assert (part.decodes, part.cu_seqlens_q.tolist(), part.input_ids.shape) == (2, [0, 1, 2], (1, 2))
    chunk = make(list(range(9)), 9, block_table=[7, 8])
    mixed = serve.ragged({one: 1, chunk: 4}, 2, torch.device("cpu"))
    assert (mixed.decodes, mixed.max_seq_len, mixed.sampling, mixed.sources) == (1, 3, None, None)


def test_only_decodes_run_in_graphs(tiny: Path) -> None:
    runner = load(tiny)
    runner.graphs = dict.fromkeys((1, 2, 4))
    decodes = [serve.Sequence([1, 2], 1, serve.SamplingParams(), 0, b"", None, 0, num_computed_tokens=1, block_table=[1])
               for _ in range(5)]
    chunk = serve.Sequence([1, 2, 3], 3, serve.SamplingParams(), 0, b"", None, 0, block_table=[1])

    def rows(batch: serve.Batch) -> int:
        laid_out = runner.lay_out(batch, [0.0] * len(serve.sampled(batch)))
        return 0 if laid_out.sampling is None else len(laid_out.seq_lens)

    assert [rows(dict.fromkeys(decodes[:n], 1)) for n in range(1, 6)] == [1, 2, 4, 4, 0]
    assert rows({decodes[0]: 1, chunk: 3}) == rows({chunk: 1}) == rows({decodes[0]: 1, chunk: 1}) == 0


def test_what_cannot_be_captured_runs_without(tiny: Path, monkeypatch: pytest.MonkeyPatch, caplog) -> None:
    runner = load(tiny)
    monkeypatch.setattr(serve, "capture", lambda *_: 1 / 0)
    with torch.inference_mode():
        serve.capture_graphs(runner, 4)
        assert runner.graphs == {} and "no CUDA graphs (division by zero)" in caplog.text
        serve.advance(runner, {serve.scratch_sequences(runner, 5)[0]: 5})


def test_memory_that_a_gpu_has_for_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (60, 100))
    monkeypatch.setattr(serve, "available_memory", lambda device: 60)
    for setting, expected in ((None, 60 - 15 - 10), (0.5, 22), (1.0, 45), (7.0, 7)):
        assert serve.cache_bytes(serve.Config(kv_cache_memory=setting), torch.device("cuda"), 15) == expected


async def test_a_prompt_on_which_the_model_fails_fails_alone(checkpoint: Path, tmp_path: Path,
                                                             monkeypatch: pytest.MonkeyPatch) -> None:
    runner = load(random_checkpoint("Mamba", tmp_path, checkpoint))
    bad, good = random_prompts()[:2]
    alone = await answers(runner, [good], LENGTH)
    whole = runner.last_logits

    def fails(seq: serve.Sequence, scored: int) -> torch.Tensor:
        if seq.token_ids[:len(bad)] == bad and seq.num_generated_tokens == 2:
            raise RuntimeError("out of memory, say")
        return whole(seq, scored)

    monkeypatch.setattr(runner, "last_logits", fails)
    async with running(runner) as engine:
        stream = engine.submit([serve.Prompt(bad), serve.Prompt(good)], serve.SamplingParams(max_tokens=LENGTH, logprobs=0))
        _, tokens = await collect(stream)
        assert [token.id for token in tokens] == [token.id for token in alone[0]]
        assert stream.sequences[0].finish_reason == "error" and stream.sequences[0].error.status == 500
        with pytest.raises(serve.APIError, match="failed on this request"):
            async for _ in serve.deltas(engine.submit([serve.Prompt(bad)], serve.SamplingParams(max_tokens=LENGTH))):
                pass


def test_a_cache_that_holds_next_to_nothing_is_refused(tiny: Path) -> None:
    with pytest.raises(serve.APIError, match="too few"):
        load(tiny, kv_cache_memory=1 << 12)
