"""Building the tokenised cache against `tokenizers` alone on the same texts, turn by turn.

    python bench/tokenise.py --tokenizer DIR [--reports 20000] [--rounds 5] [--draws 2000]

DIR is a model folder with Llama 3's tokenizer (tokenizer.json or tokenizer.model). The reports are synthetic, of about
300 tokens. The bar is 0.9: `encode_batch_fast` in batches of the same size, its ids thrown away, is all work that
cannot be avoided. Also printed: what a draw from the cache costs, what it costs to render on demand, and the memory
that building takes above what the process held before (at N and at N / 4 reports: it should not grow with N).
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tokenizers import Tokenizer as Bare

from radllama.cache import BATCH, FOLDER, open_cache, user_text
from radllama.data import INSTRUCTIONS, OnDemand, Prompt, Reports, read_examples
from radllama.tokenizer import Tokenizer

ROOT = Path(__file__).parents[1]
BAR = 0.9


def write_pairs(file: Path, count: int) -> None:
    """Pairs from the two bodies of each report of assets/make_raw.py."""
    sys.path.insert(0, str(ROOT / "assets"))
    spec = importlib.util.spec_from_file_location("make_raw", ROOT / "assets" / "make_raw.py")
    assert spec
    assert spec.loader
    make_raw = importlib.util.module_from_spec(spec)
    sys.modules["make_raw"] = make_raw
    spec.loader.exec_module(make_raw)
    maker = make_raw.Maker(count, 1)
    with file.open("w", encoding="utf-8") as lines:
        for number in range(count):
            one, other = maker.content(number)
            # Indication and technique bring the prompt to the length of real ones.
            findings = f"{one.indication} {one.technique} {other.technique} {one.findings} {other.findings}"
            impression = " ".join(f"{k}. {words}" for k, words in enumerate(one.statements + other.statements, 1))
            row = {"id": f"r{number}", "findings": findings, "impression": impression, "modality": one.modality}
            lines.write(json.dumps(row) + "\n")


def peak_of_building(file: Path, tokenizer: str) -> float:
    """GB above the resident size before, in a process of its own."""
    command = [sys.executable, __file__, "--tokenizer", tokenizer, "--build-only", str(file)]
    output = subprocess.run(command, check=True, capture_output=True, text=True)
    return float(output.stdout)


def resident(key: str) -> float:
    """GB: VmRSS now, VmHWM at the most."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) / 2**20


def build_only(file: Path, tokenizer: Tokenizer, prompt: Prompt) -> float:
    shutil.rmtree(file.parent / FOLDER, ignore_errors=True)
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak of loading the tokenizer
    before = resident("VmRSS")
    open_cache(file, tokenizer, prompt)
    return resident("VmHWM") - before


def main() -> None:
    parser = argparse.ArgumentParser(description="Building the tokenised cache against tokenizers alone.")
    parser.add_argument("--tokenizer", required=True, help="model folder with Llama 3's tokenizer")
    parser.add_argument("--reports", type=int, default=20_000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--draws", type=int, default=2_000)
    parser.add_argument("--build-only", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    tokenizer = Tokenizer.from_dir(options.tokenizer)
    prompt = Prompt(tokenizer.prompt_format, INSTRUCTIONS)
    if options.build_only:
        print(build_only(options.build_only, tokenizer, prompt))
        return

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "pairs.jsonl"
        write_pairs(file, options.reports)
        examples = read_examples(file)
        texts = [text for e in examples for text in (user_text(prompt, e.findings), e.impression)]
        tokenizer.save(Path(folder) / "tokenizer")
        bare = Bare.from_file(str(Path(folder) / "tokenizer" / "tokenizer.json"))
        bare.encode_batch_fast(texts[:100], add_special_tokens=False)  # its threads and its cache of words
        ratios = []
        for turn in range(options.rounds):
            seconds = {}
            for what in ("bare", "cache") if turn % 2 else ("cache", "bare"):
                begun = time.perf_counter()
                if what == "cache":
                    shutil.rmtree(file.parent / FOLDER, ignore_errors=True)
                    cache = open_cache(file, tokenizer, prompt)
                else:
                    for start in range(0, len(texts), 2 * BATCH):
                        bare.encode_batch_fast(texts[start : start + 2 * BATCH], add_special_tokens=False)
                seconds[what] = time.perf_counter() - begun
            ratios.append(seconds["bare"] / seconds["cache"])
            rates = {what: options.reports / value for what, value in seconds.items()}
            print(f"round {turn + 1}: cache {rates['cache']:,.0f} pairs/s, bare {rates['bare']:,.0f}, "
                  f"ratio {ratios[-1]:.3f}")  # fmt: skip
        assert cache is not None
        tokens = int(cache.lengths()[1].astype("int64").sum()) / options.reports
        middle = statistics.median(ratios)
        print(f"ratio, median of {options.rounds}: {middle:.3f} (bar {BAR}); {os.cpu_count()} cores, "
              f"{tokens:.0f} tokens a row")  # fmt: skip

        source = OnDemand(examples, tokenizer, prompt, "")
        rates = {}
        for name, chosen in (("cache", cache), ("on demand", examples)):
            reports = Reports(chosen, tokenizer, prompt, max_length=10_000, seed=0, name="pairs.jsonl")
            reports.step(0, 8)
            begun = time.perf_counter()
            reports.step(0, options.draws)
            rates[name] = options.draws / (time.perf_counter() - begun)
        print("draws: " + ", ".join(f"{name} {rate:,.0f} rows/s" for name, rate in rates.items()))
        wrong = sum(cache.row(n, n % 20) != source.row(n, n % 20) for n in range(0, options.reports, 7))
        print(f"rows that differ from rendering on demand: {wrong} of {-(-options.reports // 7)}")

        lines = file.read_bytes().splitlines(keepends=True)
        (Path(folder) / "part").mkdir()
        part = Path(folder) / "part" / "pairs.jsonl"
        part.write_bytes(b"".join(lines[: options.reports // 4]))
        peaks = [peak_of_building(path, options.tokenizer) for path in (part, file)]
        print(f"memory for building: {peaks[0]:.2f} GB at {options.reports // 4:,} reports, {peaks[1]:.2f} GB at "
              f"{options.reports:,}")  # fmt: skip
        sys.exit(0 if middle >= BAR and not wrong else 1)


if __name__ == "__main__":
    main()
