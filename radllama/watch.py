"""Ranks that end together: each notices within seconds that its launcher or another rank is gone, and what failed.

A rank that waits in a collective for one that was killed waits for ever, and launchers do not help: DeepSpeed's ends
the siblings of a failed rank one by one, up to 30 s each, and where it is killed itself they live on. So every rank
keeps a connection to rank 0, which the kernel closes when a process dies (keep-alive probes find a lost machine), and a
thread that ends the process, whatever its main thread waits for. A rank that fails by an exception says so first.
"""

from __future__ import annotations

import json
import logging
import math
import os
import secrets
import selectors
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import deepspeed.comm as dist
import psutil
import torch

from radllama.run import TrainingError

logger = logging.getLogger("radllama")

LAUNCHED = "RANK" in os.environ  # by a launcher; a process alone may outlive the shell that started it
SHELLS = {"bash", "dash", "fish", "sh", "zsh"}
POLL = 0.5  # seconds between looks at the launcher
GRACE = 2.0  # seconds in which a rank may show an error of its own after another's
LOCAL = {"btrfs", "ext2", "ext3", "ext4", "overlay", "tmpfs", "xfs", "zfs"}
SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class Watch:
    """The connections and the thread of one rank. Every rank makes one at the same time; `close` ends it well."""

    def __init__(self, rank: int, world: int, device: torch.device) -> None:
        self.rank, self.world = rank, world
        self.signal: str | None = None  # the name of one that came while `listening`
        self._heard: dict[int, str | None] = {}  # bad news: the error of a rank; None where it is just gone
        self._reason, self._deadline = "", math.inf  # of this process's end
        self._peers: dict[socket.socket, int] = {}
        self._partial: dict[socket.socket, bytes] = {}
        self._done: set[int] = set()
        self._closing, self._news = threading.Event(), threading.Event()
        self._selector = selectors.DefaultSelector()
        self._launchers = launchers()
        if world > 1:
            self._connect(device)
        self._thread = threading.Thread(target=self._run, daemon=True, name="watch")
        self._thread.start()

    def _connect(self, device: torch.device) -> None:
        """A star around rank 0. The port and a secret, which keeps strangers out, travel through the process group."""
        family = socket.AF_INET6 if socket.has_dualstack_ipv6() else socket.AF_INET
        message = torch.zeros(2, dtype=torch.int64, device=device)
        if self.rank == 0:
            listener = socket.create_server(
                ("", 0), family=family, dualstack_ipv6=family == socket.AF_INET6, backlog=self.world
            )
            listener.settimeout(60)
            message += torch.tensor([listener.getsockname()[1], secrets.randbits(62)], device=device)
        dist.broadcast(message, 0)
        port, secret = message.tolist()
        if self.rank == 0:
            while len(self._peers) < self.world - 1:
                try:
                    peer = listener.accept()[0]
                    peer.settimeout(10)
                    hello = int.from_bytes(peer.recv(16, socket.MSG_WAITALL), "big")
                except TimeoutError:
                    missing = sorted(set(range(1, self.world)) - set(self._peers.values()))
                    raise TrainingError(
                        f"ranks {missing} cannot reach rank 0 on port {port}; see to the firewall"
                    ) from None
                if hello >> 64 == secret:
                    self._add(peer, hello % 2**64)
            listener.close()
        else:
            peer = socket.create_connection((os.environ["MASTER_ADDR"], port), timeout=60)
            peer.sendall((secret << 64 | self.rank).to_bytes(16, "big"))
            self._add(peer, 0)

    def _add(self, peer: socket.socket, rank: int) -> None:
        peer.settimeout(5)
        peer.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for option, seconds in (("TCP_KEEPIDLE", 2), ("TCP_KEEPINTVL", 1), ("TCP_KEEPCNT", 3)):
            if hasattr(socket, option):
                peer.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), seconds)
        self._peers[peer], self._partial[peer] = rank, b""
        self._selector.register(peer, selectors.EVENT_READ)

    def _run(self) -> None:
        while not self._closing.is_set():
            if self._peers:
                for key, _ in self._selector.select(POLL):
                    self._receive(key.fileobj)  # type: ignore[arg-type]
            else:
                self._closing.wait(POLL)
            for launcher in self._launchers:
                if not alive(launcher):
                    self._reason, self._deadline = f"its launcher (process {launcher.pid}) is gone", 0.0
            if time.monotonic() > self._deadline and not self._closing.is_set():
                self._end()

    def _receive(self, peer: socket.socket) -> None:
        try:
            data = peer.recv(65536)
        except OSError:
            data = b""
        *lines, self._partial[peer] = (self._partial[peer] + data).split(b"\n")
        for line in lines:
            message = json.loads(line)
            if message.get("done"):
                self._done.add(message["rank"])
            else:
                self._hear(message["rank"], message["error"])
        if not data:
            rank = self._peers.pop(peer)
            self._selector.unregister(peer)
            peer.close()
            if rank not in self._done and not self._closing.is_set():
                self._hear(rank, None)

    def _hear(self, rank: int, error: str | None) -> None:
        """Bad news of a rank, which rank 0 passes on. An error leaves this one time to show one of its own."""
        if rank == self.rank or rank in self._heard:
            return
        self._heard[rank] = error
        if self.rank == 0:
            self._send({"rank": rank, "error": error})
        if not self._reason:
            gone = "is gone (killed, or its machine is lost)"
            self._reason = f"rank {rank} {gone if error is None else f'failed: {error}'}"
            self._deadline = time.monotonic() + (0 if error is None else GRACE)
        self._news.set()

    def _send(self, message: dict[str, Any]) -> None:
        for peer in list(self._peers):
            with suppress(OSError):
                peer.sendall(json.dumps(message).encode() + b"\n")

    def _end(self) -> None:
        """End this process now: its main thread may be waiting in a collective for ever."""
        with suppress(OSError, ValueError):
            after = "--resume continues from the last checkpoint"
            sys.stderr.write(f"error (rank {self.rank}): stopped, because {self._reason}; {after}\n")
            sys.stderr.flush()
        os._exit(1)

    def fail(self, error: BaseException) -> None:
        """Tell the other ranks of an exception in this one, unless one of theirs is behind it: then end as they do.

        On another rank than 0, raises in its place SystemExit where rank 0 fails for the same reason and shows it,
        and a TrainingError, which every rank shows, where the input was bad on this rank alone.
        """
        if self.world == 1:
            return
        bad_input = isinstance(error, ValueError)
        if not bad_input and self._news.wait(GRACE):  # a lost connection, likely: the thread knows more
            time.sleep(2 * GRACE)
        text = str(error) if isinstance(error, ValueError | OSError | TrainingError) else type(error).__name__
        self._send({"rank": self.rank, "error": text[:1000]})
        if bad_input and self.rank != 0:
            give_up = time.monotonic() + GRACE / 2
            while 0 not in self._heard and time.monotonic() < give_up:
                time.sleep(0.05)
            if self._heard.get(0) == text[:1000]:
                raise SystemExit(2) from error
            raise TrainingError(text) from error

    def close(self) -> None:
        """Say good-bye: this rank ends because its work is done (or, after `fail`, has nothing more to say)."""
        self._closing.set()
        self._send({"rank": self.rank, "done": True})
        if self._thread is not threading.current_thread():
            self._thread.join()
        for peer in self._peers:
            peer.close()
        self._peers.clear()
        self._selector.close()

    @contextmanager
    def listening(self) -> Iterator[None]:
        """SIGTERM and SIGUSR1 only set `signal` in here: the loop asks for it at the end of a step."""

        def note(number: int, _: object) -> None:
            self.signal = signal.Signals(number).name

        if threading.current_thread() is not threading.main_thread():
            yield  # Python delivers no signals here
            return
        before = {number: signal.signal(number, note) for number in SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def launchers() -> list[psutil.Process]:
    """The processes without which this rank must not go on: the one that started it, and DeepSpeed's front end.

    Raises TrainingError where DeepSpeed's launcher was gone before this rank had imported what it needs.
    """
    parent = psutil.Process().parent()
    if not LAUNCHED or (parent is not None and parent.name() in SHELLS):
        return []
    with suppress(psutil.Error):
        if parent is not None and "deepspeed.launcher.launch" in parent.cmdline():
            front = parent.parent()
            return [parent] + [front] * any("deepspeed" in part for part in (front.cmdline() if front else []))
    if "CROSS_RANK" in os.environ:  # DeepSpeed's launcher alone sets it
        raise TrainingError("the launcher that started this rank is gone; start again")
    return [parent] if parent is not None else []


def alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


def free_compile_locks() -> list[Path]:
    """Remove locks that a killed first start has left on DeepSpeed's compiled extensions; returns those.

    torch.utils.file_baton makes the file, keeps it open, removes it at the end; who finds one waits for ever. One that
    no process of this machine has open has no owner, unless that runs on another machine with the same home: a lock on
    a network file system is only named.
    """
    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR", Path.home() / ".cache/torch_extensions"))
    locks = {lock for pattern in ("*/lock", "*/*/lock") for lock in root.glob(pattern)} - open_files(root)
    time.sleep(0.5 * bool(locks))  # one that was just being given back is gone by then
    freed = []
    for lock in sorted(lock for lock in locks - open_files(root) if lock.exists()):
        mounts = [part for part in psutil.disk_partitions(all=True) if lock.resolve().is_relative_to(part.mountpoint)]
        kind = max(mounts, key=lambda part: len(part.mountpoint)).fstype if mounts else ""
        if kind in LOCAL:
            lock.unlink(missing_ok=True)
            freed.append(lock)
            logger.warning("removed %s, left by a compilation that was killed", lock)
        else:
            logger.warning("if nothing happens from here on: no process of this machine holds %s; remove it", lock)
    return freed


def open_files(folder: Path) -> set[Path]:
    """Files below a folder that some process, among those one may look into, has open."""
    found = set()
    for process in Path("/proc").glob("[0-9]*"):
        links: list[Path] = []
        with suppress(OSError):  # it may end at any moment
            links = list((process / "fd").iterdir())
        for link in links:
            with suppress(OSError):
                path = link.readlink()
                found |= {path} if path.is_relative_to(folder.resolve()) else set()
    return {folder / path.relative_to(folder.resolve()) for path in found}
