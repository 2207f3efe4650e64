"""screen.py: the token is that of the full logits, whatever the numbers; and few are computed in full."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from radllama import screen
from radllama.screen import Screen, can_screen, plain_argmax, rounded

pytestmark = pytest.mark.skipif(not torch.cpu._is_vnni_supported(), reason="the screen needs a CPU with AVX-512 VNNI")

Case = tuple[Tensor, Tensor]  # x, weight


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a small vocabulary has several, and a rest."""
    monkeypatch.setattr(screen, "ROWS", 48)
    monkeypatch.setattr(screen, "BLOCK", 128)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def near_ties() -> Case:
    """Ten tokens whose logits differ by far less than their 8-bit copies can tell, on top of all others."""
    weight, x = normal(500, 64) * 0.02, normal(9, 64, seed=1)
    best = normal(64, seed=2) * 0.05
    weight[40:50] = best + normal(10, 64, seed=3) * 2e-4
    return best * 40 + x * 0.1, weight


def outliers() -> Case:
    """Some coordinates hundreds of times as large as the others, as in real models: 8 bits say little then."""
    weight, x = normal(500, 64) * 0.02, normal(9, 64, seed=1)
    x[:, 7] *= 300
    weight[:, 11] *= 50
    return x, weight


CASES: dict[str, Callable[[], Case]] = {
    "random": lambda: (normal(9, 96), normal(1000, 96, seed=1)),
    "one token and an odd shape": lambda: (normal(1, 17), normal(131, 17, seed=1)),
    "two coordinates": lambda: (normal(5, 2), normal(300, 2, seed=1)),
    "near ties": near_ties,
    "outliers": outliers,
    "rows of all sizes": lambda: (normal(9, 64), normal(500, 64) * 10.0 ** (torch.arange(500) % 9 - 5)[:, None]),
    "large": lambda: (normal(9, 64) * 1e6, normal(500, 64, seed=1) * 1e6),
    "small": lambda: (normal(9, 64) * 1e-12, normal(500, 64, seed=1) * 1e-12),
    "squares beyond fp32": lambda: (normal(9, 64), normal(500, 64, seed=1) * 1e30),
    "a vector of zeros": lambda: (normal(3, 64) * torch.tensor([1.0, 0.0, 1.0])[:, None], normal(500, 64, seed=1)),
    "some rows of zeros": lambda: (normal(9, 64), normal(500, 64, seed=1) * (torch.arange(500) % 3 == 0)[:, None]),
    "all negative": lambda: (normal(9, 64).abs(), -normal(500, 64, seed=1).abs()),
}  # fmt: skip


def check(case: Case) -> None:
    x, weight = case
    found = Screen(weight).argmax(x)
    logits = x.double() @ weight.double().T
    # Where two are equal to fp32, either is right; the plain product's own choice is held to the same.
    short = logits.amax(1) - logits.gather(1, found[:, None])[:, 0]
    assert (short <= 1e-6 * x.double().norm(dim=1) * weight.double().norm(dim=1).max()).all()
    assert (found == plain_argmax(x, weight)).double().mean() >= 0.8


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_the_largest_logit_is_found(case: Callable[[], Case]) -> None:
    check(case())


@pytest.mark.parametrize("case", [near_ties, outliers])
def test_without_the_bound_it_would_not_be(monkeypatch: pytest.MonkeyPatch, case: Callable[[], Case]) -> None:
    monkeypatch.setattr(Screen, "bound", lambda self, x_NC, lost_N: torch.zeros(len(x_NC)))
    with pytest.raises(AssertionError):
        check(case())


@pytest.mark.parametrize("case", [name for name in CASES if name != "squares beyond fp32"])
def test_no_rounded_logit_is_off_by_more_than_the_bound(case: str) -> None:
    x, weight = CASES[case]()
    judge = Screen(weight)
    codes, scales, lost = rounded(x)
    short_x, short_weight = codes * scales.double()[:, None], judge.codes * judge.scales.double()[:, None]
    error = (short_x @ short_weight.T - x.double() @ weight.double().T).abs().amax(1)
    bound = judge.bound(x, lost).double()
    assert (error <= bound).all()
    if case == "random":
        assert (bound <= 30 * error).all()  # and it says something


@pytest.mark.parametrize("width", [2, 3, 64, 1000, 4096])
def test_sums_of_integers_are_exact(width: int) -> None:
    """The largest there are: a processor that adds pairs in 16 bits would saturate."""
    codes, other = torch.full((5, width), 127, dtype=torch.int8), torch.full((7, width), -127, dtype=torch.int8)
    assert (torch._int_mm(codes, other.T) == -127 * 127 * width).all()


def test_of_equal_tokens_the_first_is_taken() -> None:
    x, weight = normal(8, 64), normal(600, 64, seed=1)
    weight[[590, 300, 5]] = 3 * x[:1]  # in three blocks
    weight[[7, 8]] = 4 * x[1:2]
    found = Screen(weight).argmax(x)
    assert found[:2].tolist() == [5, 7]
    assert torch.equal(found, plain_argmax(x, weight))


def test_a_clear_winner_is_the_only_candidate(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = normal(1000, 256, seed=1)
    tokens = torch.tensor([3, 999, 128, 127, 640])
    x = weight[tokens] + 0.1 * normal(5, 256)
    monkeypatch.setattr(screen, "plain_argmax", lambda *_: pytest.fail("all logits were computed"))
    rows, candidates = Screen(weight).candidates(x)
    assert rows.tolist() == [0, 1, 2, 3, 4]
    assert torch.equal(candidates, tokens)
    assert torch.equal(Screen(weight).argmax(x), tokens)


@pytest.mark.parametrize("spoil", ["x", "weight", "candidates"])
def test_what_cannot_be_screened_goes_the_plain_way(monkeypatch: pytest.MonkeyPatch, spoil: str) -> None:
    x, weight = normal(4, 64), normal(500, 64, seed=1)
    if spoil == "x":
        x[2, 5] = float("nan")
    elif spoil == "weight":
        weight[77, 5] = float("inf")
    else:
        monkeypatch.setattr(screen, "MOST", 3)
    calls: list[Any] = []
    monkeypatch.setattr(screen, "plain_argmax", lambda *given: calls.append(given) or plain_argmax(*given))
    assert torch.equal(Screen(weight).argmax(x), plain_argmax(x, weight))
    assert len(calls) == 1


def test_only_fp32_on_a_cpu_is_screened() -> None:
    assert can_screen(torch.zeros(2, 2)) == torch.cpu._is_vnni_supported()
    assert not can_screen(torch.zeros(2, 1))
    assert not can_screen(torch.zeros(2, 2, dtype=torch.bfloat16))
    assert not can_screen(torch.zeros(2, 2, device="meta"))
