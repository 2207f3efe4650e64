"""A structure-aware fuzz of everything that is read from outside: weights, configs, adapters, tokenizers, reports.

    python tests/fuzz.py [--cases 10400] [--seed 0]       # a table; exit status 1 and a list if there are findings
    python tests/fuzz.py --seed 0 --case 4711             # that case alone, with its traceback

Each case spoils one thing in a good folder and loads it. It must load, or end in a ValueError that names the file and
quotes no report. Anything else is a finding: another exception, a crash, more than TIMEOUT seconds, more than MEMORY
bytes. The cases run in a process of their own, which is started again where one of them ends it.

KINDS says what is spoilt. The kinds marked `parsed` write well-formed JSON (or protobuf, or lines of the right form)
with wrong content, so that they reach what lies behind the parser.
"""

from __future__ import annotations

import argparse
import io
import json
import math
import os
import random
import resource
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import traceback
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TIMEOUT, MEMORY = 20, 2**30
MARKER = "XQZFINDINGS"  # stands in every report; must stand in no message
Draw = random.Random


# ---------------------------------------------------------------- spoiling JSON


@dataclass(frozen=True)
class Raw:
    """Written into JSON as it is."""

    text: str


def dump(value: Any) -> bytes:
    raws: list[str] = []

    def raw(found: Raw) -> str:
        raws.append(found.text)
        return f"\x00{len(raws) - 1}\x00"

    text = json.dumps(value, default=raw)
    for number, content in enumerate(raws):
        text = text.replace(json.dumps(f"\x00{number}\x00"), content)
    return text.encode("utf-8", "surrogatepass")


NUMBERS = (0, -1, 1, 2, 3, 2**31, 2**32 + 1, 2**63, -(2**63), 10**12, 10**30, 0.5, -0.0, 1e-320, 1e300, 7.0)
RAWS = tuple(map(Raw, ("NaN", "-Infinity", "1e999", "1" * 5000, "[" * 200 + "]" * 200, '{"a": 1, "a": 2}')))
TEXTS = ("", " ", "x", "../x", "/etc/passwd", "a\x00b", "\ud800", "é" * 300, "y" * 20_000, "nan", "8", "true", "%s{}")
OTHERS = (None, True, False, [], {}, [[]], [None], {"": None}, ["a", 1], {"a": {"b": []}})


def odd(draw: Draw) -> Any:
    """A value that is rarely the one expected."""
    return draw.choice(draw.choice((NUMBERS, RAWS, TEXTS, OTHERS)))


def near(value: Any, draw: Draw) -> Any:
    """A value like the given one, but another; or an odd one."""
    if draw.random() < 0.4:
        return odd(draw)
    if isinstance(value, bool) or value is None:
        return draw.choice((not value, str(value), 1))
    if isinstance(value, int | float):
        return draw.choice(
            (value + 1, value - 1, value * 2, value / 2, -value, value * 10**9, str(value), float(value))
        )
    if isinstance(value, str):
        place = draw.randrange(len(value) + 1)
        return draw.choice((value[:place], value + value, value[:place] + draw.choice(TEXTS) + value[place:], [value]))
    if isinstance(value, list):
        copy = list(value)
        if copy and draw.random() < 0.7:
            place = draw.randrange(len(copy))
            copy[place] = near(copy[place], draw)
            return copy
        return draw.choice((copy[1:], copy + copy, [copy], copy[::-1], dict(enumerate(map(str, copy)))))
    return draw.choice((list(value), list(value.items()), [value], {}, str(value)))


