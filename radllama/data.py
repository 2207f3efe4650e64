"""Findings/impression pairs -> token ids -> packs -> steps.

A step is a fixed number of reports, drawn without regard to length or wording. They are spread over one pack for each
rank and accumulation step. A pack is one row of tokens without padding, in which reports that carry the same
instruction share its tokens:

    [ instruction A | report 1 | report 2 | report 3 | instruction B | report 4 | report 5 ]

Reports 1 to 3 each see instruction A and themselves; their RoPE positions continue after it. Everything here is a
function of (file, seed, step), so that a resumed run needs no state to draw the same reports.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from pathlib import Path
from typing import Any, Protocol, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from radllama.files import LONGEST_ID, LONGEST_LINE, lines_of, read_json
from radllama.tokenizer import Message, PromptFormat, Tokenizer

logger = logging.getLogger(__name__)

PROMPT_FILE = "prompt.json"

INSTRUCTIONS = (
    "Derive the impression from the findings of this radiology report.",
    "Write the impression section that follows from these radiology findings.",
    "Summarize the findings below into a concise radiology impression.",
    "You are a radiologist. Read the findings and write the impression.",
    "State the impression of the report whose findings are given.",
    "Give the diagnostic impression supported by the following findings.",
    "From the findings, conclude what the referring physician needs to know.",
    "Act as the reporting radiologist and complete the impression.",
    "Turn these imaging findings into an impression.",
    "What is the impression for a study with these findings?",
    "Conclude the radiology report: write its impression.",
    "Read the imaging findings and report the most important conclusions.",
    "Compose a brief impression based only on the findings provided.",
    "Using the findings alone, write the impression of the examination.",
    "Provide the impression that a radiologist would dictate for these findings.",
    "Condense the described findings into the report's impression.",
    "Interpret the findings and give the impression, most urgent first.",
    "Finish this radiology report with its impression section.",
    "List the conclusions that the findings support, as an impression.",
    "Formulate the impression for the radiology findings that follow.",
)
# For prompt-sensitivity tests (generate --instructions held-out): never trained on by default.
HELD_OUT_INSTRUCTIONS = (
    "Given what was seen, dictate the closing section of the report.",
    "What would you tell the clinician who ordered this examination?",
    "Read what was observed below, then sum it up as a radiologist does at the end of a report.",
    "Impression, please.",
    "Your task: translate observations from an imaging study into its diagnostic conclusion.",
)


@dataclass(frozen=True)
class Example:
    """One line of a pairs file; of a plain-text file `text` alone is set."""

    id: str
    findings: str = ""
    impression: str = ""
    text: str = ""
    fields: dict[str, Any] = field(default_factory=dict)  # patient_id, modality, ... carried through


@dataclass(frozen=True)
class Row:
    """One rendered example: ids[t] is supervised where mask[t]; rows of equal `wording` may share a prefix."""

    id: str
    ids: list[int]
    mask: list[bool]
    wording: int


@dataclass(frozen=True)
class Pack:
    """One row of T tokens holding n segments and N supervised positions. All tensors int64."""

    tokens: Tensor  # (1, T)
    positions: Tensor  # (1, T), RoPE's
    segments: Tensor  # (n, 2): length, which segment is its prefix (-1: none)
    label_positions: Tensor  # (N,): where in T the token before the supervised one stands
    labels: Tensor  # (N,): the supervised tokens
    owners: Tensor  # (N,): which of `ids` a label belongs to
    ids: list[str]


@dataclass(frozen=True)
class Prompt:
    """How a model was asked in training, so that it is asked alike in generation."""

    format: PromptFormat
    instructions: tuple[str, ...]
    similar: int = 0  # how many impressions of similar reports stand behind the findings (similar.py)

    def question(self, example: Example) -> str:
        """An example's findings, followed by the impressions of the reports most similar to it."""
        texts = example.fields.get("similar", [])[: self.similar]
        return "\n".join([example.findings, *(f"Similar report: {text}" for text in texts)])

    def messages(self, findings: str, impression: str | None = None, *, wording: int = 0) -> list[Message]:
        conversation: list[Message] = [
            {"role": "system", "content": self.instructions[wording]},
            {"role": "user", "content": f"Findings: {findings}"},
        ]
        if impression is not None:
            conversation.append({"role": "assistant", "content": impression})
        return conversation

    def save(self, folder: Path) -> None:
        value = {"format": self.format, "instructions": list(self.instructions), "similar": self.similar}
        (folder / PROMPT_FILE).write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: Path) -> Prompt | None:
        """The prompt of a model that this library trained; None where the folder has no prompt.json."""
        file = folder / PROMPT_FILE
        if not file.exists():
            return None
        value = read_json(file)
        form, texts = value.get("format", ""), value.get("instructions")
        if form not in get_args(PromptFormat):
            raise ValueError(f"{file}: format: expected one of {', '.join(get_args(PromptFormat))}, found {form!r:.80}")
        if not isinstance(texts, list) or not texts or not all(isinstance(text, str) for text in texts):
            raise ValueError(f"{file}: instructions: expected a list of at least one text")
        similar = value.get("similar", 0)
        if type(similar) is not int or similar < 0:
            raise ValueError(f"{file}: similar: expected a number from 0, found {similar!r:.80}")
        return cls(form, tuple(texts), similar)


