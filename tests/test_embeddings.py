"""Embeddings: the numbers of sentence-transformers and of the plain network, in every form of input and output."""
from __future__ import annotations

import base64
import json
import shutil
import struct
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx2 as httpx
import openai
import pytest
import sentence_transformers
import serve
import torch
import transformers
import weights
from conftest import ServerProcess, ask, start_server
from openai.types import CreateEmbeddingResponse
from sentence_transformers.sentence_transformer.modules import Dense, Normalize, Pooling, Transformer
from test_model_pool import pool

TEXTS = ["A cat sits on the mat.", "Hello", "The quick brown fox jumps over the lazy dog. " * 12, "éß日本 🎉", "two\nlines",
         "a" * 50]


@pytest.fixture(scope="module")
def embedder(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """A server that chats with a small model of random weights, and embeds with it and with one of real weights."""
    folder = tmp_path_factory.mktemp("embedding")
    (folder / "chat").symlink_to(tiny)
    (folder / "minilm").symlink_to(weights.minilm())
    with start_server(folder, "chat", "minilm", "--kv-cache-memory", "64M") as server:
        yield server


def post(server: ServerProcess, text: object, model: str = "minilm", **fields: object) -> httpx.Response:
    return httpx.post(server.url + "/v1/embeddings", json={"model": model, "input": text, **fields}, timeout=60)


def vectors(server: ServerProcess, text: object, model: str = "minilm", **fields: object) -> torch.Tensor:
    response = post(server, text, model, **fields)
    assert response.status_code == 200, response.text
    CreateEmbeddingResponse.model_validate(response.json())
    assert [entry["index"] for entry in response.json()["data"]] == list(range(len(response.json()["data"])))
    return torch.tensor([entry["embedding"] for entry in response.json()["data"]])


def assert_close(got: torch.Tensor, want: torch.Tensor) -> None:
    torch.testing.assert_close(got, want.float(), atol=1e-4, rtol=0)


def test_the_numbers_are_those_of_sentence_transformers(embedder: ServerProcess) -> None:
    oracle = sentence_transformers.SentenceTransformer(str(weights.minilm()), device="cpu")
    want = oracle.encode(TEXTS, convert_to_tensor=True)
    assert_close(vectors(embedder, TEXTS), want)
    with ThreadPoolExecutor(len(TEXTS)) as pool:  # alone or in whatever batch they come into
        assert_close(torch.cat(list(pool.map(lambda text: vectors(embedder, text), TEXTS))), want)
    client = openai.OpenAI(base_url=embedder.url + "/v1", api_key="none")  # it asks for base64
    assert_close(torch.tensor([entry.embedding for entry in client.embeddings.create(model="minilm", input=TEXTS).data]), want)


def test_forms_of_input_and_output(embedder: ServerProcess) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(weights.minilm())
    ids = [tokenizer(text)["input_ids"] for text in TEXTS]
    want = vectors(embedder, TEXTS)
    assert_close(vectors(embedder, ids), want)
    assert_close(vectors(embedder, ids[0]), want[:1])
    encoded = post(embedder, TEXTS[:2], encoding_format="base64").json()
    raw = [struct.unpack("<384f", base64.b64decode(entry["embedding"])) for entry in encoded["data"]]
    assert_close(torch.tensor(raw), want[:2])
    short = vectors(embedder, TEXTS, dimensions=64)
    assert_close(short, torch.nn.functional.normalize(want[:, :64], dim=-1))
    usage = post(embedder, TEXTS).json()["usage"]
    assert usage == {"prompt_tokens": sum(map(len, ids)), "total_tokens": sum(map(len, ids))}


REFUSED = [
    ({"text": ""}, "input", "invalid_value"), ({"text": []}, "input", "invalid_value"),
    ({"text": ["a", ""]}, "input", "invalid_value"), ({"text": [[]]}, "input", "invalid_value"),
    ({"text": ["a", 1]}, "input", "invalid_value"), ({"text": ["a"] * 2049}, "input", "invalid_value"),
    ({"text": [30522]}, None, "invalid_value"), ({"text": [-1]}, "input", "invalid_value"),
    ({"text": 5}, "input", "invalid_value"), ({"text": "word " * 300}, None, "context_length_exceeded"),
    ({"text": "a", "dimensions": 385}, "dimensions", "invalid_value"),
    ({"text": "a", "dimensions": 0}, "dimensions", "invalid_value"),
    ({"text": "a", "encoding_format": "int8"}, "encoding_format", "invalid_value"),
    ({"text": "a", "truncate_prompt_tokens": 5}, "truncate_prompt_tokens", "unsupported_parameter"),
]


@pytest.mark.parametrize("fields, param, code", REFUSED)
def test_what_is_refused(embedder: ServerProcess, fields: dict, param: str, code: str) -> None:
    response = post(embedder, **fields)
    error = response.json()["error"]
    assert response.status_code == 400 and error["code"] == code, error
    assert param is None or error["param"].startswith(param)


def test_as_long_as_the_model_reads(embedder: ServerProcess) -> None:
    assert post(embedder, [100] * 256).status_code == 200
    error = post(embedder, [100] * 257).json()["error"]
    assert error["code"] == "context_length_exceeded" and "256" in error["message"] and "257" in error["message"]


def test_an_encoder_does_not_chat(embedder: ServerProcess) -> None:
    asked = {"chat/completions": {"messages": [{"role": "user", "content": "a"}]}, "completions": {"prompt": "a"}}
    for path, fields in asked.items():
        response = httpx.post(f"{embedder.url}/v1/{path}", json={"model": "minilm", **fields})
        assert response.status_code == 400 and response.json()["error"]["param"] == "model"
    assert ask(embedder, model="chat", max_tokens=2).status_code == 200
    listed = httpx.get(embedder.url + "/v1/models").json()["data"]
    assert [(model["id"], model["max_model_len"]) for model in listed] == [("chat", 256), ("minilm", 256)]
    tokens = httpx.post(embedder.url + "/tokenize", json={"model": "minilm", "prompt": "a"}).json()["tokens"]
    assert tokens == [101, 1037, 102]


def test_a_text_generator_embeds_by_its_last_token(embedder: ServerProcess, tiny: Path) -> None:
    network = transformers.AutoModel.from_pretrained(tiny, dtype="float32")
    prompts = [[5, 6, 7], list(range(1, 200)), [9], list(range(1, 190))]
    with torch.inference_mode():
        want = torch.cat([network(torch.tensor([ids])).last_hidden_state[:, -1] for ids in prompts])
    want = torch.nn.functional.normalize(want, dim=-1)
    for _ in range(2):  # the second time the prompts' beginnings are in the prefix cache
        assert_close(vectors(embedder, prompts, "chat"), want)
    error = post(embedder, [1] * 256, "chat").json()["error"]
    assert error["code"] == "context_length_exceeded"


@pytest.fixture
def bert(tmp_path: Path) -> Path:
    """A small BERT of random weights with a real tokenizer, as transformers saves it."""
    torch.manual_seed(0)
    config = transformers.BertConfig(vocab_size=30522, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
                                     intermediate_size=64, initializer_range=0.5)
    transformers.BertModel(config).save_pretrained(tmp_path / "bert")
    for name in ("tokenizer.json", "tokenizer_config.json", "vocab.txt"):
        shutil.copy(weights.minilm() / name, tmp_path / "bert")
    return tmp_path / "bert"


def embedded(folder: Path, texts: list[str]) -> torch.Tensor:
    """Return a checkpoint's vectors, all of one batch."""
    model = serve.load_model("x", serve.Checkpoint(str(folder)), serve.Config(device="cpu"), False, lambda stage: None)
    assert model.kind == "encoder"
    ids = [model.tokenizer(text)["input_ids"] for text in texts]
    with torch.inference_mode():
        return torch.stack(serve.embed(model, [serve.Job((), tokens, len(tokens), token=None) for tokens in ids]))


@pytest.mark.parametrize("mode", ["cls", "mean", "lasttoken"])
def test_pooling_is_the_checkpoints_own(bert: Path, tmp_path: Path, mode: str) -> None:
    parts = [Transformer(str(bert)), pooling := Pooling(32, pooling_mode=mode)]
    if mode == "mean":  # as EmbeddingGemma has it
        parts += [Dense(pooling.pooling_output_dimension, 16, activation_function=torch.nn.Identity()), Normalize()]
    if mode == "cls":
        parts.append(Dense(32, 8, bias=False))
    oracle = sentence_transformers.SentenceTransformer(modules=parts, device="cpu")
    oracle.save(str(tmp_path / "saved"))
    assert_close(embedded(tmp_path / "saved", TEXTS), oracle.encode(TEXTS, convert_to_tensor=True))


def test_without_a_pooling_of_its_own_the_normalised_mean(bert: Path) -> None:
    model = sentence_transformers.SentenceTransformer(modules=[Transformer(str(bert)), Pooling(32), Normalize()], device="cpu")
    assert_close(embedded(bert, TEXTS), model.encode(TEXTS, convert_to_tensor=True))


@pytest.mark.parametrize("settings", [{"pooling_mode": "max"}, {"pooling_mode": ["mean", "max"]},
                                      {"pooling_mode_mean_tokens": True, "pooling_mode_max_tokens": True}], ids=str)
def test_a_pooling_that_is_not_known_is_refused_by_name(bert: Path, settings: dict) -> None:
    (bert / "modules.json").write_text('[{"path": "1_Pooling", "type": "a.Pooling"}]')
    (bert / "1_Pooling").mkdir()
    (bert / "1_Pooling" / "config.json").write_text(json.dumps(settings))
    with pytest.raises(serve.APIError, match="max"):
        embedded(bert, TEXTS)


def test_a_module_that_is_not_known_is_refused_by_name(bert: Path) -> None:
    (bert / "modules.json").write_text('[{"path": "", "type": "a.Transformer"}, {"path": "1_LSTM", "type": "a.LSTM"}]')
    with pytest.raises(serve.APIError, match="LSTM"):
        embedded(bert, TEXTS)


KINDS = {
    "BertModel": "encoder", "BertForMaskedLM": "encoder", "BertLMHeadModel": "text", "XLMRobertaModel": "encoder",
    "ModernBertForMaskedLM": "encoder", "MPNetModel": "encoder", "T5EncoderModel": "encoder",
    "T5ForConditionalGeneration": "text", "BartForConditionalGeneration": "text", "LlamaForCausalLM": "text",
    "MistralModel": "text", "Gemma3ForCausalLM": "text", "GPT2LMHeadModel": "text", "WhisperForConditionalGeneration":
    "speech", "Wav2Vec2ForCTC": "speech", "ParakeetForCTC": "speech", "MoonshineForConditionalGeneration": "speech",
    "Speech2TextForConditionalGeneration": "speech", "VoxtralForConditionalGeneration": "text", "MambaForCausalLM":
    "text",
}


@pytest.mark.parametrize("architecture, kind", KINDS.items())
def test_the_kind_of_a_checkpoint(architecture: str, kind: str, tmp_path: Path) -> None:
    config = getattr(transformers, architecture).config_class(architectures=[architecture])
    assert serve.kind_of(serve.Checkpoint(str(tmp_path)), config)[0] == kind


async def test_an_encoder_is_loaded_on_demand_and_dropped_like_any_model(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serve, "locate_on_hub", lambda name: lambda: serve.Checkpoint(str(weights.minilm())))
    async with pool(tiny) as models:
        with pytest.raises(serve.APIError) as refusal:
            await models.get("org/minilm")
        assert (refusal.value.status, refusal.value.param) == (400, "model")
        engine = await models.get("org/minilm", ["encoder"])
        (vector,) = await serve.encoded(engine, [serve.Prompt([101, 7592, 102])])
        assert abs(vector.norm() - 1) < 1e-5 and models.names() == [str(tiny), "org/minilm"]
        assert not models.drop_idle(60) and models.drop_idle(0) and engine.stopped and models.names() == [str(tiny)]
        with pytest.raises(serve.APIError) as gone:
            await serve.encoded(engine, [serve.Prompt([101, 102])])
        assert gone.value.status == 503
