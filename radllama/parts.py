"""A long job over numbered items, in parts: by several ranks at once, and again after an interruption.

Every finished item goes at once to OUTPUT.partial (rank 0) or OUTPUT.partial-RANK: a line of JSON, under a first line
that names the settings. A later run with the same settings, on any number of ranks, goes on from there. The ranks are
those of torchrun, deepspeed or SLURM recipes (RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT in the environment).
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import IO, Any

import torch.distributed as dist

from radllama.files import replacing

Items = dict[int, dict[str, Any]]


class Ranks:
    """The processes that share the work; a context, whose end takes the connections down."""

    def __init__(self) -> None:
        self.rank, self.world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
        self.local_rank = int(os.environ.get("LOCAL_RANK", "0"))

    def __enter__(self) -> Ranks:
        if self.world > 1:
            dist.init_process_group("gloo", timeout=timedelta(minutes=10))
            # Ranks wait for the slowest, however long; for one that ended they do not: its connection closes.
            self.group = dist.new_group(timeout=timedelta(days=30))
        return self

    def __exit__(self, *error: object) -> None:
        if self.world > 1:
            dist.destroy_process_group()

    def from_first(self, value: Any) -> Any:
        """Rank 0's value, on every rank."""
        if self.world == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, group=self.group)
        return box[0]

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value, on rank 0; elsewhere nothing."""
        if self.world == 1:
            return [value]
        values = [None] * self.world if self.rank == 0 else None
        dist.gather_object(value, values, dst=0, group=self.group)
        return values or []


def run_in_parts(
    ranks: Ranks,
    output: Path,
    settings: str,
    costs: Sequence[int],
    work: Callable[[list[int]], Iterable[tuple[int, dict[str, Any]]]],
) -> list[dict[str, Any]]:
    """The results of all items in order, on rank 0; elsewhere nothing.

    `work` takes item numbers and yields (number, result) as each is finished, in any order. The items are dealt out by
    `costs`, the dearest first. The partial files stay: remove them (`remove_parts`) once the results are written.
    """
    done: Items = _read_parts(output, settings) if ranks.rank == 0 else {}
    if ranks.rank == 0 and done:
        print(f"{output.name}: {len(done)} of {len(costs)} are there already ({_part(output, 0).name}), going on")
    part = _part(output, ranks.rank)
    if ranks.rank == 0:
        with replacing(part) as file:
            file.write(json.dumps({"settings": settings}) + "\n")
            file.writelines(_line(number, result) for number, result in done.items())
        remove_parts(output, first=1)
    there: set[int] = ranks.from_first(set(done))
    left = sorted((number for number in range(len(costs)) if number not in there), key=lambda n: (-costs[n], n))
    with part.open("a", encoding="utf-8", newline="") as file:
        if ranks.rank:
            file.write(json.dumps({"settings": settings}) + "\n")
        own: Items = {}
        for number, result in work(left[ranks.rank :: ranks.world]):
            own[number] = result
            file.write(_line(number, result))
            file.flush()
    for items in ranks.gather(own):
        done |= items
    return [done[number] for number in sorted(done)]


def remove_parts(output: Path, *, first: int = 0) -> None:
    """Remove the partial files of the ranks from `first` on."""
    for file in _parts(output):
        if file != _part(output, 0) or first == 0:
            file.unlink(missing_ok=True)


def _part(output: Path, rank: int) -> Path:
    return output.with_name(f"{output.name}.partial" + (f"-{rank}" if rank else ""))


def _parts(output: Path) -> list[Path]:
    names = [_part(output, 0).name, f"{_part(output, 0).name}-"]
    return sorted(
        file
        for file in output.parent.iterdir()
        if file.name == names[0] or (file.name.startswith(names[1]) and file.name.removeprefix(names[1]).isdecimal())
    )


def _line(number: int, result: dict[str, Any]) -> str:
    return json.dumps([number, result], ensure_ascii=False, allow_nan=False) + "\n"


def _read_parts(output: Path, settings: str) -> Items:
    """What earlier runs with these settings finished; a last line that was cut off does not count."""
    done: Items = {}
    for file in _parts(output):
        with file.open("rb") as lines:
            if not _same_settings(lines, settings):
                print(f"{file.name}: of other settings, not used")
                continue
            for line in lines:
                try:
                    number, result = json.loads(line) if line.endswith(b"\n") else (None, None)
                except ValueError:
                    break
                if not isinstance(number, int) or not isinstance(result, dict):
                    break
                done[number] = result
    return done


def _same_settings(lines: IO[bytes], settings: str) -> bool:
    try:
        return bool(json.loads(lines.readline()) == {"settings": settings})
    except ValueError:
        return False
