"""4- and 8-bit weights by bitsandbytes, quantised here or in the checkpoint, and checkpoints quantised by others."""
import importlib.util
import json
import shutil
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
import serve
import torch
import transformers
from bitsandbytes.functional import dequantize_4bit, int8_vectorwise_dequant
from conftest import QUESTION, ServerProcess, ask, is_healthy, start_server, wait_for
from safetensors.torch import load_file, save_file
from serve_kernels import bitsandbytes_cpu
from test_model import tiny_gguf  # noqa: F401


def load(folder: Path, **settings: object) -> serve.Model:
    config = serve.Config(device="cpu", **settings)
    return serve.load_model("some-name", serve.Checkpoint(str(folder)), config, True, lambda stage: None)


def bytes_of(model: serve.Model) -> int:
    """Return the bytes of a model's tensors, bitsandbytes' own scales and tables included."""
    return serve.tensor_bytes(model.network, set())


@pytest.fixture(scope="module")
def quantised(checkpoint: Path) -> dict[str, serve.Model]:
    """The built-in model, quantised as it is loaded, in bitsandbytes' own layers; nothing here may run it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bitsandbytes_cpu, "pack", lambda network: None)
        return {name: load(checkpoint, quantization=name) for name in ("bnb-4bit", "bnb-8bit")}


# Flags.


@pytest.mark.parametrize("argv, bits", [
    (["--load-in-4bit"], "bnb-4bit"), (["--load_in_4bit"], "bnb-4bit"), (["--load-in-8bit"], "bnb-8bit"),
    (["--load_in_8bit"], "bnb-8bit"), (["--quantization", "bnb-4bit"], "bnb-4bit"), (["--quantization=bnb-8bit"], "bnb-8bit"),
    (["--use_bnb_nested_quant", "--load-in-4bit"], "bnb-4bit"), ([], None),
])
def test_flags(argv: list[str], bits: str | None) -> None:
    assert serve.parse_command_line(argv).quantization == bits


@pytest.mark.parametrize("argv", [
    ["--load-in-4bit", "--load-in-8bit"], ["--load_in_8bit", "--quantization", "bnb-4bit"], ["--quantization", "gptq"],
    ["--quantization"], ["--llm-int8-threshold", "-1"], ["--bnb-4bit-quant-type", "int4"],
], ids=" ".join)
def test_contradictions(argv: list[str], capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as stop:
        serve.parse_command_line(argv)
    assert stop.value.code == 2 and capsys.readouterr().err.startswith("serve.py: argument --")


def test_what_the_flags_ask_bitsandbytes_for() -> None:
    """The default threshold is the one with which 8-bit layers treat each row alone."""
    asked = serve.placement(serve.Config(device="cpu", quantization="bnb-4bit"))["quantization_config"]
    assert (asked.load_in_4bit, asked.bnb_4bit_quant_type, asked.bnb_4bit_use_double_quant) == (True, "nf4", True)
    asked = serve.placement(serve.Config(device="cpu", quantization="bnb-8bit"))["quantization_config"]
    assert (asked.load_in_8bit, asked.llm_int8_threshold) == (True, 0.0)
    asked = serve.placement(serve.Config(device="cpu", quantization="bnb-8bit", llm_int8_threshold=6.0))["quantization_config"]
    assert asked.llm_int8_threshold == 6.0
    assert "quantization_config" not in serve.placement(serve.Config(device="cpu"))


# The weights.


@pytest.mark.parametrize("name, kind, bits", [("bnb-4bit", "Linear4bit", 4), ("bnb-8bit", "Linear8bitLt", 8)])
def test_layers_and_memory(name: str, kind: str, bits: int, quantised: dict[str, serve.Model], checkpoint: Path) -> None:
    """Every linear layer but the tied lm_head is quantised, at its bits and at most 0.2 more a weight for scales."""
    network = quantised[name].network
    layers = [module for module in network.modules() if isinstance(module, torch.nn.Linear)]
    assert {type(layer).__name__ for layer in layers} == {kind, "Linear"} and len(layers) == 7 * 30 + 1
    assert type(network.lm_head) is torch.nn.Linear and network.lm_head.weight is network.model.embed_tokens.weight
    weights = sum(layer.in_features * layer.out_features for layer in layers[:-1])
    embeddings, norms = 2 * 49152 * 576, 2 * 61 * 576
    scales = bytes_of(quantised[name]) - weights * bits // 8 - embeddings - norms
    assert 0 < scales < 0.2 * weights / 8, scales
    assert network.dtype == torch.bfloat16
    assert all(getattr(layer, "compute_dtype", torch.bfloat16) == torch.bfloat16 for layer in layers)


@pytest.mark.parametrize("name", ["bnb-4bit", "bnb-8bit"])
def test_values_are_bitsandbytes_own(name: str, quantised: dict[str, serve.Model]) -> None:
    """What `values` takes out of a layer is, weight for weight, what bitsandbytes dequantises; and our kernel runs it."""
    for layer in quantised[name].network.model.layers[::29]:
        for linear in (layer.self_attn.k_proj, layer.mlp.down_proj):
            values = bitsandbytes_cpu.values(linear)
            if name == "bnb-4bit":
                linear.weight.quant_state.dtype, before = torch.float32, linear.weight.quant_state.dtype
                want = dequantize_4bit(linear.weight.data, linear.weight.quant_state)
                linear.weight.quant_state.dtype = before
            else:
                want = int8_vectorwise_dequant(linear.weight.data, linear.weight.SCB)
            assert values.group == (64 if name == "bnb-4bit" else linear.in_features) and not values.minimum.any()
            assert torch.allclose(values.dequantised(), want, rtol=1e-6, atol=0) and want.abs().max() > 0.1
            if serve.panels_cpu.unavailable() is None:
                x = torch.randn(3, linear.in_features).bfloat16()
                got = serve.panels_cpu.PanelLinear(values, None)(x).double()
                assert serve.relative_error(got, x.double() @ want.bfloat16().double().T) < 0.01


def test_our_kernel_takes_every_layer_it_can(checkpoint: Path) -> None:
    if problem := serve.panels_cpu.unavailable():
        pytest.skip(problem)
    model = load(checkpoint, quantization="bnb-4bit")
    panels = [module for module in model.network.modules() if isinstance(module, serve.panels_cpu.PanelLinear)]
    assert len(panels) == 7 * 30 and {panel.call.bits for panel in panels} == {4}
    with torch.inference_mode():
        serve.make_runner(model, serve.choose_attention("auto", model.device)[0], serve.Config(device="cpu"))
    patches = [module for module in model.network.modules() if isinstance(module, serve.PatchedLayers)]
    assert sum(len(patch.layers) for patch in patches) == 30
    assert {layer.call.down.bits for patch in patches for layer in patch.fused.layers} == {4}


@pytest.mark.parametrize("name", ["bnb-4bit", "bnb-8bit"])
def test_odd_widths(name: str, checkpoint: Path, tmp_path: Path) -> None:
    """Outputs that are no multiple of 32, inputs that are no multiple of a group, against the plain network; random weights.

    bitsandbytes' own answer would not do as the oracle: on CPU it dequantises such layers wrongly.
    """
    torch.manual_seed(0)
    config = transformers.LlamaConfig(vocab_size=49152, hidden_size=80, intermediate_size=100, num_hidden_layers=1,
                                      num_attention_heads=2, num_key_value_heads=1, initializer_range=0.2)
    transformers.LlamaForCausalLM(config).bfloat16().save_pretrained(tmp_path)
    shutil.copy(checkpoint / "tokenizer.json", tmp_path)
    shutil.copy(checkpoint / "tokenizer_config.json", tmp_path)
    model, plain = load(tmp_path, quantization=name), load(tmp_path)
    layers = [(plain.network.get_submodule(path), module) for path, module in model.network.named_modules()
              if path.endswith("_proj")]
    assert len(layers) == 7
    with torch.inference_mode():
        for linear, quantised in layers:
            x = torch.randn(50, linear.in_features).bfloat16()
            want, got = linear(x).float(), quantised(x).float()
            assert 0.002 < (got - want).norm() / want.norm() < (0.12 if name == "bnb-4bit" else 0.03), quantised
        assert serve.make_runner(model, serve.choose_attention("auto", model.device)[0], serve.Config(device="cpu"))[0].paged


# Answers.


@pytest.fixture(scope="module")
def servers(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, ServerProcess]]:
    """The built-in model at 4 and at 8 bits, as a user starts it."""
    folder = tmp_path_factory.mktemp("servers")
    with ExitStack() as stack:
        flags = "--kv-cache-memory", "64MiB"
        both = {bits: stack.enter_context(start_server(folder, f"--load_in_{bits}bit", *flags, ready=False)) for bits in "48"}
        for server in both.values():
            wait_for(lambda url=server.url: is_healthy(url), server.process, server.log)
        yield both


@pytest.mark.parametrize("bits", "48")
def test_answers(bits: str, servers: dict[str, ServerProcess]) -> None:
    response = ask(servers[bits], max_tokens=12).json()
    assert "Paris" in response["choices"][0]["message"]["content"], response
    log = servers[bits].log.read_text()
    assert "MatMul8bitLt" not in log and "WARNING" not in log and "no paged attention" not in log, log


@pytest.mark.parametrize("bits", "48")
def test_the_checkpoint_does_not_stay_in_memory(bits: str, servers: dict[str, ServerProcess]) -> None:
    maps = Path(f"/proc/{servers[bits].process.pid}/maps").read_text()
    assert "libtorch_cpu" in maps and "model.safetensors" not in maps


@pytest.mark.parametrize("name", ["bnb-4bit", "bnb-8bit"])
def test_the_same_tokens_as_generate(name: str, checkpoint: Path) -> None:
    """In float32, paged and in chunks, against the quantised network's own generate."""
    config = serve.Config(device="cpu", dtype="float32", quantization=name, block_size=8, kv_cache_memory=64 << 20)
    model = load(checkpoint, dtype="float32", quantization=name)
    ids = serve.render_chat(model, QUESTION, False, {}).token_ids
    want = model.network.generate(torch.tensor([ids]), max_new_tokens=8, do_sample=False)[0, len(ids):].tolist()
    runner, _ = serve.make_runner(model, serve.choose_attention("auto", model.device)[0], config)
    assert runner.paged
    (seq,) = serve.scratch_sequences(runner, 1)
    seq.token_ids, got = list(ids), []
    with torch.inference_mode():
        while len(got) < len(want):
            step = min(len(seq.token_ids) - seq.num_computed_tokens, 9)
            logits = serve.advance(runner, {seq: step})
            if seq.num_computed_tokens == len(seq.token_ids):
                got.append(logits.argmax().item())
                seq.token_ids.append(got[-1])
    assert got == want


