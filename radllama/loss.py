"""Cross-entropy at the supervised positions, without the logits of a large vocabulary kept in memory.

N supervised positions, C hidden_size, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from radllama.fused import linear

_ROWS = 32  # whose softmax is computed at a time


def chunked_cross_entropy(head: nn.Module, x_NC: Tensor, labels_N: Tensor, chunk: int = 512) -> Tensor:
    """Cross-entropy (N,) in fp32 of head(x) against the labels; a chunk's logits live only while it is computed."""
    frozen = not any(weight.requires_grad for weight in head.parameters())  # `head.weight`: ZeRO-3 would gather it here
    if isinstance(head, nn.Linear) and torch.is_grad_enabled() and frozen:
        return _FrozenHeadLoss.apply(x_NC, head.weight, labels_N, chunk)

    def losses(x: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(head(x).float(), labels, reduction="none")

    parts = list(zip(x_NC.split(chunk), labels_N.split(chunk), strict=True))
    if len(parts) == 1 or not torch.is_grad_enabled():
        return torch.cat([losses(x, labels) for x, labels in parts])
    return torch.cat([checkpoint(losses, x, labels, use_reentrant=False) for x, labels in parts])


class _FrozenHeadLoss(torch.autograd.Function):
    """`chunked_cross_entropy` for a frozen head: x's gradient is computed with the loss, and no logits are kept."""

    @staticmethod
    def forward(ctx: Any, x_NC: Tensor, weight_VC: Tensor, labels_N: Tensor, chunk: int) -> Tensor:  # type: ignore[override]
        losses, gradients = [], []
        for x, labels in zip(x_NC.split(chunk), labels_N.split(chunk), strict=True):
            scores = linear(x, weight_VC)
            for rows, wanted in zip(scores.split(_ROWS), labels.split(_ROWS), strict=True):
                wide = rows.float()
                place = torch.arange(len(rows), device=x.device), wanted
                probability = wide.softmax(1)
                # log of the sum of exp: the largest score's probability is exp(0) over exp(-largest) times that sum
                losses.append(wide.amax(1) - probability.amax(1).log() - wide[place])
                probability[place] -= 1
                rows.copy_(probability)  # in their place: a second copy of all would be the step's peak of memory
            gradients.append(linear(scores, weight_VC.T))
            del scores, rows
        ctx.save_for_backward(torch.cat(gradients))
        return torch.cat(losses)

    @staticmethod
    def backward(ctx: Any, grad_N: Tensor) -> tuple[Tensor, None, None, None]:  # type: ignore[override]
        (gradient_NC,) = ctx.saved_tensors
        return gradient_NC * grad_N[:, None].to(gradient_NC.dtype), None, None, None