def paths(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The ways to all values within a value."""
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield (*path, key)
        yield from paths(inner, (*path, key))


def spoil(value: Any, draw: Draw, where: Callable[[tuple[Any, ...]], bool] = lambda path: True) -> Any:
    """One to three changes in a copy of a JSON value, at paths that `where` admits."""
    value = json.loads(json.dumps(value))
    for _ in range(draw.choice((1, 1, 1, 2, 3))):
        ways = [path for path in paths(value) if where(path)]
        if not ways:
            break
        *way, last = draw.choice(ways)
        place = value
        for key in way:
            place = place[key]
        match draw.randrange(10):
            case 0:
                del place[last]
            case 1 if isinstance(place, dict):
                place[draw.choice((last + "x", last.upper(), "", "\x7f", "z" * 3000))] = place.pop(last)
            case 2 if isinstance(place, dict):
                place[f"new{draw.randrange(9)}"] = odd(draw)
            case _:
                place[last] = near(place[last], draw)
        value = json.loads(json.dumps(value, default=lambda raw: f"\x01{raw.text}")) if ways else value
    return unmark(value)


def unmark(value: Any) -> Any:
    """Raw values stand as marked texts while several changes are made."""
    if isinstance(value, dict):
        return {key: unmark(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [unmark(inner) for inner in value]
    return Raw(value[1:]) if isinstance(value, str) and value.startswith("\x01") else value


def spoil_bytes(content: bytes, draw: Draw) -> bytes:
    """Bytes cut, changed, doubled, or put in; or what no parser likes."""
    place, end = sorted((draw.randrange(len(content) + 1), draw.randrange(len(content) + 1)))
    special = (
        b"",
        b"\xff\xfe",
        b"\x00" * 64,
        b"[" * 100_000,
        b'{"a":' * 50_000,
        b"1" * 5000,
        b"\x80\x02}q\x00.",
        b"\xed\xa0\x80",
    )
    match draw.randrange(7):
        case 0:
            return content[:place]
        case 1:
            return content[:place] + bytes([draw.randrange(256)]) + content[place + 1 :]
        case 2:
            return content[:place] + content[end:]
        case 3:
            return content[:end] + content[place:]
        case 4:
            return content[:place] + draw.choice(special) + content[place:]
        case 5:
            return draw.choice(special)
        case _:
            return content.decode("latin-1").encode(draw.choice(("utf-16", "utf-8-sig", "utf-32")))


# ---------------------------------------------------------------- spoiling safetensors


def split_tensors(content: bytes) -> tuple[dict[str, Any], bytes]:
    (length,) = struct.unpack("<Q", content[:8])
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def join_tensors(header: Any, data: bytes, length: int | None = None) -> bytes:
    text = dump(header)
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def laid_out(tensors: dict[str, tuple[str, list[int], bytes]]) -> bytes:
    """A well-formed file of (dtype, shape, bytes)."""
    header, data = {}, b""
    for name, (dtype, shape, content) in tensors.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [len(data), len(data) + len(content)]}
        data += content
    return join_tensors(header, data)


def parts_of(content: bytes) -> dict[str, tuple[str, list[int], bytes]]:
    header, data = split_tensors(content)
    header.pop("__metadata__", None)
    return {name: (t["dtype"], t["shape"], data[slice(*t["data_offsets"])]) for name, t in header.items()}


def field_of(name: str) -> Callable[[bytes, Draw], bytes]:
    """Spoil this entry of the headers' tensors."""

    def change(content: bytes, draw: Draw) -> bytes:
        header, data = split_tensors(content)
        return join_tensors(spoil(header, draw, lambda path: len(path) > 1 and path[1] == name), data)

    return change


def header_names(content: bytes, draw: Draw) -> bytes:
    header, data = split_tensors(content)
    return join_tensors(spoil(header, draw, lambda path: len(path) == 1), data)


def header_length(content: bytes, draw: Draw) -> bytes:
    header, data = split_tensors(content)
    wrong = draw.choice((0, 1, 7, 2**31, 2**63, 2**64 - 1, 10**8, 10**8 + 1, len(content), len(content) - 8))
    return join_tensors(header, data, draw.choice((wrong, draw.randrange(len(content)))))


def metadata(content: bytes, draw: Draw) -> bytes:
    header, data = split_tensors(content)
    header["__metadata__"] = odd(draw) if draw.random() < 0.5 else {"format": odd(draw), "x": odd(draw)}
    return join_tensors(header, data)


def coherent(content: bytes, draw: Draw) -> bytes:
    """A well-formed file whose tensors are not those of this model: other shapes, dtypes, bytes, names."""
    tensors = parts_of(content)
    for _ in range(draw.choice((1, 1, 2))):
        name = draw.choice(list(tensors))
        dtype, shape, data = tensors.pop(name)
        size = len(data) // max(1, math.prod(shape))
        match draw.randrange(7):
            case 0:
                shape = shape[::-1] if len(shape) > 1 else [1, *shape]
            case 1:
                shape, data = [*shape[:-1], 0], b""
            case 2:
                same = {
                    8: ("F64", "I64", "U64", "C64"),
                    4: ("I32", "U32"),
                    2: ("F16", "BF16", "I16", "U16"),
                    1: ("I8", "BOOL", "F8_E4M3", "U8"),
                }
                dtype = draw.choice(same.get(size, ("U8",)))
            case 3:
                dtype, shape, data = "F64", shape, bytes(8 * (len(data) // max(size, 1)))
            case 4:
                name = draw.choice((name + "x", "model.layers.7.mlp.up_proj.weight", "", name.replace("0", "00")))
            case 5:
                data = draw.randbytes(len(data))
            case _:
                continue  # missing
        tensors[name] = (dtype, shape, data)
    return laid_out(tensors)


def state_record(content: bytes, draw: Draw) -> bytes:
    """The JSON record of a 4-bit layer, of another length, too."""
    tensors = parts_of(content)
    name = draw.choice([name for name in tensors if "quant_state" in name])
    text = dump(spoil(json.loads(tensors[name][2]), draw))
    if draw.random() < 0.1:
        text += b" " * draw.choice((10, 70_000))
    tensors[name] = ("U8", [len(text)], text)
    return laid_out(tensors)


# ---------------------------------------------------------------- spoiling the rest


def as_json(where: Callable[[tuple[Any, ...]], bool] = lambda path: True) -> Callable[[bytes, Draw], bytes]:
    return lambda content, draw: dump(spoil(json.loads(content), draw, where))


def at(*names: str) -> Callable[[bytes, Draw], bytes]:
    return as_json(lambda path: any(name in path for name in names))


def shard_names(content: bytes, draw: Draw) -> bytes:
    """Ways out of the folder, and to files that are none."""
    index = json.loads(content)
    shards = sorted(set(index["weight_map"].values()))
    ways = (
        "../{}",
        "/{}",
        "x/../{}",
        "{}/../{}",
        "./{}",
        "sub/{}",
        "{}\x00",
        "\ud800{}",
        "x" * 300 + "{}",
        "..",
        ".",
        "",
        "{}.bin",
    )
    ways += ("outside.safetensors", "inside.safetensors", "folder.safetensors", "gone.safetensors", "pipe.safetensors")
    for name in draw.sample(list(index["weight_map"]), draw.choice((1, 2, len(index["weight_map"])))):
        shard = draw.choice(shards)
        index["weight_map"][name] = draw.choice(ways).format(shard, shard)
    return dump(index)


def rows_of(change: Callable[[dict[str, Any], Draw], Any]) -> Callable[[bytes, Draw], bytes]:
    """Change one or two lines of a file of JSON lines."""

    def changed(content: bytes, draw: Draw) -> bytes:
        lines = content.splitlines()
        for place in draw.sample(range(len(lines)), draw.choice((1, 2))):
            found = change(json.loads(lines[place]), draw)
            lines[place] = found if isinstance(found, bytes) else dump(found)
        return b"\n".join(lines) + b"\n" * draw.randrange(2)

    return changed


def only(*names: str) -> Callable[[bytes, Draw], bytes]:
    return rows_of(lambda row, draw: spoil(row, draw, lambda path: path[0] in names))


def texts(row: dict[str, Any], draw: Draw) -> Any:
    key = draw.choice([key for key in row if key not in ("id", "model")])
    text = str(row[key])
    place = draw.randrange(len(text) + 1)
    row[key] = (
        text[:place] + draw.choice((*TEXTS, "<|eot_id|>", "\r\n", "\u2028", "\x1b[2J", "z" * 70_000)) + text[place:]
    )
    if draw.random() < 0.05:
        row[key] = MARKER * 200_000  # a line that is too long
    return row


def numbers(row: dict[str, Any], draw: Draw) -> Any:
    row[draw.choice(("dose", "patient_id", "id", "study_date"))] = draw.choice(NUMBERS + RAWS)
    return row


def doubled(row: dict[str, Any], draw: Draw) -> Any:
    """A key twice, nesting, or no object at all."""
    text = dump(row).decode()
    key = draw.choice([key for key in row if key not in ("id", "model")])  # messages show these
    depth = draw.choice((3, 500, 100_000))
    return draw.choice((
        text[:-1] + f', "{key}": "{MARKER} again"}}',
        text[:-1] + f', "more": {"[" * depth}{"]" * depth}}}',
        f"[{text}]",
        text + text,
        json.dumps(list(row.items())),
        json.dumps(f"{MARKER} alone"),
    )).encode()  # fmt: skip


def pieces(content: bytes, draw: Draw) -> bytes:
    """SentencePiece's protobuf: fields dropped, doubled, changed; lengths kept right or not."""
    fields, place = [], 0
    while place < len(content):  # every top-level field here is length-delimited
        start, place = place, place + 1
        size = shift = 0
        while True:
            byte = content[place]
            size, shift, place = size | (byte & 127) << shift, shift + 7, place + 1
            if byte < 128:
                break
        place += size
        fields.append(content[start:place])
    for _ in range(draw.choice((1, 2, 5))):
        number = draw.randrange(len(fields))
        match draw.randrange(5):
            case 0:
                fields.pop(number)
            case 1:
                fields.insert(draw.randrange(len(fields)), fields[number])
            case 2:
                fields[number] = spoil_bytes(fields[number], draw)
            case 3:
                body = fields[number]
                if len(body) > 3:
                    spot = draw.randrange(2, len(body))
                    fields[number] = body[:spot] + bytes([draw.randrange(256)]) + body[spot + 1 :]
            case _:
                draw.shuffle(fields)
    return b"".join(fields)


def unpickled(content: bytes, draw: Draw) -> bytes:
    """A .pth whose archive is whole and whose pickle, or one of its tensors, is not."""
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(out, "w") as new:
        names = old.namelist()
        chosen = draw.choice((next(name for name in names if name.endswith("data.pkl")), draw.choice(names)))
        for name in names:
            new.writestr(name, spoil_bytes(old.read(name), draw) if name == chosen else old.read(name))
    return out.getvalue()


def ranks(content: bytes, draw: Draw) -> bytes:
    lines = content.splitlines()
    place = draw.randrange(len(lines))
    token, rank = lines[place].split()
    lines[place] = draw.choice(
        (
            rank + b" " + token,
            token + b" " + str(draw.choice(NUMBERS)).encode(),
            b"",
            token,
            b"!!!! " + rank,
            token + b" " + b"9" * 5000,
            b"QQ== 1 2",
        )
    )
    return b"\n".join(lines[: draw.choice((len(lines), place + 1))])


# ---------------------------------------------------------------- loading


def use_model(folder: Path) -> None:
    import torch

    from radllama.checkpoint import find_model, load_model

    model = load_model(find_model(str(folder)), dtype=torch.float32)
    with torch.no_grad():
        model(torch.zeros(1, 3, dtype=torch.int64))


def use_merge(folder: Path) -> None:
    """The adapter over its base: loaded, and described."""
    import torch

    from radllama.checkpoint import describe, load_model
    from radllama.lora import load_adapter

    model = load_model(folder, dtype=torch.float32)
    load_adapter(model, folder / "adapter")
    describe(folder / "adapter")
    with torch.no_grad():
        model(torch.zeros(1, 3, dtype=torch.int64))


def use_pairs(folder: Path) -> None:
    from radllama.cache import open_cache
    from radllama.data import INSTRUCTIONS, Prompt, Reports, pack, read_examples
    from radllama.tokenizer import Tokenizer

    tokenizer = TOKENIZERS.get("") or TOKENIZERS.setdefault("", Tokenizer.from_dir(folder))
    prompt = Prompt(tokenizer.prompt_format, INSTRUCTIONS[:2])
    read = read_examples(folder / "pairs.jsonl")
    cache = open_cache(folder / "pairs.jsonl", tokenizer, prompt)
    for source in (read, cache):
        assert source
        reports = Reports(source, tokenizer, prompt, max_length=512, seed=0, name=str(folder / "pairs.jsonl"))
        reports.source.values("modality")
        pack(reports.step(0, 4))


TOKENIZERS: dict[str, Any] = {}


def use_predictions(folder: Path) -> None:
    from radllama.cases import load

    load([folder / "predictions.jsonl"])
    load([folder / "predictions.jsonl", folder / "others.jsonl"])


def use_tokenizer(folder: Path) -> None:
    from radllama.data import check_vocabulary
    from radllama.tokenizer import Tokenizer

    tokenizer = Tokenizer.from_dir(folder)
    check_vocabulary(tokenizer, 10_000, source=str(folder))
    ids, _ = tokenizer.render(
        [{"role": "user", "content": "No effusion."}, {"role": "assistant", "content": "Normal."}]
    )
    assert all(0 <= number < tokenizer.vocab_size for number in ids)
    assert isinstance(tokenizer.decode(ids), str)
    tokenizer.save(folder / "copy")


def use_nf4(folder: Path) -> None:
    use_model(folder / "nf4")


def use_shards(folder: Path) -> None:
    use_model(folder / "shards")


def use_piece(folder: Path) -> None:
    use_tokenizer(folder / "piece")


def use_tiktoken(folder: Path) -> None:
    use_tokenizer(folder / "tiktoken")


def use_import(folder: Path) -> None:
    from radllama.meta import import_meta

    import_meta(folder / "meta", folder / "imported")


def use_prompt(folder: Path) -> None:
    from radllama.data import Prompt

    prompt = Prompt.load(folder)
    assert prompt
    prompt.messages("No effusion.")


def use_job(folder: Path) -> None:
    from radllama.config import parse_config, read_config

    parse_config(read_config(folder / "job.json").resolved())


@dataclass(frozen=True)
class Kind:
    name: str
    file: str
    change: Callable[[bytes, Draw], bytes]
    use: Callable[[Path], None]
    parsed: bool = True


WEIGHTS, ADAPTER = "model.safetensors", "adapter/adapter_model.safetensors"
INDEX, PARTS = f"shards/{WEIGHTS}.index.json", ("nf4", "shards", "piece", "tiktoken", "meta")
PIPELINE = ("pre_tokenizer", "normalizer", "decoder", "post_processor")
KINDS = [
    *(Kind(f"header: {name}", WEIGHTS, field_of(name), use_model) for name in ("data_offsets", "shape", "dtype")),
    Kind("header: names", WEIGHTS, header_names, use_model),
    Kind("header: length", WEIGHTS, header_length, use_model, parsed=False),
    Kind("header: metadata", WEIGHTS, metadata, use_model),
    Kind("header: bytes", WEIGHTS, spoil_bytes, use_model, parsed=False),
    Kind("weights: coherent, of another model", WEIGHTS, coherent, use_model),
    Kind("4-bit: record", "nf4/model.safetensors", state_record, use_nf4),
    Kind("4-bit: tensors", "nf4/model.safetensors", coherent, use_nf4),
    Kind("index: shards", INDEX, shard_names, use_shards),
    Kind("index: names", INDEX, at("weight_map"), use_shards),
    Kind("index: structure", INDEX, as_json(lambda path: len(path) == 1), use_shards),
    Kind("index: bytes", INDEX, spoil_bytes, use_shards, parsed=False),
    Kind("config: sizes", "config.json", as_json(lambda path: "_" in path[0] and "rope" not in path[0]), use_model),
    Kind("config: rope", "config.json", at("rope_scaling", "rope_theta", "rms_norm_eps"), use_model),
    Kind("config: any", "config.json", as_json(), use_model),
    Kind("config: bytes", "config.json", spoil_bytes, use_model, parsed=False),
    Kind("adapter: numbers", "adapter/adapter_config.json", at("r", "lora_alpha", "lora_dropout"), use_merge),
    Kind("adapter: targets", "adapter/adapter_config.json", at("target_modules"), use_merge),
    Kind("adapter: any key", "adapter/adapter_config.json", as_json(), use_merge),
    Kind("adapter: config bytes", "adapter/adapter_config.json", spoil_bytes, use_merge, parsed=False),
    Kind("adapter: shapes", ADAPTER, field_of("shape"), use_merge),
    Kind("adapter: names", ADAPTER, header_names, use_merge),
    Kind("adapter: coherent, of another model", ADAPTER, coherent, use_merge),
    Kind("adapter: bytes", ADAPTER, spoil_bytes, use_merge, parsed=False),
    Kind("pairs: keys", "pairs.jsonl", rows_of(spoil), use_pairs),
    Kind("pairs: ids", "pairs.jsonl", only("id"), use_pairs),
    Kind("pairs: texts", "pairs.jsonl", rows_of(texts), use_pairs),
    Kind("pairs: numbers", "pairs.jsonl", rows_of(numbers), use_pairs),
    Kind("pairs: doubled, nested", "pairs.jsonl", rows_of(doubled), use_pairs),
    Kind("pairs: bytes", "pairs.jsonl", spoil_bytes, use_pairs, parsed=False),
    Kind("predictions: keys", "predictions.jsonl", rows_of(spoil), use_predictions),
    Kind("predictions: model, stop", "predictions.jsonl", only("model", "stop_reason", "modality"), use_predictions),
    Kind("predictions: texts", "predictions.jsonl", rows_of(texts), use_predictions),
    Kind("predictions: numbers", "predictions.jsonl", rows_of(numbers), use_predictions),
    Kind("predictions: doubled, nested", "predictions.jsonl", rows_of(doubled), use_predictions),
    Kind("predictions: bytes", "predictions.jsonl", spoil_bytes, use_predictions, parsed=False),
    Kind("tokenizer: vocabulary", "tokenizer.json", at("vocab"), use_tokenizer),
    Kind("tokenizer: merges", "tokenizer.json", at("merges"), use_tokenizer),
    Kind("tokenizer: added tokens", "tokenizer.json", at("added_tokens"), use_tokenizer),
    Kind("tokenizer: pipeline", "tokenizer.json", at(*PIPELINE), use_tokenizer),
    Kind("tokenizer: any key", "tokenizer.json", as_json(lambda path: "model" not in path[:-2]), use_tokenizer),
    Kind("tokenizer: bytes", "tokenizer.json", spoil_bytes, use_tokenizer, parsed=False),
    Kind("tokenizer: SentencePiece", "piece/tokenizer.model", pieces, use_piece),
    Kind("tokenizer: tiktoken", "tiktoken/tokenizer.model", ranks, use_tiktoken),
    Kind("Meta: params.json", "meta/params.json", as_json(), use_import),
    Kind("Meta: pickle", "meta/consolidated.00.pth", unpickled, use_import),
    Kind("prompt: any key", "prompt.json", as_json(), use_prompt),
    Kind("job: training", "job.json", at("training"), use_job),
    Kind("job: any key", "job.json", as_json(), use_job),
    Kind("job: bytes", "job.json", spoil_bytes, use_job, parsed=False),
]  # fmt: skip


# ---------------------------------------------------------------- the good folder


def make_base(folder: Path, tokenizer_folder: Path) -> None:
    """The folder that every case spoils: tiny models, an adapter, tokenizers, reports, a training config."""
    import base64

    import sentencepiece
    import torch
    from conftest import SENTENCES, random_llama, tiny_config
    from test_meta import write_meta

    from radllama.checkpoint import quantize_folder, save_model
    from radllama.lora import add_lora, save_adapter
    from radllama.model import RopeScaling

    for file in tokenizer_folder.glob("tokenizer*"):
        shutil.copyfile(file, folder / file.name) if folder.exists() else (
            folder.mkdir(),
            shutil.copyfile(file, folder / file.name),
        )
    scaling = RopeScaling(8.0, 1.0, 4.0, 64)
    model = random_llama(tiny_config(num_hidden_layers=1, rope_scaling=scaling))
    save_model(model, folder / "whole")
    for file in (folder / "whole").iterdir():
        file.rename(folder / file.name)
    (folder / "whole").rmdir()
    save_model(model, folder / "shards", max_shard_bytes=9000)
    (folder / "shards/folder.safetensors").mkdir()
    quantize_folder(folder, folder / "nf4", quant_type="nf4", dtype=torch.float32)
    add_lora(model, rank=2, alpha=4)
    save_adapter(model, folder / "adapter", base_model="base")
    write_meta(random_llama(tiny_config(vocab_size=96, num_hidden_layers=2)), folder / "meta", 1)
    (folder / "piece").mkdir()
    (folder / "tiktoken").mkdir()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SENTENCES * 20), model_prefix=str(folder / "piece/tokenizer"), vocab_size=100,
        model_type="bpe", byte_fallback=False, minloglevel=2,
    )  # fmt: skip
    (folder / "piece/tokenizer.vocab").unlink()
    lines = [base64.b64encode(bytes([n])) + b" %d" % n for n in range(256)]
    (folder / "tiktoken/tokenizer.model").write_bytes(b"\n".join(lines))
    (folder / "prompt.json").write_text(json.dumps({"format": "llama3", "instructions": ["Conclude.", "Sum up."]}))
    rows = [
        {
            "id": f"r{n}",
            "findings": f"{MARKER} {SENTENCES[n]}",
            "impression": f"{MARKER}.",
            "modality": "CT",
            "dose": 1.5,
        }
        for n in range(6)
    ]
    (folder / "pairs.jsonl").write_bytes(b"\n".join(map(dump, rows)))
    for name in ("predictions", "others"):
        told = [
            {"id": row["id"], "findings": row["findings"], "reference": row["impression"], "prediction": f"{MARKER} a.",
             "model": name, "stop_reason": "stop", "modality": "CT", "patient_id": f"p{row['id']}"}
            for row in rows
        ]  # fmt: skip
        (folder / f"{name}.jsonl").write_bytes(b"\n".join(map(dump, told)))
    job = json.loads((Path(__file__).parents[1] / "qlora.json").read_text())
    job["training"] = {"output": "run", "steps": 4, "epochs": None, "batch_size": 8, "accumulation": 1, "seed": 1,
                       "betas": [0.9, 0.95], "optimizer": "adamw", "warmup": 0.1, "learning_rate": 1e-3}  # fmt: skip
    job |= {"lora": {"rank": 4, "alpha": 8, "targets": ["q_proj"]}, "deepspeed": {"zero_optimization": {"stage": 1}}}
    job["data"]["weights"] = {"modality": {"CT": 2.0}}
    (folder / "job.json").write_text(json.dumps(job))


# ---------------------------------------------------------------- running


def run_case(base: Path, seed: int, case: int) -> tuple[str, str]:
    """("loaded" or "refused", "") or ("finding", what happened); raises nothing that the loaders do not."""
    kind = KINDS[case % len(KINDS)]
    draw = random.Random(f"{seed}/{case}")
    with tempfile.TemporaryDirectory(prefix="fuzz-") as place:
        folder = Path(place) / "case"
        part = kind.file.split("/")[0] if kind.file.startswith(PARTS) else ""
        shutil.copytree(base / part, folder / part, copy_function=os.link,
                        ignore=lambda _, names: [n for n in names if n in PARTS])  # fmt: skip
        if kind.name == "index: shards":
            links = {"outside": Path(place) / "stranger.safetensors", "inside": folder / "shards" / WEIGHTS}
            shutil.copyfile(base / WEIGHTS, Path(place) / "stranger.safetensors")
            chosen = draw.choice(("outside", "inside", "pipe"))
            if chosen == "pipe":
                os.mkfifo(folder / "shards/pipe.safetensors")
            else:
                (folder / f"shards/{chosen}.safetensors").symlink_to(links[chosen])
        file = folder / kind.file
        content = file.read_bytes()
        file.unlink()
        file.write_bytes(kind.change(content, draw))
        try:
            kind.use(folder)
        except ValueError as error:
            message = str(error)
            if str(file) not in message and str(file.parent) not in message:
                return "finding", f"{kind.name}: the message does not name {kind.file}: {error!r:.300}"
            if isinstance(error, UnicodeError | json.JSONDecodeError):
                return "finding", f"{kind.name}: a parser's own error: {error!r:.300}"
            if MARKER in message:
                return "finding", f"{kind.name}: the message quotes a report: {error!r:.300}"
            if len(message) > 20_000:
                return "finding", f"{kind.name}: a message of {len(message)} characters"
            return "refused", ""
        return "loaded", ""


def work(base: Path, seed: int, first: int, count: int) -> None:
    """The child: a line before each case and one after it."""
    import logging

    from radllama import cache, cases, checkpoint  # noqa: F401 - imported before the limit is set

    logging.disable()
    warm = (
        "header: names",
        "4-bit: record",
        "adapter: numbers",
        "pairs: ids",
        "predictions: keys",
        "tokenizer: merges",
    )
    for number, kind in enumerate(KINDS):
        if kind.name in warm:
            run_case(base, -1, number)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for case in range(first, first + count):
        print(json.dumps({"start": case, "kind": KINDS[case % len(KINDS)].name}), flush=True)
        signal.alarm(TIMEOUT)  # no handler: it ends the process, whatever that is doing
        try:
            outcome, what = run_case(base, seed, case)
        except BaseException as error:  # a finding, whatever it is (pyo3's panics are no Exceptions)
            kind = KINDS[case % len(KINDS)].name
            where = traceback.extract_tb(error.__traceback__)[-1]
            outcome, what = "finding", f"{kind}: {error!r:.300} at {Path(where.filename).name}:{where.lineno}"
        signal.alarm(0)
        now = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        if now - peak > 500_000:
            outcome, what = "finding", f"{KINDS[case % len(KINDS)].name}: took {(now - peak) >> 10} MB"
        peak = max(peak, now)
        print(json.dumps({"case": case, "outcome": outcome, "what": what}), flush=True)


def run(
    base: Path, *, cases: int, seed: int, script: Path = Path(__file__)
) -> tuple[dict[str, Counter[str]], list[str]]:
    """Outcomes by kind, and the findings."""
    outcomes: dict[str, Counter[str]] = {}
    first = 0
    findings: list[str] = []
    end = first + cases
    while first < end:
        command = [sys.executable, str(script), "--work", str(base), str(seed), str(first), str(end - first)]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
        begun = None
        with subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
        ) as child:
            assert child.stdout
            for line in child.stdout:
                if not line.startswith("{"):
                    continue
                told = json.loads(line)
                if "start" in told:
                    begun, name = told["start"], told["kind"]
                    continue
                outcomes.setdefault(name, Counter())[told["outcome"]] += 1
                if told["outcome"] == "finding":
                    findings.append(f"case {told['case']} of seed {seed}: {told['what']}")
                    print(findings[-1], file=sys.stderr, flush=True)
                first, begun = told["case"] + 1, None
            stderr = child.stderr.read() if child.stderr else ""
        if first < end:
            if begun is None:
                raise RuntimeError(f"the cases cannot be started: {stderr[-3000:]}")
            outcomes.setdefault(name, Counter())["finding"] += 1
            findings.append(
                f"case {begun} of seed {seed}: {name}: the process ended ({child.returncode}): {stderr[-300:]}"
            )
            first = begun + 1
    return outcomes, findings


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--cases", type=int, default=200 * len(KINDS), help="default: 200 of each kind, 10,400 in all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--case", type=int, help="run this case alone, here, and show its traceback")
    parser.add_argument("--work", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        base, seed, first, count = options.work
        work(Path(base), int(seed), int(first), int(count))
        return 0
    with tempfile.TemporaryDirectory() as place:
        make = [sys.executable, str(Path(__file__).parents[1] / "assets/make_base.py"), "--vocab-size", "450"]
        base = Path(place) / "base"
        subprocess.run([*make, "--texts", "assets/reports/validation.jsonl", "--output", f"{place}/t"], check=True,
                       capture_output=True, cwd=Path(__file__).parents[1])  # fmt: skip
        make_base(base, Path(place) / "t")
        if options.case is not None:
            print(KINDS[options.case % len(KINDS)].name, *run_case(base, options.seed, options.case))
            return 0
        outcomes, findings = run(base, cases=options.cases, seed=options.seed)
    print(table(outcomes))
    print("\n".join(findings) or "no findings")
    return 1 if findings else 0


def table(outcomes: dict[str, Counter[str]]) -> str:
    lines = [f"{'what is spoilt':<38} {'past the parser':>15} {'refused':>8} {'loaded':>7} {'findings':>9}"]
    parsed = {kind.name: kind.parsed for kind in KINDS}
    for name, found in outcomes.items():
        mark = "yes" if parsed[name] else "no"
        lines.append(f"{name:<38} {mark:>15} {found['refused']:>8} {found['loaded']:>7} {found['finding']:>9}")
    total = sum(outcomes.values(), Counter[str]())
    lines.append(f"{'all':<38} {'':>15} {total['refused']:>8} {total['loaded']:>7} {total['finding']:>9}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
