"""Layers are fused by structure and only where the result agrees. The weights are random, the architectures real."""
from __future__ import annotations

import pytest
import serve
import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM

SMALL = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
         "head_dim": 32, "vocab_size": 199, "max_position_embeddings": 256, "pad_token_id": 0, "bos_token_id": 1,
         "eos_token_id": 2}
FUSED = {  # architecture → what sets it apart
    "llama": {}, "qwen2": {}, "qwen3": {}, "gemma": {}, "mistral": {"sliding_window": 8},
    "smollm3": {"no_rope_layers": [1, 1, 1]},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},  # keep their own MLP
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32},
}
LEFT = {
    "granite": {"residual_multiplier": 0.5},  # shaped like Llama, but computes something else
    "ernie4_5": {},  # turns pairs of neighbours, not halves, in float32
    "gemma2": {}, "olmo2": {}, "phi3": {}, "starcoder2": {}, "cohere": {},
    "gpt_oss": {"num_local_experts": 4, "num_experts_per_tok": 2},  # its cosines are half as wide
    "gpt2": {"n_embd": 64, "n_layer": 3, "n_head": 2},
}


def make_runner(architecture: str, extra: dict) -> serve.PagedRunner:
    """Return a runner over random weights, self-tested."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(architecture, **{**SMALL, **extra})
    network = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval().requires_grad_(False)
    for name, parameter in network.named_parameters():
        if parameter.dim() == 1 and "bias" in name:
            torch.nn.init.normal_(parameter, std=0.1)
        elif parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.08)
    model = serve.Model(architecture, network, None, transformers.GenerationConfig(), frozenset(), frozenset(),
                        199, 256, 1, False, 0)
    runner = serve.PagedRunner(model, serve.attention_cpu.paged_attention, 32)
    assert serve.self_test(runner) is None
    return runner


def fused_layers(runner: serve.PagedRunner) -> int:
    return sum(len(module.layers) for module in runner.model.network.modules() if isinstance(module, serve.PatchedLayers))


def logits(runner: serve.PagedRunner) -> torch.Tensor:
    """Return the last logits of a prompt in two chunks and of another one's decode."""
    one, two = serve.scratch_sequences(runner, 40, 12)
    serve.advance(runner, {one: 23, two: 11})
    return serve.advance(runner, {one: 17, two: 1})


@pytest.mark.skipif(serve.decoder_layer_cpu.unavailable() is not None, reason=str(serve.decoder_layer_cpu.unavailable()))
@pytest.mark.parametrize("architecture, extra, count", [(name, extra, 3) for name, extra in FUSED.items()]
                         + [(name, extra, 0) for name, extra in LEFT.items()] + [("smollm3", {"no_rope_layers": [1, 0, 1]}, 2)])
@torch.inference_mode()
def test_fuses_what_agrees(architecture: str, extra: dict, count: int) -> None:
    runner = make_runner(architecture, extra)
    before = logits(runner)
    serve.fuse_layers(runner)
    assert fused_layers(runner) == count
    after = logits(runner)
    assert (after - before).norm() / before.norm() < (0.03 if count else 1e-6)


@torch.inference_mode()
def test_a_wrong_kernel_is_not_patched_in(monkeypatch: pytest.MonkeyPatch) -> None:
    right = serve.decoder_layer_cpu.FusedLayers.forward
    monkeypatch.setattr(serve.decoder_layer_cpu.FusedLayers, "forward", lambda *args, **kw: right(*args, **kw) * 1.1)
    runner = make_runner("llama", {})
    serve.fuse_layers(runner)
    assert fused_layers(runner) == 0


@torch.inference_mode()
def test_no_compiler_no_fusion(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serve.decoder_layer_cpu, "unavailable", lambda: "no compiler")
    runner = make_runner("llama", {})
    serve.fuse_layers(runner)
    assert fused_layers(runner) == 0