def read_examples(path: str | Path, *, need_impression: bool = True) -> list[Example]:
    """Read a JSONL file of pairs (id, findings, impression, ...) or of plain texts (id, text).

    Raises ValueError that lists the faulty lines (the first twenty), what was expected and how to mend them.
    """
    file, examples, problems = Path(path), [], []
    if not file.is_file():
        raise ValueError(f"{file}: no such file; expected JSON lines with id, findings and impression")
    seen: dict[str, int] = {}
    with file.open("rb") as lines:
        for number, example in parse_lines(lines_of(lines), need_impression=need_impression):
            if isinstance(example, ValueError):
                problems.append(f"line {number}: {example}")
            elif example.id in seen:
                problems.append(repeated_id(number, example.id, seen[example.id]))
            else:
                seen[example.id] = number
                examples.append(example)
    if problems:
        raise faulty_lines(file, problems, len(problems))
    if not examples:
        raise ValueError(f"{file}: empty; expected JSON lines with id, findings and impression")
    return examples


def parse_lines(lines: Iterable[bytes], *, need_impression: bool = True) -> Iterator[tuple[int, Example | ValueError]]:
    """Each line that is not blank with its number: the example, or what is wrong with the line."""
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                yield number, _parse(line, need_impression)
            except ValueError as error:
                yield number, error


def repeated_id(number: int, identity: str, first: int) -> str:
    return f"line {number}: id: {identity!r} stands on line {first}, too"


def faulty_lines(file: Path, problems: list[str], count: int) -> ValueError:
    """The error that lists the first twenty of `count` faulty lines."""
    shown = problems[:20] + ([f"... and {count - 20} more lines"] if count > 20 else [])
    return ValueError(f"{file}: mend or remove these lines:\n  " + "\n  ".join(shown))


def _plain(raw: Any, line: bytes) -> bool:
    """Whether it can be written out again for certain: an object of ASCII texts, as most lines are."""
    return line.isascii() and b"\\u" not in line and type(raw) is dict and {*map(type, raw.values())} <= {str}


