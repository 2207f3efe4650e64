"""Training runs of several ranks in a fraction of a second: a process that has imported everything, and forks.

Each line of standard input is a job: {"arguments": [...], "world": 2, "log": FILE}. The answer is the process id of its
launcher, which starts the ranks, ends the others when one fails, and leaves its exit status in FILE.status.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import traceback
from pathlib import Path

from radllama import train, watch


def rank(number: int, job: dict[str, object], port: str) -> int:
    place = {"RANK": str(number), "LOCAL_RANK": str(number), "WORLD_SIZE": str(job["world"])}
    os.environ |= place | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    watch.LAUNCHED = True
    try:
        train.main(job["arguments"])  # type: ignore[arg-type]
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr, flush=True)
            return 1
        return int(end.code or 0)
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def launcher(job: dict[str, object]) -> int:
    os.setsid()
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    log = os.open(str(job["log"]), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    port, running, status = str(train.free_port()), set(), 0
    for number in range(int(str(job["world"]))):
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
