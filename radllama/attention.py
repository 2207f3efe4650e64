"""A packed row's attention in one kernel call, where model.py's plain form makes one a segment.

torch's variable-length kernel takes many sequences in one row, each with its own numbers of queries and of keys: a
report's queries are its own tokens, its keys those of its prefix and its own. Tensors carry their dimensions as suffix,
as in model.py; S counts the keys of all sequences, a prefix's once for every report that shares it.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from radllama.model import Attend, packed_attention


def _causal_kernel() -> Callable[..., Any] | None:
    """(q_THD, k_SKD, v_SKD, cu_q, cu_k, max_q, max_k) -> out_THD; None where torch (before 2.11) has no such kernel.

    The mask is aligned to the lower right: a sequence's last query sees all of its keys.
    """
    try:
        varlen_attn: Any = import_module("torch.nn.attention.varlen").varlen_attn
    except ImportError:
        return None
    known = inspect.signature(varlen_attn).parameters
    if "window_size" not in known:
        return None
    # Before torch 2.12 there is no such argument, and the kernel takes fewer key heads unasked.
    grouped = {"enable_gqa": True} if "enable_gqa" in known else {}
    return partial(varlen_attn, window_size=(-1, 0), **grouped)


kernel = _causal_kernel()


@dataclass(frozen=True)
class Sequences:
    """Which tokens of a row meet: sequence i's queries are cu_q[i] .. cu_q[i + 1], its keys cu_k[i] .. cu_k[i + 1].

    keys (S,) int64: the token of the row behind each key. cu_q, cu_k (n + 1,) int32; max_q, max_k: the longest
    sequence; count_q: cu_q's last, known without asking the GPU. queries (N,) int64: where among the queries those
    asked for stand; None: all are asked for, in this order.
    """

    keys: Tensor
    cu_q: Tensor
    cu_k: Tensor
    max_q: int
    max_k: int
    count_q: int
    queries: Tensor | None


def sequences(segments: Tensor, queries: Tensor | None, device: torch.device) -> Sequences:
    """The sequences of a packed row (`segments` (n, 2) on the CPU, as for `packed_attention`).

    queries (N,) int64, ascending: the tokens whose outputs are wanted; None: all. The kernel's mask fits only queries
    that reach to their segment's end without a gap, so all behind a segment's first are computed; for the labels of a
    response, which ends its segment, these are no more.
    """
    lengths, prefixes = segments[:, 0], segments[:, 1]
    ends = lengths.cumsum(0)
    starts = ends - lengths
    chosen, firsts, places = torch.arange(len(segments)), starts, None
    if queries is not None:
        queries = queries.cpu()
        chosen, counts = torch.searchsorted(ends, queries, right=True).unique_consecutive(return_counts=True)
        firsts = queries[counts.cumsum(0) - counts]
    cu_q = _offsets(ends[chosen] - firsts)
    if queries is not None and len(queries) < cu_q[-1]:
        places = (queries + (cu_q[:-1] - firsts).repeat_interleave(counts)).to(device)
    # Two runs of the row's tokens for each sequence: its prefix's (none: of length 0), then its own.
    prefixes = prefixes[chosen]
    runs = torch.stack((torch.where(prefixes < 0, 0, lengths[prefixes]), lengths[chosen]), dim=1)
    run_starts = torch.stack((starts[prefixes], starts[chosen]), dim=1).flatten()
    run_offsets, cu_k = _offsets(runs.flatten()), _offsets(runs.sum(1))
    keys = torch.arange(int(cu_k[-1])) + (run_starts - run_offsets[:-1]).repeat_interleave(runs.flatten())
    return Sequences(
        keys=keys.to(device),
        cu_q=cu_q.to(device, torch.int32),
        cu_k=cu_k.to(device, torch.int32),
        max_q=int(cu_q.diff().max()),
        max_k=int(cu_k.diff().max()),
        count_q=int(cu_q[-1]),
        queries=places,
    )


def _offsets(lengths: Tensor) -> Tensor:
    return torch.cat((lengths.new_zeros(1), lengths.cumsum(0)))


def row_attention(segments: Tensor, queries: Tensor | None = None) -> Attend:
    """`model.packed_attention` by the kernel that fits the tensors: one call on a GPU, the plain form elsewhere.

    A CPU attends in fp32 at least: its bf16 kernel takes twice as long, and compiles a product for every length.
    queries (N,) int64, ascending: the tokens whose queries are given and outputs wanted; None: all.
    """
    plain = cache(partial(packed_attention, segments, queries))  # made where it is used: a GPU has no need of it
    on = cache(partial(sequences, segments, queries))

    def attend(q_BHTD: Tensor, k_BKTD: Tensor, v_BKTD: Tensor) -> Tensor:
        if has_kernel(q_BHTD):
            return varlen_attention(q_BHTD, k_BKTD, v_BKTD, on(q_BHTD.device))
        narrow = q_BHTD.dtype
        wide = torch.promote_types(narrow, torch.float32) if q_BHTD.device.type == "cpu" else narrow
        return plain()(q_BHTD.to(wide), k_BKTD.to(wide), v_BKTD.to(wide)).to(narrow)

    return attend


def has_kernel(q: Tensor) -> bool:
    """Whether torch's variable-length kernel (FlashAttention 2) takes these queries."""
    if kernel is None or not q.is_cuda or q.dtype not in (torch.bfloat16, torch.float16):
        return False
    return q.shape[-1] % 8 == 0 and q.shape[-1] <= 256 and torch.cuda.get_device_capability(q.device) >= (8, 0)


def varlen_attention(q_BHTD: Tensor, k_BKTD: Tensor, v_BKTD: Tensor, row: Sequences) -> Tensor:
    """The outputs of the row's queries (1, H, N, D)."""
    assert kernel is not None
    q, k, v = (x[0].transpose(0, 1) for x in (q_BHTD, k_BKTD, v_BKTD))  # (T, heads, D): how the projections wrote them
    if row.queries is not None:
        q = q.new_zeros(row.count_q, *q.shape[1:]).index_copy(0, row.queries, q)
    k, v = _Gather.apply(k, row.keys), _Gather.apply(v, row.keys)
    out: Tensor = kernel(q, k, v, row.cu_q, row.cu_k, row.max_q, row.max_k)
    if row.queries is not None:
        out = out[row.queries]
    return out.transpose(0, 1)[None]


class _Gather(torch.autograd.Function):
    """x[index]. A prefix's gradient, the sum over its reports, is summed in fp32 at least: bf16 would lose it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(index)
        ctx.rows = len(x)
        return x.index_select(0, index)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        (index,) = ctx.saved_tensors
        wide = torch.promote_types(grad.dtype, torch.float32)
        total = torch.zeros(ctx.rows, *grad.shape[1:], dtype=wide, device=grad.device)
        return total.index_add_(0, index, grad.to(wide)).to(grad.dtype), None
