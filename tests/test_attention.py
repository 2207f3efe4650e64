"""The variable-length form of a packed row's attention against the plain one, on a CPU: a naive kernel, written out as
loops over sequences and queries, takes the place of torch's and reads the same tensors."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from radllama import attention
from radllama.attention import _Gather, has_kernel, row_attention, sequences
from radllama.model import Llama, LlamaConfig, packed_attention

CPU = torch.device("cpu")
# (length, prefix): several prefixes, some used far from where they stand; no prefix; one token; one report alone.
ROWS = {
    "two prefixes": [(5, -1), (3, 0), (1, 0), (7, 0), (4, -1), (2, 4), (6, 4)],
    "no prefix": [(4, -1), (1, -1), (6, -1)],
    "a prefix of one token": [(1, -1), (1, 0), (1, 0), (2, 0)],
    "prefixes first": [(2, -1), (3, -1), (4, 1), (5, 0), (1, 1), (3, -1)],
    "one report": [(9, -1)],
}


def naive_kernel(
    q_THD: Tensor, k_SKD: Tensor, v_SKD: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int
) -> Tensor:
    """What torch documents of varlen_attn with window (-1, 0) and grouped heads, a query and a head at a time."""
    assert cu_q.dtype == cu_k.dtype == torch.int32
    assert cu_q[-1] == len(q_THD)
    assert cu_k[-1] == len(k_SKD)
    assert int(cu_q.diff().max()) == max_q
    assert int(cu_k.diff().max()) == max_k
    assert int(cu_q.diff().min()) > 0
    group = q_THD.shape[1] // k_SKD.shape[1]
    outputs = []
    for sequence in range(len(cu_q) - 1):
        q_start, q_end = int(cu_q[sequence]), int(cu_q[sequence + 1])
        k_start, k_end = int(cu_k[sequence]), int(cu_k[sequence + 1])
        for place in range(q_start, q_end):
            seen = slice(k_start, k_end - (q_end - 1 - place))
            for head in range(q_THD.shape[1]):
                scores = k_SKD[seen, head // group] @ q_THD[place, head] / math.sqrt(q_THD.shape[2])
                outputs.append(scores.softmax(0) @ v_SKD[seen, head // group])
    return torch.stack(outputs).view(q_THD.shape)


@pytest.fixture
def varlen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "kernel", naive_kernel)
    monkeypatch.setattr(attention, "has_kernel", lambda q: True)


def qkv(tokens: int, seed: int = 0) -> list[Tensor]:
    """Queries of 4 heads, keys and values of 2: (1, heads, tokens, 8), as a projection and a transpose leave them."""
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(1, tokens, heads, 8, generator=generator, dtype=torch.float64).transpose(1, 2).requires_grad_()
        for heads in (4, 2, 2)
    ]


def agree(segments: Tensor, queries: Tensor | None) -> None:
    """Outputs and the gradients of q, k and v, elementwise, against the plain form."""
    inputs = qkv(int(segments[:, 0].sum()))
    expected = packed_attention(segments)(*inputs)
    if queries is not None:
        expected = expected[:, :, queries]
    weights = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    wanted = torch.autograd.grad((expected * weights).sum(), inputs)
    q, k, v = inputs
    found = row_attention(segments, queries)(q if queries is None else q[:, :, queries], k, v)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
    for gradient, other in zip(torch.autograd.grad((found * weights).sum(), inputs), wanted, strict=True):
        torch.testing.assert_close(gradient, other, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("row", ROWS)
def test_one_call_equals_a_call_a_segment(row: str, varlen: None) -> None:
    agree(torch.tensor(ROWS[row]), None)


@pytest.mark.parametrize("row", ROWS)
def test_queries_at_the_end_of_each_segment_alone(row: str, varlen: None) -> None:
    """Labels: the last half of every segment that is no prefix; the prefixes' own queries are not computed."""
    segments = torch.tensor(ROWS[row])
    ends = segments[:, 0].cumsum(0)
    used = set(segments[:, 1].tolist())
    tails = [
        torch.arange(end - (length + 1) // 2, end)
        for number, (length, end) in enumerate(zip(segments[:, 0].tolist(), ends.tolist(), strict=True))
        if number not in used
    ]
    queries = torch.cat(tails)
    found = sequences(segments, queries, CPU)
    assert found.queries is None
    assert found.count_q == len(queries)
    assert len(found.cu_q) == len(tails) + 1
    agree(segments, queries)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("row", ROWS)
def test_queries_with_gaps(row: str, seed: int, varlen: None) -> None:
    segments = torch.tensor(ROWS[row])
    tokens = int(segments[:, 0].sum())
    generator = torch.Generator().manual_seed(seed)
    agree(segments, torch.randperm(tokens, generator=generator)[: max(1, tokens // 3)].sort().values)


def test_a_shared_prefix_is_gathered_once_for_every_report() -> None:
    found = sequences(torch.tensor([(2, -1), (1, 0), (3, 0)]), None, CPU)
    assert found.keys.tolist() == [0, 1, 0, 1, 2, 0, 1, 3, 4, 5]
    assert found.cu_q.tolist() == [0, 2, 3, 6]
    assert found.cu_k.tolist() == [0, 2, 5, 10]
    assert (found.max_q, found.max_k, found.count_q) == (3, 5, 6)


def test_the_gradient_of_a_shared_row_is_summed_in_fp32() -> None:
    """256 + 255 ones: bf16's running sum stands still at 256."""
    x = torch.zeros(2, 1, dtype=torch.bfloat16, requires_grad=True)
    index = torch.tensor([0] * 511 + [1])
    _Gather.apply(x, index).sum().backward()
    assert x.grad is not None
    assert x.grad.flatten().tolist() == [512.0, 1.0]  # 511 rounds to 512 in bf16


WRONG: dict[str, Callable[[Tensor], Tensor]] = {
    "prefixes forgotten": lambda segments: torch.stack((segments[:, 0], torch.full_like(segments[:, 1], -1)), 1),
    "another prefix": lambda segments: torch.where(segments == 4, 0, segments),
}


@pytest.mark.parametrize("fault", WRONG)
def test_the_comparison_sees_wrong_sequences(fault: str, varlen: None, monkeypatch: pytest.MonkeyPatch) -> None:
    right = attention.sequences
    monkeypatch.setattr(attention, "sequences", lambda segments, *others: right(WRONG[fault](segments), *others))
    with pytest.raises(AssertionError):
        agree(torch.tensor(ROWS["two prefixes"]), None)


def test_a_cpu_keeps_the_plain_form() -> None:
    q, k, v = qkv(6)
    assert not has_kernel(q.to(torch.bfloat16))
    segments = torch.tensor([(2, -1), (4, 0)])
    assert torch.equal(row_attention(segments)(q, k, v), packed_attention(segments)(q, k, v))


def test_a_cpu_attends_in_fp32() -> None:
    """bf16 goes in and out, and nothing is rounded in between, in the backward pass neither."""
    segments = torch.tensor(ROWS["two prefixes"])
    narrow = [x.detach().bfloat16().requires_grad_() for x in qkv(int(segments[:, 0].sum()))]
    wide = [x.detach().float().requires_grad_() for x in narrow]
    found, expected = row_attention(segments)(*narrow), packed_attention(segments)(*wide)
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, expected.bfloat16())
    weights = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1)).bfloat16()
    grads = zip(
        torch.autograd.grad(found, narrow, weights), torch.autograd.grad(expected, wide, weights.float()), strict=True
    )
    assert all(torch.equal(one, other.bfloat16()) for one, other in grads)


def test_the_plain_form_takes_some_queries_too() -> None:
    for row in ROWS.values():
        agree(torch.tensor(row), torch.arange(0, sum(length for length, _ in row), 2))


def test_torchs_kernel_is_called_as_it_asks() -> None:
    """On meta tensors: its arguments are known and its outputs have the queries' shape, in whichever version."""
    if attention.kernel is None:
        pytest.skip("this torch has no variable-length attention")
    segments = torch.tensor(ROWS["two prefixes"])
    q, k, v = (x.detach().to("meta", torch.bfloat16) for x in qkv(int(segments[:, 0].sum())))
    row = sequences(segments, None, torch.device("meta"))
    assert attention.varlen_attention(q, k, v, row).shape == q.shape


def test_a_model_takes_it(varlen: None) -> None:
    config = LlamaConfig(64, 32, 48, 2, 4, 2, 8)
    torch.manual_seed(0)
    model = Llama(config).double()
    tokens, segments = torch.arange(28)[None], torch.tensor(ROWS["two prefixes"])
    expected = model(tokens, segments=segments)
    model.packed_attention = row_attention
    torch.testing.assert_close(model(tokens, segments=segments), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.gpu
@pytest.mark.parametrize("labels", [False, True])
def test_the_kernel_itself(labels: bool) -> None:
    """bf16 on a GPU against the plain form in fp32: outputs and gradients to bf16's rounding."""
    segments = torch.tensor([(65, -1), (301, 0), (1, 0), (250, 0), (65, -1), (40, 4), (333, 4), (17, -1)])
    tokens = int(segments[:, 0].sum())
    queries = torch.cat([torch.arange(300, 366), torch.arange(700, tokens)]).cuda() if labels else None
    chosen = slice(None) if queries is None else queries
    generator = torch.Generator("cuda").manual_seed(0)
    inputs = [
        torch.randn(1, tokens, heads, 128, generator=generator, device="cuda", dtype=torch.bfloat16)
        .transpose(1, 2)
        .requires_grad_()
        for heads in (32, 8, 8)
    ]
    assert has_kernel(inputs[0])
    wide = [x.detach().float().requires_grad_() for x in inputs]
    expected = packed_attention(segments)(*wide)[:, :, chosen]
    weights = torch.randn_like(expected).bfloat16()
    wanted = [expected, *torch.autograd.grad((expected * weights.float()).sum(), wide)]
    q, k, v = inputs
    found = row_attention(segments, queries)(q[:, :, chosen], k, v)
    for one, other in zip([found, *torch.autograd.grad((found * weights).sum(), inputs)], wanted, strict=True):
        assert (one.float() - other).norm() < 0.01 * other.norm()
