"""What pip installs: one package, that runs in a folder whose files are called like its rooms."""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import numpy as np
import pytest

from kinoflow.data import video
from kinoflow.sample.picture import read_frames
from tests.data.making import gradient
from tests.test_readme import fences

ROOT = Path(__file__).parents[1]
NAMES = ("data", "train", "sample", "configs", "tae", "conditioning", "dit_video")
PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]


def run(words: list[str], folder: Path) -> str:
    own = {
        key: value for key, value in os.environ.items() if key != "PYTHONPATH"
    }  # which goes before a wheel
    own["HF_MODULES_CACHE"] = str(folder / "modules")  # where diffusers puts the code of a folder
    done = subprocess.run(
        words, cwd=folder, env=own, capture_output=True, text=True, timeout=900, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy: setuptools leaves its traces beside what it builds from."""
    folder = tmp_path_factory.mktemp("wheel")
    needed = {"pyproject.toml", "README.md", "LICENSE", "kinoflow", *NAMES}

    def left_out(place: str, names: list[str]) -> set[str]:
        return {"__pycache__", *(set(names) - needed if Path(place) == ROOT else ())}

    shutil.copytree(ROOT, folder / "source", symlinks=True, ignore=left_out)
    run(
        [*PIP, "wheel", "--no-deps", "--no-build-isolation", "-w", str(folder), str(folder / "source")],
        folder,
    )
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bin folder of an environment that holds the wheel, and sees the libraries of this one."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=False)
    (packages,) = folder.glob("lib/python*/site-packages")
    # As a path and not as a site folder: the editable kinoflow of this environment is not seen.
    (packages / "libraries.pth").write_text(sysconfig.get_path("purelib") + "\n")
    run([*PIP, "--python", str(folder), "install", "--no-deps", str(wheel)], folder)
    return folder / "bin"


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A user's folder, with files that would break everything if they were imported."""
    folder = tmp_path_factory.mktemp("desk")
    for name in NAMES:
        (folder / f"{name}.py").write_text("raise SystemExit('the wrong file')\n")
    video.write(folder / "clip.mp4", gradient(16), fps=16)
    return folder


def test_a_wheel_brings_one_package(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.partition("/")[0].partition("-")[0] for name in names} == {"kinoflow"}
    for needed in ("configs/models/dit_30b.yaml", "configs/stages/sft.yaml", "sample/mini/kinoflow.yaml"):
        assert f"kinoflow/{needed}" in names
    for folder in NAMES:
        here = {file.relative_to(ROOT).as_posix() for file in (ROOT / folder).rglob("*.py")}
        assert {f"kinoflow/{name}" for name in here} <= set(names)


def test_the_commands_run_among_files_of_their_names(installed: Path, desk: Path) -> None:
    quick = ["--steps", "1", "--guidance", "1", "--frames", "1"]  # the next test makes a clip
    run([str(installed / "kinoflow"), "sample", "a red star", *quick, "--out", "star.png"], desk)
    assert video.probe(desk / "star.png").frames == 1
    assert "640" not in run([str(installed / "kinoflow"), "tae", "info", "clip.mp4", "--json"], desk)
    assert "kinoflow train" in run([str(installed / "python"), "-m", "kinoflow.train", "--help"], desk)
    where = run([str(installed / "python"), "-c", "import kinoflow; print(kinoflow.__file__)"], desk)
    assert Path(where.strip()).is_relative_to(installed.parent)


def readmes_python() -> list[str]:
    return [code for language, code in fences((ROOT / "README.md").read_text()) if language == "python"]


def test_the_readmes_python_runs_among_files_of_our_names(installed: Path, desk: Path) -> None:
    blocks = [code for code in readmes_python() if "diffusers" not in code]
    fast, changed = re.subn(r"(seed=7)", r"\1, steps=2", "\n".join(blocks))
    assert changed == 1
    run([str(installed / "python"), "-c", fast], desk)
    assert video.probe(desk / "heart.mp4").frames == 32
    asked = ["a blue heart grows on a black background", "--seed", "7", "--steps", "2", "--out", "own.mp4"]
    run([str(installed / "kinoflow"), "sample", *asked], desk)
    assert (desk / "own.mp4").read_bytes() == (desk / "heart.mp4").read_bytes()
    assert (desk / "clip.kino").is_file()


def test_the_readmes_diffusers_gives_the_commands_frames(installed: Path, desk: Path) -> None:
    (block,) = (code for code in readmes_python() if "diffusers" in code)
    fast, changed = re.subn(r"(seed=7)", r"\1, num_inference_steps=2", block)
    assert changed == 1
    run([str(installed / "kinoflow"), "sample", "export-diffusers", "mini", "for-diffusers"], desk)
    run([str(installed / "python"), "-c", f"{fast}import numpy; numpy.save('made.npy', frames)"], desk)
    asked = ["a blue heart grows on a black background", "--seed", "7", "--steps", "2", "--out", "own.webp"]
    run([str(installed / "kinoflow"), "sample", *asked], desk)
    assert np.array_equal(np.round(np.load(desk / "made.npy") * 255), read_frames(desk / "own.webp"))