def _parse(line: bytes, need_impression: bool) -> Example:
    if len(line) > LONGEST_LINE:
        raise ValueError(f"longer than {LONGEST_LINE:,} bytes; that is no report")
    try:
        raw = json.loads(line)
        if not _plain(raw, line):
            json.dumps(raw, ensure_ascii=False, allow_nan=False).encode()  # as it will be written out again
    except UnicodeEncodeError:
        raise ValueError("a text holds half of a surrogate pair, which is not a character") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 (byte {error.start})") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"not valid JSON (column {error.colno}: {error.msg})") from None
    except RecursionError:
        raise ValueError("not valid JSON (nested too deeply)") from None
    except ValueError:  # NaN, Infinity, 1e999, or thousands of digits
        raise ValueError("not valid JSON (a number that is not finite, or too long)") from None
    if not isinstance(raw, dict):
        raise ValueError(f"expected an object, found {type(raw).__name__}")
    wanted = ["text"] if "text" in raw else ["findings", "impression"] if need_impression else ["findings"]
    if "id" in raw and isinstance(raw["id"], int) and not isinstance(raw["id"], bool):
        raw["id"] = str(raw["id"])
    for key in ["id", *wanted]:
        if not isinstance(raw.get(key), str) or not raw[key].strip():
            kind = "an empty text" if isinstance(raw.get(key), str) else type(raw.get(key)).__name__
            found = kind if key in raw else "nothing"
            raise ValueError(f"{key}: expected a text that is not empty, found {found}")
    if len(raw["id"]) > LONGEST_ID:
        raise ValueError(f"id: expected at most {LONGEST_ID} characters, found {len(raw['id'])}")
    similar = raw.get("similar", [])
    if not isinstance(similar, list) or not all(isinstance(text, str) for text in similar):
        raise ValueError("similar: expected a list of texts, as python -m radllama.similar writes it")
    known = {"id", "findings", "impression", "text"}
    texts = {key: raw[key] for key in ("findings", "impression", "text") if isinstance(raw.get(key), str)}
    return Example(id=raw["id"], fields={key: raw[key] for key in raw if key not in known}, **texts)


class Source(Protocol):
    """Where `Reports` finds its rows: `OnDemand` below, or a `cache.Cache`. n reports, in the file's order."""

    def __len__(self) -> int: ...

    def identity(self, index: int) -> str:
        """The report's id."""

    def row(self, index: int, wording: int) -> Row:
        """The whole row, as `Tokenizer.render` gives it."""

    def lengths(self) -> tuple[NDArray[Any], NDArray[Any]]:
        """Tokens of every report's prompt and of its whole row (n,), with the longest wording."""

    def values(self, field: str) -> tuple[list[str], NDArray[Any]]:
        """The different values of a field ("" where a report has none), and which of them each report has (n,)."""


@dataclass(frozen=True)
class OnDemand:
    """Examples in memory, rendered whenever they are drawn."""

    examples: list[Example]
    tokenizer: Tokenizer
    prompt: Prompt
    name: str

    def __len__(self) -> int:
        return len(self.examples)

    def identity(self, index: int) -> str:
        return self.examples[index].id

    def row(self, index: int, wording: int) -> Row:
        example = self.examples[index]
        if example.text:
            body = self.tokenizer.encode(example.text)
            ids = [self.tokenizer.bos_id, *body, self.tokenizer.end_of_text_id]
            return Row(example.id, ids, [False] + [True] * (len(ids) - 1), -1)  # plain texts share nothing
        question = self.prompt.question(example)
        ids, mask = self.tokenizer.render(self.prompt.messages(question, example.impression, wording=wording))
        return Row(example.id, ids, mask, wording)

    def lengths(self) -> tuple[NDArray[Any], NDArray[Any]]:
        longest, _ = longest_wording(self.tokenizer, self.prompt)
        numbers = tqdm(
            range(len(self)), desc=f"check {self.name}", unit="report", leave=False, disable=len(self) < 20_000
        )
        rows = (self.row(index, longest) for index in numbers)
        both = np.array([(row.mask.index(True), len(row.ids)) for row in rows])
        return both[:, 0], both[:, 1]

    def values(self, field: str) -> tuple[list[str], NDArray[Any]]:
        found = [str(e.fields.get(field) or "") for e in self.examples]
        names = sorted(set(found))  # not NumPy's unique: an array of texts is as wide as the longest
        number = {name: place for place, name in enumerate(names)}
        return names, np.array([number[name] for name in found])


def longest_wording(tokenizer: Tokenizer, prompt: Prompt) -> tuple[int, int]:
    """Which wording makes the longest prompt, and its tokens without findings."""
    lengths = [
        len(tokenizer.render(prompt.messages("", wording=wording), add_generation_prompt=True)[0])
        for wording in range(len(prompt.instructions))
    ]
    return lengths.index(max(lengths)), max(lengths)


