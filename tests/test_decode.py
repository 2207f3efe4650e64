"""decode.py: cached decoding against uncached passes, and proof that the comparison would notice."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from conftest import random_llama, tiny_config
from torch import Tensor, nn

from radllama import decode as decode_module
from radllama.decode import KVCache, Sampler, fits_dequantized, generate, greedy_loop, shared_prefix
from radllama.draft import Drafter
from radllama.lora import add_lora, replace_layer
from radllama.model import Llama, RopeScaling
from radllama.quant import Linear4bit, kept

LLAMA31 = RopeScaling(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=16)


LLAMA31_CONFIG = tiny_config(vocab_size=64, num_attention_heads=8, rope_scaling=LLAMA31)
STOPPING = {3, 17, 40, 41, 42, 43}


@pytest.fixture(scope="module")
def model() -> Llama:
    return random_llama(LLAMA31_CONFIG)


def prompts(count: int = 9, prefix: int = 0) -> list[list[int]]:
    """Of unequal lengths; all begin with the same `prefix` tokens, some with another one; the last one stands twice."""
    draw = torch.Generator().manual_seed(1)
    head = torch.randint(0, 64, (prefix,), generator=draw).tolist()
    lengths = torch.randint(1, 30, (count,), generator=draw).tolist()
    rows = [head + torch.randint(0, 64, (length,), generator=draw).tolist() for length in lengths]
    return [*rows, rows[0] + [5, 6], rows[0] + [5, 7, 8], [*rows[0][:-1], 9], rows[0] + [5], list(rows[-1])]


def copying_llama() -> Llama:
    """Attention that finds where the last token stood before: its greedy output soon repeats itself."""
    model = random_llama(LLAMA31_CONFIG)
    with torch.no_grad():
        for layer in model.model.layers:
            for linear in (layer.self_attn.o_proj, layer.mlp.down_proj):
                linear.weight.mul_(0.3)
    return model


@cache
def case(kind: str, prefix: int, stopping: bool) -> tuple[Llama, list[list[int]], list[list[int]]]:
    """A model, prompts, and what the plain loop makes of them: 20 tokens at most."""
    model = {"random": lambda: random_llama(LLAMA31_CONFIG), "copying": copying_llama}[kind]()
    rows = prompts(prefix=prefix)
    return model, rows, [greedy_loop(model, row, STOPPING if stopping else (), 20) for row in rows]


def check(kind: str, prefix: int, stopping: bool, **options: Any) -> None:
    model, rows, expected = case(kind, prefix, stopping)
    assert ({len(output) for output in expected} == {20}) != stopping  # some rows leave early, or none does
    found = generate(model, rows, stop_ids=STOPPING if stopping else (), max_new_tokens=20, **options)
    assert found == expected


@pytest.mark.parametrize("kind", ["random", "copying"])
@pytest.mark.parametrize("prefix", [0, 7])
@pytest.mark.parametrize("stopping", [True, False])
@pytest.mark.parametrize(("batch_size", "draft_tokens"), [(1, 4), (3, 2), (4, 0), (64, 8)], ids=str)
def test_greedy_equals_the_plain_loop(
    kind: str, prefix: int, stopping: bool, batch_size: int, draft_tokens: int
) -> None:
    check(kind, prefix, stopping, batch_size=batch_size, draft_tokens=draft_tokens)


def test_drafts_are_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """They spare passes of a model that repeats itself; the outputs are the plain loop's all the same."""
    passes = []
    step = decode_module._step
    monkeypatch.setattr(decode_module, "_step", lambda *arguments: passes.append(1) or step(*arguments))
    counts = []
    for draft_tokens in (0, 4):
        passes.clear()
        check("copying", 7, False, batch_size=2, draft_tokens=draft_tokens)
        counts.append(len(passes))
    assert counts[1] < 0.8 * counts[0]


