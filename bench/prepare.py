"""How fast, and in how much memory, raw reports become pairs; and whether what was planted in them is found.

    python bench/prepare.py --count 1000000 --work DIR [--workers 2] [--json FILE]

Makes a raw export by assets/make_raw.py (used again if it is there) and runs radllama.reports over it. Printed, and
written as JSON: for each stage the time, reports a second and the most memory of all processes together (PSS); the disk
space while it runs; what became of the planted faults; and how many of the planted duplicates stand in one group with
their original. The first SAMPLE reports are run once more without near duplicates: what their signatures cost is the
difference.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from numpy.typing import NDArray

from radllama import duplicates, reports

ROOT = Path(__file__).parent.parent
SAMPLE = 200_000
STAGES = {  # function -> its module and its name in the table
    "_scan_all": (reports, "read, parse, screen, filter, signatures"),
    "exact_clusters": (duplicates, "exact groups"),
    "near_clusters": (duplicates, "near groups"),
    "assign": (duplicates, "splits"),
    "near_held_out": (reports, "exact search of the held-out"),
    "contamination": (reports, "contamination"),
    "_write": (reports, "write"),
}


class Watch(threading.Thread):
    """Looks four times a second at the memory of this process and its children, and at the size of a folder."""

    def __init__(self, folder: Path) -> None:
        super().__init__(daemon=True)
        self.folder, self.over, self.stage = folder, threading.Event(), "start"
        self.peaks: Counter[str] = Counter()
        self.disk = 0

    def run(self) -> None:
        me = psutil.Process()
        while not self.over.wait(0.25):
            memory = 0
            for process in [me, *me.children(recursive=True)]:
                try:
                    memory += process.memory_full_info().pss
                except psutil.Error:
                    continue
            self.peaks[self.stage] = max(self.peaks[self.stage], memory)
            disk = 0
            for path in self.folder.rglob("*"):
                try:
                    disk += path.stat().st_size
                except OSError:  # just removed
                    continue
            self.disk = max(self.disk, disk)


class Run:
    """One run of `reports.prepare`, watched; its functions are as before at the end."""

    def __init__(self, export: Path, out: Path, near: float, workers: int) -> None:
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir(parents=True)
        self.seconds: dict[str, float] = {}
        self.results: dict[str, Any] = {}
        self.ids = np.zeros(0, np.uint64)
        self.watch = Watch(out)
        originals = {name: (module, getattr(module, name)) for name, (module, _) in STAGES.items()}
        for name, (module, step) in originals.items():
            setattr(module, name, self._timed(name, step))
        self.watch.start()
        begun = time.perf_counter()
        try:
            self.summary = reports.prepare([export], out, reports.Settings(near=near), workers=workers)
        finally:
            self.total = time.perf_counter() - begun
            self.watch.over.set()
            self.watch.join()
            for name, (module, step) in originals.items():
                setattr(module, name, step)

    def _timed(self, name: str, step: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: Any, **named: Any) -> Any:
            self.watch.stage = name
            begun = time.perf_counter()
            result = step(*arguments, **named)
            self.seconds[name] = time.perf_counter() - begun
            self.watch.stage = "between"
            if name == "near_clusters":
                self.results[name] = result
            if name == "_write":
                self.ids = arguments[0].column("id")
            return result

        return run


def truths(path: Path) -> Iterator[dict[str, Any]]:
    with path.open(encoding="utf-8") as lines:
        yield from map(json.loads, lines)


def faults(truth: Path, out: Path) -> dict[str, Any]:
    """Of each planted fault: how many there are, how many of them were dropped and why, or kept with which flags."""
    reasons = {duplicates.digest(row["id"]): row["reason"] for row in truths(out / "quarantine.jsonl") if row.get("id")}
    flags = {
        duplicates.digest(row["id"]): tuple(row["flags"])
        for name in duplicates.SPLITS
        for row in truths(out / f"{name}.jsonl")
        if "flags" in row
    }
    planted: Counter[str] = Counter()
    dropped: dict[str, Counter[str]] = {}
    flagged: dict[str, Counter[str]] = {}
    for row in truths(truth):
        fault = row.get("fault") or "none"
        planted[fault] += 1
        key = duplicates.digest(row["id"])
        if (reason := reasons.get(key)) is not None:
            dropped.setdefault(fault, Counter())[reason] += 1
        for flag in flags.get(key, ()):
            flagged.setdefault(fault, Counter())[flag] += 1
    return {
        fault: {
            "planted": count,
            "dropped": dict(dropped.get(fault, Counter()).most_common()),
            "flagged": dict(flagged.get(fault, Counter()).most_common()),
        }
        for fault, count in planted.most_common()
    }


def recall(truth: Path, ids: NDArray[Any], component: NDArray[Any]) -> dict[str, Any]:
    """Of each kind of planted duplicates: those whose original passed the filters as they did, and how many of these
    stand in one group with it (kept on one side of the split, and capped there)."""
    order = np.argsort(ids)
    ordered = ids[order]

    def rows(names: list[str]) -> NDArray[Any]:
        wanted = np.array([duplicates.digest(name) for name in names], dtype=np.uint64)
        at = np.minimum(np.searchsorted(ordered, wanted), len(ordered) - 1)
        return np.where(ordered[at] == wanted, order[at], -1)

    pairs: dict[str, tuple[list[str], list[str]]] = {}
    for row in truths(truth):
        if "duplicate_of" in row:
            one, other = pairs.setdefault(row["fault"], ([], []))
            one.append(row["id"])
            other.append(row["duplicate_of"])
    found = {}
    for kind, (copies, sources) in sorted(pairs.items()):
        a, b = rows(copies), rows(sources)
        both = (a >= 0) & (b >= 0)
        together = int((component[a[both]] == component[b[both]]).sum())
        found[kind] = {"planted": len(copies), "with original": int(both.sum()), "one group": together}
    return found


def measure(export: Path, work: Path, count: int, workers: int) -> dict[str, Any]:
    run = Run(export, work / "out", 0.8, workers)
    sample = min(count, SAMPLE)
    part = export
    if sample < count:
        part = work / f"raw-first-{sample}.jsonl"
        with export.open("rb") as lines, part.open("wb") as first:
            first.writelines(islice(lines, sample))
    plain = Run(part, work / "out-without", 0.0, workers)
    scan, scan_plain = run.seconds["_scan_all"] / count, plain.seconds["_scan_all"] / sample
    near = max(scan - scan_plain, 0.0) + (run.seconds["near_clusters"] + run.seconds["near_held_out"]) / count
    truth = export.with_name(export.name + ".truth.jsonl")
    return {
        "reports": count,
        "workers": workers,
        "bytes": export.stat().st_size,
        "stages": {
            title: {
                "seconds": run.seconds[name],
                "reports/s": count / run.seconds[name],
                "peak MB": run.watch.peaks[name] / 2**20,
            }
            for name, (_, title) in STAGES.items()
        },
        "seconds": run.total,
        "reports/s": {
            "parsing, screening, filtering": 1 / scan_plain,
            "near duplicates": 1 / near,
            "all": count / run.total,
        },
        "peak MB": max(run.watch.peaks.values(), default=0) / 2**20,
        "peak MB of the sample": max(plain.watch.peaks.values(), default=0) / 2**20,
        "disk MB": run.watch.disk / 2**20,
        "search": run.summary["contamination"]["search"],
        "duplicates": recall(truth, run.ids, run.results["near_clusters"].component),
        "faults": faults(truth, work / "out"),
    }


def show(found: dict[str, Any]) -> None:
    print(f"{found['reports']:,} reports, {found['bytes'] / 2**20:,.0f} MB, {found['workers']} workers\n")
    print(f"{'stage':42} {'seconds':>9} {'reports/s':>11} {'peak MB':>9}")
    for title, told in found["stages"].items():
        peak = f"{told['peak MB']:9,.0f}" if told["peak MB"] else " too short"
        print(f"{title:42} {told['seconds']:9.1f} {told['reports/s']:11,.0f} {peak}")
    print(f"{'all':42} {found['seconds']:9.1f} {found['reports/s']['all']:11,.0f} {found['peak MB']:9,.0f}")
    print(f"\nparsing, screening, filtering: {found['reports/s']['parsing, screening, filtering']:,.0f} reports/s")
    print(f"near duplicates (signatures, groups, search): {found['reports/s']['near duplicates']:,.0f} reports/s")
    print(f"disk while it runs: {found['disk MB']:,.0f} MB")
    print("search: " + ", ".join(f"{name} {count:,}" for name, count in found["search"].items()))
    print("\nplanted duplicates in one group with their original, of those where both passed the filters:")
    for kind, told in found["duplicates"].items():
        share = told["one group"] / max(told["with original"], 1)
        print(f"  {kind:28} {told['one group']:>9,} of {told['with original']:>9,}  {100 * share:.2f} %")
    print("\nplanted faults:")
    for fault, told in found["faults"].items():
        gone = sum(told["dropped"].values())
        most = [f"{reason} {n:,}" for reason, n in list(told["dropped"].items())[:2]]
        most += [f"flag {flag} {n:,}" for flag, n in list(told["flagged"].items())[:2]]
        share = 100 * gone / told["planted"]
        print(f"  {fault:20} {told['planted']:>9,} planted {share:6.1f} % dropped   {', '.join(most)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--count", type=int, default=100_000)
    parser.add_argument("--work", type=Path, required=True, help="folder for the exports (about 7 kB a report)")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there, too")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    export = options.work / f"raw-{options.count}.jsonl"
    if not export.exists():
        command = [sys.executable, str(ROOT / "assets/make_raw.py"), "--count", str(options.count)]
        subprocess.run([*command, "--seed", "1", "--output", str(export)], check=True)
    found = measure(export, options.work, options.count, options.workers)
    show(found)
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
