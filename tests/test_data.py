"""Packs against reports alone and against naive oracles; the draw of steps; bad input.

`check_pack` is the oracle of packing: it raises AssertionError where a packed report's logits, losses or gradients
are not those it has alone. Broken packs show that it would notice.
"""

from __future__ import annotations

import json
import logging
import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import random_llama, synthetic_examples, tiny_config
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from radllama import model as model_module
from radllama.data import (
    HELD_OUT_INSTRUCTIONS,
    INSTRUCTIONS,
    PROMPT_FILE,
    Example,
    Pack,
    Prompt,
    Reports,
    Row,
    check_vocabulary,
    in_order,
    pack,
    read_examples,
    shared_prefix,
    spread,
)
from radllama.model import Llama
from radllama.tokenizer import Tokenizer

PROMPT = Prompt("llama3", INSTRUCTIONS[:3])
SECRET = "zebra"  # stands in every report of a faulty file, and in no message
quick = settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.too_slow])


def make_reports(
    tokenizer: Tokenizer,
    examples: list[Example],
    prompt: Prompt = PROMPT,
    *,
    max_length: int = 512,
    seed: int = 0,
) -> Reports:
    return Reports(examples, tokenizer, prompt, max_length=max_length, seed=seed, name="train.jsonl")


@pytest.fixture(scope="module")
def reports(tokenizer: Tokenizer) -> Reports:
    return make_reports(tokenizer, synthetic_examples(30))


@pytest.fixture(scope="module")
def llama(tokenizer: Tokenizer) -> Llama:
    return random_llama(tiny_config(vocab_size=tokenizer.vocab_size))


# What a pack computes


def forward_pack(model: Llama, packed: Pack, *, losses: bool = True) -> Tensor:
    return model(
        packed.tokens,
        positions=packed.positions,
        segments=packed.segments,
        label_positions=packed.label_positions,
        labels=packed.labels if losses else None,
    )


def forward_alone(model: Llama, row: Row) -> tuple[Tensor, Tensor]:
    """Logits (N, V) and losses (N,) at the row's labels, computed in the plainest way."""
    ids, mask = torch.tensor(row.ids), torch.tensor(row.mask)
    logits = model(ids[None])[0, :-1][mask[1:]]
    return logits, F.cross_entropy(logits, ids[1:][mask[1:]], reduction="none")


def gradients(model: Llama, loss: Tensor) -> dict[str, Tensor]:
    names, parameters = zip(*model.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(loss, parameters, retain_graph=True), strict=True))


