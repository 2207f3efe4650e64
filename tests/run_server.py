"""Training runs of several ranks in a fraction of a second: a process that has imported everything, and forks.

Each line of standard input is a job: {"arguments": [...], "world": 2, "log": FILE}, and what else `prepare` knows. The
answer is the process id of its launcher, which starts the ranks, ends the others when one fails, and leaves its exit
status in FILE.status.
"""

from __future__ import annotations

import itertools
import json
import os
import resource
import signal
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import torch
from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

from radllama import train, watch
from radllama.resume import Checkpoints


def prepare(job: dict[str, Any]) -> None:
    """What a job may ask for besides.

    "dump": FOLDER, where rank 0 writes what it loads from a checkpoint and saves, whole, as DeepSpeed gathers it.
    "clock": time.time() leaps by hours, to and fro. "full": [RANKS, STEP]: their disk is full when they save after it.
    """
    if job.get("dump"):
        load, save = Checkpoints.load, Checkpoints.save

        def loaded(self: Checkpoints, engine: Any) -> Any:
            manifest = load(self, engine)
            dump(engine, Path(job["dump"]) / "loaded.pt")
            return manifest

        def saved(self: Checkpoints, engine: Any, step: int, state: dict[str, Any]) -> None:
            dump(engine, Path(job["dump"]) / f"saved-{step}.pt")
            save(self, engine, step, state)

        Checkpoints.load, Checkpoints.save = loaded, saved  # type: ignore[method-assign]
    if job.get("clock"):
        now, leaps = time.time, itertools.cycle([0, 7200, -86400, 5, -3600])
        time.time = lambda: now() + next(leaps)  # type: ignore[assignment]
    if job.get("full"):
        save_all, (ranks, full) = Checkpoints.save, job["full"]

        def limited(self: Checkpoints, engine: Any, step: int, state: dict[str, Any]) -> None:
            if self.rank in ranks and step == full:
                resource.setrlimit(resource.RLIMIT_FSIZE, (15_000, -1))  # no file may grow beyond this
            save_all(self, engine, step, state)

        Checkpoints.save = limited  # type: ignore[method-assign]


def dump(engine: Any, file: Path) -> None:
    moments = next(iter(engine.optimizer.optimizer.state.values()))
    keys = [key for key, value in moments.items() if torch.is_tensor(value) and value.dim()]
    assert len(keys) == 2
    whole = {}
    if engine.zero_optimization_stage() < 3:
        # Only the first step links the moments, once the first of the parameter groups has some.
        engine.optimizer._hp_optimizer_states_linked = False
        engine.optimizer._lazy_init_hp_params_optimizer_state()
    for name, parameter in engine.module.named_parameters():
        if parameter.requires_grad:
            states = [safe_get_full_optimizer_state(parameter, key) for key in keys]
            whole[name] = [safe_get_full_fp32_param(parameter), *states]
    if torch.distributed.get_rank() == 0:
        file.parent.mkdir(exist_ok=True)
        torch.save(whole, file)


def rank(number: int, job: dict[str, Any], port: str) -> int:
    place = {"RANK": str(number), "LOCAL_RANK": str(number), "WORLD_SIZE": str(job["world"])}
    os.environ |= place | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    watch.LAUNCHED = True
    prepare(job)
    try:
        train.main(job["arguments"])
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr, flush=True)
            return 1
        return int(end.code or 0)
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def launcher(job: dict[str, Any]) -> int:
    os.setsid()
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    log = os.open(job["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    port, running, status = str(train.free_port()), set(), 0
    for number in range(job["world"]):
        child = os.fork()
        if child == 0:
            os._exit(rank(number, job, port))
        running.add(child)
    while running:
        child, code = os.wait()
        running.discard(child)
        if code and not status:
            status = os.waitstatus_to_exitcode(code)
            for other in running:
                os.kill(other, signal.SIGTERM)
    return status


if __name__ == "__main__":
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # a killed launcher leaves nothing behind
    for line in sys.stdin:
        job = json.loads(line)
        child = os.fork()
        if child == 0:
            status = launcher(job)
            Path(f"{job['log']}.status").write_text(str(status))
            os._exit(0)
        print(child, flush=True)
