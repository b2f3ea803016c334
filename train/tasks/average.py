"""`kinoflow train average OUT RELEASE RELEASE …`: the mean of several backbones as one release.

Movie Gen (section 3.3) ends its fine-tuning with it: models that went on from the same weights with other
data, seeds or rates are good at different things, and their mean at more of them than any. So is the mean of
one that was fine-tuned and the one it was made of (Wortsman et al. 2022, arXiv:2109.01903).
"""

import os
import shutil
from collections.abc import Mapping, Sequence, Set
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kinoflow.configs.errors import UserError
from kinoflow.configs.files import folder_fingerprint, replacing_folder
from kinoflow.configs.pretrained import Weights, load_config, save_pretrained
from kinoflow.configs.schema import dump
from kinoflow.dit_video.backbone import BACKBONES, BackboneConfig
from kinoflow.dit_video.video_dit import DiTConfig
from kinoflow.sample.adapters import FOLDER as ADAPTERS
from kinoflow.sample.card import CARD_NAME
from kinoflow.sample.release import PARTS, Release, lent

USAGE = """usage: kinoflow train average OUT RELEASE RELEASE … [--int8]

Writes the release OUT, whose backbone is the mean of theirs, which must be of one shape and share the
autoencoder. All else is copied from the first. If that one reads what is known of a clip (dit.known) and
others do not, it keeps what it reads it with: the mean with what it went on from forgets less.

  --int8  its matrices in 8 bits, half the size of fp16; then one RELEASE is enough"""


def main(words: Sequence[str]) -> int:
    """Write the release that the first word names from those of the others; 0."""
    small = "--int8" in words
    words = [word for word in words if word != "--int8"]
    if len(words) < (2 if small else 3):
        raise UserError(f"average: name the release to write and those to average: {USAGE.splitlines()[0]}")
    out, releases = Path(words[0]), [Release.load(word) for word in words[1:]]
    average(out, releases, torch.int8 if small else torch.float16)
    made = f"the mean of {len(releases)} backbones" if len(releases) > 1 else releases[0].name
    print(f"{out}: {made}{', in 8 bits' if small else ''}")
    asked = "--label CLASS" if releases[0].config.classes else '"PROMPT"'
    print(f"next: kinoflow sample {asked} --weights {out}")
    return 0


def average(out: Path, releases: Sequence[Release], dtype: torch.dtype = torch.float16) -> None:
    """Write `out`, a few tensors in memory at a time; of `dtype` see `save_pretrained`.

    Raises:
        UserError: the backbones have other shapes, or the latents they make are not of one autoencoder; or
            `out` is one of the releases.
    """
    first = releases[0]
    part = first.part
    config = load_config(first.folder / part, BACKBONES[part].config_type)
    for other in releases[1:]:
        _compare(first, other, config)
    if any(out.resolve() == release.folder.resolve() for release in releases):
        raise UserError(f"{out}: is one of those to average; choose another folder to write")
    weights = [Weights(release.folder / part) for release in releases]
    state = {name: torch.empty(weights[0].shape(name), device="meta") for name in weights[0]}
    with replacing_folder(out) as aside:
        # Adapters are for a backbone as it was, or nearly.
        left = {*BACKBONES} if len(releases) == 1 else {*BACKBONES, ADAPTERS}
        left |= lent(out, first.folder)
        shutil.copytree(first.folder, aside, dirs_exist_ok=True, ignore=partial(_ignored, first.folder, left))
        for other in PARTS:
            if other not in left and not (aside / other).exists() and first.place(other).is_dir():
                shutil.copytree(first.place(other), aside / other)  # of the release around it
        save_pretrained(aside / part, config=config, state=state, dtype=dtype,
                        read=lambda names, _: _mean(names, weights))  # fmt: skip
        dump(replace(first.config, name=out.resolve().name, version="1", trained_from=_named(releases)),
             aside / CARD_NAME)  # fmt: skip


def _compare(first: Release, other: Release, config: BackboneConfig) -> None:
    own, its = (release.folder / release.part for release in (first, other))
    found = load_config(its, BACKBONES[other.part].config_type)
    alike: dict[str, Any] = {"attention": config.attention}
    if isinstance(config, DiTConfig) and config.known:
        alike["known"] = True
    if first.part != other.part or replace(found, **alike) != config:
        raise UserError(f"{its}: is another model than {own}; average what went on from the same weights")
    places = first.place("tae"), other.place("tae")
    if folder_fingerprint(places[0]) != folder_fingerprint(places[1]):
        raise UserError(f"{places[1]}: is another autoencoder than {places[0]}; their backbones' latents "
                        "have no mean")  # fmt: skip


def _ignored(release: Path, left: Set[str], folder: str | os.PathLike[str], _: list[str]) -> Set[str]:
    """What is not copied of a folder of a release: parts of the names that are `left` out."""
    return left if Path(folder) == release else set()


def _mean(names: Sequence[str], weights: Sequence[Weights]) -> Mapping[str, Tensor]:
    """In fp32, as the sum of a few would lose bits in fp16; of those that have it."""
    found = {name: [each[name].float() for each in weights if name in each] for name in names}
    return {name: sum(values, torch.zeros(())) / len(values) for name, values in found.items()}


def _named(releases: Sequence[Release]) -> str:
    mean = "the mean of " if len(releases) > 1 else ""
    return mean + ", ".join(f"{release.name} {release.config.version}" for release in releases)