class Reports:
    """The reports of one file, drawn in steps; those that lose every label to max_length are left out."""

    def __init__(
        self,
        examples: list[Example] | Source,
        tokenizer: Tokenizer,
        prompt: Prompt,
        *,
        max_length: int,
        seed: int,
        name: str,
        weights: Mapping[Any, Mapping[str, float]] | None = None,
    ) -> None:
        """max_length: tokens of a row, cut at the right. `name` (a file) is used in messages.

        weights: field -> value -> weight, such as {"modality": {"CT": 2.0}}. A report's weight is the product of those
        of its values, 1 where nothing is said. An epoch stays as long as the file; a report stands in it as often as
        its share of all weights says: n w / sum(w), rounded down or up by chance so that this is the mean.

        Raises ValueError where nothing would be left to learn from, or where no report has a weighted value.
        """
        self.source = OnDemand(examples, tokenizer, prompt, name) if isinstance(examples, list) else examples
        self.prompt, self.max_length, self.seed = prompt, max_length, seed
        longest, tokens = longest_wording(tokenizer, prompt)
        if tokens >= max_length and self.source.row(0, longest).wording >= 0:
            raise ValueError(
                f"data.max_length: {max_length} leaves no room: instruction and template alone take {tokens}"
            )
        prompts, rows = self.source.lengths()
        self.kept = np.flatnonzero(prompts < max_length)  # those with a label left
        self.lost = len(prompts) - len(self.kept)
        self.truncated = int((rows > max_length).sum())
        if self.lost:
            logger.warning("%s: %d of %d reports lose their whole impression to data.max_length %d and are left out",
                           name, self.lost, len(prompts), max_length)  # fmt: skip
        if self.truncated > self.lost:
            logger.warning("%s: %d reports lose a part of their impression", name, self.truncated - self.lost)
        if not len(self.kept):
            raise ValueError(
                f"{name}: data.max_length {max_length} cuts every impression away; raise it or shorten the findings"
            )
        self.weights = self._weigh(weights, name) if weights else None
        self._orders: dict[int, NDArray[Any]] = {}

    def __len__(self) -> int:
        return len(self.kept)

    def row(self, index: int, epoch: int) -> Row:
        """A report, rendered with the wording that (seed, epoch, id) draws."""
        place = int(self.kept[index])
        key = f"{self.seed}/{epoch}/{self.source.identity(place)}".encode()
        draw = int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "big")
        row = self.source.row(place, draw % len(self.prompt.instructions))
        if len(row.ids) <= self.max_length:
            return row
        return replace(row, ids=row.ids[: self.max_length], mask=row.mask[: self.max_length])

    def step(self, number: int, batch_size: int) -> list[Row]:
        """The reports of optimizer step `number` (from 0): one endless stream of shuffled epochs, cut in steps."""
        rows = []
        for place in range(number * batch_size, (number + 1) * batch_size):
            epoch, offset = divmod(place, len(self))
            # With weights a report may come several times in an epoch: by place it gets another wording each time.
            rows.append(self.row(int(self._order(epoch)[offset]), epoch if self.weights is None else place))
        return rows

    def _order(self, epoch: int) -> NDArray[Any]:
        if epoch not in self._orders:
            if len(self._orders) == 2:  # a step may reach from one epoch into the next
                self._orders.clear()
            if self.weights is None:
                self._orders[epoch] = np.random.default_rng([self.seed, epoch]).permutation(len(self))
            else:
                self._orders[epoch] = weighted_order(self.weights, self.seed, epoch)
        return self._orders[epoch]

    def _weigh(self, weights: Mapping[Any, Mapping[str, float]], name: str) -> NDArray[Any]:
        """The weight of every report that is kept (n,)."""
        product = np.ones(len(self))
        for field_name, by_value in weights.items():
            names, codes = self.source.values(field_name)
            if unknown := sorted(by_value.keys() - set(names)):
                raise ValueError(
                    f"data.weights.{field_name}: no report of {name} has {', '.join(unknown)}; there are: "
                    + ", ".join(value or "(nothing)" for value in names[:20])
                )
            product *= np.array([by_value.get(value, 1.0) for value in names])[codes[self.kept]]
        return product


