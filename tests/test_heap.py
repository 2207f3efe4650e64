"""heap.py: tensors keep their values, freed memory is used again, and what the heap takes is what lives."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from radllama import heap

CODE = """
import json, random, threading
import torch
from radllama import heap

before = torch.full((1 << 20,), 7.0)  # of malloc, freed after the heap has come
assert heap.keep_freed_memory() and heap.keep_freed_memory()
assert before.sum() == 7 << 20
del before
most = heap.library().most
found = {"small": most()}
x = torch.ones(1 << 20)
found["one"], place = most(), x.data_ptr()
del x
found["again"] = [torch.ones(1 << 20).data_ptr() == place for _ in range(3)] + [most() == found["one"]]

# As a step does: some tensors stay, others come and go, of a few sizes; small ones (malloc's) all the time.
draw, live, now, peak = random.Random(0), {}, 0, 0
sizes = [draw.randrange(1 << 15, 1 << 20) for _ in range(12)]
for number in range(6000):
    if live and draw.random() < (0.45 if number < 3000 else 0.55):
        key = draw.choice(list(live))
        tensor = live.pop(key)
        assert tensor[0] == tensor[-1] == tensor[len(tensor) // 2] == key
        now -= tensor.nbytes
        del tensor
    else:
        size = draw.choice(sizes)
        live[number] = torch.full((size,), float(number))
        now += 4 * size
        peak = max(peak, now)
        torch.ones(10)
    assert live.get(number) is None or live[number].data_ptr() % 64 == 0
live.clear()
found["peak"], found["most"] = peak, most()
whole = torch.empty((most() - 64) // 4)  # all holes have become one
found["whole"] = most() == found["most"]
del whole

def work(seed):
    draw = random.Random(seed)
    for number in range(400):
        tensor = torch.full((draw.randrange(1 << 14, 1 << 16),), float(seed))
        assert (tensor == seed).all()

threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
[thread.start() for thread in threads]
[thread.join() for thread in threads]
try:
    torch.empty(1 << 45, dtype=torch.uint8)
except RuntimeError as error:
    found["too much"] = str(error)
print(json.dumps(found))
kept = torch.ones(1 << 20)  # outlives everything else
"""


def test_tensors_live_in_the_heap() -> None:
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["small"] == 0
    assert found["one"] == 4 << 20
    assert all(found["again"])
    assert found["peak"] > 100 << 20
    assert found["peak"] <= found["most"] < 1.1 * found["peak"]
    assert found["whole"]
    assert "not enough memory" in found["too much"]


def test_without_a_compiler_the_c_librarys_heap_keeps_what_is_freed(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    calls = []

    class Libc:
        def mallopt(self, key: int, value: int) -> None:
            calls.append((key, value))

        def malloc_trim(self, pad: int) -> None:
            assert pad == 0

    def refuse() -> None:
        raise OSError("no compiler")

    monkeypatch.setattr(heap, "library", refuse)
    monkeypatch.setattr(heap.ctypes, "CDLL", lambda name: Libc())
    caplog.set_level("INFO", "radllama")
    heap.return_freed_memory()
    assert not heap.keep_freed_memory()
    assert calls == [(-3, 2**20), (-4, 0), (-1, -1)]
    assert "cannot be used here (OSError)" in caplog.text
