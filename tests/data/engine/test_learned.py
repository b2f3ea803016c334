"""Aesthetics and text match by a tiny random CLIP: plain twins of the scores, caches, rules and mistakes."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from kinoflow.conditioning.clip_model import ClipModel
from kinoflow.data.__main__ import main
from kinoflow.data.clips import manifest
from kinoflow.data.engine import kept, learned
from tests.conditioning.writing import write_clip
from tests.data.engine.planting import shot, write

pytest.importorskip("cv2")
KEYS = ["scan.text=none", "select.sharpness=null", "select.motion=null", "select.shake=null"]
WORDS = ["a", "man", "in", "the", "car", "street", "rabbit"]
NAMES = ("car", "rabbit", "street")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_clip(tmp_path_factory.mktemp("clip"), WORDS)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made")
    for name in NAMES:
        write(folder / f"{name}.mp4", shot(name))
        (folder / f"{name}.txt").write_text(f"a man in the {name}")
    (folder / "street.txt").unlink()
    assert main(["curate", str(folder), str(folder / "out"), "--workers", "0", "--config", *KEYS]) == 0
    rng = np.random.default_rng(0)
    weight, bias = rng.normal(size=(1, 8)).astype(np.float32), np.array([5.0], np.float32)
    save_file({"weight": weight, "bias": bias}, folder / "head.safetensors")
    return folder


def entries(out: Path) -> dict[str, manifest.ClipEntry]:
    return {Path(entry.path).stem: entry for entry in manifest.read(out / "manifest.jsonl").entries}


def embed(made: Path, model: Path, *keys: str) -> int:
    head = f"clip.aesthetic={made / 'head.safetensors'}"
    words = [f"clip.model={model}", head, "clip.frames=2", *keys]
    return main(["embed", str(made / "out"), "--workers", "0", "--config", *words])


def test_the_scores_are_those_of_the_model_and_the_layer(made: Path, model: Path) -> None:
    """A plain twin: the same model of transformers, asked directly."""
    import torch
    from PIL import Image
    from transformers import AutoModel, AutoProcessor

    assert embed(made, model) == 0
    found, twin = entries(made / "out"), AutoModel.from_pretrained(model)
    processor = AutoProcessor.from_pretrained(model)
    weight = load_file(made / "head.safetensors")["weight"][0]
    for name in NAMES:
        frames = [Image.fromarray(shot(name)[at]) for at in kept.sampled(found[name], 2)]
        with torch.no_grad():
            seen = twin.get_image_features(**processor(images=frames, return_tensors="pt")).pooler_output
            tokens = processor(text=[f"a man in the {name}"], return_tensors="pt")
            said = twin.get_text_features(**tokens).pooler_output[0]
        mean = torch.nn.functional.normalize(seen, dim=-1).mean(0)
        good = 5 + float(mean @ torch.tensor(weight))
        assert found[name].extra["aesthetic"] == pytest.approx(good, abs=0.02)
        if name == "street":
            assert "match" not in found[name].extra, "it has no caption"
        else:
            cosine = float(torch.nn.functional.cosine_similarity(mean, said, dim=0))
            assert found[name].extra["match"] == pytest.approx(cosine, abs=0.01)


def test_each_shot_is_looked_at_once_and_select_needs_no_model(
    made: Path, model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert embed(made, model) == 0
    before = entries(made / "out")
    monkeypatch.setattr(kept, "pictures", lambda *_: pytest.fail("decodes again"))
    assert embed(made, model) == 0 and entries(made / "out") == before
    monkeypatch.setattr(learned, "ClipModel", lambda *_: pytest.fail("wants the model"))
    keys = [f"clip.aesthetic={made / 'head.safetensors'}", "select.aesthetic=best 34%"]
    capsys.readouterr()
    assert main(["select", str(made / "out"), "--json", "--config", *keys]) == 0
    stages = {stage["stage"]: stage for stage in json.loads(capsys.readouterr().out)["stages"]}
    assert (stages["aesthetic"]["came"], stages["aesthetic"]["dropped"]) == (3, 2)
    best = max(before, key=lambda name: before[name].extra["aesthetic"])
    assert entries(made / "out") == {best: before[best]}
    worse = min(before[name].extra["match"] for name in ("car", "rabbit"))
    assert main(["select", str(made / "out"), "--config", keys[0], f"select.match={worse + 1e-4}:"]) == 0
    left = entries(made / "out")
    assert len(left) == 2 and "street" in left, "what has no caption is not dropped for it"
    assert "<h2>match</h2>" in (made / "out" / "funnel.html").read_text()
    assert main(["select", str(made / "out"), "--config", keys[0]]) == 0
    assert entries(made / "out") == before


def test_curate_asks_the_model_where_the_config_names_it(made: Path, model: Path, tmp_path: Path) -> None:
    for name in ("car", "street"):
        shutil.copy(made / f"{name}.mp4", tmp_path)
    keys = [*KEYS, f"clip.model={model}", f"clip.aesthetic={made / 'head.safetensors'}"]
    words = ["curate", str(tmp_path), str(tmp_path / "out"), "--workers", "0", "--config", *keys]
    assert main([*words, "select.aesthetic=best 50%"]) == 0
    assert len(entries(tmp_path / "out")) == 1
    assert main(words) == 0
    found = entries(tmp_path / "out")
    assert set(found) == {"car", "street"} and all("aesthetic" in entry.extra for entry in found.values())
    (tmp_path / "car.txt").write_text("a man in the car")
    assert main(words) == 0
    assert "match" in entries(tmp_path / "out")["car"].extra


def test_long_captions_are_cut_to_what_the_model_reads(model: Path) -> None:
    clip = ClipModel(str(model))
    long = clip.text("a man in the car " * 30)
    assert long.shape == (8,) and np.linalg.norm(long) == pytest.approx(1, abs=1e-5)


def test_mistakes_are_one_line(
    made: Path, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = str(made / "out")
    save_file({"weight": np.zeros((1, 9), np.float32)}, tmp_path / "wide.safetensors")
    two = {"a": np.zeros((2, 8), np.float32), "b": np.zeros((1, 2), np.float32)}
    save_file(two, tmp_path / "two.safetensors")
    (tmp_path / "bad.safetensors").write_bytes(b"x")
    (tmp_path / "empty").mkdir()
    fresh = tmp_path / "fresh"
    shutil.copytree(made / "out", fresh, ignore=shutil.ignore_patterns("embeddings"))
    assert embed(made, model) == 0
    for words, why in [
        (["embed", out], "clip.model: is not said"),
        (["embed", out, "--config", f"clip.model={tmp_path / 'empty'}"], "holds no CLIP-like model"),
        (["embed", out, "--config", f"clip.model={tmp_path / 'gone'}"], "no such folder"),
        (["select", out, "--config", "select.aesthetic=5:"], "asks for clip.aesthetic"),
        (["select", str(fresh), "--config", "select.match=0.2:"], "run kinoflow data embed first"),
        (["select", out, "--config", f"clip.aesthetic={tmp_path / 'wide.safetensors'}"], "takes 9 numbers"),
        (
            ["select", out, "--config", f"clip.aesthetic={tmp_path / 'two.safetensors'}"],
            "not one linear layer",
        ),
        (
            ["select", out, "--config", f"clip.aesthetic={tmp_path / 'bad.safetensors'}"],
            "no safetensors file",
        ),
        (["select", out, "--config", f"clip.aesthetic={tmp_path / 'none.safetensors'}"], "none.safetensors"),
        (["select", out, "--config", "clip.frames=0"], "clip.frames: 0; use 1 to 256"),
    ]:
        capsys.readouterr()
        assert main(words) == 2, words
        said = capsys.readouterr().err
        assert why in said and said.count("\n") == 1, said
