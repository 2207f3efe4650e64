"""watch.py: whose death a rank notices, which compile locks are freed, and that no wall clock is asked."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
from conftest import ROOT

from radllama import watch
from radllama.run import TrainingError


def test_a_zombie_is_not_alive() -> None:
    child = subprocess.Popen(["sleep", "60"])
    process = psutil.Process(child.pid)
    assert watch.alive(process)
    child.kill()
    while process.status() != psutil.STATUS_ZOMBIE:  # nobody has waited for it
        time.sleep(0.01)
    assert not watch.alive(process)
    child.wait()
    assert not watch.alive(process)


def test_a_rank_knows_its_launcher_and_that_it_has_none_any_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CROSS_RANK", raising=False)
    monkeypatch.setattr(watch, "LAUNCHED", True)
    parent = psutil.Process()
    monkeypatch.setattr(psutil.Process, "parent", lambda self: parent if self == parent else None)
    assert watch.launchers() == [parent]
    monkeypatch.setenv("CROSS_RANK", "0")  # DeepSpeed's launcher was there, and this process is not it
    with pytest.raises(TrainingError, match="launcher that started this rank is gone"):
        watch.launchers()
    monkeypatch.setattr(psutil.Process, "cmdline", lambda self: ["python", "-m", "deepspeed.launcher.launch"])
    assert watch.launchers() == [parent, parent]
    monkeypatch.setattr(psutil.Process, "name", lambda self: "bash")
    assert watch.launchers() == []
    monkeypatch.setattr(watch, "LAUNCHED", False)
    assert watch.launchers() == []


def test_only_compile_locks_that_nobody_holds_are_freed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    stale, held, other = (tmp_path / f"py_cpu/{name}/lock" for name in ("stale", "held", "stale/source"))
    for lock in (stale, held, other):
        lock.parent.mkdir(parents=True, exist_ok=True)
        lock.touch()
    with held.open():  # as the process does that compiles
        with monkeypatch.context() as patch:
            patch.setattr(watch, "LOCAL", set())  # a network file system: its owner may be elsewhere
            assert watch.free_compile_locks() == []
        assert f"no process of this machine holds {stale}; remove it" in caplog.text
        assert watch.free_compile_locks() == [stale]
        stale.touch()
        with monkeypatch.context() as patch:  # processes that end while they are looked into

            def ending(find: Callable[[Any], Any]) -> Callable[[Any], Any]:
                def look(path: Any) -> Any:
                    if re.fullmatch(r"/proc/\d+/fd", str(path)) and str(os.getpid()) not in str(path):
                        raise FileNotFoundError(2, "No such file or directory", str(path))
                    return find(path)

                return look

            for name in ("scandir", "listdir"):
                patch.setattr(os, name, ending(getattr(os, name)))
            assert watch.free_compile_locks() == [stale]
        assert not stale.exists()
        assert held.exists()
        assert other.exists()
    assert watch.free_compile_locks() == [held]
    assert watch.free_compile_locks() == []


def test_nothing_that_runs_asks_the_wall_clock() -> None:
    """It may leap: what waits, waits by time.monotonic."""
    for name in ("guard", "reshard", "resume", "run", "train", "watch"):
        tree = ast.parse((ROOT / f"radllama/{name}.py").read_text())
        asked = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
        assert not asked & {"time_ns", "now", "utcnow", "st_mtime", "st_ctime", "create_time"}, name
        clocks = [ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Call)]
        assert not [call for call in clocks if call.startswith("time.time(")], name
