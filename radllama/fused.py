"""Parts of a layer in a form that is faster, or keeps less, than the plain formula, which stands beside each."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """x W^T, as `F.linear`, where no gradient is recorded: (..., in), (out, in) -> (..., out).

    In fp32 on a CPU by oneDNN, which `F.linear` takes for other types alone: as fast as MKL or a tenth faster (AMD),
    and a third faster for the head's few rows. The weight may be transposed.
    """
    fast = x.dtype == torch.float32 and x.device.type == "cpu" and has_onednn()
    return _product(x, weight) if fast and x.numel() else F.linear(x, weight)  # it refuses some without rows


def can_pack(weight: Tensor) -> bool:
    return weight.device.type == "cpu" and weight.dtype == torch.float32 and has_onednn()


def pack(weight: Tensor) -> Tensor:
    """A weight (out, in) as `packed_product` wants it. Unpacked, every product would rearrange it again."""
    packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight)
    return packed


def packed_product(x: Tensor, packed: Tensor) -> Tensor:
    """x W^T of a packed W: (..., in) -> (..., out)."""
    shape, x = x.shape[:-1], x.reshape(-1, x.shape[-1])
    rows = len(x)
    if 0 < rows < 3:  # which take 1.4 times as long as four do
        x = F.pad(x, (0, 0, 0, 4 - rows))
    result = _product(x, packed)
    return result[:rows].view(*shape, result.shape[1])


@cache
def has_onednn() -> bool:
    """Whether this torch has oneDNN's products, plain and packed, which are no public functions of it."""
    try:
        _product(torch.ones(1, 2), torch.ones(3, 2))
        _product(torch.ones(1, 2), pack(torch.ones(3, 2)))
    except (AttributeError, RuntimeError, TypeError, NotImplementedError):
        return False
    return True


def _product(x: Tensor, weight: Tensor) -> Tensor:
    result: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")
    return result


class Linear(nn.Linear):
    """nn.Linear without a bias, by `linear`, in the backward pass too."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features, bias=False)

    def forward(self, input: Tensor) -> Tensor:
        result: Tensor = _Linear.apply(input, self.weight, self)
        return result

    def plain(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, layer: Linear) -> Tensor:  # type: ignore[override]
        ctx.layer = layer  # and not its weight: under ZeRO-3 it comes and goes between forward and backward
        ctx.save_for_backward(x if weight.requires_grad else None)
        return linear(x, weight)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        (x,) = ctx.saved_tensors
        x_grad = linear(grad, ctx.layer.weight.T) if ctx.needs_input_grad[0] else None
        weight_grad = linear(grad.flatten(0, -2).T, x.flatten(0, -2).T) if ctx.needs_input_grad[1] else None
        return x_grad, weight_grad, None


def plain_swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up (Shazeer 2020, arXiv 2002.05202), elementwise."""
    return F.silu(gate) * up


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """`plain_swiglu` that keeps its two inputs alone: silu(gate) is computed again."""
    result: Tensor = _SwiGLU.apply(gate, up)
    return result


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(gate, up)
        return F.silu(gate).mul_(up)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        up_grad = F.silu(gate).mul_(grad)
        return torch.ops.aten.silu_backward(grad * up, gate), up_grad
