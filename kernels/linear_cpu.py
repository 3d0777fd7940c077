"""Linear layers whose weights oneDNN packed once, into the order in which it reads them.

    y[row, n] = Σ_k x[row, k] weight[n, k] + bias[n]        x [..., in_features], weight [out_features, in_features]

torch repacks a weight on every F.linear, which at a few rows costs as much as the product. The result of a row is bitwise
the same whatever other rows are in the call. oneDNN breaks that in one place: a lone row of more than 1024 inputs takes a
kernel that splits the sum (in bfloat16 one result in 5,000 rounds otherwise, in float32 nine in ten), so it gets company.
"""

from collections import defaultdict

import torch
from torch import Tensor, nn

from . import panels_cpu

LONE_ROW_INPUTS = 1024  # measured with torch 2.13, oneDNN's AVX-512 kernels: up to here a lone row is like any other
ROWS_HINT = 16  # what oneDNN packs for: a decode batch


class PackedLinear(nn.Module):
    """An nn.Linear for inference that holds only the packed weight.

    `weight` still answers dtype, device and shape, which transformers reads; arithmetic on it fails.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), ROWS_HINT)
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        if self.in_features > LONE_ROW_INPUTS and x.numel() == self.in_features:
            return self._multiply(torch.cat([x.view(1, -1)] * 2))[:1].view(*x.shape[:-1], self.out_features)
        return self._multiply(x)

    def _multiply(self, x: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}, {self.weight.dtype}"


def packable(module: nn.Module) -> bool:
    """Tell whether a module is a plain linear layer (no subclass, no hooks) that oneDNN multiplies on this CPU."""
    if type(module) is not nn.Linear or module.weight.device.type != "cpu" or module._forward_hooks:
        return False
    if not torch.backends.mkldnn.is_available() or module.weight.numel() == 0:
        return False
    if module.weight.dtype == torch.bfloat16:
        return torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return module.weight.dtype == torch.float32


def pack_linears(model: nn.Module) -> int:
    """Replace every packable linear layer below `model`, and return how many: bfloat16 by panels, where these can be.

    The original weights are freed, but for those that the model uses elsewhere too, as tied embeddings are.
    """
    homes: dict[nn.Module, list[tuple[nn.Module, str]]] = defaultdict(list)  # more than one where parents share a layer
    for parent in model.modules():
        for name, child in parent.named_children():
            if packable(child):
                homes[child].append((parent, name))
    count = len(homes)
    while homes:  # one at a time, so that never more than one weight exists twice
        linear, places = homes.popitem()
        weight = panels_cpu.joint_weight([linear])
        panels = panels_cpu.unsupported(weight) is None and panels_cpu.unavailable() is None
        packed = panels_cpu.PanelLinear(weight, linear.bias) if panels else PackedLinear(linear)
        for parent, name in places:
            setattr(parent, name, packed)
        del linear, weight
    return count


def benchmark(rows: int, out_features: int, in_features: int, dtype: torch.dtype) -> None:
    """Time a layer against F.linear over eight weights in turn, so that none is hot."""
    import itertools
    import time

    linears = [nn.Linear(in_features, out_features, bias=False, dtype=dtype) for _ in range(8)]
    packed = [PackedLinear(linear) for linear in linears]
    x, figures = torch.randn(rows, in_features).to(dtype), []
    for layers in (linears, packed):
        times, turn, stop = [], itertools.cycle(layers), time.perf_counter() + 0.5
        while len(times) < 10 or time.perf_counter() < stop:
            layer, start = next(turn), time.perf_counter()
            layer(x)
            times.append(time.perf_counter() - start)
        figures.append(min(times))
    size, work = out_features * in_features * dtype.itemsize, 2 * rows * out_features * in_features
    print(f"{rows:4} x {out_features:5} x {in_features:4} {str(dtype)[6:]:8}", end="")
    for name, best in zip(("F.linear", "packed"), figures):
        print(f" | {name} {best * 1e6:7.0f} us {size / best / 1e9:6.1f} GB/s {work / best / 1e12:6.3f} TFLOP/s", end="")
    print()


if __name__ == "__main__":
    with torch.inference_mode():
        for dtype in (torch.bfloat16, torch.float32):
            for shape in ((960, 576), (576, 576), (3072, 576), (576, 1536), (49152, 576)):
                for rows in (1, 16, 256):
                    benchmark(rows, *shape, dtype)