# Checkpoints that are quantised already.


@pytest.mark.parametrize("name", ["bnb-4bit", "bnb-8bit"])
def test_a_saved_checkpoint_needs_no_flag(name: str, quantised: dict[str, serve.Model], checkpoint: Path,
                                          tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    network = quantised[name].network
    network.save_pretrained(tmp_path)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(checkpoint / file, tmp_path)
    assert serve.Checkpoint(str(tmp_path)).size < 0.7 * serve.Checkpoint(str(checkpoint)).size
    with monkeypatch.context() as patch:
        patch.setattr(bitsandbytes_cpu, "pack", lambda network: None)
        loaded = load(tmp_path).network
    for before, after in zip(network.model.layers[7].mlp.children(), loaded.model.layers[7].mlp.children()):
        if isinstance(before, torch.nn.Linear):
            assert bitsandbytes_cpu.values(before).dequantised().equal(bitsandbytes_cpu.values(after).dequantised())
            assert type(before) is type(after) is not torch.nn.Linear
    with pytest.raises(serve.APIError, match="quantised already: leave out --quantization"):
        load(tmp_path, quantization=name)


def test_gguf_is_quantised_already(tiny_gguf: Path) -> None:  # noqa: F811
    with pytest.raises(serve.APIError, match="cannot be loaded: .*GGUF") as refusal:
        serve.load_model("some-name", serve.Checkpoint(str(tiny_gguf.parent), tiny_gguf.name),
                         serve.Config(device="cpu", quantization="bnb-4bit"), True, lambda stage: None)
    assert refusal.value.status == 400


def requantised(tiny: Path, folder: Path, quantization: dict[str, object]) -> dict[str, torch.Tensor]:
    """Copy the tiny checkpoint, saying that it is quantised; return its weights."""
    shutil.copytree(tiny, folder, dirs_exist_ok=True)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": quantization}))
    return load_file(folder / "model.safetensors")


def test_fp8_is_dequantised_on_cpu(tiny: Path, tmp_path: Path) -> None:
    """In blocks of 16 x 16, each with a scale of its own."""
    weights = requantised(tiny, tmp_path, {"quant_method": "fp8", "weight_block_size": [16, 16]})
    expected = dict(weights)
    for name, weight in list(weights.items()):
        if "_proj" in name:
            blocks = weight.float().unflatten(0, (-1, 16)).unflatten(2, (-1, 16))  # [rows, 16, columns, 16]
            scales = blocks.abs().amax((1, 3)) / 448
            weights[name] = (blocks / scales[:, None, :, None]).flatten(2).flatten(0, 1).to(torch.float8_e4m3fn)
            weights[name.replace("weight", "weight_scale_inv")] = scales
            blocks = weights[name].float().unflatten(0, (-1, 16)).unflatten(2, (-1, 16))
            expected[name] = (blocks * scales[:, None, :, None]).flatten(2).flatten(0, 1)
    save_file(weights, tmp_path / "model.safetensors")
    state = load(tmp_path, dtype="float32").network.state_dict()
    assert all(torch.allclose(state[name].float(), weight.float(), rtol=1e-2) for name, weight in expected.items())


@pytest.mark.parametrize("quantization, missing", [
    ({"quant_method": "gptq", "bits": 4, "group_size": 32}, "optimum"),
    ({"quant_method": "awq", "bits": 4, "group_size": 32}, "gptqmodel"),
    ({"quant_method": "compressed-tensors", "format": "float-quantized"}, "compressed.tensors"),
    ({"quant_method": "magic"}, "magic"),
], ids=["gptq", "awq", "compressed-tensors", "unknown"])
def test_what_is_missing_is_named(quantization: dict, missing: str, tiny: Path, tmp_path: Path) -> None:
    if importlib.util.find_spec(missing.replace(".", "_")):
        pytest.skip(f"{missing} is installed")
    requantised(tiny, tmp_path, quantization)
    with pytest.raises(serve.APIError, match=missing) as refusal:
        load(tmp_path)
    assert refusal.value.status == 400 and "\n" not in refusal.value.message


def test_it_ends_the_start(tiny: Path, tmp_path: Path) -> None:
    requantised(tiny, tmp_path / "gptq", {"quant_method": "gptq", "bits": 4})
    with start_server(tmp_path, str(tmp_path / "gptq"), ready=False) as server:
        assert server.process.wait(60) == 2 and "optimum" in server.log.read_text()
