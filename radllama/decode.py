"""Decoding many prompts: nothing computed twice, a batch that stays full, drafts that the model confirms.

    prompts      what several begin with (all with the instruction) is computed once; equal prompts are, as a whole
    prefill      packed, without padding; the head runs for no token of it
    batch        a finished row's place goes to a waiting prompt; keys and values stay in one buffer of fixed size
    drafts       greedy only: guessed tokens (draft.py) are tried, several in one pass; kept is what the model would
                 have chosen anyway
    head         greedy only: an 8-bit copy finds the few tokens whose logits can be the largest (screen.py)

`greedy_loop`, without any of it, is the oracle. Tensors carry their dimensions as suffix, as in model.py.
"""

from __future__ import annotations

import logging
import math
from collections import deque
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from mmap import mmap
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from radllama.draft import Drafter
from radllama.fused import linear
from radllama.model import Attend, Llama, LlamaConfig, lower_right_mask
from radllama.quant import Linear4bit, kept
from radllama.screen import Screen, can_screen

logger = logging.getLogger("radllama")

FILL_TOKENS = 1024  # of a pass that only fills the cache; 256 and 2048 took a twentieth longer on a CPU
# Tokens that cost a pass little more than one does, as long as reading the weights takes longer than computing:
# drafts never make a pass wider than this.
WIDTH = {"cpu": 16, "cuda": 128}
GROUP = 16  # rows on a CPU that attend together, up to the longest of them: reading their keys is what takes time
SCREEN_FROM = 32  # tokens to write, at most: making the head's 8-bit copy costs what it saves in about ten passes


@torch.no_grad()
def greedy_loop(model: Llama, prompt: list[int], stop_ids: Collection[int], max_new_tokens: int) -> list[int]:
    """Greedy decoding as it is defined: the whole row again for each token. Slow; what all else is compared with."""
    output: list[int] = []
    while len(output) < max_new_tokens and not (output and output[-1] in stop_ids):
        row = torch.tensor([prompt + output], device=model.model.embed_tokens.weight.device)
        output.append(int(model(row)[0, -1].argmax()))
    return output


def generate(
    model: Llama,
    prompts: list[list[int]],
    *,
    stop_ids: Collection[int],
    max_new_tokens: int,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    seeds: Sequence[int] | None = None,
    batch_size: int = 64,
    draft_tokens: int = 4,
    corpus: Iterable[list[int]] = (),
    keep_dequantized: bool | None = None,
    progress: bool = False,
) -> list[list[int]]:
    """Continue every prompt until a stop id (which is the last id returned) or max_new_tokens.

    temperature 0 is greedy. Otherwise each prompt draws from its own generator, seeded by (seed, its place in the
    list) or by what `seeds` gives it, so that a result does not depend on the batch it was computed in.
    draft_tokens: tried at a time, greedy only. corpus: token ids of texts like those to be written (the training
    impressions, say), from which drafts are taken, too; they change no output. keep_dequantized: hold the 4-bit
    weights de-quantised meanwhile; None: where they take at most half of the free memory. Raises ValueError for an
    empty prompt.
    """
    outputs: list[list[int]] = [[] for _ in prompts]
    seeds = [seed_of(seed, place) for place in range(len(prompts))] if seeds is None else seeds
    finished = decode(
        model, prompts, seeds, Sampler(temperature, top_k, top_p), stop_ids=stop_ids, max_new_tokens=max_new_tokens,
        batch_size=batch_size, draft_tokens=draft_tokens, corpus=corpus, keep_dequantized=keep_dequantized)  # fmt: skip
    for place, output in tqdm(finished, total=len(prompts), desc="generate", unit="report", disable=not progress):
        outputs[place] = output
    return outputs


def seed_of(seed: int, place: int) -> int:
    return hash((seed, place)) % 2**63


@dataclass
class Row:
    """A prompt on its way; the last token of `text` is not yet in the cache."""

    places: list[int]  # in the caller's list: equal prompts that are decoded greedily share a row
    text: list[int]  # the prompt, then what was written
    prompt_length: int
    generator: torch.Generator
    drafts: list[int] = field(default_factory=list)  # tried in the coming pass

    @property
    def output(self) -> list[int]:
        return self.text[self.prompt_length :]


