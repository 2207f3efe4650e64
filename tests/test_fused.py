"""The fused parts against the plain formulas: values and gradients to the bit, and what is kept."""

from __future__ import annotations

import pytest
import torch

from radllama.fused import plain_swiglu, swiglu


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_swiglu_is_the_plain_one_bit_for_bit(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    gate, up, cotangent = (3 * torch.randn(2, 7, 33, generator=generator).to(dtype) for _ in range(3))
    results = []
    for function in (plain_swiglu, swiglu):
        leaves = [x.clone().requires_grad_() for x in (gate, up)]
        y = function(*leaves)
        results.append((y.detach(), *torch.autograd.grad(y, leaves, cotangent)))
    for expected, value in zip(*results, strict=True):
        assert torch.equal(value, expected)


def test_swiglu_keeps_its_inputs_alone() -> None:
    gate, up = (torch.randn(4, 8, requires_grad=True) for _ in range(2))
    kept: list[torch.Tensor] = []

    def pack(x: torch.Tensor) -> torch.Tensor:
        kept.append(x)
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        swiglu(gate, up)
    assert {x.data_ptr() for x in kept} == {gate.data_ptr(), up.data_ptr()}
