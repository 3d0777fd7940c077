"""The layers of bitsandbytes on CPU: their values as panels (panels_cpu.py), and what has to be put right in the others.

    4 bits (NF4, FP4): weight = table[code] absmax[block], blocks of 64 weights; absmax may itself be 8-bit codes
    8 bits: weight = code SCB[output] / 127

On CPU bitsandbytes' own products dequantise the whole weight each time, or round its scales, or quantise the inputs too.
"""

import math

import torch
from torch import nn

from .panels_cpu import Grouped, PanelLinear, unavailable, unsupported


def values(linear: nn.Linear) -> Grouped:
    """Return the values of a layer of bitsandbytes; a 4-bit one must not have run: that may reorder codes and round scales."""
    from bitsandbytes.functional import dequantize_blockwise  # its package takes a while

    weight, state = linear.weight, getattr(linear, "quant_state", None)
    if state is None:  # int8, one scale a row
        scale = (linear.state.SCB if weight.SCB is None else weight.SCB).float()[:, None] / 127
        return Grouped(8, weight.data.view(torch.uint8), scale, torch.zeros_like(scale))
    assert not getattr(state, "packing_format_for_cpu", False)
    pairs = weight.data.view(torch.uint8).flatten()
    codes = torch.stack([pairs >> 4, pairs & 15], 1).view(linear.out_features, linear.in_features)
    scale = dequantize_blockwise(state.absmax, state.state2) + state.offset if state.nested else state.absmax
    group = math.gcd(state.blocksize, linear.in_features)  # a group may go beyond a row: its parts have one scale
    scale = scale.float().repeat_interleave(state.blocksize // group)[:codes.numel() // group].view(linear.out_features, -1)
    return Grouped(4, codes, scale, torch.zeros_like(scale), state.code)


def settle(network: nn.Module) -> None:
    """Let quantised layers compute in the network's own dtype, and let go of the file that they were quantised from."""
    for name, module in list(network.named_modules()):
        if type(module).__name__ == "Linear4bit":
            module.compute_dtype = network.dtype
            # bitsandbytes' product for CPUs with AVX512-BF16 takes whole tiles, in bfloat16; other layers are dequantised,
            # which bitsandbytes 0.50 gets wrong on CPU where a group goes beyond a row.
            module.support_avx512bf16_for_cpu = (module.support_avx512bf16_for_cpu and module.out_features % 32 == 0
                                                 and network.dtype == torch.bfloat16)
            if module.in_features % module.weight.quant_state.blocksize and module.weight.device.type == "cpu":
                plain = nn.Linear(module.in_features, module.out_features, device="meta")
                plain.bias, plain.weight = module.bias, nn.Parameter(values(module).dequantised().to(network.dtype))
                network.set_submodule(name, plain)
    for parameter in network.parameters():
        if type(parameter) is nn.Parameter and parameter.device.type == "cpu":
            parameter.data = parameter.data.clone()  # else all of it stays mapped for the sake of the embeddings


def pack(network: nn.Module) -> None:
    """Let our kernel compute with the values of bitsandbytes' layers, where there is one."""
    if network.dtype != torch.bfloat16 or network.device.type != "cpu" or unavailable():
        return
    for name, module in list(network.named_modules()):
        if type(module).__name__ in ("Linear4bit", "Linear8bitLt") and unsupported(weight := values(module)) is None:
            panel = PanelLinear(weight, module.bias)
            panel.grouped = weight  # for a fused layer
            network.set_submodule(name, panel)
