"""meta.py: Meta's checkpoints give the logits of the model they were made from; pickles that do more are refused."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import random_llama, tiny_config
from torch import Tensor

from radllama.checkpoint import load_model
from radllama.meta import import_meta, main, meta_name, split_halves
from radllama.model import Llama, RopeScaling

CONFIG = tiny_config(vocab_size=96, max_position_embeddings=131_072, rope_scaling=RopeScaling(8.0, 1.0, 4.0, 8192))
BY_COLUMNS = ("wo", "w2")


def interleaved(weight: Tensor, heads: int) -> Tensor:
    """Meta's order of the rows: the inverse of `split_halves`."""
    rows, columns = weight.shape
    return weight.view(heads, 2, rows // heads // 2, columns).transpose(1, 2).reshape(rows, columns)


def write_meta(model: Llama, folder: Path, shards: int, *, embedding: int = 0) -> None:
    """The model as Meta would give it; `embedding`: the dimension its embedding is cut along."""
    config = model.config
    parts: list[dict[str, Tensor]] = [{"rope.freqs": torch.ones(4)} for _ in range(shards)]
    for name, parameter in model.named_parameters():
        theirs, weight = meta_name(name), parameter.detach()
        if "q_proj" in name or "k_proj" in name:
            weight = interleaved(weight, weight.shape[0] // config.head_dim)
        dimension = 1 if any(f".{key}." in theirs for key in BY_COLUMNS) else embedding if "tok" in theirs else 0
        pieces = [weight] * shards if weight.dim() == 1 else weight.chunk(shards, dim=dimension)
        for part, piece in zip(parts, pieces, strict=True):
            part[theirs] = piece.clone()
    folder.mkdir()
    for number, part in enumerate(parts):
        torch.save(part, folder / f"consolidated.{number:02d}.pth")
    params = {
        "dim": 32,
        "n_layers": 2,
        "n_heads": 4,
        "n_kv_heads": 2,
        "vocab_size": -1,
        "norm_eps": config.rms_norm_eps,
    }
    params |= {"rope_theta": config.rope_theta, "use_scaled_rope": config.rope_scaling is not None, "multiple_of": 8}
    (folder / "params.json").write_text(json.dumps(params))
    (folder / "tokenizer.model").write_bytes(b"the tokenizer")


@pytest.mark.parametrize(("shards", "embedding"), [(1, 0), (2, 0), (2, 1)])
def test_an_import_gives_the_same_logits(tmp_path: Path, shards: int, embedding: int) -> None:
    model = random_llama(CONFIG)
    write_meta(model, tmp_path / "meta", shards, embedding=embedding)
    main(["--input", str(tmp_path / "meta"), "--output", str(tmp_path / "out")])
    found = load_model(tmp_path / "out", dtype=torch.float32)
    assert found.config == CONFIG
    tokens = torch.randint(0, 96, (2, 40), generator=torch.Generator().manual_seed(1))
    assert torch.equal(found(tokens), model(tokens))
    assert (tmp_path / "out/tokenizer.model").read_bytes() == b"the tokenizer"
    assert not list((tmp_path / "out").glob("*.pth"))


def meta_attention_scores(wq: Tensor, wk: Tensor, x: Tensor, positions: Tensor) -> Tensor:
    """One head's scores as Meta's code computes them: neighbouring dimensions are complex numbers, which RoPE turns."""
    frequencies = 1.0 / CONFIG.rope_theta ** (torch.arange(0, wq.shape[0], 2).float() / wq.shape[0])
    turn = torch.polar(torch.ones(len(positions), len(frequencies)), torch.outer(positions.float(), frequencies))
    q, k = (torch.view_as_complex((x @ w.T).view(len(x), -1, 2)) * turn for w in (wq, wk))
    q, k = (torch.view_as_real(rotated).flatten(1) for rotated in (q, k))
    return q @ k.T


def test_the_order_of_dimensions_is_metas() -> None:
    """Against Meta's complex arithmetic, not against this file's own inverse."""
    from radllama.model import rotary_angles, rotate

    config = tiny_config()
    generator = torch.Generator().manual_seed(0)
    wq, wk = (torch.randn(8, 32, generator=generator) for _ in range(2))
    x, positions = torch.randn(5, 32, generator=generator), torch.arange(5) * 7
    cos, sin = rotary_angles(positions[None], config, torch.float32)
    q, k = (rotate((x @ split_halves(w, 1).T)[None, None], cos, sin)[0, 0] for w in (wq, wk))
    expected = meta_attention_scores(wq, wk, x, positions)
    torch.testing.assert_close(q @ k.T, expected)
    plain = [rotate((x @ w.T)[None, None], cos, sin)[0, 0] for w in (wq, wk)]
    assert (plain[0] @ plain[1].T - expected).abs().max() > 0.1  # the order matters


MEASURE = """
import json, sys, threading, time
from pathlib import Path
from radllama.meta import import_meta

def anonymous():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("RssAnon"))

peak = baseline = anonymous()
done = threading.Event()
def sample():
    global peak
    while not done.is_set():
        peak = max(peak, anonymous())
        time.sleep(0.001)
sampler = threading.Thread(target=sample)
sampler.start()
import_meta(Path(sys.argv[1]), Path(sys.argv[2]))
done.set()
sampler.join()
print(json.dumps(peak - baseline))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/status")
@pytest.mark.parametrize("shards", [1, 2])
def test_an_import_holds_one_tensor(tmp_path: Path, shards: int) -> None:
    """A model of 323 MiB whose largest tensors, of 40, follow one another: two of them would be noticed.

    malloc gives blocks of more than 32 MiB back as soon as they are freed; of smaller ones it would keep some.
    """
    shape = {"vocab_size": 40_960, "hidden_size": 512, "intermediate_size": 40_960, "num_hidden_layers": 2}
    with torch.device("meta"):
        model = Llama(tiny_config(**shape, num_attention_heads=8, num_key_value_heads=4, head_dim=64)).bfloat16()
    model.to_empty(device="cpu")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.uniform_(-1, 1)
    largest, whole = 40_960 * 512 * 2, sum(2 * parameter.numel() for parameter in model.parameters())
    assert whole > 7 * largest
    write_meta(model, tmp_path / "meta", shards)
    file = tmp_path / "meta/params.json"
    params = {"dim": 512, "n_layers": 2, "n_heads": 8, "n_kv_heads": 4}
    file.write_text(json.dumps(json.loads(file.read_text()) | params))
    command = [sys.executable, "-c", MEASURE, str(tmp_path / "meta"), str(tmp_path / "out")]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)
    assert done.returncode == 0, done.stderr
    peak = int(done.stdout.splitlines()[-1])
    print(f"{shards} file(s): peak {peak / 2**20:.1f} MiB, largest {largest / 2**20:.1f}, whole {whole / 2**20:.1f}")
    assert 0.9 * largest <= peak <= 1.5 * largest
    again = load_model(tmp_path / "out", dtype=torch.bfloat16)
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), model.parameters(), strict=True))


class Hostile:
    def __reduce__(self) -> Any:
        return os.system, ("touch hacked",)


def tensors_of(folder: Path) -> dict[str, Tensor]:
    found: dict[str, Tensor] = torch.load(folder / "consolidated.00.pth", weights_only=True)
    return found


def with_tensors(change: Callable[[dict[str, Tensor]], Any]) -> Callable[[Path], Any]:
    def edit(folder: Path) -> None:
        tensors = tensors_of(folder)
        change(tensors)
        torch.save(tensors, folder / "consolidated.00.pth")

    return edit


def with_params(**changes: Any) -> Callable[[Path], Any]:
    def edit(folder: Path) -> None:
        file = folder / "params.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))

    return edit


NORM, UP = "norm.weight", "layers.1.feed_forward.w3.weight"
SPOILERS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "hostile": (
        lambda f: torch.save({NORM: Hostile()}, f / "consolidated.00.pth"),
        r"00\.pth: cannot be read as a .pth",
    ),
    "hostile, old": (lambda f: (f / "consolidated.00.pth").write_bytes(pickle.dumps(Hostile())), "cannot be read"),
    "no torch file": (lambda f: (f / "consolidated.00.pth").write_bytes(b"x" * 99), r"00\.pth: cannot be read"),
    "cut off": (lambda f: os.truncate(f / "consolidated.00.pth", 9000), r"00\.pth: cannot be read"),
    "a list": (lambda f: torch.save([torch.ones(2)], f / "consolidated.00.pth"), "expected a dict of names"),
    "no pth": (lambda f: (f / "consolidated.00.pth").unlink(), "expected consolidated.00.pth"),
    "no params": (lambda f: (f / "params.json").unlink(), r"params\.json: not found"),
    "params huge": (with_params(n_layers=10**12), "n_layers: expected a whole number from 1 to 1024, found 10000"),
    "params another": (with_params(dim=64), r"params\.json says \(96, 64\)"),
    "params odd": (with_params(n_heads=3), "do not divide into heads"),
    "more layers": (with_params(n_layers=3), "missing: layers.2.attention.wk.weight"),
    "missing": (with_tensors(lambda t: t.pop(NORM)), "missing: norm.weight"),
    "unexpected": (with_tensors(lambda t: t.update(x=torch.ones(1))), "unexpected: x"),
    "misshapen": (with_tensors(lambda t: t.update({UP: torch.ones(32, 48)})), rf"{UP}: params.json says \(48, 32\)"),
    "integers": (
        with_tensors(lambda t: t.update({NORM: torch.ones(32).int()})),
        "norm.weight: expected torch.bfloat16, .* found torch.int32",
    ),
    "float8": (
        with_tensors(lambda t: t.update({NORM: t[NORM].to(torch.float8_e4m3fn)})),
        "norm.weight: expected torch.bfloat16, .* found torch.float8_e4m3fn",
    ),
    "a bomb": (
        with_tensors(lambda t: t.update({UP: torch.ones(1, 1).expand(48, 32)})),
        r"00\.pth: expected .* dense tensors, each with its bytes in the file",
    ),
    "another part": (lambda f: torch.save({}, f / "consolidated.01.pth"), r"01\.pth: holds other tensors"),
}


@pytest.mark.parametrize("spoiler", SPOILERS)
def test_what_cannot_be_imported(
    spoiler: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    write_meta(random_llama(CONFIG), tmp_path / "meta", 1)
    spoil, message = SPOILERS[spoiler]
    spoil(tmp_path / "meta")
    with pytest.raises(ValueError, match=message) as caught:
        import_meta(tmp_path / "meta", tmp_path / "out")
    assert str(tmp_path / "meta") in str(caught.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["meta"]  # nothing written, and nothing ran
    with pytest.raises(SystemExit):
        main(["--input", str(tmp_path / "meta"), "--output", str(tmp_path / "out")])
    assert capsys.readouterr().err.startswith("error: ")
