"""The largest logit's token without all logits in full precision: an 8-bit copy of the head finds who can be it.

A large vocabulary's head is most of what a small model reads and computes for a token. Its 8-bit copy is a quarter of
it, and CPUs multiply 8-bit integers four times as fast (AVX-512 VNNI). With w a row of the head, x the token's vector,
and what they are rounded to, w' and x',

    |w x - w' x'| = |(w - w') x + w' (x - x')| <= |w - w'| |x| + |w'| |x - x'|

so that a token whose rounded logit lies more than twice that bound below the best one cannot be the best. The others,
mostly a single one, are computed from the head itself. Exact: what is left to chance is how sums of floats are rounded.

Tensors carry their dimensions as suffix, as in model.py; K candidates.
"""

from __future__ import annotations

import torch
from torch import Tensor

from radllama.fused import linear

ROWS = 256  # of the head rounded at a time, and
BLOCK = 16_384  # tokens screened at a time: both stay in the processor's cache
MOST = 4096  # candidates computed one by one, 4 C bytes each; where there are more, all logits are computed


def can_screen(weight_VC: Tensor) -> bool:
    """Where it is exact and pays: without VNNI sums of 8-bit products may saturate; logits in bf16 tie by the dozen."""
    if weight_VC.device.type != "cpu" or weight_VC.dtype != torch.float32 or not torch.cpu._is_vnni_supported():
        return False
    return 1 < weight_VC.shape[1] <= 2**17  # torch 2.13's product over a single coordinate is wrong; sums fit 32 bits


def plain_argmax(x_NC: Tensor, weight_VC: Tensor) -> Tensor:
    """The token (N,) of each row's largest logit; of equals the first."""
    return linear(x_NC, weight_VC).argmax(-1)


def rounded(x_NC: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Each row as integers up to 127 times a scale: (N, C) int8, scales (N,), lengths of what is lost (N,)."""
    scale_N1 = (x_NC.abs().amax(1, keepdim=True) / 127).clamp_(min=torch.finfo(torch.float32).tiny)
    whole_NC = (x_NC / scale_N1).round_()
    codes_NC = whole_NC.to(torch.int8)
    return codes_NC, scale_N1[:, 0], torch.linalg.vector_norm(whole_NC.mul_(scale_N1).sub_(x_NC), dim=1)


class Screen:
    """`plain_argmax` for one weight, which must not change meanwhile."""

    def __init__(self, weight_VC: Tensor) -> None:
        self.weight = weight_VC
        self.codes = torch.empty(weight_VC.shape, dtype=torch.int8)
        self.scales, lost_V, length_V = (torch.empty(len(weight_VC)) for _ in range(3))
        for start in range(0, len(weight_VC), ROWS):
            part = slice(start, start + ROWS)
            self.codes[part], self.scales[part], lost_V[part] = rounded(weight_VC[part])
            length_V[part] = torch.linalg.vector_norm(weight_VC[part], dim=1)
        self.lost, self.length = float(lost_V.max()), float(length_V.max())  # no |w - w'|, no |w| is longer

    def bound(self, x_NC: Tensor, lost_N: Tensor) -> Tensor:
        """By how much a rounded logit of each row can differ from the logit (N,), as floats give either."""
        length_N = torch.linalg.vector_norm(x_NC, dim=1)
        exact_N = self.lost * length_N + (self.length + self.lost) * lost_N
        # C products summed in fp32 are off by at most C 2^-24 |w| |x|; the rest is for the few roundings beside.
        return 1.01 * exact_N + (x_NC.shape[1] + 16) * 2.0**-24 * self.length * length_N

    def candidates(self, x_NC: Tensor) -> tuple[Tensor, Tensor]:
        """Rows and tokens (K,) whose logits can be the largest, ordered; none of a row that is not all numbers."""
        codes_NC, scale_N, lost_N = rounded(x_NC)
        # Logits in units of scale_N, which changes no order. The sums of integers are exact.
        parts = zip(self.codes.split(BLOCK), self.scales.split(BLOCK), strict=True)
        blocks = [torch._int_mm(codes_NC, codes.T) * scales for codes, scales in parts]
        best_NB = torch.stack([logits.amax(1) for logits in blocks], dim=1)
        least_N1 = (best_NB.amax(1) - 2 * self.bound(x_NC, lost_N) / scale_N)[:, None]
        found = []
        for number, reached in enumerate((best_NB >= least_N1).T):
            rows = reached.nonzero()[:, 0]
            places = (blocks[number][rows] >= least_N1[rows]).nonzero()
            found.append(torch.stack((rows[places[:, 0]], places[:, 1] + number * BLOCK)))
        row_K, token_K = torch.cat(found, dim=1)
        order = row_K.argsort(stable=True)
        return row_K[order], token_K[order]

    def argmax(self, x_NC: Tensor) -> Tensor:
        row_K, token_K = self.candidates(x_NC)
        counts = row_K.bincount(minlength=len(x_NC))
        if len(row_K) > MOST or not counts.all():
            return plain_argmax(x_NC, self.weight)
        exact_K = (self.weight[token_K] * x_NC[row_K]).sum(1)
        splits = counts.tolist()
        return torch.stack(
            [tokens[exact.argmax()] for tokens, exact in zip(token_K.split(splits), exact_K.split(splits), strict=True)]
        )