def assert_same_gradients(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """To 1e-5 relative, parameter by parameter."""
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert gradient.norm() > 0, name
        assert (found[name] - gradient).norm() <= 1e-5 * gradient.norm(), name


def check_pack(model: Llama, rows: Sequence[Row], packed: Pack) -> None:
    """AssertionError unless each report has the logits, losses and gradients in the pack that it has alone."""
    logits, losses = forward_pack(model, packed, losses=False), forward_pack(model, packed)
    alone = [forward_alone(model, row) for row in rows]
    assert packed.ids == [row.id for row in rows]
    assert logits.std() >= 1
    for number, (expected_logits, expected_losses) in enumerate(alone):
        mine = packed.owners == number
        torch.testing.assert_close(logits[mine], expected_logits, atol=1e-4, rtol=0)
        torch.testing.assert_close(losses[mine], expected_losses, atol=1e-4, rtol=0)
    total, expected = losses.sum(), torch.cat([values for _, values in alone]).sum()
    assert abs(total - expected) <= 1e-5 * expected
    assert_same_gradients(gradients(model, total), gradients(model, expected))
    for number in (0, len(rows) - 1):
        total, expected = losses[packed.owners == number].sum(), alone[number][1].sum()
        assert_same_gradients(gradients(model, total), gradients(model, expected))


@pytest.fixture
def rows(reports: Reports) -> list[Row]:
    """Nine reports of three wordings, two to four each."""
    by_wording: dict[int, list[Row]] = {}
    for row in reports.step(0, 30):
        by_wording.setdefault(row.wording, []).append(row)
    chosen = [row for count, wording in ((4, 0), (2, 1), (3, 2)) for row in by_wording[wording][:count]]
    assert len(chosen) == 9
    return chosen


def test_a_pack_of_several_wordings_gives_what_each_report_has_alone(llama: Llama, rows: list[Row]) -> None:
    packed = pack(rows)
    prefixes = [number for number, (_, prefix) in enumerate(packed.segments.tolist()) if prefix < 0]
    assert len(prefixes) == 3  # one a wording
    assert len(packed.segments) == 3 + 9
    assert packed.tokens.shape[1] < 0.8 * sum(len(row.ids) - 1 for row in rows)
    check_pack(llama, rows, packed)


def test_a_pack_without_shared_prefixes_does_too(llama: Llama, rows: list[Row]) -> None:
    apart = [replace(row, wording=number) for number, row in enumerate(rows)]
    packed = pack(apart)
    assert packed.segments[:, 1].tolist() == [-1] * 9
    assert packed.tokens.shape[1] == sum(len(row.ids) - 1 for row in rows)
    check_pack(llama, apart, packed)


def random_rows(seed: int, vocab_size: int = 97) -> list[Row]:
    """Rows whose wordings share a random prefix; labels are scattered after the prompt."""
    draw = random.Random(seed)

    def ids(least: int, most: int) -> list[int]:
        return [draw.randrange(vocab_size) for _ in range(draw.randint(least, most))]

    rows: list[Row] = []
    for wording in draw.sample(range(-1, 6), draw.randint(1, 4)):
        prefix = ids(1, 12)
        for _ in range(draw.randint(1, 4)):
            prompt, answer = prefix + ids(0, 6), ids(2, 6)
            mask = [False] * len(prompt) + [draw.random() < 0.7 for _ in answer[1:]] + [True]
            rows.append(Row(f"r{len(rows)}", prompt + answer, mask, wording))
    return rows


@pytest.mark.parametrize("seed", range(12))
def test_random_packs_give_what_each_report_has_alone(seed: int) -> None:
    rows = random_rows(seed)
    check_pack(random_llama(tiny_config(rope_theta=10_000.0), seed), rows, pack(rows))


def unlink(packed: Pack) -> Pack:
    segments = packed.segments.clone()
    segments[:, 1] = -1
    return replace(packed, segments=segments)


def link_to_first(packed: Pack) -> Pack:
    """All reports follow the first wording's prefix."""
    segments = packed.segments.clone()
    segments[segments[:, 1] > 0, 1] = 0
    return replace(packed, segments=segments)


def restart(packed: Pack) -> Pack:
    """Positions start at 0 in every segment, so that a report stands on top of its prefix."""
    lengths = packed.segments[:, 0].tolist()
    return replace(packed, positions=torch.cat([torch.arange(length) for length in lengths])[None])


def run_on(packed: Pack) -> Pack:
    return replace(packed, positions=torch.arange(packed.tokens.shape[1])[None])


BROKEN_PACKS: dict[str, Callable[[Pack], Pack]] = {
    "prefix link gone": unlink,
    "prefix link to another wording": link_to_first,
    "positions restart after the prefix": restart,
    "positions run on over the row": run_on,
    "one segment": lambda packed: replace(packed, segments=torch.tensor([[packed.tokens.shape[1], -1]])),
    "labels at the supervised token": lambda p: replace(p, label_positions=p.label_positions + 1),
    "labels of the neighbour": lambda packed: replace(packed, labels=packed.labels.roll(1)),
    "owners mixed up": lambda packed: replace(packed, owners=packed.owners.flip(0)),
    "a label lost": lambda packed: replace(
        packed,
        label_positions=packed.label_positions[1:],
        labels=packed.labels[1:],
        owners=packed.owners[1:],
    ),
}


@pytest.mark.parametrize("broken", BROKEN_PACKS.values(), ids=BROKEN_PACKS.keys())
def test_a_broken_pack_is_noticed(llama: Llama, rows: list[Row], broken: Callable[[Pack], Pack]) -> None:
    with pytest.raises((AssertionError, IndexError)):
        check_pack(llama, rows, broken(pack(rows)))


@pytest.mark.parametrize(
    ("target", "mutant"),
    [
        ("lower_right_mask", lambda queries, keys, device: torch.ones(queries, keys, dtype=torch.bool)),
        ("lower_right_mask", lambda queries, keys, device: torch.ones(queries, keys, dtype=torch.bool).tril()),
        ("packed_attention", lambda segments, queries=None: model_module.causal_attention),
    ],
    ids=["no causal mask after a prefix", "upper left mask", "segments ignored"],
)
def test_broken_packed_attention_is_noticed(
    monkeypatch: pytest.MonkeyPatch, llama: Llama, rows: list[Row], target: str, mutant: Any
) -> None:
    monkeypatch.setattr(llama if hasattr(llama, target) else model_module, target, mutant)
    with pytest.raises(AssertionError):
        check_pack(llama, rows, pack(rows))


def test_no_report_sees_another(llama: Llama, rows: list[Row]) -> None:
    packed = pack(rows)
    with torch.no_grad():
        before = forward_pack(llama, packed)
        own_segments = [pair for pair in enumerate(packed.segments.tolist()) if pair[1][1] >= 0]
        starts = [0, *packed.segments[:, 0].cumsum(0).tolist()]
        assert len(own_segments) == len(rows)
        for owner, (number, (length, _)) in enumerate(own_segments):
            tokens, start = packed.tokens.clone(), starts[number]
            own = slice(start, start + length)
            tokens[0, own] = (tokens[0, own] + 1) % llama.config.vocab_size
            after = forward_pack(llama, replace(packed, tokens=tokens))
            mine = packed.owners == owner
            assert (after[mine] - before[mine]).abs().max() > 0.1
            assert torch.equal(after[~mine], before[~mine])


def test_a_report_depends_on_its_prefix_and_itself_alone(llama: Llama, rows: list[Row]) -> None:
    packed = pack(rows)
    embedded: list[Tensor] = []
    hook = llama.model.embed_tokens.register_forward_hook(lambda _, __, output: embedded.append(output))
    losses = forward_pack(llama, packed)
    hook.remove()
    segments = packed.segments.tolist()
    segment_of = torch.tensor([number for number, (length, _) in enumerate(segments) for _ in range(length)])
    own_segments = [number for number, (_, prefix) in enumerate(segments) if prefix >= 0]
    for owner, own in enumerate(own_segments):
        (gradient,) = torch.autograd.grad(losses[packed.owners == owner].sum(), embedded, retain_graph=True)
        reached = set(segment_of[gradient[0].norm(dim=-1) > 0].tolist())
        assert reached == {own, segments[own][1]}


@pytest.mark.parametrize("batch_size", [8, 24])
def test_accumulation_gives_the_same_gradient_however_a_step_is_cut(
    llama: Llama, reports: Reports, batch_size: int
) -> None:
    """1 x 8 = 2 x 4 = 8 x 1, on unequal masks, with the loss of train.py: sum / supervised tokens of the step."""
    rows = reports.step(1, batch_size)
    supervised = sum(sum(row.mask[1:]) for row in rows)
    results, means = {}, {}
    for packs in (1, 2, 4, 8):
        losses = [forward_pack(llama, pack(members)) for members in spread(rows, packs)]
        assert sum(len(values) for values in losses) == supervised
        results[packs] = gradients(llama, torch.stack([values.sum() / supervised for values in losses]).sum())
        means[packs] = gradients(llama, torch.stack([values.mean() for values in losses]).mean())
    for packs in (2, 4, 8):
        assert_same_gradients(results[packs], results[1])
        with pytest.raises(AssertionError):  # the usual mean of means, on these rows
            assert_same_gradients(means[packs], results[1])


# shared_prefix and pack against naive oracles

MASKED_IDS = st.lists(st.tuples(st.integers(0, 3), st.booleans()), min_size=1, max_size=8)


@st.composite
def rows_of_one_wording(draw: st.DrawFn, wording: int = 0) -> list[Row]:
    """Rows over a tiny alphabet, so that prefixes are common; labels anywhere, but one after the first token."""
    stem = draw(st.lists(st.integers(0, 3), max_size=8))
    rows = []
    for _ in range(draw(st.integers(1, 5))):
        kept = draw(st.integers(0, len(stem)))
        tail = draw(MASKED_IDS)
        early = draw(st.booleans()) and draw(st.booleans())  # seldom a label in the stem
        mask = [early and draw(st.booleans()) for _ in range(kept)] + [label for _, label in tail]
        ids = stem[:kept] + [token for token, _ in tail]
        if not any(mask[1:]):
            ids, mask = [*ids, draw(st.integers(0, 3))], [*mask, True]
        rows.append(Row("", ids, mask, wording))
    return rows


@st.composite
def rows_of_wordings(draw: st.DrawFn) -> list[Row]:
    """Several wordings, which may come back later in the list; -1 is plain text."""
    groups = [draw(rows_of_one_wording(draw(st.integers(-1, 3)))) for _ in range(draw(st.integers(1, 4)))]
    return [replace(row, id=f"r{number}") for number, row in enumerate(row for group in groups for row in group)]


def naive_prefix(rows: Sequence[Row]) -> int:
    """Grow the prefix while all rows agree and no row has its first label there or right after it."""
    length = 0
    while all(len(row.ids) > length + 1 and not any(row.mask[: length + 2]) for row in rows):
        if len({row.ids[length] for row in rows}) > 1:
            break
        length += 1
    return length


@quick
@given(rows_of_one_wording())
def test_shared_prefix_equals_the_naive_one(rows: list[Row]) -> None:
    length = shared_prefix(rows)
    assert length == naive_prefix(rows)
    for row in rows:
        assert row.ids[:length] == rows[0].ids[:length]
        assert length <= max(0, row.mask.index(True) - 1)


@pytest.mark.parametrize(
    ("rows", "length"),
    [
        ([([1, 2, 3, 4, 5], 4), ([1, 2, 3, 4, 6], 4)], 3),  # the token before the first label is not shared
        ([([1, 2, 3, 4, 5], 4), ([1, 2, 3, 4, 5], 4)], 3),
        ([([1, 2, 3, 4, 5], 4), ([1, 2, 3, 4, 5], 2)], 1),  # the earliest label counts
        ([([1, 2, 3, 4, 5], 4), ([1, 2, 9, 4, 5], 4)], 2),
        ([([1, 2, 3, 4, 5], 4), ([1, 2, 3], 2)], 1),
        ([([1, 2], 1), ([1, 2], 1)], 0),
        ([([1, 2, 3], 0), ([1, 2, 3], 2)], 0),  # a label on the very first token
        ([([7, 2, 3], 2), ([1, 2, 3], 2)], 0),
    ],
)
def test_shared_prefix_of_known_rows(rows: list[tuple[list[int], int]], length: int) -> None:
    """Each row: ids and the place of its first label."""
    made = [Row("", ids, [t >= first for t in range(len(ids))], 0) for ids, first in rows]
    assert shared_prefix(made) == length


def unpack(packed: Pack) -> list[tuple[str, list[int], list[int]]]:
    """(id, tokens, label after each token or -1) of every report; what `model.packed_attention` makes of a pack."""
    segments = packed.segments.tolist()
    starts = [sum(length for length, _ in segments[:number]) for number in range(len(segments))]
    tokens, positions = packed.tokens[0].tolist(), packed.positions[0].tolist()
    label_at = dict(zip(packed.label_positions.tolist(), packed.labels.tolist(), strict=True))
    owner_at = dict(zip(packed.label_positions.tolist(), packed.owners.tolist(), strict=True))
    assert len(label_at) == len(packed.labels)
    assert sum(length for length, _ in segments) == len(tokens) == len(positions)
    prefixes = {prefix for _, prefix in segments if prefix >= 0}
    rows: list[tuple[str, list[int], list[int]]] = []
    for number, (length, prefix) in enumerate(segments):
        if number in prefixes:
            assert segments[number][1] == -1
            assert not label_at.keys() & set(range(starts[number], starts[number] + length))
            continue
        places = list(range(starts[number], starts[number] + length))
        if prefix >= 0:
            places = [*range(starts[prefix], starts[prefix] + segments[prefix][0]), *places]
        assert [positions[place] for place in places] == list(range(len(places)))
        assert {owner_at[place] for place in places if place in owner_at} == {len(rows)}
        labels = [label_at.get(place, -1) for place in places]
        rows.append((packed.ids[len(rows)], [tokens[place] for place in places], labels))
    return rows


@quick
@given(rows_of_wordings())
def test_a_pack_holds_its_rows_exactly(rows: list[Row]) -> None:
    packed = pack(rows)
    found = unpack(packed)
    assert found == [
        (row.id, row.ids[:-1], [token if label else -1 for token, label in zip(row.ids[1:], row.mask[1:], strict=True)])
        for row in rows
    ]
    assert packed.ids == [row.id for row in rows]
    for tensor in (packed.tokens, packed.positions, packed.segments, packed.labels, packed.owners):
        assert tensor.dtype == torch.int64
    # Neighbours of one wording have their prefix in common once; a plain text shares nothing.
    size, start = 0, 0
    while start < len(rows):
        end = start + 1
        while end < len(rows) and rows[end].wording == rows[start].wording >= 0:
            end += 1
        shared = naive_prefix(rows[start:end]) if end - start > 1 else 0
        size += sum(len(row.ids) - 1 for row in rows[start:end]) - (end - start - 1) * shared
        start = end
    assert packed.tokens.shape[1] == size


def test_the_prefix_comes_from_whole_rows(tokenizer: Tokenizer) -> None:
    """Tokenised apart, "Findings: " ends in a token for the space, which the whole row has inside the next word."""
    examples = [
        Example("a", "The heart is normal in size.", "Normal."),
        Example("b", "No pleural effusion.", "Normal."),
        Example("c", "The gallbladder holds several stones.", "Normal."),
    ]
    prompt = Prompt("llama3", INSTRUCTIONS[:1])
    rows = make_reports(tokenizer, examples, prompt).step(0, 3)
    whole = tokenizer.encode("Findings: No pleural effusion.")
    apart = tokenizer.encode("Findings: ") + tokenizer.encode("No pleural effusion.")
    assert whole != apart
    assert whole[: len(tokenizer.encode("Findings: "))] != tokenizer.encode("Findings: ")
    for row in rows:
        example = next(example for example in examples if example.id == row.id)
        assert row.ids == tokenizer.render(prompt.messages(example.findings, example.impression))[0]
    length = shared_prefix(rows)
    assert tokenizer.decode(rows[0].ids[:length]).endswith("Findings:")
    assert [ids for _, ids, _ in unpack(pack(rows))] == [row.ids[:-1] for row in rows]
    # Two reports that begin alike share that, too: it is the longest common prefix.
    alike = [row for row in rows if row.id != "b"]
    assert tokenizer.decode(alike[0].ids[: shared_prefix(alike)]).endswith("Findings: The")


# Rows


def test_a_row_is_the_prompt_of_generation_and_the_labelled_answer(tokenizer: Tokenizer, reports: Reports) -> None:
    row, example = reports.row(4, 0), synthetic_examples(30)[4]
    question = reports.prompt.messages(example.findings, wording=row.wording)
    prompt, _ = tokenizer.render(question, add_generation_prompt=True)
    answer = [*tokenizer.encode(example.impression), tokenizer.eos_id]
    assert row.ids == prompt + answer
    assert row.mask == [False] * len(prompt) + [True] * len(answer)


def test_a_plain_text_is_supervised_but_for_its_first_token(tokenizer: Tokenizer) -> None:
    text = "No pleural effusion."
    row = make_reports(tokenizer, [Example("a", text=text)]).row(0, 0)
    assert row.ids == [tokenizer.bos_id, *tokenizer.encode(text), tokenizer.end_of_text_id]
    assert row.mask == [False] + [True] * (len(row.ids) - 1)
    assert row.wording == -1


def test_plain_texts_in_a_pack_have_what_they_have_alone(llama: Llama, tokenizer: Tokenizer) -> None:
    texts = [Example(example.id, text=example.findings) for example in synthetic_examples(4)]
    rows = make_reports(tokenizer, texts).step(0, 4)
    check_pack(llama, rows, pack(rows))


def test_similar_reports_stand_behind_the_findings(tokenizer: Tokenizer) -> None:
    fields = {"similar": ["Old granuloma.", "No acute disease.", "Effusion."]}
    prompt, example = Prompt("llama3", INSTRUCTIONS[:1], similar=2), Example("a", "Lungs clear.", "Normal.", "", fields)
    (row,) = make_reports(tokenizer, [example], prompt).step(0, 1)
    text = tokenizer.decode(row.ids)
    assert "Findings: Lungs clear.\nSimilar report: Old granuloma.\nSimilar report: No acute disease." in text
    assert "Effusion" not in text
    assert tokenizer.decode([i for i, own in zip(row.ids, row.mask, strict=True) if own]).startswith("Normal.")


def test_prompt_survives_save_and_load(tmp_path: Path) -> None:
    assert Prompt.load(tmp_path) is None
    prompt = Prompt("alpaca", ("Schließe daraus.", "Conclude."), similar=3)
    prompt.save(tmp_path)
    assert Prompt.load(tmp_path) == prompt


@pytest.mark.parametrize(
    "content",
    [
        "{",
        "[]",
        "3",
        "{}",
        '{"format": "llama3", "instructions": []}',
        '{"format": "llama3", "instructions": [3]}',
        '{"format": "llama3", "instructions": 3}',
        '{"format": "llama3", "instructions": "Conclude."}',
        '{"format": "llama3", "instructions": ["Conclude."], "similar": true}',
        '{"format": "llama3", "instructions": ["Conclude."], "similar": -1}',
    ],
)
def test_a_broken_prompt_file_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / PROMPT_FILE).write_text(content)
    with pytest.raises(ValueError, match=PROMPT_FILE):
        Prompt.load(tmp_path)


