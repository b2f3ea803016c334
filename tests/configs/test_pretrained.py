"""Model folders: round trips, shards and what damage says."""

import errno
import os
import stat
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from kinoflow.configs.errors import UserError
from kinoflow.configs.pretrained import (
    fingerprint,
    load_pretrained,
    load_state,
    resolve_folder,
    save_pretrained,
)


@dataclass(frozen=True, kw_only=True)
class Shape:
    width: int = 3


STATE = {"a.weight": torch.randn(64, 64), "b.weight": torch.randn(64, 64), "steps": torch.tensor([3])}


def test_round_trip(tmp_path: Path) -> None:
    save_pretrained(tmp_path, config=Shape(width=7), state=STATE)
    config, state = load_pretrained(tmp_path, Shape)
    assert config == Shape(width=7)
    assert state.keys() == STATE.keys()
    assert all(torch.equal(state[k], STATE[k]) for k in STATE)


def test_shards_and_the_way_back(tmp_path: Path) -> None:
    save_pretrained(tmp_path, config=Shape(), state=STATE, max_shard_size=20_000)
    assert len(list(tmp_path.glob("model-*.safetensors"))) == 2
    _, state = load_pretrained(tmp_path, Shape)
    assert all(torch.equal(state[k], STATE[k]) for k in STATE)
    save_pretrained(tmp_path, config=Shape(), state=STATE)
    assert [p.name for p in tmp_path.glob("*.safetensors*")] == ["model.safetensors"]


@pytest.mark.parametrize("size", ["5GB", 6_000])
def test_bytes_are_within_half_a_level(tmp_path: Path, size: str | int) -> None:
    """In one file and sharded; a row of zeros stays, and so does what is small, a vector or no number."""
    small, vector = torch.randn(3, 5), torch.randn(64)
    matrix = torch.randn(96, 64) * torch.logspace(-3, 3, 96)[:, None]
    matrix[5] = 0
    kernel = torch.randn(8, 24, 3, 3, 3) * torch.logspace(-2, 2, 8)[:, None, None, None, None]
    state = STATE | {"matrix": matrix, "kernel": kernel, "small": small, "vector": vector}
    save_pretrained(tmp_path, config=Shape(), state=state, dtype=torch.int8, max_shard_size=size)
    _, found = load_pretrained(tmp_path, Shape)
    assert found.keys() == state.keys() and len(found) == len(state)
    for name in ("matrix", "kernel", "a.weight"):
        rows = state[name].flatten(1).abs().amax(1) / 127
        value, level = found[name], rows.view(-1, *[1] * (state[name].ndim - 1))
        assert value.dtype == torch.float32 and found.shape(name) == value.shape  # type: ignore[attr-defined]
        # A level is stored in bf16, rounded up: at most 2^-7 more.
        assert ((value - state[name]).abs() <= 0.501 * (1 + 2**-7) * level).all()
    assert (found["matrix"][5] == 0).all()
    assert torch.equal(found["small"], small.half()) and torch.equal(found["vector"], vector.half())
    assert torch.equal(found["steps"], STATE["steps"])
    total = sum(path.stat().st_size for path in tmp_path.glob("*.safetensors"))
    assert total < 1.3 * sum(state[name].numel() for name in state) + 2_000


def test_half_precision_keeps_integers_and_the_fingerprint(tmp_path: Path) -> None:
    save_pretrained(tmp_path, config=Shape(), state=STATE, dtype=torch.float16)
    _, state = load_pretrained(tmp_path, Shape)
    assert state["a.weight"].dtype == torch.float16
    assert state["steps"].dtype == torch.int64
    assert fingerprint(state) == fingerprint(STATE)
    assert fingerprint(state) != fingerprint({**STATE, "steps": torch.tensor([4])})


def test_a_failed_save_leaves_the_folder_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, value: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    save_pretrained(tmp_path, config=Shape(), state=STATE, max_shard_size=20_000)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    monkeypatch.setattr("kinoflow.configs.pretrained.write_json", full)
    with pytest.raises(OSError, match="No space"):
        save_pretrained(tmp_path, config=Shape(width=7), state={"c": torch.ones(3)})
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_files_have_the_rights_of_new_files_and_others_stay(tmp_path: Path) -> None:
    (tmp_path / "README.md").touch()
    before = os.umask(0o027)
    try:
        save_pretrained(tmp_path, config=Shape(), state=STATE, max_shard_size=20_000)
    finally:
        os.umask(before)
    written = [path for path in tmp_path.iterdir() if path.name != "README.md"]
    assert len(written) == 4  # two shards, their index and config.json
    assert {stat.S_IMODE(path.stat().st_mode) for path in written} == {0o640}
    assert (tmp_path / "README.md").exists()


@pytest.mark.parametrize(
    "damage", ["config missing", "config bad", "config list", "config key", "weights missing", "weights cut"]
)
def test_damage_names_the_file(tmp_path: Path, damage: str) -> None:
    save_pretrained(tmp_path, config=Shape(), state=STATE)
    config, weights = tmp_path / "config.json", tmp_path / "model.safetensors"
    match damage:
        case "config missing":
            config.unlink()
        case "config bad":
            config.write_text("{")
        case "config list":
            config.write_text("[1]")
        case "config key":
            config.write_text('{"widht": 3}')
        case "weights missing":
            weights.unlink()
        case "weights cut":
            weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(
        UserError, match=r"config\.json" if "config" in damage else r"model\.safetensors"
    ) as info:
        load_pretrained(tmp_path, Shape)
    assert "\n" not in str(info.value)


def test_no_such_folder() -> None:
    with pytest.raises(UserError, match="no such folder"):
        load_pretrained("/nowhere/at/all", Shape)


def test_a_hub_id_is_fetched_once_no_such_folder_is_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The hub is asked for the id and gives a folder; without it, the line names both places."""
    save_pretrained(tmp_path / "cache", config=Shape(width=5), state=STATE)
    asked: list[str] = []

    def download(name: str, revision: str | None, allow_patterns: list[str] | None) -> str:
        assert allow_patterns is None, "a release is fetched whole"
        asked.append(name if revision is None else f"{name}@{revision}")
        return str(tmp_path / "cache")

    monkeypatch.setattr("kinoflow.configs.pretrained.snapshot_download", download)
    config, _ = load_pretrained("owner/name", Shape)
    assert (config, asked) == (Shape(width=5), ["owner/name"])
    assert resolve_folder("owner/name", revision="v1") == tmp_path / "cache" and asked[1:] == [
        "owner/name@v1"
    ]
    monkeypatch.undo()
    with pytest.raises(UserError, match="neither a folder here nor readable from the hub") as info:
        load_pretrained("owner/no-such-model", Shape)  # the suite is offline
    assert "\n" not in str(info.value)


def test_weights_of_another_shape_are_refused() -> None:
    with pytest.raises(UserError, match="weight"):
        load_state(torch.nn.Linear(3, 4), {"weight": torch.zeros(4, 2), "bias": torch.zeros(4)}, "here")
