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
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

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

    def messages(self, findings: str, impression: str | None = None, *, wording: int = 0) -> list[Message]:
        conversation: list[Message] = [
            {"role": "system", "content": self.instructions[wording]},
            {"role": "user", "content": f"Findings: {findings}"},
        ]
        if impression is not None:
            conversation.append({"role": "assistant", "content": impression})
        return conversation

    def save(self, folder: Path) -> None:
        value = {"format": self.format, "instructions": list(self.instructions)}
        (folder / PROMPT_FILE).write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: Path) -> Prompt | None:
        """The prompt of a model that this library trained; None where the folder has no prompt.json."""
        file = folder / PROMPT_FILE
        if not file.exists():
            return None
        try:
            value = json.loads(file.read_text(encoding="utf-8"))
            prompt = cls(value["format"], tuple(value["instructions"]))
        except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
            raise ValueError(f"{file}: expected an object with format and instructions ({error!r})") from None
        listed = isinstance(value["instructions"], list)
        if not listed or not prompt.instructions or not all(isinstance(text, str) for text in prompt.instructions):
            raise ValueError(f"{file}: instructions: expected a list of at least one text")
        return prompt


def read_examples(path: str | Path, *, need_impression: bool = True) -> list[Example]:
    """Read a JSONL file of pairs (id, findings, impression, ...) or of plain texts (id, text).

    Raises ValueError that lists the faulty lines (the first twenty), what was expected and how to mend them.
    """
    file, examples, problems = Path(path), [], []
    if not file.is_file():
        raise ValueError(f"{file}: no such file; expected JSON lines with id, findings and impression")
    seen: dict[str, int] = {}
    with file.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                example = _parse(line, need_impression)
                if example.id in seen:
                    raise ValueError(f"id: {example.id!r} stands on line {seen[example.id]}, too")
                seen[example.id] = number
                examples.append(example)
            except ValueError as error:
                problems.append(f"line {number}: {error}")
    if problems:
        shown = problems[:20] + ([f"... and {len(problems) - 20} more lines"] if len(problems) > 20 else [])
        raise ValueError(f"{file}: mend or remove these lines:\n  " + "\n  ".join(shown))
    if not examples:
        raise ValueError(f"{file}: empty; expected JSON lines with id, findings and impression")
    return examples


def _parse(line: bytes, need_impression: bool) -> Example:
    try:
        raw = json.loads(line)
        json.dumps(raw, ensure_ascii=False).encode()  # as it will be written out again
    except UnicodeEncodeError:
        raise ValueError("a text holds half of a surrogate pair, which is not a character") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 (byte {error.start})") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"not valid JSON (column {error.colno}: {error.msg})") from None
    except RecursionError:
        raise ValueError("not valid JSON (nested too deeply)") from None
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
    known = {"id", "findings", "impression", "text"}
    texts = {key: raw[key] for key in ("findings", "impression", "text") if isinstance(raw.get(key), str)}
    return Example(id=raw["id"], fields={key: raw[key] for key in raw.keys() - known}, **texts)


class Reports:
    """The examples of one file, rendered on demand; examples that lose every label to max_length are left out."""

    def __init__(
        self, examples: list[Example], tokenizer: Tokenizer, prompt: Prompt, *, max_length: int, seed: int, name: str
    ) -> None:
        """max_length: tokens of a row, cut at the right. `name` (a file) is used in messages.

        Raises ValueError where nothing would be left to learn from.
        """
        self.tokenizer, self.prompt, self.max_length, self.seed = tokenizer, prompt, max_length, seed
        lengths = [
            len(tokenizer.render(prompt.messages("", wording=wording), add_generation_prompt=True)[0])
            for wording in range(len(prompt.instructions))
        ]
        self._longest = lengths.index(max(lengths))
        if max(lengths) >= max_length and not examples[0].text:
            raise ValueError(
                f"data.max_length: {max_length} leaves no room: instruction and template alone take {max(lengths)}"
            )
        self.examples: list[Example] = []
        self.truncated = self.lost = 0
        for example in tqdm(examples, desc=f"check {name}", unit="report", leave=False, disable=len(examples) < 20_000):
            row, cut = self._render(example, self._longest)
            self.truncated += cut
            if any(row.mask[1:]):
                self.examples.append(example)
            else:
                self.lost += 1
        if self.lost:
            logger.warning("%s: %d of %d reports lose their whole impression to data.max_length %d and are left out",
                           name, self.lost, len(examples), max_length)  # fmt: skip
        if self.truncated > self.lost:
            logger.warning("%s: %d reports lose a part of their impression", name, self.truncated - self.lost)
        if not self.examples:
            raise ValueError(
                f"{name}: data.max_length {max_length} cuts every impression away; raise it or shorten the findings"
            )

    def __len__(self) -> int:
        return len(self.examples)

    def row(self, index: int, epoch: int) -> Row:
        """An example, rendered with the wording that (seed, epoch, id) draws."""
        example = self.examples[index]
        key = f"{self.seed}/{epoch}/{example.id}".encode()
        draw = int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "big")
        return self._render(example, draw % len(self.prompt.instructions))[0]

    def _render(self, example: Example, wording: int) -> tuple[Row, bool]:
        if example.text:
            body = self.tokenizer.encode(example.text)
            ids = [self.tokenizer.bos_id, *body, self.tokenizer.end_of_text_id]
            mask, wording = [False] + [True] * (len(ids) - 1), -1  # plain texts share nothing
        else:
            ids, mask = self.tokenizer.render(
                self.prompt.messages(example.findings, example.impression, wording=wording)
            )
        cut = len(ids) > self.max_length
        return Row(example.id, ids[: self.max_length], mask[: self.max_length], wording), cut

    def step(self, number: int, batch_size: int) -> list[Row]:
        """The reports of optimizer step `number` (from 0): one endless stream of shuffled epochs, cut in steps."""
        rows = []
        for place in range(number * batch_size, (number + 1) * batch_size):
            epoch, offset = divmod(place, len(self))
            rows.append(self.row(int(_shuffled(len(self), self.seed, epoch)[offset]), epoch))
        return rows


@lru_cache(maxsize=2)
def _shuffled(count: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(count)


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
