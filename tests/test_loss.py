"""The chunked cross-entropies against torch's over all logits: values, gradients, what is computed and kept."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from radllama.loss import chunked_cross_entropy


@pytest.mark.parametrize("chunk", [1, 3, 4, 10, 1024])
def test_chunked_cross_entropy_equals_the_plain_one(chunk: int) -> None:
    generator = torch.Generator().manual_seed(0)
    head = nn.Linear(16, 50, bias=False)
    x = 3 * torch.randn(10, 16, generator=generator)
    labels, weight = torch.randint(50, (10,), generator=generator), torch.rand(10, generator=generator)
    results = []
    for losses_of in (
        lambda x: F.cross_entropy(head(x), labels, reduction="none"),
        lambda x: chunked_cross_entropy(head, x, labels, chunk),
    ):
        head.zero_grad()
        leaf = x.clone().requires_grad_()
        losses = losses_of(leaf)
        (losses * weight).sum().backward()
        assert head.weight.grad is not None
        assert leaf.grad is not None
        results.append((losses.detach(), leaf.grad, head.weight.grad.clone()))
    for expected, value in zip(*results, strict=True):
        torch.testing.assert_close(value, expected, atol=1e-6, rtol=1e-5)


def test_chunks_are_computed_again_in_the_backward_pass_alone() -> None:
    head, calls = nn.Linear(16, 50, bias=False), []
    head.register_forward_hook(lambda _, inputs, __: calls.append(len(inputs[0])))
    x, labels = torch.randn(10, 16, requires_grad=True), torch.zeros(10, dtype=torch.int64)
    losses = chunked_cross_entropy(head, x, labels, 4)
    assert calls == [4, 4, 2]
    losses.sum().backward()
    assert sorted(calls) == [2, 2, 4, 4, 4, 4]
    calls.clear()
    with torch.no_grad():
        chunked_cross_entropy(head, x, labels, 4)
    assert calls == [4, 4, 2]


def test_losses_are_fp32_whatever_the_weights() -> None:
    head = nn.Linear(16, 50, bias=False).bfloat16()
    losses = chunked_cross_entropy(head, torch.randn(6, 16).bfloat16(), torch.arange(6), 4)
    assert losses.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("chunk", [1, 3, 4, 10, 512])
def test_a_frozen_heads_loss_equals_the_plain_one(chunk: int, dtype: torch.dtype) -> None:
    """Each position's loss has its own weight in the sum, as a packed step's never has, but a caller's may."""
    generator = torch.Generator().manual_seed(0)
    head = nn.Linear(16, 50, bias=False, dtype=dtype).requires_grad_(False)
    x = (3 * torch.randn(10, 16, generator=generator)).to(dtype)
    labels, weight = torch.randint(50, (10,), generator=generator), torch.rand(10, generator=generator)
    wide, leaf = x.float().clone().requires_grad_(), x.clone().requires_grad_()
    expected = F.cross_entropy(F.linear(wide, head.weight.float()), labels, reduction="none")
    (expected * weight).sum().backward()
    losses = chunked_cross_entropy(head, leaf, labels, chunk)
    assert losses.dtype == torch.float32
    (losses * weight).sum().backward()
    assert leaf.grad is not None
    assert wide.grad is not None
    near = {"atol": 1e-5, "rtol": 1e-5} if dtype == torch.float32 else {"atol": 0.03, "rtol": 0.03}
    torch.testing.assert_close(losses, expected, **near)
    torch.testing.assert_close(leaf.grad.float(), wide.grad, **near)


def test_a_confident_frozen_head_keeps_its_small_gradient() -> None:
    """p - 1 is taken before rounding to bf16, where p itself would be 1; and a loss of 200 is no infinity."""
    head = nn.Linear(2, 2, bias=False, dtype=torch.bfloat16).requires_grad_(False)
    head.weight.copy_(torch.eye(2))
    x = torch.tensor([[7.0, 0.0], [200.0, 0.0]], dtype=torch.bfloat16, requires_grad=True)
    losses = chunked_cross_entropy(head, x, torch.tensor([0, 1]))
    losses.sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(losses, torch.tensor([9.115e-4, 200.0]), atol=1e-6, rtol=1e-3)
    torch.testing.assert_close(x.grad[0].float(), torch.tensor([-9.11e-4, 9.11e-4]), atol=0, rtol=0.01)


def test_a_frozen_head_keeps_a_gradient_and_no_logits() -> None:
    head, kept = nn.Linear(16, 50, bias=False).requires_grad_(False), []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tuple(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        chunked_cross_entropy(head, torch.randn(10, 16, requires_grad=True), torch.arange(10), 4)
    assert kept == [(10, 16)]
