"""The fused parts against the plain formulas: values and gradients, and what is kept."""

from __future__ import annotations

import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from radllama import fused
from radllama.fused import Linear, linear, plain_rms_norm, plain_swiglu, rms_norm, swiglu

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


NORMS = {"plain": plain_rms_norm, "fused": rms_norm}


@pytest.mark.parametrize("trained", [("x", "weight"), ("x",), ("weight",)])
@pytest.mark.parametrize("rows", SHAPES)
def test_rms_norm_has_the_plain_values_and_gradients(rows: tuple[int, ...], trained: tuple[str, ...]) -> None:
    torch.manual_seed(0)
    inputs = {"x": 3 * torch.randn(*rows, 33), "weight": 1 + torch.randn(33)}
    cotangent = torch.randn(*rows, 33)
    leaves = [inputs[name].requires_grad_() for name in trained]
    results = []
    for function in NORMS.values():
        y = function(inputs["x"], inputs["weight"], 1e-2)
        results.append((y.detach(), *torch.autograd.grad(y, leaves, cotangent)))
    (y, *grads), (found, *found_grads) = results
    assert torch.equal(found, y)
    for expected, grad in zip(grads, found_grads, strict=True):
        torch.testing.assert_close(grad, expected)


def test_rms_norms_gradient_in_bf16_is_as_good_as_the_plain_one() -> None:
    """Against the formula in double precision."""
    torch.manual_seed(0)
    x, weight, cotangent = (torch.randn(*shape).bfloat16() for shape in ((64, 96), (96,), (64, 96)))
    wide = [value.double().requires_grad_() for value in (x, weight)]
    y = wide[1] * wide[0] * torch.rsqrt(wide[0].pow(2).mean(-1, keepdim=True) + 1e-5)
    exact = torch.autograd.grad(y, wide, cotangent.double())
    errors = {}
    for name, function in NORMS.items():
        leaves = [value.clone().requires_grad_() for value in (x, weight)]
        grads = torch.autograd.grad(function(*leaves, 1e-5), leaves, cotangent)
        errors[name] = [(one - other).norm() / other.norm() for one, other in zip(grads, exact, strict=True)]
    assert all(ours < 1.05 * plain < 0.01 for ours, plain in zip(errors["fused"], errors["plain"], strict=True))


def test_rms_norm_keeps_its_input_and_a_number_for_each_row() -> None:
    x, weight = torch.randn(4, 8, requires_grad=True), torch.ones(8)
    kept: dict[int, torch.Tensor] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        rms_norm(x, weight, 1e-5)
    assert sorted(tensor.numel() for tensor in kept.values()) == [4, 8, 32]
    assert {x.data_ptr(), weight.data_ptr()} < kept.keys()


def test_rms_norm_reads_its_weight_anew_in_the_backward_pass() -> None:
    """As under ZeRO-3, where it is gathered for each pass."""
    weight = torch.nn.Parameter(torch.randn(8))
    whole, x = weight.detach().clone(), torch.randn(3, 8, requires_grad=True)
    (expected,) = torch.autograd.grad(plain_rms_norm(x, whole, 1e-5).sum(), x)
    y = rms_norm(x, weight, 1e-5)
    weight.data = torch.empty(0)
    weight.data = whole.clone()
    y.sum().backward()
    torch.testing.assert_close(x.grad, expected)


KERNELS = """
import sys
import torch
from radllama.fused import keep_few_kernels, linear

def anonymous():
    return int(next(line for line in open("/proc/self/status") if line.startswith("RssAnon")).split()[1]) / 1024

if sys.argv[1] == "few":
    keep_few_kernels()
weight = torch.ones(64, 64)
linear(torch.ones(1, 64), weight)
before = anonymous()
for rows in range(2, 402):
    linear(torch.ones(rows, 64), weight)
    torch.ones(rows, 64).bfloat16() @ weight.bfloat16()
print(anonymous() - before)
"""


def test_few_compiled_kernels_are_kept() -> None:
    if not fused.has_onednn():
        pytest.skip("this torch has no oneDNN")

    caches = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY")  # another test's training may have set them
    environment = {name: value for name, value in os.environ.items() if name not in caches}

    def growth(kept: str) -> float:
        command = [sys.executable, "-c", KERNELS, kept]
        return float(subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout)

    assert growth("few") < 0.5 * growth("all")


def test_what_the_environment_says_of_kernels_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "7")
    monkeypatch.setenv("LRU_CACHE_CAPACITY", "")  # so that it is restored
    monkeypatch.delenv("LRU_CACHE_CAPACITY")
    fused.keep_few_kernels()
    assert os.environ["ONEDNN_PRIMITIVE_CACHE_CAPACITY"] == "7"
    assert os.environ["LRU_CACHE_CAPACITY"] == "64"
