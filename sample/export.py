"""`kinoflow sample export-diffusers RELEASE OUT`: a release as a folder that diffusers loads.

model_index.json   names the pipeline, the parts' classes, and what kinoflow.yaml says
pipeline.py        the pipeline's class, from `kinoflow.sample.diffusion`
dit/ tae/ text/    the parts, with a file kinoflow_PART.py each that names their class

It is a release of ours as well: `kinoflow sample --weights OUT` makes the same clips of it.
"""

from __future__ import annotations

import argparse
import shutil
from dataclasses import replace
from pathlib import Path

from kinoflow.conditioning.checkpoints import LIMITS, TextConfig
from kinoflow.configs.errors import UserError
from kinoflow.configs.files import replacing_folder, write_json, write_text
from kinoflow.configs.pretrained import CONFIG_NAME, weight_files
from kinoflow.configs.schema import dump, to_dict
from kinoflow.configs.terminal import print_json
from kinoflow.sample.card import CARD_NAME
from kinoflow.sample.release import Release
from kinoflow.sample.stable_diffusion import INDEX, StableDiffusion, open_release

PIPELINE = "pipeline"
_PIPELINE_CLASS = "KinoflowPipeline"
_CLASSES = {"dit": "Dit", "tae": "Tae", "text": "Text"}
_DIFFUSERS = "0.35.0"  # the first whose way of loading these folders is known
_BESIDE = ("README.md", "figures.json")  # of a release, for people
_FILE = '''"""Needs kinoflow beside diffusers: the class that {what}."""

from kinoflow.sample.diffusion import {name}

__all__ = ["{name}"]
'''


def main(argv: list[str]) -> int:
    """Write the folder and say how it is loaded; 0."""
    parser = argparse.ArgumentParser(
        prog="kinoflow sample export-diffusers",
        description="Write a release as a folder that DiffusionPipeline.from_pretrained(OUT, "
        "trust_remote_code=True) loads where kinoflow is installed.",
    )
    parser.add_argument("release", metavar="RELEASE", help="folder or hub id; mini is the shipped one")
    parser.add_argument("out", type=Path, metavar="OUT", help="folder to be made")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead")
    args = parser.parse_args(argv)
    release = open_release(None if args.release == "mini" else args.release)
    export(release, args.out)
    if args.json:
        print_json({"path": str(args.out), "release": release.name, "weights": release.weights_hash})
        return 0
    print(f"{args.out}: {release.name} for diffusers")
    print(f'next: DiffusionPipeline.from_pretrained("{args.out}", trust_remote_code=True)("PROMPT", seed=0)')
    return 0


def export(release: Release, out: Path) -> None:
    """Write the folder, whole or not at all. Text encoders that lie in other folders go into it.

    Raises:
        UserError: it is there already, or the release makes no clips of prompts with a dit/.
    """
    if out.exists():
        raise UserError(f"{out}: is there already; name a folder that is not")
    if isinstance(release, StableDiffusion):
        raise UserError(f"{release.folder}: is in diffusers' layout already; give a release of kinoflow")
    if release.config.classes or release.config.pixels or release.part != "dit":
        kind = "of classes or pixels" if release.part == "dit" else f"with {release.part}/"
        raise UserError(f"{release.folder}: a release {kind}; give one of prompts with dit/")
    with replacing_folder(out) as aside:
        for part in ("dit", "tae"):
            _copy_model(release.place(part), aside / part)
        config = replace(release.config, text=_copy_text(release, aside / "text"), best_of=1)
        for name in _BESIDE:
            if (release.folder / name).is_file():
                shutil.copyfile(release.folder / name, aside / name)
        for part, name in _CLASSES.items():
            write_text(aside / part / f"{_module(part)}.py", _FILE.format(what=f"reads {part}/", name=name))
        text = _FILE.format(what="makes the videos", name=_PIPELINE_CLASS)
        write_text(aside / f"{PIPELINE}.py", text)
        index = {"_class_name": [PIPELINE, _PIPELINE_CLASS], "_diffusers_version": _DIFFUSERS}
        parts = {part: [_module(part), name] for part, name in _CLASSES.items()}
        write_json(aside / INDEX, index | parts | {"release": to_dict(config)})
        dump(config, aside / CARD_NAME)


def _module(part: str) -> str:
    """Names of their own: diffusers copies all of these files into one folder."""
    return f"kinoflow_{part}"


def _copy_model(source: Path, target: Path) -> None:
    target.mkdir()
    files = weight_files(source)
    for path in [source / CONFIG_NAME, *files, *source.glob("*.safetensors.index.json")]:
        shutil.copyfile(path, target / path.name)


def _copy_text(release: Release, target: Path) -> TextConfig:
    """Copy the encoders that lie in folders; what the copy's config says, which is beside them too."""
    config = release.config.text
    target.mkdir()
    for name, source in config.sources(release.text_holder).items():
        if Path(source).is_dir():
            shutil.copytree(source, target / name)
    config = replace(config, **{
        name: "" for name in LIMITS if (target / name).is_dir()
    })  # fmt: skip
    write_json(target / CONFIG_NAME, to_dict(config))
    return config
