"""resume.py: which checkpoints are kept, which is taken, and which are passed over, with a stand-in for the engine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from radllama import resume
from radllama.config import Config, parse_config
from radllama.resume import Checkpoints, check_data
from radllama.run import TrainingError


class Engine:
    """Saves a number; loads its name."""

    optimizer = None

    def __init__(self) -> None:
        self.value, self.full = 0, False
        self.loaded: str | None = None

    def save_checkpoint(self, folder: str, *, tag: str, save_latest: bool, exclude_frozen_parameters: bool) -> None:
        assert not save_latest
        assert exclude_frozen_parameters
        (Path(folder) / tag).mkdir(parents=True)
        (Path(folder) / tag / "state.pt").write_text(f"{self.value}" * 100)
        if self.full:
            raise OSError(28, "No space left on device")

    def load_checkpoint(self, folder: str, *, tag: str, load_module_strict: bool) -> tuple[str, dict[str, Any]]:
        self.loaded = tag
        return folder, {}


@pytest.fixture
def make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(resume.dist, "barrier", lambda: None)
    return lambda keep=1: Checkpoints(tmp_path / "checkpoints", rank=0, world=1, keep=keep)


def kept(checkpoints: Checkpoints) -> list[str]:
    assert (checkpoints.folder / "latest").read_text() == checkpoints.complete()[0].name
    return sorted(path.name for path in checkpoints.folder.glob("step_*"))


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_the_last_ones_are_kept(make: Any, keep: int) -> None:
    checkpoints, engine = make(keep), Engine()
    for step in range(1, 6):
        checkpoints.save(engine, step, {"best": 1.0})
        assert kept(checkpoints) == [f"step_{number:08d}" for number in range(1, step + 1)][-keep:]
    assert checkpoints.load(engine) | {"files": None} == {"best": 1.0, "step": 5, "world": 1, "files": None}


def test_one_that_cannot_be_written_costs_none_of_those_before(make: Any) -> None:
    checkpoints, engine = make(keep=1), Engine()
    checkpoints.save(engine, 1, {})
    engine.full = True
    with pytest.raises(TrainingError, match=r"step_00000002 cannot be written \(.*No space left.*--resume"):
        checkpoints.save(engine, 2, {})
    assert kept(checkpoints) == ["step_00000001"]
    engine.full = False
    checkpoints.save(engine, 2, {})
    assert kept(checkpoints) == ["step_00000002"]


def test_the_only_good_one_outlives_damaged_later_ones(make: Any, caplog: pytest.LogCaptureFixture) -> None:
    checkpoints, engine = make(keep=3), Engine()
    for step in (2, 4, 6):
        checkpoints.save(engine, step, {})
    flipped, short = (checkpoints.folder / f"step_0000000{step}/state.pt" for step in (6, 4))
    flipped.write_text("1" + flipped.read_text()[1:])
    short.write_text(short.read_text()[:-1])
    (checkpoints.folder / "step_00000008.partial").mkdir()
    assert checkpoints.load(engine)["step"] == 2
    assert engine.loaded == "step_00000002"
    for told in (
        "step_00000008.partial was never completed; it is ignored",
        "step_00000006 is damaged and passed over: state.pt has another checksum",
        "step_00000004 is damaged and passed over: state.pt has 99 bytes in place of 100",
    ):
        assert told in caplog.text
    checkpoints.save(engine, 3, {})  # the damaged ones belong to a past that was given up
    assert kept(checkpoints) == ["step_00000002", "step_00000003"]
    for path in checkpoints.folder.glob("step_*/state.pt"):
        path.unlink()
    with pytest.raises(ValueError, match=r"no checkpoint in .* is whole"):
        checkpoints.load(engine)


def test_one_is_taken_only_once_latest_names_it(make: Any, caplog: pytest.LogCaptureFixture) -> None:
    checkpoints, engine = make(keep=2), Engine()
    assert checkpoints.load(engine) is None
    for step in (1, 2):
        checkpoints.save(engine, step, {})
    latest = checkpoints.folder / "latest"
    latest.write_text("step_00000001")  # killed between the renaming and this
    assert checkpoints.load(engine)["step"] == 1
    latest.write_text("step_0000\0")
    assert checkpoints.load(engine)["step"] == 2
    assert f"{latest} names no complete checkpoint; step_00000002 is the newest" in caplog.text


def test_data_must_be_as_it_was_when_the_run_began(tmp_path: Path) -> None:
    def config(**data: str) -> Config:
        raw = {"model": {"path": "m"}, "method": "full", "training": {"output": "o", "steps": 1}}
        return parse_config(raw | {"data": {"train": str(tmp_path / "t"), **data}})

    (tmp_path / "t").write_text("one\n")
    (tmp_path / "v").write_text("two\n")
    (tmp_path / "model").mkdir()
    weights = tmp_path / "model/model.safetensors"
    weights.write_bytes(bytes(1000))
    both = config(validation=str(tmp_path / "v"))

    def check(config: Config = both) -> None:
        check_data(config, tmp_path, tmp_path / "model", rank=0, world=1)

    for _ in range(2):
        check()
    (tmp_path / "v").write_text("TWO\n")
    with pytest.raises(ValueError, match=r"data.validation: .*/v has changed since this run began; restore it"):
        check()
    check(config())
    weights.write_bytes(bytes(999) + b"1")
    with pytest.raises(ValueError, match=r"model.path: .*/model has changed since this run began; restore it"):
        check(config())


def test_a_large_models_fingerprint_reads_samples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resume, "SAMPLES", 4)
    monkeypatch.setattr(resume, "SAMPLE", 8)
    file = tmp_path / "model.safetensors"

    def with_one_at(place: int, size: int = 400) -> dict[str, Any]:
        content = bytearray(size)
        content[place] = 1
        file.write_bytes(content)
        return resume.model_fingerprint(tmp_path)

    seen = {place: with_one_at(place)["blake2b"] for place in range(400)}
    unseen = [place for place in seen if place % 100 >= 8]
    assert len({seen[place] for place in unseen}) == 1
    assert len(set(seen.values())) == 1 + 4 * 8
    assert with_one_at(50, 401) != with_one_at(50, 400)
    file.rename(tmp_path / "other.safetensors")
    assert resume.model_fingerprint(tmp_path)["blake2b"] != seen[50]


def test_a_manifest_in_which_any_bit_has_flipped_is_passed_over(make: Any) -> None:
    checkpoints, engine = make(keep=2), Engine()
    for step in (2, 4):
        checkpoints.save(engine, step, {"best": 1.5, "guard": {"recent": [1.0], "skipped": 0}})
    manifest = checkpoints.folder / "step_00000004/manifest.json"
    whole = manifest.read_bytes()
    for place in range(len(whole)):
        for bit in (1, 4, 32):
            manifest.write_bytes(whole[:place] + bytes([whole[place] ^ bit]) + whole[place + 1 :])
            found = checkpoints.load(engine)
            assert found["step"] == 2, (place, bit, manifest.read_bytes())
    manifest.write_bytes((checkpoints.folder / "step_00000002/manifest.json").read_bytes())
    checkpoints.load(engine)
    assert engine.loaded == "step_00000002"  # a whole manifest, but of another step
    manifest.write_bytes(whole)
    assert checkpoints.load(engine)["step"] == 4
