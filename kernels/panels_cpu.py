"""Linear layers in panels of 32 outputs, in bfloat16 or left as a checkpoint's codes of 4 or 8 bits.

    y[row, n] = Σ_k x[row, k] weight[n, k] + bias[n]
    weight[n, k] = value(codes[n, k]) scale[n, k // group] + minimum[n, k // group]     value: table[code], or the code itself

    x [tokens, inputs] bfloat16; weight [outputs, inputs] bfloat16; codes [outputs, inputs] uint8, or int8 seen as uint8;
    scale, minimum [outputs, inputs / group] float32; table [16] float32.

A panel of codes is unpacked to the bfloat16 weights that it stands for in the registers, or in the cache for many rows: codes
change a layer's speed and none of its bits. At a few rows a layer takes the time that memory needs to deliver it, and 4 bits
are delivered sooner than 16. One row's result is bitwise the same whatever other rows are in the call.
"""

import ctypes
import functools
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

if __name__ == "__main__":  # run as a file: stand where serve.py puts this folder
    import sys
    import types

    sys.modules["serve_kernels"] = types.ModuleType("serve_kernels")
    sys.modules["serve_kernels"].__path__ = [str(Path(__file__).parent)]
    __package__ = "serve_kernels"

from .compile_cpu import load, problem

SOURCE = Path(__file__).with_suffix(".cpp")
PANEL = 32  # as in panels_cpu.h


@dataclass(frozen=True, slots=True)
class Grouped:
    """A weight as codes with a scale and a minimum for every group of inputs."""

    bits: int  # 4: codes index the table; 8: codes are signed integers
    codes: Tensor  # [outputs, inputs] uint8
    scale: Tensor  # [outputs, groups] float32
    minimum: Tensor  # [outputs, groups] float32
    table: Tensor | None = None  # [16] float32

    @property
    def group(self) -> int:
        return self.codes.shape[1] // self.scale.shape[1]

    def rows(self, index: Tensor) -> "Grouped":
        """Return some of the outputs, in another order."""
        return Grouped(self.bits, self.codes[index], self.scale[index], self.minimum[index], self.table)

    def dequantised(self) -> Tensor:
        """Return the weight [outputs, inputs] in float32: the reference."""
        values = self.codes.view(torch.int8).float() if self.table is None else self.table[self.codes.long()]
        scale, minimum = (x.repeat_interleave(self.group, 1) for x in (self.scale, self.minimum))
        return values * scale + minimum


Weight = Tensor | Grouped
PARTS = ["codes", "scale", "minimum", "table"]


def save(weights: dict[str, Grouped], path: Path) -> None:
    """Write weights to a safetensors file."""
    tensors = {f"{name}.{part}": tensor for name, grouped in weights.items() for part in PARTS
               if (tensor := getattr(grouped, part)) is not None}
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)


def load_saved(path: Path) -> dict[str, Grouped]:
    """Read what `save` wrote; a weight with a table has 4 bits."""
    tensors = load_file(path)
    names = {name.rpartition(".")[0] for name in tensors}
    parts = {name: [tensors.get(f"{name}.{part}") for part in PARTS] for name in names}
    return {name: Grouped(8 if table is None else 4, *rest, table) for name, (*rest, table) in parts.items()}


