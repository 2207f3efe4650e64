"""The tokenised cache: a data file's token ids on disk, memory-mapped, so that millions of reports cost no memory.

    source = open_cache("train.jsonl", tokenizer, prompt) or read_examples("train.jsonl")
    reports = Reports(source, tokenizer, prompt, max_length=1024, seed=0, name="train.jsonl")

It lies beside the data file, in `.radllama-cache/<fingerprint>/`. The fingerprint covers the content of the file and
of the tokenizer, the prompt format and wordings, and the versions of what they pass through: if one of them changes,
another cache is built. The folder holds the reports' text in another form, and may be removed at any time.

What is stored. A row differs from wording to wording, but in Llama 3's chat format special tokens part the messages,
which `Tokenizer.render` tokenises one by one. So the ids of the user's message and of the answer are stored once a
report ("pieces"), and the rest of the template once a wording. In the formats of Llama 2 and Alpaca tokens reach
across the borders of the parts: there the cache holds texts, and rows are rendered when they are drawn ("texts").
Either way a row is exactly `Tokenizer.render`'s.

A cache is built in a folder beside its place, written through to the disk and renamed; a lock lets one process build
while the others wait. Sizes and checksums of all its files are checked before use; a damaged cache is built again.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
import shutil
import tempfile
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from radllama.data import Example, OnDemand, Prompt, Row, faulty_lines, parse_lines, repeated_id
from radllama.files import lines_of, sync
from radllama.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

FOLDER, HEADER = ".radllama-cache", "header.json"
VERSION = 1  # of the layout: raise it whenever another version of this module would read the files otherwise
FIELDS = ("modality", "body_part")  # kept as well: training may draw by them
MOST_VALUES = 1000  # different values of a field; with more it is not one to draw by
BATCH = 1024  # reports tokenised at once
PROBE = " \n A 3 mm nodule.\n\n "  # begins with a letter once stripped: a tokenizer that puts a space there shows


@dataclass(frozen=True)
class Template:
    """What stands around a report in the chat format of Llama 3: head[wording] + user + tail + answer + stop."""

    heads: list[list[int]]
    tail: list[int]

    @classmethod
    def find(cls, tokenizer: Tokenizer, prompt: Prompt) -> Template | None:
        """None where a row is not made of parts that are tokenised one by one."""
        if tokenizer.prompt_format != "llama3":
            return None
        end_of_turn = tokenizer.header_token_ids[2]
        user, answer = tokenizer.encode(user_text(prompt, PROBE)), tokenizer.encode(PROBE.strip())
        heads: list[list[int]] = []
        tail: list[int] = []
        for wording in range(len(prompt.instructions)):
            ids = tokenizer.render(prompt.messages(PROBE, wording=wording), add_generation_prompt=True)[0]
            if end_of_turn not in ids:
                return None
            end = len(ids) - 1 - ids[::-1].index(end_of_turn)
            heads.append(ids[: end - len(user)])
            tail = ids[end:]
            row = tokenizer.render(prompt.messages(PROBE, PROBE, wording=wording))[0]
            if row != [*heads[-1], *user, *tail, *answer, tokenizer.eos_id]:
                return None
        return cls(heads, tail)


def user_text(prompt: Prompt, findings: str) -> str:
    """The user's message with the line breaks before it, as the chat format of Llama 3 tokenises it."""
    return "\n\n" + prompt.messages(findings)[1]["content"].strip()


