"""What a latent folder says of itself: `index.json`."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from kinoflow.configs.errors import UserError

INDEX, FORMAT = "index.json", 2
# What made_from says in the place of an autoencoder and of text encoders where there are none.
PIXELS, LABELS = "pixels", "labels"
_LATER = ("classes", "keyframes", "pooled", "upsample")


@dataclass(frozen=True, kw_only=True)
class LatentIndex:
    """What a latent folder holds. `buckets` maps a bucket's name (data.buckets' form) to its number of clips.

    `widths` are those of the text encoders' states. `made_from` describes the source and the encoders; "tae"
    is the autoencoder's fingerprint, as in a latent file. Shards are added only under an equal description.
    `latent_mean` and `latent_std`, a value a channel, are that autoencoder's: they normalize what is read.
    `classes` are the names of the clips' classes in the order of their labels; empty where they have texts.
    `keyframes` says that clips of more than one frame have latents of single frames too. `pooled` are widths
    of the encoders' pooled texts, 0 of one that gives none; empty where none does. With `upsample` each frame
    has a latent of its own, and so has that of a clip so many times smaller.
    """

    buckets: Mapping[str, int]
    shard_size: int
    captions_per_clip: int
    widths: tuple[int, ...]
    made_from: Mapping[str, str]
    latent_mean: tuple[float, ...]
    latent_std: tuple[float, ...]
    classes: tuple[str, ...] = ()
    keyframes: bool = False
    pooled: tuple[int, ...] = ()
    upsample: int = 0

    def __post_init__(self) -> None:
        if not len(self.latent_mean) == len(self.latent_std) > 0 or min(self.latent_std) <= 0:
            raise UserError("tae.latent_mean: not measured; export the autoencoder from its run first")
        places = [name.partition(" ")[0] for name in self.buckets]
        for place in places:
            if places.count(place) > 1:
                raise UserError(f"buckets: {place} is listed twice, once is enough")

    def described(self) -> dict[str, Any]:
        """As index.json has it: what came later only where there is some, as before there was any."""
        return {key: value for key, value in asdict(self).items() if value or key not in _LATER}

    def num_shards(self, bucket: str) -> int:
        """Shards of a bucket; the last may be shorter."""
        return -(-self.buckets[bucket] // self.shard_size)

    def shard_clips(self, bucket: str, shard: int) -> range:
        """The clips of a shard."""
        return range(shard * self.shard_size, min((shard + 1) * self.shard_size, self.buckets[bucket]))


def read_index(folder: Path) -> LatentIndex:
    """The index of a latent folder.

    Raises:
        UserError: there is none, or it is damaged.
    """
    try:
        content = json.loads((folder / INDEX).read_text(encoding="utf-8"))
        if (written := content.pop("format")) != FORMAT:
            raise UserError(f"{folder / INDEX}: has format {written}, this kinoflow reads {FORMAT}; delete "
                              f"{folder} and run precompute again")  # fmt: skip
        lists = {key: tuple(content[key]) for key in ("widths", "latent_mean", "latent_std")}
        later = {key: tuple(content.get(key, ())) for key in ("classes", "pooled")}
        return LatentIndex(**{**content, **lists, **later})
    except FileNotFoundError as error:
        raise UserError(f"{folder / INDEX} is missing: write it with `kinoflow train precompute "
                          f"out={folder}`") from error  # fmt: skip
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{folder / INDEX} is damaged; delete {folder}, run precompute again") from error
