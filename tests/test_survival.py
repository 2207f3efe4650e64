"""Runs that are killed, stopped, starved of disk and given broken files: nothing is lost, nobody hangs."""

from __future__ import annotations

import os
import random
import signal
import time
from contextlib import suppress
from pathlib import Path

import pytest
from jobs import SAVE_EVERY, STEPS, Job, Runs, contents, metrics, steps_done, until

ENDLESS = {"steps": 100_000, "save_every": 50_000, "validate_every": 50_000}
VICTIMS = ("rank 0", "rank 1", "launcher", "everything")
VICTIMS_OF_DEEPSPEED = (*VICTIMS, "front end")


def aim(job: Job, victim: str) -> int:
    """Whom to kill: a process, or minus a group of them."""
    if victim == "everything":
        return -job.pid
    if victim == "front end":  # the `deepspeed` that was typed in
        return job.pid
    return job.launcher() if victim == "launcher" else job.ranks()[int(victim[-1])]


def kill_and_resume(
    runs: Runs, name: str, victim: str, step: int | None, rng: random.Random, *, real: bool
) -> tuple[int, bool, float] | None:
    """Kill a run after `step` steps, or inside a save; resume at once.

    Returns the step after which it was killed, whether inside a save, and the seconds it lived on; None where it was
    over before.
    """
    config = runs.config(name)
    folder = runs.folder / name
    job = runs.launch(config) if real else runs.start(config)
    if not until(lambda: len(job.ranks()) == 2, job, pause=0.02):
        raise AssertionError(job.text())
    target = aim(job, victim)
    if step is None:
        first = rng.randrange(STEPS // SAVE_EVERY) * SAVE_EVERY  # in one of the saves after this step
        there = until(lambda: steps_done(folder) >= first, job) and until(
            lambda: list(folder.glob("checkpoints/*.partial")), job, pause=0.0005
        )
    else:
        there = until(lambda: steps_done(folder) >= step, job)
        time.sleep(rng.random() * 0.05)
    if not there:
        job.wait()
        return None
    os.kill(target, signal.SIGKILL)
    inside = bool(list(folder.glob("checkpoints/*.partial")))
    done = steps_done(folder)
    resumed = runs.start(config, "--resume")  # the lock keeps it waiting until the other's ranks are gone
    lived = job.wait()
    if resumed.finish() == 2 and "holds no run; start without --resume" in resumed.text():
        assert done == 0  # killed before anything was written
        resumed = runs.start(config)
    assert resumed.finish() == 0, resumed.text()
    return done, inside, lived


def survive(runs: Runs, kills: int, seed: int, *, real: bool = False) -> None:
    """Kill so many runs, every other one at a step that is drawn and the rest inside a save; each must end as the one
    that was left alone. `real`: started by DeepSpeed's launcher; the resumed ones are not, to save time."""
    rng = random.Random(seed)
    alone(runs)
    expected = contents(runs.folder / "alone"), metrics(runs.folder / "alone")
    victims = VICTIMS_OF_DEEPSPEED if real else VICTIMS
    outcomes: list[tuple[int, bool, float]] = []
    for _ in range(2 * kills):
        number = len(outcomes)
        victim = victims[number // 2 % len(victims)]
        step = rng.randrange(victim == "front end", STEPS) if number % 2 else None  # until a rank looks, it lacks none
        name = f"killed-{runs.count}"
        outcome = kill_and_resume(runs, name, victim, step, rng, real=real)
        if outcome is not None:
            assert (contents(runs.folder / name), metrics(runs.folder / name)) == expected, (name, victim, outcome)
            assert not list((runs.folder / name).rglob("*.partial"))
            outcomes.append(outcome)
        if len(outcomes) == kills:
            break
    saves = sum(inside for _, inside, _ in outcomes)
    longest = max(lived for _, _, lived in outcomes)
    print(
        f"\n{len(outcomes)} runs killed ({', '.join(victims)}), {kills // 2} at drawn steps, {saves} inside a save (s):"
    )
    for done in range(STEPS + 1):
        print(f"  after step {done:2} {''.join('#s'[inside] for step, inside, _ in sorted(outcomes) if step == done)}")
    print(f"the last rank lived on for at most {longest:.1f} s")
    assert len(outcomes) == kills
    assert saves >= kills // 3


@pytest.mark.system  # for its minute, not for a package
def test_three_kills_change_nothing(runs: Runs) -> None:
    survive(runs, kills=3, seed=1)


@pytest.mark.slow
@pytest.mark.parametrize(("kills", "real"), [(20, False), (10, True)])
def test_thirty_kills_change_nothing(runs: Runs, kills: int, real: bool) -> None:
    survive(runs, kills, seed=2 * real, real=real)


def good(tmp: Runs, name: str) -> bool:
    return contents(tmp.folder / name) == contents(tmp.folder / "alone")


def alone(runs: Runs, **training: int) -> None:
    job = runs.start(runs.config("alone", **training))
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
def test_a_signal_once_a_rank_is_gone_saves_nothing_and_ends_at_once(runs: Runs) -> None:
    job = runs.start(runs.config("gone", **ENDLESS))
    assert until(lambda: steps_done(runs.folder / "gone") >= 2, job)
    first, second = job.ranks()
    os.kill(second, signal.SIGKILL)
    with suppress(ProcessLookupError):
        os.kill(first, signal.SIGUSR1)
    assert job.wait(30) < 5
    assert "stopped, because rank 1 is gone" in job.text()
    assert not list((runs.folder / "gone").glob("checkpoints/*"))


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
    config = runs.config("failing", **ENDLESS)
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
        os.killpg(job.pid, signal.SIGKILL)
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
def test_changed_data_is_refused(runs: Runs) -> None:
    config = runs.config("run")
    job = runs.start(config)
    assert until(lambda: (runs.folder / "run/checkpoints/latest").exists(), job)
    os.killpg(job.pid, signal.SIGKILL)
    job.wait()
    data = runs.folder / "train.jsonl"
    lines = data.read_text().splitlines()
    data.write_text("\n".join([lines[1], lines[0], *lines[2:]]) + "\n")
    changed = runs.start(config, "--resume")
    assert changed.finish() == 2
    assert "data.train" in changed.text()
    assert "has changed since this run began" in changed.text()


def test_a_clock_that_leaps_changes_nothing(runs: Runs) -> None:
    """Hours to and fro at every look at it: nobody is thought dead, no lock is lost, no step repeated."""
    alone(runs, steps=8)
    config = runs.config("leaping", steps=8)
    job = runs.start(config, clock=True)
    assert until(lambda: steps_done(runs.folder / "leaping") >= 4, job), job.text()
    os.killpg(job.pid, signal.SIGKILL)
    job.wait()
    resumed = runs.start(config, "--resume", clock=True)
    assert resumed.finish() == 0, resumed.text()
    assert "resumed from step 3 of 8" in resumed.text()
    assert good(runs, "leaping")


@pytest.mark.parametrize("ranks", [[0, 1], pytest.param([1], marks=pytest.mark.slow)])
def test_a_full_disk_at_several_ranks_ends_all_and_keeps_the_last_checkpoint(runs: Runs, ranks: list[int]) -> None:
    alone(runs, steps=8)
    config = runs.config("full", steps=8)
    job = runs.start(config, full=[ranks, 6])
    assert job.wait(30) < 30
    assert job.finish() == 1, job.text()
    assert "checkpoints/step_00000006 cannot be written" in job.text()
    assert "Traceback" not in job.text()
    assert (runs.folder / "full/checkpoints/latest").read_text() == "step_00000003"
    resumed = runs.start(config, "--resume")
    assert resumed.finish() == 0, resumed.text()
    assert good(runs, "full")
    assert not list((runs.folder / "full").rglob("*.partial"))


@pytest.mark.system  # for its time, not for a package
@pytest.mark.parametrize("victim", ["launcher", "front end"])
def test_ranks_end_when_deepspeeds_launcher_is_killed(runs: Runs, victim: str) -> None:
    job = runs.launch(runs.config("job", **ENDLESS))
    assert until(lambda: steps_done(runs.folder / "job") >= 2, job, pause=0.1), job.text()
    target = aim(job, victim)
    os.kill(target, signal.SIGKILL)
    lived = job.wait(60)
    print(f"\nDeepSpeed's {victim} killed: the last rank lived on for {lived:.1f} s")
    assert f"stopped, because its launcher (process {target}) is gone" in job.text()


FAILING = """
import time
from pathlib import Path
from radllama import train
forward, calls = train.Run.forward, iter(range(1000))
def broken(run, batch):
    if run.place.rank == 2 and next(calls) == 3:
        (run.folder / "failing").touch()
        raise RuntimeError("this rank is broken")
    return forward(run, batch)
train.Run.forward = broken
train.main()
"""


@pytest.mark.system  # for its time, not for a package
def test_at_four_ranks_an_error_ends_deepspeeds_job_and_is_shown_first(runs: Runs) -> None:
    """DeepSpeed's launcher alone would take 30 s for each of the others, and their errors would bury this one."""
    (runs.folder / "failing.py").write_text(FAILING)
    job = runs.launch(runs.config("job", **ENDLESS), world=4, script=runs.folder / "failing.py")
    assert until((runs.folder / "job/failing").exists, job, pause=0.1), job.text()
    lived = job.wait(60)
    print(f"\nrank 2 failed: the last of four ranks lived on for {lived:.1f} s")
    assert job.finish() != 0
    text = job.text()
    first = text.index("RuntimeError: this rank is broken")
    assert text.count("Traceback") == 1, text
    for rank in (0, 1, 3):
        told = f"error (rank {rank}): stopped, because rank 2 failed: RuntimeError"
        assert told not in text or text.index(told) > first, text
