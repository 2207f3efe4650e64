"""How fast, and in how much memory, raw reports become pairs; and whether what was planted in them is found.

    python bench/prepare.py --count 1000000 --work DIR [--workers 2]

Makes raw exports by assets/make_raw.py (reused if they are there), runs radllama.reports over them twice, without and
with near duplicates, and prints reports a second, the peak memory of all processes together (PSS), and how many of the
planted defects were dropped for their reason.
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
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

from radllama import reports

ROOT = Path(__file__).parent.parent


class Memory(threading.Thread):
    """The most proportional memory of this process and its children, looked at four times a second."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.peak, self.over = 0, threading.Event()

    def run(self) -> None:
        me = psutil.Process()
        while not self.over.wait(0.25):
            total = 0
            for process in [me, *me.children(recursive=True)]:
                try:
                    total += process.memory_full_info().pss
                except psutil.Error:
                    continue
            self.peak = max(self.peak, total)


def timed(name: str, seconds: Counter[str]) -> None:
    """Let a step of radllama.reports add its time to `seconds`."""
    step: Callable[..., Any] = getattr(reports, name)

    def run(*arguments: Any) -> Any:
        begun = time.perf_counter()
        try:
            return step(*arguments)
        finally:
            seconds[name] += time.perf_counter() - begun

    setattr(reports, name, run)


def found(truth: Path, quarantine: Path) -> list[str]:
    """For each planted fault: how many there are, how many were dropped, and for which reason most often."""
    reasons = {row["id"]: row["reason"] for row in map(json.loads, quarantine.open(encoding="utf-8")) if row.get("id")}
    planted: Counter[str] = Counter()
    dropped: dict[str, Counter[str]] = {}
    for row in map(json.loads, truth.open(encoding="utf-8")):
        fault = row.get("fault") or "none"
        planted[fault] += 1
        if row["id"] in reasons:
            dropped.setdefault(fault, Counter())[reasons[row["id"]]] += 1
    lines = []
    for fault, count in planted.most_common():
        why = dropped.get(fault, Counter())
        most = ", ".join(f"{reason} {n:,}" for reason, n in why.most_common(2))
        lines.append(f"  {fault:28} {count:>9,} planted {100 * why.total() / count:6.1f} % dropped   {most}")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--count", type=int, default=100_000)
    parser.add_argument("--work", type=Path, required=True, help="folder for the exports (about 1.7 kB a report)")
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    export = options.work / f"raw-{options.count}.jsonl"
    if not export.exists():
        command = [sys.executable, str(ROOT / "assets/make_raw.py"), "--count", str(options.count)]
        subprocess.run([*command, "--seed", "1", "--output", str(export)], check=True)
    seconds: Counter[str] = Counter()
    for name in ("_scan_all", "_decide", "_write"):
        timed(name, seconds)
    taken: dict[str, Counter[str]] = {}
    for name, near in (("without", 0.0), ("with", 0.8)):
        out = options.work / f"out-{name}"
        shutil.rmtree(out, ignore_errors=True)
        seconds.clear()
        memory = Memory()
        memory.start()
        reports.prepare([export], out, reports.Settings(near=near), workers=options.workers)
        memory.over.set()
        memory.join()
        taken[name] = Counter(seconds)
        steps = ", ".join(f"{step[1:]} {value:.1f} s" for step, value in seconds.items())
        print(f"{name} near duplicates: {steps}; peak {memory.peak / 2**20:,.0f} MB", flush=True)
    n, off, on = options.count, taken["without"], taken["with"]
    print(f"\nparsing, screening, filtering: {n / off['_scan_all']:,.0f} reports/s with {options.workers} workers")
    more = on.total() - off.total()
    print(f"near duplicates (signatures, grouping, held-out search): {n / more:,.0f} reports/s")
    print(f"all: {n / on.total():,.0f} reports/s\n")
    print("\n".join(found(export.with_name(export.name + ".truth.jsonl"), options.work / "out-with/quarantine.jsonl")))


if __name__ == "__main__":
    main()
