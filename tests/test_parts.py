"""parts.py: what is done stays done, on one rank or several, and no rank waits for one that is gone."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from radllama.parts import Ranks, remove_parts, run_in_parts


def squares(numbers: list[int], asked: list[int], fail_at: int | None = None) -> Iterator[tuple[int, dict[str, Any]]]:
    for number in numbers:
        asked.append(number)
        if number == fail_at:
            raise RuntimeError("the work failed")
        yield number, {"square": number**2}


def run(output: Path, *, settings: str = "s", count: int = 6, fail_at: int | None = None) -> tuple[Any, list[int]]:
    asked: list[int] = []
    with Ranks() as ranks:
        results = run_in_parts(ranks, output, settings, [1] * count, lambda n: squares(n, asked, fail_at))
    return results, asked


EXPECTED = [{"square": n**2} for n in range(6)]


def test_an_interrupted_run_goes_on_where_it_was(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "out.jsonl"
    with pytest.raises(RuntimeError):
        run(output, fail_at=3)
    assert not output.exists()
    assert run(output) == (EXPECTED, [3, 4, 5])
    assert "3 of 6" in capsys.readouterr().out
    assert run(output) == (EXPECTED, [])
    (tmp_path / "out.jsonl.partial-x").touch()
    remove_parts(output)
    assert [file.name for file in tmp_path.iterdir()] == ["out.jsonl.partial-x"]
    assert run(output) == (EXPECTED, [0, 1, 2, 3, 4, 5])


def test_other_settings_start_anew(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(tmp_path / "out.jsonl")
    assert run(tmp_path / "out.jsonl", settings="other")[1] == [0, 1, 2, 3, 4, 5]
    assert "of other settings" in capsys.readouterr().out


@pytest.mark.parametrize("tail", [b'[4, {"square": 1', b'[4, {"square": 16}]', b"\xff\xfe\n", b"{}\n", b"[1]\n"])
def test_a_line_that_was_cut_off_is_computed_again(tmp_path: Path, tail: bytes) -> None:
    output, part = tmp_path / "out.jsonl", tmp_path / "out.jsonl.partial"
    run(output)
    part.write_bytes(b"".join(part.read_bytes().splitlines(keepends=True)[:5]) + tail)
    assert run(output) == (EXPECTED, [4, 5])
    part.write_bytes(b"")
    assert run(output)[1] == [0, 1, 2, 3, 4, 5]


def test_the_dearest_come_first(tmp_path: Path) -> None:
    asked: list[int] = []
    run_in_parts(Ranks(), tmp_path / "o", "s", [2, 9, 2, 5], lambda n: squares(n, asked))
    assert asked == [1, 3, 0, 2]


SCRIPT = """
import json, sys
from pathlib import Path
from test_parts import run
results, asked = run(Path(sys.argv[1]), count=int(sys.argv[2]), fail_at=json.loads(sys.argv[3]))
print(json.dumps([results, asked]))
"""


def start(world: int, arguments: list[str]) -> list[subprocess.Popen[str]]:
    """The same command as `world` ranks."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    common = os.environ | {"WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    path = os.pathsep.join([str(Path(__file__).parent), str(Path(__file__).parents[1])])
    return [
        subprocess.Popen(
            [sys.executable, *arguments],
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=common | {"RANK": str(rank), "LOCAL_RANK": str(rank), "PYTHONPATH": path},
        )
        for rank in range(world)
    ]


def test_ranks_share_the_work_and_none_waits_for_one_that_failed(tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    ranks = start(2, ["-c", SCRIPT, str(output), "6", "3"])
    for rank in ranks:
        rank.communicate(timeout=120)
        assert rank.returncode != 0
    assert sorted(file.name for file in tmp_path.iterdir()) == ["out.jsonl.partial", "out.jsonl.partial-1"]
    ranks = start(3, ["-c", SCRIPT, str(output), "6", "null"])  # two items are left for three ranks
    answers = [json.loads(rank.communicate(timeout=120)[0].splitlines()[-1]) for rank in ranks]
    assert [results for results, _ in answers] == [EXPECTED, [], []]
    assert [asked for _, asked in answers] == [[3], [5], []]
