"""Runs that are killed, stopped, starved of disk and given broken files: nothing is lost, nobody hangs."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from conftest import random_llama, synthetic_examples, tiny_config

from radllama.checkpoint import save_model
from radllama.tokenizer import Tokenizer

STEPS, SAVE_EVERY = 20, 3


class Job:
    """One run that the server has started."""

    def __init__(self, server: subprocess.Popen[str], arguments: list[str], world: int, log: Path) -> None:
        self.log, self.status_file = log, Path(f"{log}.status")
        self.status_file.unlink(missing_ok=True)
        log.unlink(missing_ok=True)
        assert server.stdin
        assert server.stdout
        server.stdin.write(json.dumps({"arguments": arguments, "world": world, "log": str(log)}) + "\n")
        server.stdin.flush()
        self.pid, self.world = int(server.stdout.readline()), world

    def ranks(self) -> list[int]:
        """Process ids by rank."""
        try:
            return sorted(child.pid for child in psutil.Process(self.pid).children())
        except psutil.NoSuchProcess:
            return []

    def members(self) -> list[int]:
        """The living processes of the run: all in the launcher's session."""
        found = []
        for process in psutil.process_iter():
            try:
                ours = self.pid in (process.pid, os.getsid(process.pid))  # it has no session of its own at first
                if ours and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process.pid)
            except (ProcessLookupError, psutil.Error):
                continue
        return found

    def wait(self, seconds: float = 120) -> float:
        """Until no process of the run is left; how long that took."""
        began = time.monotonic()
        while self.members():
            assert time.monotonic() - began < seconds, self.text()
            time.sleep(0.02)
        return time.monotonic() - began

    def finish(self) -> int:
        self.wait()
        return int(self.status_file.read_text()) if self.status_file.exists() else -signal.SIGKILL

    def text(self) -> str:
        return self.log.read_text(errors="replace") if self.log.exists() else ""


class Runs:
    """A tiny model, its reports and configs, and the server that trains on them."""

    def __init__(self, folder: Path, tokenizer_folder: Path, server: subprocess.Popen[str]) -> None:
        self.folder, self.server, self.count = folder, server, 0
        tokenizer = Tokenizer.from_dir(tokenizer_folder)
        save_model(random_llama(tiny_config(vocab_size=tokenizer.vocab_size)), folder / "base")
        tokenizer.save(folder / "base")
        examples = synthetic_examples(40)
        for name, part in (("train", examples[:32]), ("validation", examples[32:])):
            rows = [{"id": e.id, "findings": e.findings, "impression": e.impression} for e in part]
            (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def config(self, output: str, method: str = "lora", stage: int = 1, **training: Any) -> Path:
        lora = {} if method == "full" else {"lora": {"rank": 4, "alpha": 8, "dropout": training.pop("dropout", 0.1)}}
        raw = lora | {
            "model": {"path": str(self.folder / "base")},
            "method": method,
            "data": {"train": str(self.folder / "train.jsonl"), "validation": str(self.folder / "validation.jsonl")},
            "training": {"output": str(self.folder / output), "steps": STEPS, "save_every": SAVE_EVERY,
                         "validate_every": 7, "learning_rate": 1e-2, "dtype": "float32"} | training,
            "deepspeed": {"zero_optimization": {"stage": stage}},
        }  # fmt: skip
        file = self.folder / f"{output}.json"
        file.write_text(json.dumps(raw))
        return file

    def start(self, config: Path, *arguments: str, world: int = 2) -> Job:
        self.count += 1
        log = self.folder / f"{self.count}.log"
        return Job(self.server, ["--config", str(config), *arguments], world, log)


@pytest.fixture(scope="module")
def server() -> Iterator[subprocess.Popen[str]]:
    environment = os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(Path(__file__).with_name("run_server.py"))]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)
    yield process
    assert process.stdin
    process.stdin.close()
    process.wait(30)


@pytest.fixture
def runs(tmp_path: Path, tokenizer_folder: Path, server: subprocess.Popen[str]) -> Runs:
    return Runs(tmp_path, tokenizer_folder, server)