@pytest.mark.parametrize("prefix", [0, 7])
def test_what_prompts_begin_with_is_computed_once(monkeypatch: pytest.MonkeyPatch, prefix: int) -> None:
    filled: list[tuple[int, ...]] = []
    fill = KVCache.fill

    def count(self: KVCache, model: Llama, pieces: list[Any]) -> None:
        filled.extend(tuple(piece.tokens) for piece in pieces)
        fill(self, model, pieces)

    monkeypatch.setattr(KVCache, "fill", count)
    check("random", prefix, True)
    rows = prompts(prefix=prefix)
    assert sum(map(len, filled)) == len({tuple(row[:end]) for row in rows for end in range(1, len(row))})


def test_a_corpus_gives_drafts(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the model will write, told beforehand, spares most passes; nonsense spares none and changes nothing."""
    _, _, expected = case("random", 7, True)
    passes = []
    step = decode_module._step
    monkeypatch.setattr(decode_module, "_step", lambda *arguments: passes.append(1) or step(*arguments))
    counts = []
    for corpus in ([], [[1, 2, 3, 4] * 5], expected):
        passes.clear()
        check("random", 7, True, batch_size=2, corpus=corpus)
        counts.append(len(passes))
    assert counts[2] < 0.6 * counts[0] <= 0.7 * counts[1]


@pytest.mark.parametrize("screened", [True, False])
def test_the_head_s_copy_changes_nothing(monkeypatch: pytest.MonkeyPatch, screened: bool) -> None:
    made = []
    screen = decode_module._screen
    monkeypatch.setattr(decode_module, "can_screen", lambda weight: screened)
    monkeypatch.setattr(decode_module, "_screen", lambda model: made.append(screen(model)) or made[-1])
    check("random", 7, True)
    assert [one is not None for one in made] == [screened]
    made.clear()
    model, rows, _ = case("random", 7, True)
    generate(model, rows, stop_ids=(), max_new_tokens=8, temperature=1.0)
    generate(model, rows[:1], stop_ids=(), max_new_tokens=2)
    assert not made  # no use for one


MUTATIONS: dict[str, tuple[Any, str, Any]] = {
    "rows are not moved": (KVCache, "copy", lambda self, source, targets, length: None),
    "drafts are taken unseen": (
        decode_module,
        "_step",
        lambda model, cache, rows, *rest, step=decode_module._step: [
            [*row.drafts, chosen[-1]] for row, chosen in zip(rows, step(model, cache, rows, *rest), strict=True)
        ],
    ),
    "the shared prefix is a token too long": (
        decode_module,
        "shared_prefix",
        lambda rows, left_over=1: shared_prefix(rows, left_over) + left_over,
    ),
    "a prompt's last token is filled in as well": (
        KVCache,
        "fill",
        lambda self, model, pieces, fill=KVCache.fill: fill(
            self, model, [replace(piece, start=piece.start + (piece.start > 0)) for piece in pieces]
        ),
    ),
    "a prompt's beginning is left where it was computed": (
        KVCache,
        "fill",
        lambda self, model, pieces, fill=KVCache.fill: fill(
            self, model, [replace(piece, source=None) for piece in pieces]
        ),
    ),
}


@pytest.mark.parametrize("mutation", MUTATIONS.values(), ids=MUTATIONS.keys())
def test_broken_decoding_is_noticed(monkeypatch: pytest.MonkeyPatch, mutation: tuple[Any, str, Any]) -> None:
    case("copying", 7, True)  # the expected outputs are made before anything is broken
    monkeypatch.setattr(*mutation)

    def check_both() -> None:  # one row at a time meets other rows' places, all at once each other's beginnings
        for batch_size in (3, 64):
            check("copying", 7, True, batch_size=batch_size)

    with pytest.raises((AssertionError, RuntimeError)):
        check_both()


def test_the_prefix_that_all_prompts_share() -> None:
    assert shared_prefix([[1, 2, 3, 4], [1, 2, 3], [1, 2, 9, 9, 9]]) == 2
    assert shared_prefix([[1, 2, 3], [1, 2, 3]]) == 2  # the last token of each prompt is left over
    assert shared_prefix([[5], [5, 6]]) == 0
    assert shared_prefix([[1, 2, 3]]) == 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_kept_dequantised_give_the_same_logits(dtype: torch.dtype) -> None:
    model = random_llama(tiny_config(hidden_size=64, vocab_size=64)).to(dtype)
    for name, linear in [(n, m) for n, m in model.named_modules() if isinstance(m, nn.Linear) and n != "lm_head"]:
        replace_layer(model, name, Linear4bit.from_weight(linear.weight))
    add_lora(model, rank=4, alpha=8)
    tokens = torch.arange(12)[None]
    with torch.no_grad():
        expected = model(tokens)
        with kept(model, dtype):
            assert torch.equal(model(tokens), expected)
            assert all(layer._kept is not None for layer in model.modules() if isinstance(layer, Linear4bit))
        with kept(model, dtype, packed=True):
            torch.testing.assert_close(model(tokens), expected)
    assert all(layer._kept is None for layer in model.modules() if isinstance(layer, Linear4bit))
    assert fits_dequantized(model)  # some kilobytes
    with_, without = (
        generate(model, prompts(4), stop_ids=(), max_new_tokens=6, keep_dequantized=keep) for keep in (True, False)
    )
    assert with_ == without


def test_sampling_depends_on_seed_and_place_not_on_the_batch(model: Llama) -> None:
    def draw(seed: int, batch_size: int) -> list[list[int]]:
        return generate(
            model, prompts(), stop_ids=(), max_new_tokens=8, temperature=0.8, top_k=20, top_p=0.9, seed=seed,
            batch_size=batch_size)  # fmt: skip

    assert draw(0, 64) == draw(0, 2)
    assert draw(0, 64) != draw(1, 64)


def test_top_k_and_top_p_against_plain_loops() -> None:
    logits = torch.randn(5, 40, generator=torch.Generator().manual_seed(0)) * 3
    for k, p in [(None, None), (7, None), (None, 0.6), (7, 0.6), (1, None), (None, 1e-9)]:
        found = Sampler(0.7, k, p).probabilities(logits)
        for row, probabilities in zip(logits, found, strict=True):
            kept = sorted(range(40), key=lambda i: -float(row[i]))[:k]
            weights = torch.softmax(row[kept] / 0.7, 0).tolist()
            total, survivors = 0.0, {}
            for token, weight in zip(kept, weights, strict=True):
                if p is not None and total >= p:
                    break
                survivors[token], total = weight, total + weight
            expected = torch.zeros(40)
            for token, weight in survivors.items():
                expected[token] = weight / total
            torch.testing.assert_close(probabilities, expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(
    "arguments",
    [
        (-1.0, None, None),
        (math.nan, None, None),
        (math.inf, None, None),
        (1e-40, None, None),
        (1.0, 0, None),
        (1.0, None, 0.0),
        (1.0, None, 1.5),
    ],
)
def test_bad_sampling_settings(arguments: tuple[float, int | None, float | None]) -> None:
    with pytest.raises(ValueError, match=r"temperature|top_k|top_p"):
        Sampler(*arguments)


def test_an_empty_prompt_is_refused(model: Llama) -> None:
    with pytest.raises(ValueError, match="prompt 1 is empty"):
        generate(model, [[1], []], stop_ids=(), max_new_tokens=2)
    with pytest.raises(ValueError, match="max_new_tokens: expected at least 1, found 0"):
        generate(model, [[1]], stop_ids=(), max_new_tokens=0)


def test_finished_rows_are_forgotten(model: Llama, monkeypatch: pytest.MonkeyPatch) -> None:
    drafters: list[Drafter] = []
    monkeypatch.setattr(decode_module, "Drafter", lambda *given: drafters.append(Drafter(*given)) or drafters[-1])
    generate(model, [[1, 2, 3], [4, 5], [1, 2, 3]], stop_ids=(), max_new_tokens=4)
    assert not drafters[0].prompts


def test_a_gpus_cache_leaves_room(model: Llama, monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    shape, length = model.config, 100
    slot = 2 * shape.num_hidden_layers * shape.num_key_value_heads * length * shape.head_dim * 2
    weight = torch.empty(0, dtype=torch.bfloat16, device="meta")
    for free, expected in ((3 * 5 * slot, 5), (3 * 5 * slot - 1, 4), (10**12, 8), (1, 1)):
        monkeypatch.setattr(decode_module, "free_memory", lambda _, free=free: free)
        assert decode_module.slots_that_fit(shape, 8, length, weight) == expected
    assert "room for 4 of 8 reports" in caplog.text
    assert decode_module.slots_that_fit(shape, 8, length, torch.empty(0)) == 8
    x = KVCache(tiny_config(num_hidden_layers=1, num_attention_heads=1, num_key_value_heads=1), 1, 4,
                       torch.device("cpu"), torch.float32)  # fmt: skip
    x.copy(0, [], 2)


# The cache


def check_cache(model: Llama, tokens: Tensor, lengths: list[int], steps: list[int], keep: list[int] | None) -> None:
    """Prefill rows of unequal length at once, append chunks of `steps` tokens, compare with every row alone.

    tokens (B, T). Row b's prompt is its first lengths[b] tokens; what stands after them in the prefill is other
    tokens, as padding would be. After the first chunk only the rows `keep` stay. AssertionError on a difference.
    """
    with torch.no_grad():
        alone = [model(row[None])[0] for row in tokens]
        assert torch.cat(alone).std() >= 1
        rows = list(range(len(tokens)))
        cache = KVCache(model.config, len(rows), tokens.shape[1], torch.device("cpu"), torch.float32)
        prompts = tokens[:, : max(lengths)].clone()
        for row, length in enumerate(lengths):
            prompts[row, length:] = 1
        logits = model(prompts, attends=cache.attends(torch.arange(prompts.shape[1]).expand_as(prompts)))
        for row, length in enumerate(lengths):
            torch.testing.assert_close(logits[row, :length], alone[row][:length], atol=1e-4, rtol=0)
        reach = torch.tensor(lengths)
        for number, size in enumerate(steps):
            positions = reach[:, None] + torch.arange(size)
            chunk = tokens[rows].gather(1, positions)
            logits = model(chunk, positions=positions, attends=cache.attends(positions))
            for place, row in enumerate(rows):
                expected = alone[row][positions[place]]
                torch.testing.assert_close(logits[place], expected, atol=1e-4, rtol=0)
            reach = reach + size
            if keep is not None and number == 0:
                for target, source in enumerate(keep):
                    cache.copy(source, [target], int(reach.max()))
                rows, reach = [rows[place] for place in keep], reach[keep]


@pytest.mark.parametrize("steps", [[1] * 7, [4, 1, 3], [8]], ids=str)
@pytest.mark.parametrize("keep", [None, [0, 2, 3], [3, 1], [2]], ids=str)
def test_cached_decoding_equals_the_uncached_pass(steps: list[int], keep: list[int] | None) -> None:
    config = tiny_config(num_attention_heads=8, rope_scaling=LLAMA31)
    tokens = torch.randint(config.vocab_size, (4, 20), generator=torch.Generator().manual_seed(3))
    check_cache(random_llama(config), tokens, [3, 11, 1, 7], steps, keep)


CACHE_MUTATIONS: dict[str, tuple[str, Callable[..., Any]]] = {
    "rows are not moved": ("copy", lambda self, source, targets, length: None),
    "all rows at the first row's positions": (
        "attends",
        lambda self, positions, attends=KVCache.attends: attends(self, positions[:1].expand_as(positions)),
    ),
    "a chunk sees its own future": (
        "attends",
        lambda self, positions, attends=KVCache.attends: [
            lambda q, k, v, one=one: one(q, k, v)[:, :, -1:].expand_as(q) for one in attends(self, positions)
        ],
    ),
}


@pytest.mark.parametrize(("target", "mutant"), CACHE_MUTATIONS.values(), ids=CACHE_MUTATIONS.keys())
def test_decoding_notices_a_broken_cache(monkeypatch: pytest.MonkeyPatch, target: str, mutant: Any) -> None:
    tokens = torch.randint(97, (3, 20), generator=torch.Generator().manual_seed(3))
    monkeypatch.setattr(KVCache, target, mutant)
    with pytest.raises((AssertionError, RuntimeError)):
        check_cache(random_llama(tiny_config()), tokens, [3, 9, 5], [1, 3, 1], [2, 0])