class Cache:
    """The reports of one file, read from disk as they are drawn; the `data.Source` of a `Reports`."""

    def __init__(self, folder: Path, header: dict[str, Any], tokenizer: Tokenizer, prompt: Prompt) -> None:
        """`folder` as `build` left it; `open_cache` makes sure of that."""
        self.folder, self._tokenizer, self._prompt = folder, tokenizer, prompt
        self._template = Template.find(tokenizer, prompt)
        self._count: int = header["reports"]
        self._values: dict[str, list[str] | None] = header["values"]
        self._parts = self._map("parts", header["dtype"])  # user's part and answer of one report after the other
        self._bounds = self._map("bounds", "<u8")  # where they end: 0, user 0, answer 0, user 1, answer 1 ...
        self._names = self._map("names", "<u1")
        self._name_bounds = self._map("name_bounds", "<u8")
        self._lengths = self._map("lengths", "<u4").reshape(-1, 2)
        self._codes = {field: self._map(field, "<u2") for field in FIELDS}

    def _map(self, name: str, dtype: str) -> NDArray[Any]:
        return np.asarray(np.memmap(self.folder / f"{name}.bin", dtype=dtype, mode="r"))

    def __len__(self) -> int:
        return self._count

    def identity(self, index: int) -> str:
        start, end = self._name_bounds[index : index + 2].tolist()
        return self._names[start:end].tobytes().decode()

    def row(self, index: int, wording: int) -> Row:
        start, middle, end = self._bounds[2 * index : 2 * index + 3].tolist()
        user, answer = self._parts[start:middle], self._parts[middle:end]
        identity = self.identity(index)
        if self._template is None:
            findings, rest = user.tobytes().decode(), answer.tobytes().decode()
            example = Example(identity, findings, rest) if findings else Example(identity, text=rest)
            return OnDemand([example], self._tokenizer, self._prompt, "").row(0, wording)
        if start == middle:  # a plain text has no user
            ids, first, wording = [self._tokenizer.bos_id], 1, -1
            stop = self._tokenizer.end_of_text_id
        else:
            ids = [*self._template.heads[wording], *user.tolist(), *self._template.tail]
            first, stop = len(ids), self._tokenizer.eos_id
        ids += answer.tolist()
        ids.append(stop)
        return Row(identity, ids, [False] * first + [True] * (len(ids) - first), wording)

    def lengths(self) -> tuple[NDArray[Any], NDArray[Any]]:
        return self._lengths[:, 0], self._lengths[:, 1]

    def values(self, field: str) -> tuple[list[str], NDArray[Any]]:
        if field not in self._codes:
            raise ValueError(f"data.weights.{field}: expected one of {', '.join(FIELDS)}")
        names = self._values[field]
        if names is None:
            raise ValueError(f"data.weights.{field}: the reports have more than {MOST_VALUES} different values")
        return names, self._codes[field]


def open_cache(path: str | Path, tokenizer: Tokenizer, prompt: Prompt) -> Cache | None:
    """The cache of a data file, built if there is none; None, with a note in the log, where it cannot be written.

    Any number of processes may call it at once; one builds. Raises ValueError for bad lines as `read_examples`.
    """
    file = Path(path)
    if not file.is_file():
        raise ValueError(f"{file}: no such file; expected JSON lines with id, findings and impression")
    content = digest(file)
    fingerprint = fingerprint_of(content, tokenizer, prompt)
    folder = file.parent / FOLDER / fingerprint
    while (header := check(folder, fingerprint)) is None:
        try:
            lock = open_lock(folder)
        except OSError as error:
            logger.info("%s: no tokenised cache can be written beside it (%s); its reports are kept in memory and "
                        "tokenised as they are drawn", file, error.strerror)  # fmt: skip
            return None
        with lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                logger.info("%s: another process tokenises it; waiting", file)
                fcntl.flock(lock, fcntl.LOCK_EX)
                continue  # it may have failed: look again
            except OSError as error:  # a file system without locks: another might build it at the same time
                logger.info("%s: no tokenised cache is written beside it (no locks there: %s); its reports are kept in "
                            "memory and tokenised as they are drawn", file, error.strerror)  # fmt: skip
                return None
            header = check(folder, fingerprint)
            if header is None:
                if folder.exists():
                    logger.warning("%s is damaged: it is built again", folder)
                header = build(folder, file, content, tokenizer, prompt)
            break
    return Cache(folder, header, tokenizer, prompt)