def steps_done(folder: Path) -> int:
    file = folder / "metrics.jsonl"
    return len([line for line in file.read_text().splitlines() if '"loss"' in line]) if file.exists() else 0


def contents(folder: Path) -> dict[str, bytes]:
    """What a run leaves behind, byte for byte."""
    names = ("last/adapter_model.safetensors", "best/adapter_model.safetensors")
    return {name: (folder / name).read_bytes() for name in names}


def metrics(folder: Path) -> list[tuple[Any, ...]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [tuple(line.get(key) for key in ("step", "loss", "validation_loss", "gradient_norm")) for line in lines]


def until(condition: Any, job: Job, pause: float = 0.002) -> bool:
    """Wait for a condition; False where the run ended before."""
    while not condition():
        if job.status_file.exists():
            return False
        time.sleep(pause)
    return True


def kill(job: Job, victim: str) -> None:
    if victim == "everything":
        os.killpg(job.pid, signal.SIGKILL)
    elif victim == "launcher":
        os.kill(job.pid, signal.SIGKILL)
    else:
        os.kill(job.ranks()[int(victim[-1])], signal.SIGKILL)


def kill_and_resume(
    runs: Runs, name: str, victim: str, step: int | None, rng: random.Random
) -> tuple[str, float] | None:
    """Kill a run after `step` steps, or inside a save; resume at once. Where it was killed; how long it lived on."""
    config = runs.config(name)
    folder = runs.folder / name
    job = runs.start(config)
    if step is None:
        first = rng.randrange(STEPS // SAVE_EVERY) * SAVE_EVERY  # in one of the saves after this step
        there = until(lambda: steps_done(folder) >= first, job) and until(
            lambda: list(folder.glob("checkpoints/*.partial")), job, pause=0.0005
        )
    else:
        there = until(lambda: steps_done(folder) >= step, job)
        time.sleep(rng.random() * 0.05)
    if not there or len(job.ranks()) < 2:
        job.wait()
        return None
    kill(job, victim)
    inside = bool(list(folder.glob("checkpoints/*.partial")))
    done = steps_done(folder)
    resumed = runs.start(config, "--resume")  # the lock keeps it waiting until the other's ranks are gone
    lived = job.wait()
    assert resumed.finish() == 0, resumed.text()
    return ("in a save" if inside else f"step {done:2d}"), lived


def survive(runs: Runs, kills: int, in_saves: int, seed: int) -> Counter[str]:
    """Kill so many runs, one after the other; each must end as the one that was left alone."""
    rng = random.Random(seed)
    alone = runs.start(runs.config("alone"))
    assert alone.finish() == 0, alone.text()
    expected = contents(runs.folder / "alone"), metrics(runs.folder / "alone")
    places: Counter[str] = Counter()
    victims, longest = Counter[str](), 0.0
    while places.total() < kills or places["in a save"] < in_saves:
        number = places.total()
        assert number < 3 * kills
        victim = ("rank 0", "rank 1", "launcher", "everything")[number % 4]
        step = rng.randrange(STEPS) if number % 2 else None
        name = f"killed-{runs.count}"
        outcome = kill_and_resume(runs, name, victim, step, rng)
        if outcome is None:
            continue  # it was over before
        assert (contents(runs.folder / name), metrics(runs.folder / name)) == expected, (name, victim, outcome)
        assert not list((runs.folder / name).rglob("*.partial"))
        places[outcome[0]] += 1
        victims[victim] += 1
        longest = max(longest, outcome[1])
    print(f"\n{kills} kills: {dict(sorted(victims.items()))}; the last rank lived on for at most {longest:.1f} s")
    for place, count in sorted(places.items()):
        print(f"  {place:10} {'#' * count} {count}")
    return places


@pytest.mark.system  # for its minute, not for a package
def test_three_kills_change_nothing(runs: Runs) -> None:
    survive(runs, kills=3, in_saves=1, seed=1)


@pytest.mark.slow
def test_thirty_kills_change_nothing(runs: Runs) -> None:
    survive(runs, kills=30, in_saves=10, seed=0)


def good(tmp: Runs, name: str) -> bool:
    return contents(tmp.folder / name) == contents(tmp.folder / "alone")


def alone(runs: Runs) -> None:
    job = runs.start(runs.config("alone"))
    assert job.finish() == 0, job.text()


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_to_one_rank_saves_on_all_and_ends_well(runs: Runs, number: signal.Signals) -> None:
    alone(runs)
    config = runs.config("stopped")
    job = runs.start(config)
    assert until(lambda: steps_done(runs.folder / "stopped") >= 4, job)
    os.kill(job.ranks()[1], number)
    assert job.finish() == 0, job.text()
    assert "continue with --resume" in job.text()
    done = steps_done(runs.folder / "stopped")
    assert (runs.folder / "stopped/checkpoints/latest").read_text() == f"step_{done:08d}"
    assert done < STEPS
    assert runs.start(config, "--resume").finish() == 0
    assert good(runs, "stopped")


@pytest.mark.slow
def test_a_second_run_is_kept_out_until_the_last_rank_is_gone(runs: Runs) -> None:
    config = runs.config("held")
    job = runs.start(config)
    assert until(lambda: steps_done(runs.folder / "held") >= 4, job)
    rank = job.ranks()[1]
    os.kill(rank, signal.SIGSTOP)  # it cannot notice anything
    os.kill(job.pid, signal.SIGKILL)
    second = runs.start(config, "--resume")
    assert second.finish() == 2
    assert "is in use by process" in second.text()
    os.kill(rank, signal.SIGCONT)
    job.wait(20)
    assert runs.start(config, "--resume").finish() == 0


@pytest.mark.slow
def test_at_four_ranks_a_failing_one_ends_all_and_its_error_is_shown_first(runs: Runs) -> None:
    config = runs.config("failing", steps=5000, save_every=5000, validate_every=5000)
    job = runs.start(config, world=4)
    assert until(lambda: steps_done(runs.folder / "failing") >= 2, job)
    os.kill(job.ranks()[2], signal.SIGKILL)
    assert job.wait(60) < 30
    assert "stopped, because rank 2 is gone" in job.text()
    assert job.finish() != 0


@pytest.mark.slow
def test_damaged_checkpoints_are_passed_over(runs: Runs) -> None:
    alone(runs)
    for name, damage in (("flipped", flip), ("short", truncate)):
        config = runs.config(name)
        job = runs.start(config)
        folder = runs.folder / name / "checkpoints"
        latest = folder / "latest"
        assert until(lambda file=latest: file.exists() and int(file.read_text()[5:]) > SAVE_EVERY, job)
        kill(job, "everything")
        job.wait()
        latest = folder / (folder / "latest").read_text()
        damage(max(latest.glob("*optim_states.pt"), key=lambda file: file.name))
        resumed = runs.start(config, "--resume")
        assert resumed.finish() == 0, resumed.text()
        assert f"{latest.name} is damaged and passed over" in resumed.text()
        assert good(runs, name)


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-100])


@pytest.mark.slow
def test_changed_data_and_another_number_of_ranks_are_refused(runs: Runs) -> None:
    config = runs.config("run")
    job = runs.start(config)
    assert until(lambda: (runs.folder / "run/checkpoints/latest").exists(), job)
    kill(job, "everything")
    job.wait()
    before = sorted(
        (path, path.read_bytes()) for path in (runs.folder / "run/checkpoints").rglob("*") if path.is_file()
    )
    other = runs.start(config, "--resume", world=1)
    assert other.finish() == 2
    assert "was written by 2 ranks" in other.text()
    after = sorted((path, path.read_bytes()) for path in (runs.folder / "run/checkpoints").rglob("*") if path.is_file())
    assert before == after
    data = runs.folder / "train.jsonl"
    lines = data.read_text().splitlines()
    data.write_text("\n".join([lines[1], lines[0], *lines[2:]]) + "\n")
    changed = runs.start(config, "--resume")
    assert changed.finish() == 2
    assert "data.train" in changed.text()
    assert "has changed since this run began" in changed.text()
