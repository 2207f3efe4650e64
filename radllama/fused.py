"""Parts of a layer in a form that is faster, or keeps less, than the plain formula, which stands beside each."""

from __future__ import annotations

import os
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


def keep_few_kernels(most: int = 64) -> None:
    """From now on oneDNN keeps the last `most` of its kernels, of 0.7 MB each, in place of 1,024.

    It compiles one for each shape that it meets, in 0.4 ms. A layer needs less than 64 of them for its forward and
    backward pass; those of another pack's length hardly ever come again, and cost a process a gigabyte. Before the
    process's first product; what the environment says already stays.
    """
    for cache_of in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):  # oneDNN's own and torch's above it
        os.environ.setdefault(cache_of, str(most))


def multiplies_bf16() -> bool:
    """Whether this CPU has instructions for products of bf16 matrices, which take half of fp32's time or less."""
    return torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()


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


def plain_rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / rms(x) * weight over the last dimension, in fp32 but for the product (Zhang & Sennrich 2019)."""
    wide = x.float()
    normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return weight * normed.to(x.dtype)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`plain_rms_norm` that keeps x and a number for each row.

    Of what autograd keeps that is half in bf16 (a third where the weight is trained), as much in fp32 (half).
    """
    result: Tensor = _RMSNorm.apply(x, weight, eps)
    return result


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:  # type: ignore[override]
        wide = x.float()
        scale = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
        ctx.save_for_backward(x, weight, scale)
        return weight * (wide * scale).to(x.dtype)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, weight, scale = ctx.saved_tensors
        normed = x.float() * scale
        x_grad, weight_grad = None, None
        if ctx.needs_input_grad[1]:
            weight_grad = (grad * normed.to(x.dtype)).flatten(0, -2).sum(0)
        if ctx.needs_input_grad[0]:
            wide = (grad * weight).float()
            along = (wide * normed).mean(-1, keepdim=True)  # what would only make x longer
            x_grad = wide.addcmul_(normed, along, value=-1).mul_(scale).to(x.dtype)
        return x_grad, weight_grad, None
