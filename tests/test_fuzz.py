"""Whatever is read from outside loads or ends in a clear error; see fuzz.py. `make test-fuzz` runs 10,400 cases."""

from __future__ import annotations

import random
import shutil
import struct
from pathlib import Path

import fuzz
import pytest


@pytest.fixture(scope="session")
def base(tokenizer_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fuzz") / "base"
    fuzz.make_base(folder, tokenizer_folder)
    return folder


def test_the_good_folder_loads(base: Path) -> None:
    for part in ("", "nf4", "shards"):
        fuzz.use_model(base / part)
    for use in (fuzz.use_merge, fuzz.use_predictions, fuzz.use_tokenizer, fuzz.use_prompt, fuzz.use_job):
        use(base)
    with pytest.raises(ValueError, match="256 tokens, not 128,000"):
        fuzz.use_tiktoken(base)
    fuzz.use_piece(base)
    fuzz.use_import(base)
    shutil.rmtree(base / "imported")
    shutil.rmtree(base / "copy")


def check(base: Path, cases: int, seed: int) -> None:
    outcomes, findings = fuzz.run(base, cases=cases, seed=seed)
    print(fuzz.table(outcomes))
    assert not findings, "\n".join([*findings, f"again: python tests/fuzz.py --seed {seed} --case NUMBER"])
    assert sum(sum(found.values()) for found in outcomes.values()) == cases
    assert all(sum(found.values()) >= cases // len(fuzz.KINDS) for found in outcomes.values())


def test_a_few_hundred_cases(base: Path) -> None:
    check(base, 5 * len(fuzz.KINDS), seed=1)


@pytest.mark.slow
def test_ten_thousand_cases(base: Path) -> None:
    """At least 200 of each kind, most of them past the parser."""
    assert 200 * len(fuzz.KINDS) >= 10_000
    check(base, 200 * len(fuzz.KINDS), seed=0)


def test_the_fuzz_sees_crashes_hangs_and_allocations(base: Path, tmp_path: Path) -> None:
    """Four loaders that do what must not happen, in the child as it runs."""
    script = tmp_path / "bad.py"
    script.write_text(BAD)
    outcomes, findings = fuzz.run(base, cases=6, seed=0, script=script)
    told = "\n".join(findings)
    assert len(findings) == 5, told
    assert outcomes["good"]["loaded"] == 1
    for what in ("KeyError", "the process ended (-11)", "the process ended (-14)", "quotes a report", "MemoryError"):
        assert what in told


BAD = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
import ctypes, time
import fuzz

def crash(folder): ctypes.string_at(0)
def hang(folder): time.sleep(60)
def huge(folder): bytearray(2 ** 40)
def quote(folder): raise ValueError(str(folder / "pairs.jsonl") + fuzz.MARKER)
def wrong(folder): raise KeyError("x")
fuzz.TIMEOUT = 1
keep = lambda content, draw: content
uses = dict(good=len, crash=crash, hang=hang, huge=huge, quote=quote, wrong=wrong)
uses["good"] = lambda folder: None
fuzz.KINDS[:] = [fuzz.Kind(name, "pairs.jsonl", keep, use) for name, use in uses.items()]
sys.exit(fuzz.main())
"""


def test_spoilt_headers_are_well_formed(base: Path) -> None:
    """The kinds that claim it get past the JSON parser: eight bytes of length, then JSON."""
    content = (base / fuzz.WEIGHTS).read_bytes()
    changes = [kind.change for kind in fuzz.KINDS if kind.file == fuzz.WEIGHTS and kind.parsed]
    for number in range(200):
        spoilt = changes[number % len(changes)](content, random.Random(number))
        (length,) = struct.unpack("<Q", spoilt[:8])
        assert spoilt[8 : 8 + length].strip().startswith(b"{")
        assert spoilt[8 : 8 + length].strip().endswith(b"}")
        assert spoilt != content or number % len(changes)