# The draw of steps


def test_a_step_is_a_function_of_file_seed_and_number(tokenizer: Tokenizer) -> None:
    examples = synthetic_examples(11)
    first, second = make_reports(tokenizer, examples), make_reports(tokenizer, examples)
    forwards = [first.step(number, 4) for number in range(9)]
    backwards = [second.step(number, 4) for number in reversed(range(9))][::-1]  # as after a resume
    assert forwards == backwards
    # The seed decides the order and, apart from it, the wordings.
    other = make_reports(tokenizer, examples, seed=1)
    stream = [row.id for rows in forwards for row in rows]
    assert stream != [row.id for number in range(9) for row in other.step(number, 4)]
    wordings = [[made.row(index, 0).wording for index in range(11)] for made in (first, other)]
    assert wordings[0] != wordings[1]


@pytest.mark.parametrize("batch_size", [1, 4, 11, 25])
def test_every_epoch_holds_every_report_once(tokenizer: Tokenizer, batch_size: int) -> None:
    reports = make_reports(tokenizer, synthetic_examples(11))
    stream = [row.id for number in range(-(-44 // batch_size)) for row in reports.step(number, batch_size)]
    epochs = [stream[start : start + 11] for start in range(0, 44, 11)]
    for epoch in epochs:
        assert sorted(epoch) == sorted(f"r{number}" for number in range(11))
    assert len({tuple(epoch) for epoch in epochs}) == 4  # each in an order of its own


def test_reports_are_drawn_without_regard_to_wording(tokenizer: Tokenizer) -> None:
    """The order is the same with one wording as with twenty, and wordings are drawn evenly and independently."""
    examples = synthetic_examples(400)
    one = make_reports(tokenizer, examples, Prompt("llama3", INSTRUCTIONS[:1]))
    many = make_reports(tokenizer, examples, Prompt("llama3", INSTRUCTIONS))
    steps = [many.step(number, 8) for number in range(150)]  # three epochs
    assert [[row.id for row in rows] for rows in steps] == [
        [row.id for row in one.step(number, 8)] for number in range(150)
    ]
    counts = Counter(row.wording for rows in steps for row in rows)
    assert set(counts) == set(range(20))
    assert sum((count - 60) ** 2 / 60 for count in counts.values()) < 43.8  # chi-square, 19 degrees, p = .001
    # As for independent draws: 8 of 20 give 6.73 distinct wordings on average (standard error .08 over 150 steps).
    distinct = sum(len({row.wording for row in rows}) for rows in steps) / len(steps)
    assert abs(distinct - 20 * (1 - 0.95**8)) < 0.3
    # A report gets another wording in another epoch.
    drawn = [{row.id: row.wording for rows in steps[n : n + 50] for row in rows} for n in (0, 50, 100)]
    changed = sum(drawn[0][example.id] != drawn[1][example.id] for example in examples)
    assert abs(changed / 400 - 0.95) < 0.04


def test_in_order_gives_all_reports_once_in_the_files_order(reports: Reports) -> None:
    batches = list(in_order(reports, 7))
    assert [len(batch) for batch in batches] == [7, 7, 7, 7, 2]
    assert [row for batch in batches for row in batch] == [reports.row(index, 0) for index in range(30)]
    assert [row.id for batch in batches for row in batch] == [f"r{number}" for number in range(30)]


LENGTHS = st.lists(st.tuples(st.integers(2, 60), st.integers(-1, 3)), min_size=1, max_size=40)


@quick
@given(LENGTHS, st.integers(1, 8))
def test_spread_keeps_all_rows_balances_tokens_and_leaves_no_pack_empty(
    shapes: list[tuple[int, int]], packs: int
) -> None:
    rows = [Row(f"r{n}", [0] * length, [True] * length, wording) for n, (length, wording) in enumerate(shapes)]
    if len(rows) < packs:
        with pytest.raises(ValueError, match="batch_size"):
            spread(rows, packs)
        return
    groups = spread(rows, packs)
    assert len(groups) == packs
    assert all(groups)
    assert sorted(row.id for group in groups for row in group) == sorted(row.id for row in rows)
    wordings = [row.wording for group in groups for row in group]
    assert wordings == sorted(wordings)  # neighbours share their prefix
    total, longest = sum(len(row.ids) for row in rows), max(len(row.ids) for row in rows)
    assert max(sum(len(row.ids) for row in group) for group in groups) <= total / packs + longest
    assert spread(list(rows), packs) == groups


# Reports: drawing by weights


def of_modalities(count: int, *modalities: str) -> list[Example]:
    """Examples whose modalities take turns."""
    return [
        replace(example, fields={"modality": modalities[number % len(modalities)], "body_part": "chest"})
        for number, example in enumerate(synthetic_examples(count))
    ]


def weighted(tokenizer: Tokenizer, examples: list[Example], weights: Any, seed: int = 0) -> Reports:
    return Reports(examples, tokenizer, PROMPT, max_length=512, seed=seed, name="train.jsonl", weights=weights)


def test_weights_set_how_often_a_report_is_drawn(tokenizer: Tokenizer) -> None:
    """CT three times as often as CR, and "" (no modality) as often as CR."""
    examples = of_modalities(60, "CT", "CR", "")
    reports = weighted(tokenizer, examples, {"modality": {"CT": 3.0}})
    expected = {"CT": 60 * 3 / 100, "CR": 60 / 100, "": 60 / 100}  # a report in an epoch
    modality = {example.id: example.fields["modality"] for example in examples}
    totals: Counter[str] = Counter()
    for epoch in range(40):
        rows = reports.step(epoch, 60)
        counts = Counter(row.id for row in rows)
        assert len(rows) == 60
        for example in examples:
            mean = expected[modality[example.id]]
            assert counts[example.id] in (int(mean), int(mean) + 1)
        totals += counts
    for example in examples:  # 40 epochs, each floor or ceil: a standard deviation of at most 0.5 * 40 ** 0.5 = 3.2
        assert abs(totals[example.id] - 40 * expected[modality[example.id]]) < 14
    share = sum(count for name, count in totals.items() if modality[name] == "CT") / totals.total()
    assert abs(share - 0.6) < 0.02
    assert len({tuple(sorted(row.id for row in reports.step(epoch, 60))) for epoch in range(40)}) == 40


def test_weights_of_two_fields_multiply(tokenizer: Tokenizer) -> None:
    examples = of_modalities(40, "CT", "CR")
    examples = [
        replace(e, fields=e.fields | {"body_part": "chest" if number < 20 else "knee"})
        for number, e in enumerate(examples)
    ]
    reports = weighted(tokenizer, examples, {"modality": {"CT": 2.0}, "body_part": {"knee": 0.5, "chest": 4}})
    product = [(2.0 if number % 2 == 0 else 1.0) * (4 if number < 20 else 0.5) for number in range(40)]
    assert reports.weights is not None
    assert reports.weights.tolist() == product


def test_weighted_steps_are_a_function_of_seed_and_number(tokenizer: Tokenizer) -> None:
    examples, weights = of_modalities(11, "CT", "CR"), {"modality": {"CT": 2.0}}
    first, second = weighted(tokenizer, examples, weights), weighted(tokenizer, examples, weights)
    forwards = [first.step(number, 4) for number in range(12)]
    assert forwards == [second.step(number, 4) for number in reversed(range(12))][::-1]
    assert forwards != [weighted(tokenizer, examples, weights, seed=1).step(number, 4) for number in range(12)]


def test_a_report_that_comes_again_in_an_epoch_comes_with_other_wordings(tokenizer: Tokenizer) -> None:
    reports = weighted(tokenizer, of_modalities(30, *["CR"] * 29, "CT"), {"modality": {"CT": 1e6}})
    rows = reports.step(0, 30)
    assert Counter(row.id for row in rows)["r29"] >= 29
    assert {row.wording for row in rows if row.id == "r29"} == {0, 1, 2}


def test_weights_belong_to_the_reports_that_are_left(tokenizer: Tokenizer) -> None:
    examples = of_modalities(6, "CT", "CR", "US")
    examples[1] = replace(examples[1], findings="The heart is normal in size. " * 100)  # loses its impression
    reports = weighted(tokenizer, examples, {"modality": {"CT": 2.0, "CR": 3.0, "US": 5.0}})
    assert reports.lost == 1
    assert reports.weights is not None
    assert reports.weights.tolist() == [2.0, 5.0, 2.0, 3.0, 5.0]


def test_equal_weights_draw_every_report_once(tokenizer: Tokenizer) -> None:
    reports = weighted(tokenizer, of_modalities(37, "CT"), {"modality": {"CT": 0.3}})
    for epoch in range(5):
        assert sorted(row.id for row in reports.step(epoch, 37)) == sorted(f"r{number}" for number in range(37))


def test_extreme_weights_stay_inside(tokenizer: Tokenizer) -> None:
    reports = weighted(tokenizer, of_modalities(30, *["CR"] * 29, "CT"), {"modality": {"CT": 1e12, "CR": 1e-9}})
    assert {row.id for row in reports.step(0, 60)} == {"r29"}


def test_a_weighted_value_that_no_report_has_is_named(tokenizer: Tokenizer) -> None:
    with pytest.raises(ValueError, match=r"data\.weights\.modality: no report of train\.jsonl has MR; .*: CR, CT$"):
        weighted(tokenizer, of_modalities(4, "CT", "CR"), {"modality": {"CT": 2.0, "MR": 2.0}})
    with pytest.raises(ValueError, match=r"has CT; there are: \(nothing\)$"):
        weighted(tokenizer, synthetic_examples(3), {"modality": {"CT": 2.0}})


def test_validation_has_no_weights_and_weights_leave_its_order_alone(tokenizer: Tokenizer) -> None:
    examples = of_modalities(9, "CT", "CR")
    plain = make_reports(tokenizer, examples)
    assert list(in_order(weighted(tokenizer, examples, {"modality": {"CT": 5}}), 4)) == list(in_order(plain, 4))


def test_held_out_instructions_are_held_out() -> None:
    everything = [" ".join(text.lower().split()) for text in (*INSTRUCTIONS, *HELD_OUT_INSTRUCTIONS)]
    assert len(HELD_OUT_INSTRUCTIONS) >= 5
    assert len(set(everything)) == len(INSTRUCTIONS) + len(HELD_OUT_INSTRUCTIONS)


# Reports: what max_length cuts away


def prompt_length(tokenizer: Tokenizer, findings: str, wording: int) -> int:
    return len(tokenizer.render(PROMPT.messages(findings, wording=wording), add_generation_prompt=True)[0])


def test_reports_that_lose_their_labels_are_counted_reported_and_left_out(
    tokenizer: Tokenizer, caplog: pytest.LogCaptureFixture
) -> None:
    impression = f"Small left pleural effusion, unchanged. {SECRET}"
    short, middle, long = (
        "No pneumothorax.",
        "The heart is normal in size. " * 3,
        f"The heart is normal in size. {SECRET} " * 40,
    )
    examples = [Example("s", short, impression), Example("m", middle, impression), Example("l", long, impression)]
    room = max(prompt_length(tokenizer, middle, wording) for wording in range(3)) + 2
    with caplog.at_level(logging.WARNING):
        reports = make_reports(tokenizer, examples, max_length=room)
    assert (reports.lost, reports.truncated, len(reports)) == (1, 2, 2)
    assert [reports.row(index, 0).id for index in range(2)] == ["s", "m"]
    assert f"train.jsonl: 1 of 3 reports lose their whole impression to data.max_length {room}" in caplog.text
    assert "train.jsonl: 1 reports lose a part of their impression" in caplog.text
    assert SECRET not in caplog.text
    for epoch in range(20):  # whatever the wording
        for index in range(2):
            row = reports.row(index, epoch)
            assert len(row.ids) <= room
            assert any(row.mask[1:])
    whole = make_reports(tokenizer, examples, max_length=10_000)
    assert (whole.lost, whole.truncated) == (0, 0)
    cut, uncut = reports.row(1, 0), whole.row(1, 0)
    assert (cut.ids, cut.mask) == (uncut.ids[:room], uncut.mask[:room])


def test_nothing_to_report_where_nothing_is_cut(tokenizer: Tokenizer, caplog: pytest.LogCaptureFixture) -> None:
    make_reports(tokenizer, synthetic_examples(3))
    assert not caplog.records


def test_a_file_without_any_label_left_is_refused(tokenizer: Tokenizer) -> None:
    examples = [Example(f"r{n}", f"The heart is normal in size. {SECRET} " * 40, "Normal.") for n in range(3)]
    with pytest.raises(ValueError, match=r"train\.jsonl: data\.max_length 200 cuts every impression") as caught:
        make_reports(tokenizer, examples, max_length=200)
    assert SECRET not in str(caught.value)


def test_max_length_below_the_prefix_is_refused(tokenizer: Tokenizer) -> None:
    longest = max(prompt_length(tokenizer, "", wording) for wording in range(3))
    with pytest.raises(ValueError, match=rf"data\.max_length: {longest} leaves no room: .* take {longest}"):
        make_reports(tokenizer, synthetic_examples(3), max_length=longest)
    with pytest.raises(ValueError, match="cuts every impression"):
        make_reports(tokenizer, synthetic_examples(3), max_length=longest + 1)


def test_the_longest_wording_is_the_longest_as_rendered(tokenizer: Tokenizer) -> None:
    """Blanks around an instruction count for nothing in the row; every wording must leave a label."""
    prompt = Prompt("llama3", ("Conclude." + "\n \n" * 30, INSTRUCTIONS[1]))
    long = len(tokenizer.render(prompt.messages("No effusion.", wording=1), add_generation_prompt=True)[0])
    examples = [Example(f"r{n}", "No effusion.", "Normal.") for n in range(8)]
    with pytest.raises(ValueError, match="cuts every impression"):
        make_reports(tokenizer, examples, prompt, max_length=long)
    rows = make_reports(tokenizer, examples, prompt, max_length=long + 1).step(0, 8)
    assert {row.wording for row in rows} == {0, 1}
    assert all(any(row.mask) for row in rows)


def test_a_tokenizer_larger_than_the_embedding_is_refused(tokenizer: Tokenizer) -> None:
    size = tokenizer.vocab_size
    check_vocabulary(tokenizer, size, source="here")
    check_vocabulary(tokenizer, size + 62, source="here")  # padded embeddings are common
    with pytest.raises(ValueError, match=f"here: the tokenizer has {size} ids, the embedding {size - 1} rows"):
        check_vocabulary(tokenizer, size - 1, source="here")


# Reading files


def write_lines(folder: Path, *lines: bytes | str | dict[str, Any]) -> Path:
    file = folder / "pairs.jsonl"
    encoded = [json.dumps(line) if isinstance(line, dict) else line for line in lines]
    file.write_bytes(b"".join((line.encode() if isinstance(line, str) else line) + b"\n" for line in encoded))
    return file


def good(number: int = 1, **changes: Any) -> dict[str, Any]:
    return {"id": f"g{number}", "findings": f"{SECRET} stripes", "impression": f"a {SECRET}"} | changes


def test_reads_pairs_with_their_other_fields_and_plain_texts(tmp_path: Path) -> None:
    file = write_lines(
        tmp_path,
        b"\xef\xbb\xbf" + json.dumps(good(1, patient_id="p", modality=None, age=3)).encode(),
        "",
        "  \t ",
        good(2, id=7),
        {"id": "t", "text": "Zwölf Röntgenbilder \u2028 here."},
        json.dumps({"id": "ü", "findings": "ä", "impression": "ö"}, ensure_ascii=False),
    )
    assert read_examples(file) == [
        Example("g1", f"{SECRET} stripes", f"a {SECRET}", fields={"patient_id": "p", "modality": None, "age": 3}),
        Example("7", f"{SECRET} stripes", f"a {SECRET}"),
        Example("t", text="Zwölf Röntgenbilder \u2028 here."),
        Example("ü", "ä", "ö"),
    ]


def test_generation_needs_no_impression(tmp_path: Path) -> None:
    file = write_lines(tmp_path, {"id": "a", "findings": "x"}, {"id": "b", "findings": "y", "impression": ""})
    assert read_examples(file, need_impression=False) == [Example("a", "x"), Example("b", "y")]
    with pytest.raises(ValueError, match=r"line 1: impression: .* found nothing\n  line 2: impression: .* an empty"):
        read_examples(file)


HALF = "a text holds half of a surrogate pair"
BAD_LINES: dict[str, tuple[Any, str]] = {
    "cut off": ('{"id": "a", "findings": "' + SECRET, r"not valid JSON \(column 31: "),
    "not JSON": (f"{SECRET},{SECRET}", r"not valid JSON \(column 1: Expecting value"),
    "two objects": (f'{{"id": "a"}} {{"id": "{SECRET}"}}', r"not valid JSON \(column 13: Extra data"),
    "a list": (f'["{SECRET}"]', "expected an object, found list"),
    "nested bomb": (
        '{"id": "a", "findings": "x", "impression": "y", "z": ' + "[" * 100_000,
        r"not valid JSON \(nested too deeply",
    ),
    "closed nested bomb": (
        '{"id": "a", "findings": "x", "impression": "y", "z": ' + "[" * 100_000 + "]" * 100_000 + "}",
        r"not valid JSON \(nested too deeply",
    ),
    "endless number": (f'{{"id": "{SECRET}", "n": {"9" * 5000}}}', ""),
    "Latin-1": (json.dumps(good(findings=f"{SECRET} ä"), ensure_ascii=False).encode("latin-1"), "not UTF-8"),
    "UTF-16": (json.dumps(good()).encode("utf-16"), "not"),
    "no id": ({key: value for key, value in good().items() if key != "id"}, "id: .* found nothing"),
    "an empty id": (good(id=""), "id: .* found an empty text"),
    "id null": (good(id=None), "id: .* found NoneType"),
    "id true": (good(id=True), "id: .* found bool"),
    "no findings": ({"id": "a", "impression": SECRET}, "findings: .* found nothing"),
    "findings a number": (good(findings=4.5), "findings: .* found float"),
    "no impression": ({"id": "a", "findings": SECRET}, "impression: .* found nothing"),
    "an empty impression": (good(impression=""), "impression: .* found an empty text"),
    "a blank impression": (good(impression=" \n\t "), "impression: .* found an empty text"),
    "impression a list": (good(impression=[SECRET]), "impression: .* found list"),
    "an empty text": ({"id": "a", "text": ""}, "text: .* found an empty text"),
    "half a surrogate pair": (good(findings=f"{SECRET} \ud83d"), HALF),
    "a surrogate in UTF-8": (b'{"id": "a", "findings": "\xed\xa0\x80", "impression": "y"}', HALF),
    "a surrogate in another field": (good(3, modality=f"{SECRET} \ud83d"), HALF),
    "a surrogate inside a field": (good(3, more=[{"x": f"{SECRET} \udc00"}]), HALF),
}


@pytest.mark.parametrize(("line", "message"), BAD_LINES.values(), ids=BAD_LINES.keys())
def test_a_bad_line_is_named_by_file_and_number(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, line: Any, message: str
) -> None:
    file = write_lines(tmp_path, good(1), "", line, good(2))
    with pytest.raises(ValueError, match=rf"line \d+: {message}") as caught:
        read_examples(file)
    shown = str(caught.value)
    assert shown.startswith(f"{file}: mend or remove these lines:\n  line 3: ")
    assert SECRET not in shown + caplog.text
    assert len(shown) < 1000
    shown.encode()  # can be printed


def test_surrogates_are_found_where_no_impression_is_needed(tmp_path: Path) -> None:
    """generate writes the reference and the other fields out again, hours later."""
    file = write_lines(tmp_path, good(1, impression="\ud83d"))
    with pytest.raises(ValueError, match=f"line 1: {HALF}"):
        read_examples(file, need_impression=False)


def test_a_pair_of_surrogates_is_a_character(tmp_path: Path) -> None:
    file = write_lines(tmp_path, r'{"id": "a", "findings": "\ud83d\ude00", "impression": "y"}')
    assert read_examples(file)[0].findings == "\U0001f600"


def test_duplicate_ids_name_both_lines(tmp_path: Path) -> None:
    file = write_lines(tmp_path, good(1, id="7"), good(2), good(3, id=7))
    with pytest.raises(ValueError, match="line 3: id: '7' stands on line 1, too") as caught:
        read_examples(file)
    assert SECRET not in str(caught.value)


def test_all_bad_lines_are_listed_up_to_twenty(tmp_path: Path) -> None:
    file = write_lines(tmp_path, *[good(n, impression="") for n in range(25)], good(30))
    with pytest.raises(ValueError, match="mend or remove") as caught:
        read_examples(file)
    lines = str(caught.value).splitlines()
    assert len(lines) == 22
    assert lines[1].startswith("  line 1: ")
    assert lines[20].startswith("  line 20: ")
    assert lines[21] == "  ... and 5 more lines"


@pytest.mark.parametrize("content", [b"", b"\n \n"])
def test_an_empty_file_is_refused(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "pairs.jsonl"
    with pytest.raises(ValueError, match=r"pairs\.jsonl: no such file"):
        read_examples(file)
    file.write_bytes(content)
    with pytest.raises(ValueError, match=r"pairs\.jsonl: empty"):
        read_examples(file)
    with pytest.raises(ValueError, match="no such file"):
        read_examples(tmp_path)  # a folder
