"""The fused parts against the plain formulas: values and gradients, and what is kept."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from radllama import fused
from radllama.fused import Linear, linear, plain_swiglu, swiglu

SHAPES: list[tuple[int, ...]] = [(1,), (7,), (2, 5), (1, 64), (0,), (1, 0)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("rows", SHAPES)
def test_linear_is_the_product_in_double_precision(rows: tuple[int, ...], transposed: bool, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(*rows, 96, generator=generator).to(dtype)
    weight = torch.randn(96, 40, generator=generator).to(dtype).T
    weight = weight if transposed else weight.contiguous()
    expected = (x.double() @ weight.double().T).to(dtype)
    torch.testing.assert_close(linear(x, weight), expected)


@pytest.mark.parametrize("missing", ["_linear_pointwise", "_reorder_linear_weight"])
def test_a_torch_without_onednns_private_products_computes_by_its_public_ones(
    missing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, weight = torch.randn(5, 96), torch.randn(40, 96)
    operations = {"_linear_pointwise", "_reorder_linear_weight"} - {missing}
    there = SimpleNamespace(**{name: getattr(torch.ops.mkldnn, name) for name in operations})
    monkeypatch.setattr(torch.ops, "mkldnn", there)
    fused.has_onednn.cache_clear()
    try:
        assert not fused.can_pack(weight)
        assert torch.equal(linear(x, weight), F.linear(x, weight))
    finally:
        fused.has_onednn.cache_clear()


@pytest.mark.parametrize("trained", [("input", "weight"), ("input",), ("weight",)])
@pytest.mark.parametrize("rows", SHAPES)
def test_a_linear_layer_has_the_plain_values_and_gradients(rows: tuple[int, ...], trained: tuple[str, ...]) -> None:
    torch.manual_seed(0)
    layer = Linear(96, 40)
    x, cotangent = torch.randn(*rows, 96), torch.randn(*rows, 40)
    x.requires_grad_("input" in trained)
    layer.weight.requires_grad_("weight" in trained)
    leaves = [leaf for leaf in (x, layer.weight) if leaf.requires_grad]
    results = []
    for function in (layer.plain, layer):
        y = function(x)
        results.append((y.detach(), *torch.autograd.grad(y, leaves, cotangent)))
    for expected, found in zip(*results, strict=True):
        torch.testing.assert_close(found, expected)


def test_a_linear_layer_reads_its_weight_anew_in_the_backward_pass() -> None:
    """As under ZeRO-3, where it is gathered for each pass: what it was in the forward pass is not kept."""
    layer = Linear(8, 4)
    whole = layer.weight.detach().clone()
    x = torch.randn(3, 8, requires_grad=True)
    y = layer(x)
    layer.weight.data = torch.empty(0)
    layer.weight.data = whole.clone()
    y.sum().backward()
    torch.testing.assert_close(x.grad, whole.sum(0).expand(3, 8))


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