def fingerprint_of(content: str, tokenizer: Tokenizer, prompt: Prompt) -> str:
    """A hash of everything that the cache of a file with this content hash depends on."""
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save(folder)
        files = sorted(file for file in Path(folder).iterdir() if file.name in ("tokenizer.json", "tokenizer.model"))
        vocabulary = {file.name: digest(file) for file in files}
    probes = [
        tokenizer.render(prompt.messages(PROBE, PROBE, wording=wording))[0]
        for wording in range(len(prompt.instructions))
    ]
    parts = {
        "version": VERSION,
        "libraries": [version("tokenizers"), version("sentencepiece")],
        "data": content,
        "tokenizer": vocabulary,
        "format": tokenizer.prompt_format,
        "instructions": list(prompt.instructions),
        "similar": prompt.similar,
        "probes": probes,  # the template, as the code has it now
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


def digest(file: Path) -> str:
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def check(folder: Path, fingerprint: str) -> dict[str, Any] | None:
    """The header of a complete and undamaged cache; None for anything else."""
    try:
        header: dict[str, Any] = json.loads((folder / HEADER).read_text(encoding="utf-8"))
        if header["seal"] != seal(header) or header["fingerprint"] != fingerprint:
            return None
        files: dict[str, dict[str, Any]] = header["files"]
        if any((folder / name).stat().st_size != known["bytes"] for name, known in files.items()):
            return None
        return header if all(digest(folder / name) == known["sha256"] for name, known in files.items()) else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None


def seal(header: dict[str, Any]) -> str:
    """The checksum of a header but for the checksum itself."""
    rest = {key: value for key, value in header.items() if key != "seal"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def open_lock(folder: Path) -> BinaryIO:
    """The lock file of a cache; makes the folder of all caches, which git is told to ignore."""
    folder.parent.mkdir(exist_ok=True)
    if not (ignore := folder.parent / ".gitignore").exists():
        ignore.write_text("*\n", encoding="utf-8")
    return folder.with_suffix(".lock").open("wb")


def build(folder: Path, file: Path, content: str, tokenizer: Tokenizer, prompt: Prompt) -> dict[str, Any]:
    """Build the cache of `file` (whose hash is `content`) beside `folder`, rename it, return its header.

    The caller holds the lock: what a killed process left is nobody's.
    """
    partial_folder = folder.with_suffix(".partial")
    shutil.rmtree(partial_folder, ignore_errors=True)
    partial_folder.mkdir()
    try:
        header = {"fingerprint": folder.name} | fill(partial_folder, file, content, tokenizer, prompt)
        header["seal"] = seal(header)
        with Writer(partial_folder / HEADER) as writer:
            writer.write((json.dumps(header, indent=1) + "\n").encode())
        sync(partial_folder)
        shutil.rmtree(folder, ignore_errors=True)  # a damaged one
        partial_folder.rename(folder)
        sync(folder.parent)
    except OSError as error:
        raise OSError(error.errno, f"the tokenised cache cannot be written ({error.strerror})", str(folder)) from error
    finally:
        shutil.rmtree(partial_folder, ignore_errors=True)
    size = sum(known["bytes"] for known in header["files"].values())
    logger.info("%s: tokenised %d reports into %s (%.2f GB)", file, header["reports"], folder, size / 2**30)
    return header


def fill(folder: Path, file: Path, content: str, tokenizer: Tokenizer, prompt: Prompt) -> dict[str, Any]:
    """Write the files of a cache into an empty folder; returns its header but for fingerprint and seal."""
    template = Template.find(tokenizer, prompt)
    if template is None:
        dtype, encode = "<u1", partial(encode_texts, tokenizer, prompt)
    else:
        dtype = "<u2" if tokenizer.vocab_size <= 2**16 else "<u4"
        encode = partial(encode_pieces, Sentences(tokenizer), prompt, template, dtype)
    reader, end, name_end = Reader(file), 0, 0
    values: dict[str, dict[str, int]] = {field: {} for field in FIELDS}
    names = ("parts", "bounds", "names", "name_bounds", "lengths", *FIELDS)
    with ExitStack() as stack:
        writers = {name: stack.enter_context(Writer(folder / f"{name}.bin")) for name in names}
        for name in ("bounds", "name_bounds"):
            writers[name].write(np.zeros(1, "<u8"))
        for examples, encoded in ahead(batched(reader, BATCH), encode):
            writers["parts"].write(encoded.parts)
            bounds = end + encoded.sizes.ravel().cumsum(dtype="<u8")
            writers["bounds"].write(bounds)
            identities = [example.id.encode() for example in examples]
            name_bounds = name_end + np.array([len(name) for name in identities]).cumsum(dtype="<u8")
            writers["names"].write(b"".join(identities))
            writers["name_bounds"].write(name_bounds)
            end, name_end = int(bounds[-1]), int(name_bounds[-1])
            writers["lengths"].write(encoded.lengths.astype("<u4"))
            for field, table in values.items():
                writers[field].write(codes(table, [str(example.fields.get(field) or "") for example in examples]))
    reader.finish(content)
    return {
        "reports": len(reader.keys),
        "dtype": dtype,
        "values": {field: list(table) if len(table) <= MOST_VALUES else None for field, table in values.items()},
        "files": {w.path.name: {"bytes": w.size, "sha256": w.sha.hexdigest()} for w in writers.values()},
    }


class Sentences:
    """Ids of texts, each sentence tokenised once: reports say the same again and again.

    Texts are cut between a full stop and a space. Llama 3's split pattern always parts them there: no token that holds
    a stop goes on with a space; and it never looks back, so that what follows is parted as on its own.
    """

    MOST = 100_000  # sentences known at a time

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._known: dict[str, bytes] = {}

    def encode(self, texts: Sequence[str]) -> list[bytes]:
        """The ids of each text as uint32."""
        cut = [self.cut(text) for text in texts] if self._tokenizer.parts_sentences else [[text] for text in texts]
        if len(self._known) > self.MOST:
            self._known = {}  # not cleared: another thread may be reading it
        known = self._known
        new = list({sentence for sentences in cut for sentence in sentences if sentence not in known})
        for sentence, ids in zip(new, self._tokenizer.encode_batch(new), strict=True):
            known[sentence] = array("I", ids).tobytes()
        return [b"".join([known[sentence] for sentence in sentences]) for sentences in cut]

    def cut(self, text: str) -> list[str]:
        first, *rest = text.split(". ")
        return [f"{first}.", *[f" {part}." for part in rest[:-1]], f" {rest[-1]}"] if rest else [first]


@dataclass(frozen=True)
class Encoded:
    """A batch of n reports: sizes of their two parts (n, 2), `data.Source.lengths` (n, 2), and all parts in a row."""

    sizes: NDArray[Any]
    lengths: NDArray[Any]
    parts: NDArray[Any] | bytes


def encode_pieces(
    sentences: Sentences, prompt: Prompt, template: Template, dtype: str, examples: list[Example]
) -> Encoded:
    texts: list[str] = []
    for e in examples:
        texts += ("", e.text) if e.text else (user_text(prompt, prompt.question(e)), e.impression.strip())
    ids = sentences.encode(texts)
    sizes = np.fromiter(map(len, ids), np.int64, len(ids)).reshape(-1, 2) // 4
    parts = np.frombuffer(b"".join(ids), np.uint32).astype(dtype, copy=False)
    around = max(map(len, template.heads)) + len(template.tail)
    prompts = np.where(sizes[:, 0] == 0, 1, sizes[:, 0] + around)
    return Encoded(sizes, np.stack([prompts, prompts + sizes[:, 1] + 1], axis=1), parts)


def encode_texts(tokenizer: Tokenizer, prompt: Prompt, examples: list[Example]) -> Encoded:
    texts = [text.encode() for e in examples for text in ("" if e.text else prompt.question(e), e.text or e.impression)]
    sizes = np.array([len(text) for text in texts]).reshape(-1, 2)
    lengths = OnDemand(examples, tokenizer, prompt, "").lengths()
    return Encoded(sizes, np.stack(lengths, axis=1), b"".join(texts))


def codes(table: dict[str, int], names: list[str]) -> NDArray[Any]:
    """The number of each name in the table, which grows by new ones up to a bound."""
    numbers = (table.setdefault(n, len(table)) if len(table) <= MOST_VALUES else table.get(n, 0) for n in names)
    return np.fromiter(numbers, "<u2", len(names))


def batched(examples: Iterable[Example], size: int) -> Iterator[list[Example]]:
    iterator = iter(examples)
    while batch := list(islice(iterator, size)):
        yield batch


def ahead(
    batches: Iterable[list[Example]], encode: Callable[[list[Example]], Encoded]
) -> Iterator[tuple[list[Example], Encoded]]:
    """Batches and what `encode` makes of them, in their order. It runs in two threads, while the caller reads and
    writes others: one is in the tokenizer's own threads while the other turns its ids into an array."""
    with ThreadPoolExecutor(2) as threads:
        waiting: list[tuple[list[Example], Future[Encoded]]] = []
        for batch in batches:
            waiting.append((batch, threads.submit(encode, batch)))
            if len(waiting) == 3:
                examples, future = waiting.pop(0)
                yield examples, future.result()
        for examples, future in waiting:
            yield examples, future.result()


class Reader:
    """The examples of a file, with a progress bar; `finish` tells what was wrong with the file."""

    def __init__(self, file: Path) -> None:
        self.file, self.keys = file, array("q")  # a hash of each id: eight bytes a report are all that is kept
        self._sha, self._problems, self._faulty = hashlib.sha256(), list[str](), 0

    def __iter__(self) -> Iterator[Example]:
        for number, example in parse_lines(self._lines()):
            if isinstance(example, ValueError):
                self._note(f"line {number}: {example}")
            else:
                self.keys.append(hash(example.id))
                if not self._faulty:  # or nothing will come of it: only look for more faulty lines
                    yield example

    def _lines(self) -> Iterator[bytes]:
        size = self.file.stat().st_size
        with (
            self.file.open("rb") as lines,
            tqdm(desc=f"tokenise {self.file.name}", total=size, unit="B", unit_scale=True, leave=False,
                 disable=size < 2**24) as bar,
        ):  # fmt: skip

            def seen(part: bytes) -> None:
                self._sha.update(part)
                bar.update(len(part))

            yield from lines_of(lines, seen)

    def _note(self, problem: str) -> None:
        self._faulty += 1
        if len(self._problems) < 20:
            self._problems.append(problem)

    def finish(self, content: str) -> None:
        """ValueError if the file has faulty lines, an id twice, no line, or is not the one with the hash `content`."""
        ordered = np.sort(np.frombuffer(self.keys, np.int64))
        if twice := set(ordered[1:][ordered[1:] == ordered[:-1]].tolist()):
            self._name_repeated(twice)
        if self._faulty:
            raise faulty_lines(self.file, self._problems, self._faulty)
        if not self.keys:
            raise ValueError(f"{self.file}: empty; expected JSON lines with id, findings and impression")
        if self._sha.hexdigest() != content:
            raise ValueError(f"{self.file}: changed while it was read; start again once it is complete")

    def _name_repeated(self, keys: set[int]) -> None:
        """Read the file again for the lines whose ids have these hashes."""
        seen: dict[str, int] = {}
        with self.file.open("rb") as lines:
            for number, example in parse_lines(lines_of(lines)):
                if isinstance(example, ValueError) or hash(example.id) not in keys:
                    continue
                if example.id in seen:
                    self._note(repeated_id(number, example.id, seen[example.id]))
                seen.setdefault(example.id, number)


class Writer:
    """A file that is on the disk when the block ends; its size and checksum are counted as it grows."""

    def __init__(self, path: Path) -> None:
        self.path, self.size, self.sha = path, 0, hashlib.sha256()

    def __enter__(self) -> Writer:
        self._stream = self.path.open("wb")
        return self

    def write(self, data: NDArray[Any] | bytes) -> None:
        content = data if isinstance(data, bytes) else data.tobytes()
        self._stream.write(content)
        self.sha.update(content)
        self.size += len(content)

    def __exit__(self, *_: object) -> None:
        with self._stream:
            self._stream.flush()
            os.fsync(self._stream.fileno())
