"""What reaches the hub: a release's own files and a card, in one commit; a fake hub stands in."""

import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from huggingface_hub import HfApi, ModelCard
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError

from kinoflow.sample.__main__ import main
from kinoflow.sample.release import DEFAULT_RELEASE, Release

FIGURES = json.loads((DEFAULT_RELEASE / "figures.json").read_text())


class Repo(str):
    __slots__ = ()
    repo_id = "someone/tiny"


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """The folder that stands for the hub, and what was asked of it."""
    asked = {}

    def create_repo(self, repo_id, **more):
        asked["repo"] = (repo_id, more)
        return Repo(f"https://huggingface.co/{repo_id}")

    def upload_folder(self, *, repo_id, folder_path, commit_message):
        asked["commit"] = (repo_id, commit_message)
        shutil.copytree(folder_path, tmp_path / "hub")

    monkeypatch.setattr(HfApi, "create_repo", create_repo)
    monkeypatch.setattr(HfApi, "upload_folder", upload_folder)
    return tmp_path / "hub", asked


@pytest.fixture
def release(whole_release_folder, tmp_path):
    return Path(shutil.copytree(whole_release_folder, tmp_path / "release"))


def push(release, *more):
    return main(["push", str(release), "someone/tiny", *more])


def test_what_is_pushed_is_the_release(hub, release, capsys):
    folder, asked = hub
    for stray in (
        "notes.txt", ".secret", "dit/.cache", "dit/__pycache__/x.pyc", "adapters/four/sampling.yaml"
    ):  # fmt: skip
        (release / stray).parent.mkdir(parents=True, exist_ok=True)
        (release / stray).write_text("mine")
    assert push(release, "--private", "--license", "apache-2.0") == 0
    assert capsys.readouterr().out.startswith(
        "https://huggingface.co/someone/tiny: tiny\nnext: kinoflow sample"
    )
    was, is_there = Release.load(release), Release.load(folder)
    assert (is_there.config, is_there.weights_hash) == (was.config, was.weights_hash)
    assert asked["repo"] == ("someone/tiny", {"private": True, "exist_ok": True})
    assert asked["commit"] == ("someone/tiny", f"tiny 1, weights {was.weights_hash}")
    assert (folder / "adapters" / "four" / "sampling.yaml").is_file()
    names = {path.name for path in folder.rglob("*")}
    assert not names & {"notes.txt", ".secret", ".cache", "x.pyc"} and not any(
        map(Path.is_symlink, folder.rglob("*"))
    )
    assert not (release / "README.md").exists()
    card = ModelCard.load(folder / "README.md")
    assert (card.data.license, card.data.library_name) == ("apache-2.0", "kinoflow")
    assert (card.data.pipeline_tag, card.data.eval_results) == ("text-to-video", None)
    assert (
        '    kinoflow sample "PROMPT" --weights someone/tiny'.strip() in card.text
        and "Figures" not in card.text
    )


def test_figures_become_a_table_and_the_hubs_results(release, capsys):
    figures = FIGURES | {"weights": Release.load(release).weights_hash, "word": None}
    (release / "figures.json").write_text(json.dumps(figures))
    assert push(release, "--dry-run") == 0
    said = capsys.readouterr().out
    shape = {key: 100 * figures["shape"][key] for key in ("share", "low", "high", "real")}
    row = "| shape (400) | {share:.1f} % ({low:.1f}-{high:.1f}) | {real:.1f} % |\n".format(**shape)
    assert row in said and "written word" not in said
    distances = f"{figures['frechet']:.1f} | {figures['frechet_real']:.1f} |\n"
    assert f"| Fréchet distance in the judge's features | {distances}" in said and "with 36.6 dB" in said
    (model,) = yaml.safe_load(said.split("---\n")[1])["model-index"]
    values = {metric["name"]: metric["value"] for item in model["results"] for metric in item["metrics"]}
    assert values["accuracy, shape"] == figures["shape"]["share"]
    assert values["PSNR of the autoencoder, dB"] == round(figures["autoencoder_psnr"], 4)
    (release / "figures.json").write_text(json.dumps(figures | {"autoencoder_psnr": None, "best_of": 1}))
    assert push(release, "--dry-run") == 0
    said = capsys.readouterr().out
    assert "dB" not in said and "guidance 4,\nclips of" in said
    (release / "figures.json").write_text(json.dumps(figures | {"best_of": 3}))
    assert push(release, "--dry-run") == 0
    assert "guidance 4, the best of up to 3,\nclips of" in capsys.readouterr().out


def test_the_shipped_card_comes_along_without_pictures_that_do_not(capsys):
    assert push("mini", "--dry-run") == 0
    said = capsys.readouterr().out
    own = (DEFAULT_RELEASE / "README.md").read_text()
    assert re.sub(r"!\[[^\]]*\]\(\.\./[^)]*\)\n\n", "", own) == said.split("---\n\n", 1)[1]
    assert "../" in own and "../" not in said


def test_a_readme_with_its_own_head_stays_as_it_is(release, capsys):
    (release / "README.md").write_text("---\nlicense: mit\n---\n# Mine\n")
    assert push(release, "--dry-run") == 0
    assert capsys.readouterr().out == "---\nlicense: mit\n---\n# Mine\n"


def test_a_folder_for_diffusers_brings_what_diffusers_loads(hub, release, tmp_path, capsys):
    assert main(["export-diffusers", str(release), str(tmp_path / "out")]) == 0
    assert push(tmp_path / "out", "--json") == 0
    out = capsys.readouterr().out.splitlines()[-1]
    assert json.loads(out)["url"] == "https://huggingface.co/someone/tiny"
    here, there = (
        {p.relative_to(f) for f in [folder] for p in f.rglob("*")} for folder in (tmp_path / "out", hub[0])
    )
    assert there - here == {Path("README.md")} and here <= there
    assert "diffusers" in ModelCard.load(hub[0] / "README.md").data.tags


def test_what_goes_wrong_is_one_line(hub, release, monkeypatch, capsys):
    def refused(*argv):
        assert push(*argv) == 2
        said = capsys.readouterr()
        assert (said.out, said.err.count("\n")) == ("", 1)
        return said.err

    response = SimpleNamespace(headers={}, request=None)
    for error, words in [
        (
            HfHubHTTPError("401 Unauthorized\nfor url", response=response),
            "401 Unauthorized for url); see that",
        ),
        (LocalTokenNotFoundError("no token"), "not uploaded (no token)"),
        (HFValidationError("Repo id must"), "no name for a repository"),
        (ConnectionError("no network"), "not uploaded (no network)"),
    ]:
        monkeypatch.setattr(HfApi, "create_repo", lambda *_, error=error, **__: (_ for _ in ()).throw(error))
        assert words in refused(release)
    (release / "figures.json").write_text(json.dumps(FIGURES))
    assert f"figures.json: measured on weights {FIGURES['weights']}, these are" in refused(release)
    (release / "figures.json").write_text("[]")
    assert "figures.json: not what evaluate prints" in refused(release)
    assert "no such folder" in refused(release / "gone")
    assert not hub[0].exists()