def in_bytes(weight: Grouped, group: int) -> Grouped:
    """Return a weight of integer codes with codes of 8 bits and smaller groups."""
    scale, minimum = (x.repeat_interleave(weight.group // group, 1) for x in (weight.scale, weight.minimum))
    return Grouped(8, weight.codes, scale, minimum)


def concatenate(weights: list[Tensor] | list[Grouped]) -> Weight:
    """Put the outputs of weights side by side."""
    if isinstance(weights[0], Tensor):
        return torch.cat(weights)
    if len({(weight.bits, weight.group) for weight in weights}) > 1:
        weights = [in_bytes(weight, min(weight.group for weight in weights)) for weight in weights]
    codes, scale, minimum = (torch.cat([getattr(w, name) for w in weights]) for name in ("codes", "scale", "minimum"))
    return Grouped(weights[0].bits, codes, scale, minimum, weights[0].table)


def joint_weight(linears: list[nn.Linear]) -> Weight:
    """Return the weight of layers of one input as one: in the codes of the checkpoint, where all of them have such."""
    codes = [getattr(linear, "grouped", None) for linear in linears]
    if None not in codes:
        return concatenate(codes)
    return torch.cat([linear.weight.detach() if own is None else own.dequantised().bfloat16()
                      for linear, own in zip(linears, codes)])


class Linear(ctypes.Structure):
    """The struct of that name in panels_cpu.h."""

    _fields_ = [(name, ctypes.c_void_p) for name in ("panels", "bias", "table")] + [
        (name, ctypes.c_int) for name in ("outputs", "inputs", "bits", "group")
    ]


@functools.cache
def _library(*flags: str) -> ctypes.CDLL:
    """Return the compiled kernel. Raises CompileError."""
    library = load(SOURCE, *flags)
    pointer, integer = ctypes.c_void_p, ctypes.c_int
    library.linear.argtypes = ctypes.POINTER(Linear), pointer, pointer, integer, integer
    library.pack_pairs.argtypes = pointer, pointer, integer, integer
    library.pack_groups.argtypes = pointer, pointer, pointer, pointer, ctypes.POINTER(Linear)
    library.argmax.argtypes = pointer, pointer, integer, integer, integer
    library.argmax.restype = library.linear.restype = library.pack_pairs.restype = library.pack_groups.restype = None
    return library


@functools.cache
def unavailable() -> str | None:
    """Return why this machine cannot run the kernel, or None where it is compiled and ready."""
    return problem(_library)


def unsupported(weight: Weight) -> str | None:
    """Return why a weight does not fit into panels, or None."""
    outputs, inputs = (weight if isinstance(weight, Tensor) else weight.codes).shape
    if outputs % PANEL or inputs % PANEL:
        return f"widths {outputs} and {inputs}: no multiples of {PANEL}"
    if isinstance(weight, Tensor):
        plain = weight.dtype == torch.bfloat16 and weight.device.type == "cpu"
        return None if plain else "its weight is not in bfloat16 on the CPU"
    return f"groups of {weight.group}" if weight.group % 8 else None


def pack(weight: Weight, bias: Tensor | None, *flags: str) -> tuple[Linear, list[Tensor]]:
    """Pack a weight for which `unsupported` returned None; return it for C, and the tensors that it points into."""
    bias = None if bias is None else bias.detach().bfloat16().contiguous()
    bias_pointer = None if bias is None else bias.data_ptr()
    if isinstance(weight, Tensor):
        (outputs, inputs), weight = weight.shape, weight.contiguous()
        panels = torch.empty(outputs * inputs // 2, dtype=torch.int32)
        _library(*flags).pack_pairs(weight.data_ptr(), panels.data_ptr(), outputs, inputs)
        return Linear(panels.data_ptr(), bias_pointer, None, outputs, inputs, 16, 0), [panels, bias]
    outputs, inputs = weight.codes.shape
    scale, minimum = (x.float().contiguous() for x in (weight.scale, weight.minimum))
    codes, table = weight.codes.contiguous(), None if weight.table is None else weight.table.float().contiguous()
    header = 2 * PANEL * scale.element_size()
    size = outputs * inputs * weight.bits // 8 + outputs // PANEL * scale.shape[1] * header
    panels = torch.empty(size, dtype=torch.uint8)
    linear = Linear(panels.data_ptr(), bias_pointer, None if table is None else table.data_ptr(),
                    outputs, inputs, weight.bits, weight.group)
    _library(*flags).pack_groups(codes.data_ptr(), scale.data_ptr(), minimum.data_ptr(), panels.data_ptr(), linear)
    return linear, [panels, bias, table]


class PanelLinear(nn.Module):
    """An nn.Linear for inference in bfloat16, that holds only the packed weight.

    `weight` still answers dtype, device and shape, which transformers reads; it has no elements.
    """

    def __init__(self, weight: Weight, bias: Tensor | None, *flags: str) -> None:
        super().__init__()
        self.call, self._alive = pack(weight, bias, *flags)
        self.run, self.bias = _library(*flags).linear, bias
        self.in_features, self.out_features = self.call.inputs, self.call.outputs
        self.weight = torch.empty(1, dtype=torch.bfloat16).expand(self.out_features, self.in_features)

    def forward(self, x: Tensor) -> Tensor:
        assert x.dtype == torch.bfloat16 and x.shape[-1] == self.in_features
        x, out = x.contiguous(), x.new_empty(*x.shape[:-1], self.out_features)
        self.run(self.call, x.data_ptr(), out.data_ptr(), x.numel() // self.in_features, torch.get_num_threads())
        return out

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, {self.call.bits} bits"


def argmax(x: Tensor) -> Tensor:
    """Return the first of each row's highest columns [rows] of x [rows, columns], in bfloat16 and free of NaN."""
    assert x.dtype == torch.bfloat16 and x.dim() == 2
    x, best = x.contiguous(), torch.empty(x.shape[0], dtype=torch.int64)
    _library().argmax(x.data_ptr(), best.data_ptr(), *x.shape, torch.get_num_threads())
    return best


def benchmark(rows: int, outputs: int, inputs: int) -> None:
    """Time a layer in its forms, over eight weights in turn, so that none is hot, beside oneDNN's packed bfloat16."""
    import itertools
    import time

    from .linear_cpu import PackedLinear

    def grouped(bits: int) -> Grouped:
        scale = torch.rand(outputs, inputs // 32)
        table = torch.arange(16.0) if bits == 4 else None
        return Grouped(bits, torch.randint(1 << bits, (outputs, inputs), dtype=torch.uint8), scale, -scale, table)

    plain = [nn.Linear(inputs, outputs, bias=False, dtype=torch.bfloat16) for _ in range(8)]
    forms = {"oneDNN": [PackedLinear(linear) for linear in plain]}
    forms |= {"bf16": [PanelLinear(linear.weight.detach(), None) for linear in plain]}
    forms |= {f"{bits} bits": [PanelLinear(grouped(bits), None) for _ in range(8)] for bits in (8, 4)}
    x, work = torch.randn(rows, inputs).bfloat16(), 2 * rows * outputs * inputs
    print(f"{rows:4} x {outputs:5} x {inputs:4}", end="")
    for name, layers in forms.items():
        times, turn, stop = [], itertools.cycle(layers), time.perf_counter() + 0.5
        while len(times) < 10 or time.perf_counter() < stop:
            layer, start = next(turn), time.perf_counter()
            layer(x)
            times.append(time.perf_counter() - start)
        best = min(times)
        bits = 16 if name in ("oneDNN", "bf16") else int(name[0]) + 2
        speed = outputs * inputs * bits / 8e9 / best
        print(f" | {name} {best * 1e6:6.0f} us {speed:5.1f} GB/s {work / best / 1e12:5.3f} TFLOP/s", end="")
    print()


if __name__ == "__main__":
    print(unavailable() or f"{torch.get_num_threads()} threads")
    with torch.inference_mode():
        for shape in ((960, 576), (3072, 576), (576, 1536), (49152, 576)):
            for rows in (1, 16, 256):
                benchmark(rows, *shape)
