"""Spoilt files: JSON values, bytes, safetensors, lines of reports, SentencePiece's protobuf, pickles. For fuzz.py.

Each maker takes a good file's content and a source of chance, and returns a bad one's content, the same for the same
chance. Most keep the form and spoil what is in it, so that it reaches what lies behind the parser.
"""

from __future__ import annotations

import io
import json
import math
import random
import struct
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

MARKER = "XQZFINDINGS"  # stands in every report; must stand in no message
Draw = random.Random
Change = Callable[[bytes, Draw], bytes]


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


def field_of(name: str) -> Change:
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


def as_json(where: Callable[[tuple[Any, ...]], bool] = lambda path: True) -> Change:
    return lambda content, draw: dump(spoil(json.loads(content), draw, where))


def at(*names: str) -> Change:
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


def rows_of(change: Callable[[dict[str, Any], Draw], Any]) -> Change:
    """Change one or two lines of a file of JSON lines."""

    def changed(content: bytes, draw: Draw) -> bytes:
        lines = content.splitlines()
        for place in draw.sample(range(len(lines)), draw.choice((1, 2))):
            found = change(json.loads(lines[place]), draw)
            lines[place] = found if isinstance(found, bytes) else dump(found)
        return b"\n".join(lines) + b"\n" * draw.randrange(2)

    return changed


def only(*names: str) -> Change:
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
