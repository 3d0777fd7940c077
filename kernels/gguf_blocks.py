"""The blocks of GGUF's quantised formats, as codes with a scale and a minimum for every group of inputs (panels_cpu.py).

    Q4_0, Q4_1, Q5_0, Q5_1, Q8_0: blocks of 32 weights, one group
    Q4_K, Q5_K: blocks of 256 weights, 8 groups of 32;  Q6_K: 256 weights, 16 groups of 16

Source of the layouts: ggml's ggml-common.h. Products of a scale and a code are exact in float32, so that what is unpacked is
bit for bit what gguf.dequantize gives.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from torch import Tensor

from .panels_cpu import Grouped

FORMATS = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q4_K", "Q5_K", "Q6_K")


def halves(blocks: np.ndarray, at: int) -> np.ndarray:
    """Read a half at a place of each block [..., bytes], as [..., 1] float32."""
    return np.ascontiguousarray(blocks[..., at:at + 2]).view(np.float16).astype(np.float32)


def nibbles(packed: np.ndarray) -> np.ndarray:
    """Return the lower halves of bytes [..., n], then the upper ones: [..., 2 n]."""
    return np.concatenate([packed & 15, packed >> 4], axis=-1)


def bits(packed: np.ndarray) -> np.ndarray:
    """Return 32 bits [..., 4 bytes] as [..., 32], the lowest first."""
    return np.unpackbits(packed, axis=-1, bitorder="little")


def read_small(kind: str, blocks: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return codes, scale and minimum of blocks of 32 weights."""
    scale, rest = halves(blocks, 0), blocks[..., 2:]
    if kind == "Q8_0":
        return rest, scale, np.zeros_like(scale)
    if kind.endswith("_1"):
        minimum, rest = halves(blocks, 2), rest[..., 2:]
    else:
        minimum = scale * (-8 if kind == "Q4_0" else -16)
    if kind.startswith("Q4"):
        return nibbles(rest), scale, minimum
    return nibbles(rest[..., 4:]) | bits(rest[..., :4]) << 4, scale, minimum


def read_large(kind: str, blocks: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return codes, scale and minimum of blocks of 256 weights [outputs, blocks, bytes]."""
    lead, shifts = blocks.shape[:-1], np.array([0, 4], np.uint8)[:, None]
    if kind == "Q6_K":
        low, high = blocks[..., :128].reshape(*lead, 2, 1, 64), blocks[..., 128:192].reshape(*lead, 2, 1, 32)
        low = (low >> shifts & 15).reshape(*lead, 2, 4, 32)
        codes = low | (high >> np.array([0, 2, 4, 6], np.uint8)[:, None] & 3) << 4
        scale = halves(blocks, 208) * blocks[..., 192:208].view(np.int8).astype(np.float32)
        return codes.reshape(*lead, 256), scale, -32 * scale
    scales, minima = gguf.quants.Q4_K.get_scale_min(blocks[..., 4:16].reshape(-1, 12))
    scale = halves(blocks, 0) * scales.reshape(*lead, 8).astype(np.float32)
    minimum = -halves(blocks, 2) * minima.reshape(*lead, 8).astype(np.float32)
    codes = (blocks[..., -128:].reshape(*lead, 4, 1, 32) >> shifts & 15).reshape(*lead, 8, 32)
    if kind == "Q5_K":
        codes = codes | (blocks[..., 16:48].reshape(*lead, 1, 32) >> np.arange(8, dtype=np.uint8)[:, None] & 1) << 4
    return codes.reshape(*lead, 256), scale, minimum


def read_blocks(tensor: Any) -> Grouped | None:
    """Return a gguf.ReaderTensor's matrix as codes, or None where it is no matrix or of another format."""
    kind = tensor.tensor_type.name
    if kind not in FORMATS or len(tensor.shape) != 2:
        return None
    inputs, outputs = map(int, tensor.shape)
    blocks = tensor.data.reshape(outputs, -1, gguf.GGML_QUANT_SIZES[tensor.tensor_type][1])
    codes, scale, minimum = (read_large if kind.endswith("_K") else read_small)(kind, blocks)

    def matrix(array: np.ndarray) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(array.reshape(outputs, -1)))

    if kind.startswith("Q4"):
        return Grouped(4, matrix(codes), matrix(scale), matrix(minimum), torch.arange(16.0))
    return Grouped(8, matrix(codes), matrix(scale), matrix(minimum))


def row_keys(weight: Tensor) -> Iterator[bytes]:
    """Return the contents of each row of a bfloat16 matrix."""
    return (row.tobytes() for row in weight.contiguous().view(torch.int16).numpy())


def read_codes(path: str | Path, weights: dict[str, Tensor]) -> dict[str, Grouped]:
    """Return those of a network's bfloat16 weights that are quantised in a GGUF file.

    They are found by value: transformers renames them and reorders their rows, and knows how; here their contents tell.
    """
    found: dict[str, Grouped] = {}
    for tensor in gguf.GGUFReader(path).tensors:
        if (grouped := read_blocks(tensor)) is None:
            continue
        dequantised = torch.from_numpy(gguf.dequantize(tensor.data, tensor.tensor_type)).bfloat16()
        places = {key: i for i, key in enumerate(row_keys(dequantised))}
        for name, weight in weights.items():
            if name in found or weight.shape[1:] != dequantised.shape[1:] or next(row_keys(weight[:1])) not in places:
                continue
            if None not in (rows := [places.get(key) for key in row_keys(weight)]):
                found[name] = grouped.rows(torch.tensor(rows))
    return found