def weighted_order(weights: NDArray[Any], seed: int, epoch: int) -> NDArray[Any]:
    """Which reports (n,) an epoch draws from n with these weights (n,), and in which order.

    Systematic sampling (Madow 1949): the reports, shuffled, lie one behind the other on a line, each as long as its
    weight, and n points at even distances, from a random start, pick them. So report i comes floor or ceil of
    n w_i / sum(w) times, n w_i / sum(w) on average; equal weights give every report once.
    """
    draw = np.random.default_rng([seed, epoch])
    order = draw.permutation(len(weights))
    reach = np.cumsum(weights[order])
    points = (draw.random() + np.arange(len(weights))) * (reach[-1] / len(weights))
    chosen = np.minimum(np.searchsorted(reach, points, side="right"), len(weights) - 1)  # rounding may pass the end
    picked: NDArray[Any] = order[chosen]
    return draw.permutation(picked)


def spread(rows: Sequence[Row], packs: int) -> list[list[Row]]:
    """Cut a step's reports into `packs` groups of about equal tokens, wordings kept together; none is empty.

    Every rank must run the same number of packs, or the others wait for it for ever.
    """
    if len(rows) < packs:
        raise ValueError(f"{len(rows)} reports cannot fill {packs} packs: raise training.batch_size")
    ordered = sorted(rows, key=lambda row: (row.wording, len(row.ids)))
    reach = np.cumsum([len(row.ids) for row in ordered])
    cuts = [0]
    for number in range(1, packs):
        even = int(np.searchsorted(reach, reach[-1] * number / packs))
        cuts.append(min(max(even, cuts[-1] + 1), len(rows) - (packs - number)))
    return [list(ordered[start:end]) for start, end in zip(cuts, [*cuts[1:], len(rows)], strict=True)]


def shared_prefix(rows: Sequence[Row]) -> int:
    """How many leading tokens these rows may share: equal ids, and in none a label or the token before the first."""
    first, last = min(row.ids for row in rows), max(row.ids for row in rows)
    limit = min(row.mask.index(True) - 1 for row in rows)
    for length, (a, b) in enumerate(zip(first, last, strict=False)):
        if a != b or length >= limit:
            return length
    return max(0, min(len(first), len(last), limit))


def pack(rows: Sequence[Row]) -> Pack:
    """Put rows into one Pack; each needs a supervised token after its first."""
    tokens: list[int] = []
    positions: list[int] = []
    segments: list[tuple[int, int]] = []
    label_positions: list[int] = []
    labels: list[int] = []
    owners: list[int] = []

    def append(ids: list[int], position: int, prefix: int) -> None:
        segments.append((len(ids), prefix))
        tokens.extend(ids)
        positions.extend(range(position, position + len(ids)))

    ids: list[str] = []
    for wording, members in groupby(rows, key=lambda row: row.wording):
        group = list(members)
        length = shared_prefix(group) if len(group) > 1 and wording >= 0 else 0
        prefix = -1
        if length:
            prefix = len(segments)
            append(group[0].ids[:length], 0, -1)
        for row in group:
            offset = len(tokens) - length  # where the row's token 0 would stand
            supervised = [t for t in range(1, len(row.ids)) if row.mask[t]]
            label_positions += [offset + t - 1 for t in supervised]
            labels += [row.ids[t] for t in supervised]
            owners += [len(ids)] * len(supervised)
            ids.append(row.id)
            append(row.ids[length:-1], length, prefix)  # nothing is predicted from a row's last token
    return Pack(
        tokens=torch.tensor([tokens]),
        positions=torch.tensor([positions]),
        segments=torch.tensor(segments),
        label_positions=torch.tensor(label_positions),
        labels=torch.tensor(labels),
        owners=torch.tensor(owners),
        ids=ids,
    )


def in_order(reports: Reports, batch_size: int) -> Iterator[list[Row]]:
    """All reports once, in the file's order, with the wordings of epoch 0 (validation)."""
    for start in range(0, len(reports), batch_size):
        yield [reports.row(index, 0) for index in range(start, min(start + batch_size, len(reports)))]


def check_vocabulary(tokenizer: Tokenizer, vocab_size: int, *, source: str) -> None:
    """ValueError if the tokenizer can give ids that the embedding does not have."""
    if tokenizer.vocab_size > vocab_size:
        raise ValueError(
            f"{source}: the tokenizer has {tokenizer.vocab_size} ids, the embedding {vocab_size} rows; "
            "the tokenizer belongs to another model"
        )