@torch.no_grad()
def decode(
    model: Llama,
    prompts: Sequence[list[int]],
    seeds: Sequence[int],
    sampler: Sampler,
    *,
    stop_ids: Collection[int],
    max_new_tokens: int,
    batch_size: int = 64,
    draft_tokens: int = 4,
    corpus: Iterable[list[int]] = (),
    keep_dequantized: bool | None = None,
) -> Iterator[tuple[int, list[int]]]:
    """Yield (a prompt's place in the list, what follows it), each as it is finished. See `generate`."""
    if any(not prompt for prompt in prompts):
        raise ValueError(f"prompt {[bool(prompt) for prompt in prompts].index(False)} is empty")
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens: expected at least 1, found {max_new_tokens}")
    if not prompts:
        return
    greedy = sampler.temperature == 0
    waiting = deque(_rows(prompts, seeds, merge=greedy))
    slots = min(batch_size, len(waiting))
    drafter = Drafter(draft_tokens if greedy else 0, corpus)
    weight, was_training = model.model.embed_tokens.weight, model.training
    length = max(map(len, prompts)) + max_new_tokens + draft_tokens  # where short drafts are padded, too
    slots = slots_that_fit(model.config, slots, length, weight)
    width = WIDTH["cpu" if weight.device.type == "cpu" else "cuda"]
    model.eval()
    with ExitStack() as at_end:
        at_end.callback(model.train, was_training)
        if fits_dequantized(model) if keep_dequantized is None else keep_dequantized:
            at_end.enter_context(kept(model, weight.dtype, packed=True))
        cache = KVCache(model.config, slots, length, weight.device, weight.dtype)
        shared = shared_prefix(prompts)
        cache.fill(model, [Piece(0, 0, prompts[0][:shared])])
        cache.copy(0, list(range(1, slots)), shared)
        screen = _screen(model) if greedy and len(waiting) * max_new_tokens >= SCREEN_FROM else None
        rows: list[Row] = []
        while waiting or rows:
            # New prompts come in several at a time: a pass for one alone costs nearly as much.
            if waiting and 4 * (slots - len(rows)) >= slots:
                new = [waiting.popleft() for _ in range(min(slots - len(rows), len(waiting)))]
                _admit(model, cache, rows, new, shared)
                for row in new:
                    drafter.read(row.text)
            for row in rows:
                left = max_new_tokens - len(row.text) + row.prompt_length
                row.drafts = drafter.guess(row.text, min(width // len(rows), left) - 1)
            chosen = _step(model, cache, rows, sampler, screen)
            for slot in reversed(range(len(rows))):
                row = rows[slot]
                if _accept(row, chosen[slot], drafter, stop_ids, max_new_tokens):
                    drafter.forget(row.text)
                    yield from ((place, row.output) for place in row.places)
                    last = rows.pop()
                    if last is not row:  # it moves into the gap
                        cache.copy(len(rows), [slot], len(last.text))
                        rows[slot] = last


def _rows(prompts: Sequence[list[int]], seeds: Sequence[int], *, merge: bool) -> list[Row]:
    """The longest first, equal prompts side by side; with `merge` equal prompts become one row."""
    rows: dict[tuple[int, ...], Row] = {}
    for place, prompt in sorted(enumerate(prompts), key=lambda item: (-len(item[1]), item[1])):
        key = tuple(prompt) if merge else (place,)
        if key in rows:
            rows[key].places.append(place)
        else:
            rows[key] = Row([place], list(prompt), len(prompt), torch.Generator().manual_seed(seeds[place]))
    return list(rows.values())


def shared_prefix(prompts: Sequence[list[int]], left_over: int = 1) -> int:
    """How many tokens all prompts begin with; at least `left_over` tokens of each are not counted."""
    first, last = min(prompts), max(prompts)  # the two that differ earliest
    most = min(map(len, prompts)) - left_over
    return next((n for n in range(most) if first[n] != last[n]), most)


@dataclass
class Piece:
    """Tokens for the cache: `slot` holds `start` tokens before them, or takes these from `source`."""

    slot: int
    start: int
    tokens: list[int]
    source: int | None = None  # a slot that is filled in the same pass, by a piece before this one, or earlier


def _admit(model: Llama, cache: KVCache, rows: list[Row], new: list[Row], shared: int) -> None:
    """Give each new row the next slot and fill its part of the cache, all but the prompt's last token."""
    held = {tuple(row.text[: row.prompt_length]): slot for slot, row in enumerate(rows)}
    fresh: list[tuple[list[int], int]] = []
    copies: list[tuple[int, int, int]] = []
    for row in new:
        slot, key = len(rows), tuple(row.text)
        rows.append(row)
        if key in held:  # samples of one prompt
            copies.append((held[key], slot, len(key) - 1))
            continue
        held[key] = slot
        fresh.append((row.text[:-1], slot))
    pieces: list[Piece] = []
    last: list[int] = []
    for text, slot in sorted(fresh):  # side by side stand those that begin alike
        start = shared_prefix([last, text], left_over=0)
        if start > shared:
            pieces.append(Piece(slot, start, text[start:], source=pieces[-1].slot))
        else:
            pieces.append(Piece(slot, shared, text[shared:]))
        last = text
    while pieces:
        count, size = 1, len(pieces[0].tokens)
        while count < len(pieces) and size + len(pieces[count].tokens) <= FILL_TOKENS:
            size += len(pieces[count].tokens)
            count += 1
        cache.fill(model, pieces[:count])
        del pieces[:count]
    for source, target, length in copies:
        cache.copy(source, [target], length)


def _screen(model: Llama) -> Screen | None:
    """For the head, where there can be one and its 8-bit copy takes at most half of the free memory."""
    head = model.lm_head
    if (
        not isinstance(head, nn.Linear)
        or not can_screen(head.weight)
        or 2 * head.weight.numel() > free_memory(head.weight)
    ):
        return None
    return Screen(head.weight.detach())


def _step(
    model: Llama, cache: KVCache, rows: list[Row], sampler: Sampler, screen: Screen | None = None
) -> list[list[int]]:
    """One pass: each row's last token and its drafts in, the token that follows each of them out."""
    wide = 1 + max(len(row.drafts) for row in rows)
    tokens_BT = torch.zeros(len(rows), wide, dtype=torch.int64)
    wanted: list[int] = []  # what pads a row of fewer drafts is computed, but neither read nor kept
    for slot, row in enumerate(rows):
        given = [row.text[-1], *row.drafts]
        tokens_BT[slot, : len(given)] = torch.tensor(given)
        wanted += range(slot * wide, slot * wide + len(given))
    positions_BT = torch.tensor([len(row.text) - 1 for row in rows])[:, None] + torch.arange(wide)
    device = cache.k.device
    x_BTC = model.model(tokens_BT.to(device), positions_BT.to(device), cache.attends(positions_BT))
    x_NC, head = x_BTC.flatten(0, 1)[torch.tensor(wanted, device=device)], model.lm_head
    if screen is not None:
        chosen = iter(screen.argmax(x_NC).tolist())
    else:
        logits_NV = linear(x_NC, head.weight) if isinstance(head, nn.Linear) else head(x_NC)
        chosen = iter(sampler.choose(logits_NV, [row.generator for row in rows]))
    return [[next(chosen) for _ in range(1 + len(row.drafts))] for row in rows]


def _accept(row: Row, chosen: list[int], drafter: Drafter, stop_ids: Collection[int], max_new_tokens: int) -> bool:
    """Append the chosen tokens as far as the drafts agreed, and the one after; True where the row is finished."""
    for token, draft in zip(chosen, [*row.drafts, None], strict=True):
        drafter.append(row.text, token)
        if token in stop_ids or len(row.output) == max_new_tokens:
            return True
        if token != draft:
            break
    return False


class KVCache:
    """Keys and values of the tokens so far: (layers, slots, K, S, D) each; a slot holds a row, filled from the left."""

    def __init__(self, config: LlamaConfig, slots: int, length: int, device: torch.device, dtype: torch.dtype) -> None:
        self.group = config.num_attention_heads // config.num_key_value_heads
        shape = (config.num_hidden_layers, slots, config.num_key_value_heads, length, config.head_dim)
        self.k, self.v = (_zeros(shape, device, dtype) for _ in range(2))

    def copy(self, source: int, targets: list[int], length: int) -> None:
        """Give the slots `targets` the first `length` tokens of another."""
        for x in (self.k, self.v) if targets else ():
            x[:, targets, :, :length] = x[:, source, None, :, :length]

    def attends(self, positions_BT: Tensor) -> list[Attend]:
        """One a layer, for the first B slots: store the keys and values of `positions` (on the CPU), attend to all up
        to each token. A query head's group is laid along the queries: one key head serves it without being repeated."""
        B, T = positions_BT.shape
        ends = (positions_BT.max(1).values + 1).tolist()
        positions_BT = positions_BT.to(self.k.device)
        row = torch.arange(B, device=positions_BT.device)[:, None]
        sees = torch.arange(max(ends), device=positions_BT.device) <= positions_BT[:, None, :, None]  # (B, 1, T, S)
        sees = sees.repeat(1, 1, self.group, 1)
        size = B if self.k.is_cuda else GROUP
        groups = [(slice(first, first + size), max(ends[first : first + size])) for first in range(0, B, size)]

        def attend(q_BHTD: Tensor, k_BKTD: Tensor, v_BKTD: Tensor, layer: int) -> Tensor:
            k, v = self.k[layer], self.v[layer]
            k[row, :, positions_BT] = k_BKTD.transpose(1, 2)
            v[row, :, positions_BT] = v_BKTD.transpose(1, 2)
            q = q_BHTD.reshape(B, k.shape[1], self.group * T, -1)
            outputs = [
                F.scaled_dot_product_attention(
                    q[some], k[:B][some, :, :end], v[:B][some, :, :end], attn_mask=sees[some, ..., :end]
                )
                for some, end in groups
            ]
            return torch.cat(outputs).view_as(q_BHTD)

        return [partial(attend, layer=layer) for layer in range(len(self.k))]

    def fill(self, model: Llama, pieces: list[Piece]) -> None:
        """Store the pieces' tokens, packed in one row. A piece's source stands before it."""
        device = self.k.device
        lengths = [len(piece.tokens) for piece in pieces]
        if not any(lengths):
            for piece in pieces:
                if piece.source is not None:
                    self.copy(piece.source, [piece.slot], piece.start)
            return
        tokens_1T = torch.tensor([token for piece in pieces for token in piece.tokens], device=device)[None]
        positions = torch.cat([piece.start + torch.arange(len(piece.tokens)) for piece in pieces]).to(device)
        slots = torch.tensor([piece.slot for piece in pieces for _ in piece.tokens], device=device)

        def attend(q_1HTD: Tensor, k_1KTD: Tensor, v_1KTD: Tensor, layer: int) -> Tensor:
            k, v = self.k[layer], self.v[layer]
            k[slots, :, positions] = k_1KTD[0].transpose(0, 1)
            v[slots, :, positions] = v_1KTD[0].transpose(0, 1)
            for piece in pieces:
                if piece.source is not None:
                    k[piece.slot, :, : piece.start] = k[piece.source, :, : piece.start]
                    v[piece.slot, :, : piece.start] = v[piece.source, :, : piece.start]
            if layer == len(self.k) - 1:
                return q_1HTD  # of no token: what comes of the last layer is not wanted
            outputs = []
            for q, piece in zip(q_1HTD.split(lengths, dim=2), pieces, strict=True):
                if not piece.tokens:  # all of them are its source's
                    continue
                end = piece.start + len(piece.tokens)
                sees = lower_right_mask(len(piece.tokens), end, device)
                keys, values = k[piece.slot, None, :, :end], v[piece.slot, None, :, :end]
                outputs.append(F.scaled_dot_product_attention(q, keys, values, attn_mask=sees, enable_gqa=True))
            return torch.cat(outputs, dim=2)

        attends: list[Attend] = [partial(attend, layer=layer) for layer in range(len(self.k))]
        nothing = torch.zeros(0, dtype=torch.int64, device=device)
        model.model(tokens_1T, positions[None], attends, nothing)


def _zeros(shape: tuple[int, ...], device: torch.device, dtype: torch.dtype) -> Tensor:
    """On a CPU, memory that the system provides page by page, as it is first used: most rows stay short."""
    if device.type != "cpu":
        return torch.zeros(shape, device=device, dtype=dtype)
    return torch.frombuffer(mmap(-1, math.prod(shape) * dtype.itemsize), dtype=dtype).view(shape)


def fits_dequantized(model: nn.Module) -> bool:
    """Whether the 4-bit weights, de-quantised to the model's dtype, take at most half of the free memory."""
    layers = [layer for layer in model.modules() if isinstance(layer, Linear4bit)]
    if not layers:
        return False
    weight = next(p for p in model.parameters() if p.is_floating_point())
    return 2 * sum(layer.in_features * layer.out_features for layer in layers) * weight.itemsize <= free_memory(weight)


def slots_that_fit(config: LlamaConfig, slots: int, length: int, weight: Tensor) -> int:
    """As many slots of `length` tokens as a third of a GPU's free memory holds; a CPU's take what is written alone."""
    if weight.device.type == "cpu":
        return slots
    values = config.num_hidden_layers * config.num_key_value_heads * length * config.head_dim
    fitting = free_memory(weight) // 3 // (2 * values * weight.element_size())
    if fitting < slots:
        logger.warning("the longest prompt leaves room for %d of %d reports at a time", max(1, fitting), slots)
    return min(slots, max(1, fitting))


def free_memory(tensor: Tensor) -> int:
    """Bytes, where the tensor lies; 0 where that is unknown."""
    if tensor.is_cuda:
        return torch.cuda.mem_get_info(tensor.device)[0]
    lines = Path("/proc/meminfo").read_text().splitlines() if Path("/proc/meminfo").exists() else []
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable")), 0)


class Sampler:
    """Greedy, or temperature, top-k and top-p (Holtzman et al. 2020) in that order."""

    def __init__(self, temperature: float = 0.0, top_k: int | None = None, top_p: float | None = None) -> None:
        if temperature and not 1e-3 <= temperature < math.inf:  # below, fp32 logits overflow
            raise ValueError(f"temperature: expected 0 (greedy) or at least 0.001, found {temperature}")
        if top_k is not None and top_k < 1:
            raise ValueError(f"top_k: expected at least 1, found {top_k}")
        if top_p is not None and not 0 < top_p <= 1:
            raise ValueError(f"top_p: expected a number above 0 and up to 1, found {top_p}")
        self.temperature, self.top_k, self.top_p = temperature, top_k, top_p

    def probabilities(self, logits_BV: Tensor) -> Tensor:
        """The distribution (B, V) that tokens are drawn from."""
        logits = logits_BV.float() / self.temperature
        if self.top_k is not None and self.top_k < logits.shape[-1]:
            worst = logits.topk(self.top_k).values[:, -1:]
            logits = logits.masked_fill(logits < worst, float("-inf"))
        probabilities = logits.softmax(-1)
        if self.top_p is not None:
            # Keep the fewest most likely tokens that together reach top_p: those before which less than top_p stands.
            ordered, index = probabilities.sort(descending=True, stable=True)
            ordered[ordered.cumsum(-1) - ordered >= self.top_p] = 0.0
            probabilities = torch.zeros_like(ordered).scatter_(-1, index, ordered)
        return probabilities / probabilities.sum(-1, keepdim=True)

    def choose(self, logits_BV: Tensor, generators: list[torch.Generator]) -> list[int]:
        """One token a row."""
        if self.temperature == 0:
            greedy: list[int] = logits_BV.argmax(-1).tolist()
            return greedy
        rows = self.probabilities(logits_BV).cpu()
        return [int(torch.multinomial(row, 1, generator=g)) for row, g in zip(rows, generators, strict=True)]
