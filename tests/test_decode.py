"""decode.py: cached decoding against uncached passes, and proof that the comparison would notice."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import random_llama, tiny_config
from torch import Tensor

from radllama.decode import KVCache
from radllama.model import Llama, RopeScaling

LLAMA31 = RopeScaling(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=16)


def decode(model: Llama, tokens: Tensor, lengths: list[int], steps: list[int], keep: list[int] | None) -> None:
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
                cache.keep(torch.tensor(keep))
                rows, reach = [rows[place] for place in keep], reach[keep]


@pytest.mark.parametrize("steps", [[1] * 7, [4, 1, 3], [8]], ids=str)
@pytest.mark.parametrize("keep", [None, [0, 2, 3], [3, 1], [2]], ids=str)
def test_cached_decoding_equals_the_uncached_pass(steps: list[int], keep: list[int] | None) -> None:
    config = tiny_config(num_attention_heads=8, rope_scaling=LLAMA31)
    tokens = torch.randint(config.vocab_size, (4, 20), generator=torch.Generator().manual_seed(3))
    decode(random_llama(config), tokens, [3, 11, 1, 7], steps, keep)


CACHE_MUTATIONS: dict[str, tuple[str, Callable[..., Any]]] = {
    "rows are not kept": ("keep", lambda self, rows: None),
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
        decode(random_llama(tiny_config()), tokens, [3, 9, 5], [1, 3, 1], [2, 0])
