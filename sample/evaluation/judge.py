"""The judge: a small network that says what a clip of the world shows.

Letters: b clips, f frames, c channels, h w sides.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn
from torch.nn import functional

from kinoflow.configs.pretrained import load_pretrained, load_state, save_pretrained
from kinoflow.data.world import COLORS, MOTIONS, SHAPES, WORDS
from kinoflow.tae.model.pixels import from_bytes

J = TypeVar("J", bound="Judging")

ALPHABET = " ABCDEFGHIJKLMNOPQRSTUVWXYZ"
"""Classes of one letter; the blank ends a word, and four blanks are no sign at all."""
ATTRIBUTES = ("color", "shape", "motion")


@dataclass(frozen=True, kw_only=True)
class JudgeConfig:
    """Shape of the judge and the names of its classes. Clips are brought to frames x side x side."""

    frames: int = 16
    side: int = 64
    widths: tuple[int, ...] = (24, 40, 64, 96)
    reading_width: int = 32
    colors: tuple[str, ...] = COLORS
    shapes: tuple[str, ...] = SHAPES
    motions: tuple[str, ...] = MOTIONS
    letters: int = max(map(len, WORDS))

    def __post_init__(self) -> None:
        if len(self.widths) != 4 or min(*self.widths, self.reading_width) < 1:
            raise ValueError("widths: the judge has four levels, each at least 1 channel wide")
        if self.frames % 4 or self.side % 16:
            raise ValueError("frames, side: must be multiples of 4 and 16")


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What the judge saw: logits of each question, and the features they come from."""

    color: Float[Tensor, "b colors"]
    shape: Float[Tensor, "b shapes"]
    motion: Float[Tensor, "b motions"]
    letters: Float[Tensor, "b letters classes"]
    features: Float[Tensor, "b d"]


class Judging(nn.Module):
    """What both judges are beside their layers: starting values, and a model folder."""

    config_type: ClassVar[type[Any]]
    config: Any

    def init_weights(self) -> None:
        """Give every parameter its starting value."""
        init_weights(self)

    @classmethod
    def from_pretrained(cls: type[J], source: str | Path) -> J:
        """Read a model folder or hub id; fp32, in evaluation mode.

        Raises:
            UserError: a missing or damaged file.
        """
        config, state = load_pretrained(source, cls.config_type)
        with torch.device("meta"):
            judge = cls(config)
        load_state(judge, state, source)
        channels_last(judge)
        return judge.eval()

    def save_pretrained(self, folder: str | Path, dtype: torch.dtype | None = torch.int8) -> None:
        """Write config.json and safetensors weights into `folder`, in 8 bits unless a `dtype` says else."""
        save_pretrained(folder, config=self.config, state=self.state_dict(), dtype=dtype)


class Judge(Judging):
    """Spatio-temporal convolutions, a question each for color, shape and motion, and a reader of signs."""

    config_type = JudgeConfig
    config: JudgeConfig

    def __init__(self, config: JudgeConfig) -> None:
        super().__init__()
        self.config = config
        first, second, third, fourth = config.widths
        self.stem = level(3, first, (3, 5, 5), (2, 2, 2))
        self.level2 = level(first, second, (3, 3, 3), (1, 2, 2))
        self.level3 = level(second, third, (3, 3, 3), (2, 2, 2))
        self.level4 = level(third, fourth, (3, 3, 3), (1, 2, 2))
        self.color = nn.Linear(2 * fourth, len(config.colors))
        self.shape = nn.Linear(2 * fourth, len(config.shapes))
        self.motion = nn.Linear(2 * fourth, len(config.motions))
        self.reader = sign_reader(first, config.reading_width)
        self.row = nn.Conv2d(config.reading_width, 1, 1)
        cells = config.reading_width * (config.side // 4)
        self.letters = nn.Linear(cells, config.letters * len(ALPHABET))

    def forward(self, video: Float[Tensor, "b 3 f h w"]) -> Verdict:
        """Judge clips of exactly the configured frames and side, RGB in [-1, 1]."""
        x = self.stem(video.contiguous(memory_format=torch.channels_last_3d))
        letters = read_sign(x.mean(dim=2), self.reader, self.row, self.letters)
        x = self.level4(self.level3(self.level2(x)))
        features = torch.cat((x.mean(dim=(2, 3, 4)), x.amax(dim=(2, 3, 4))), dim=1)
        return Verdict(
            color=self.color(features),
            shape=self.shape(features),
            motion=self.motion(features),
            letters=letters,
            features=features,
        )

    def prepare(self, clips: UInt8[Tensor, "b f h w 3"]) -> Float[Tensor, "b 3 frames side side"]:
        """Clips of any size as it sees them (`prepared`)."""
        return prepared(clips, self.config.frames, self.config.side)

    @torch.no_grad()
    def judge(self, clips: Sequence[UInt8[np.ndarray, "f h w 3"]], batch_size: int = 16) -> "Judgement":
        """Labels and features of uint8 RGB clips of any size, `batch_size` at a time."""
        self.eval()
        judgements = []
        for start in range(0, len(clips), batch_size):
            some = clips[start : start + batch_size]
            videos = [self.prepare(torch.from_numpy(np.asarray(clip))[None]) for clip in some]
            judgements.append(self.name(self(torch.cat(videos))))
        return Judgement(
            labels=tuple(label for part in judgements for label in part.labels),
            features=np.concatenate([part.features for part in judgements]),
        )

    def name(self, verdict: Verdict) -> "Judgement":
        """The likeliest classes by name."""
        classes = {"color": self.config.colors, "shape": self.config.shapes, "motion": self.config.motions}
        chosen = {key: getattr(verdict, key).argmax(dim=1).tolist() for key in ATTRIBUTES}
        words = verdict.letters.argmax(dim=2).tolist()
        labels = tuple(
            {key: classes[key][chosen[key][i]] for key in ATTRIBUTES} | {"word": spell(word)}
            for i, word in enumerate(words)
        )
        return Judgement(labels=labels, features=verdict.features.double().numpy(force=True))


@dataclass(frozen=True, kw_only=True)
class Judgement:
    """Labels by name ("color", "shape", "motion", "word") and features of some clips."""

    labels: tuple[dict[str, str], ...]
    features: Float[np.ndarray, "clips d"]


def spell(letters: Sequence[int]) -> str:
    """Classes of letters to a word; what stands after the first blank is not read."""
    return "".join(ALPHABET[letter] for letter in letters).partition(" ")[0]


def letter_classes(word: str, letters: int) -> list[int]:
    """A word ("" if there is no sign) to one class for each letter, blanks at its end."""
    return [ALPHABET.index(letter) for letter in word.ljust(letters)]


def level(
    inputs: int, outputs: int, kernel: tuple[int, int, int], stride: tuple[int, int, int]
) -> nn.Sequential:
    """A convolution in time and space, normalized."""
    padding = (kernel[0] // 2, kernel[1] // 2, kernel[2] // 2)
    conv = nn.Conv3d(inputs, outputs, kernel, stride, padding, bias=False)
    return nn.Sequential(conv, nn.BatchNorm3d(outputs), nn.ReLU())


def sign_reader(inputs: int, width: int) -> nn.Sequential:
    """From a picture's features to those of letters, 4 times smaller in height and 2 in width."""
    return nn.Sequential(
        nn.Conv2d(inputs, width, 3, (2, 1), 1),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        nn.Conv2d(width, width, 3, (2, 2), 1),
        nn.BatchNorm2d(width),
        nn.ReLU(),
    )


def read_sign(
    x: Float[Tensor, "b c h w"], reader: nn.Module, row: nn.Module, letters: nn.Module
) -> Float[Tensor, "b letters classes"]:
    """A sign rests, so that the mean over time shows it: choose a row for each column of it, and read."""
    x = reader(x)
    line = (row(x).softmax(dim=2) * x).sum(dim=2)
    return letters(line.flatten(1)).unflatten(1, (-1, len(ALPHABET)))


def init_weights(module: nn.Module) -> None:
    """Give every parameter of a judge its starting value."""
    for part in module.modules():
        if isinstance(part, nn.Conv2d | nn.Conv3d):
            nn.init.kaiming_normal_(part.weight, nonlinearity="relu")
            if part.bias is not None:
                nn.init.zeros_(part.bias)
        elif isinstance(part, nn.Linear):
            nn.init.normal_(part.weight, std=part.in_features**-0.5)
            nn.init.zeros_(part.bias)
        elif isinstance(part, nn.BatchNorm2d | nn.BatchNorm3d):
            part.reset_parameters()
    channels_last(module)


def channels_last(module: nn.Module) -> None:
    """Lay the kernels out as a CPU wants them: twice as fast."""
    for part in module.modules():
        if isinstance(part, nn.Conv3d):
            part.weight.data = part.weight.data.contiguous(memory_format=torch.channels_last_3d)


def prepared(
    clips: UInt8[Tensor, "b f h w 3"], num_frames: int, side: int
) -> Float[Tensor, "b 3 num_frames side side"]:
    """Evenly spaced frames and area-averaged pixels of clips of any size, RGB in [-1, 1]."""
    count, frames, height, width, _ = clips.shape
    index = torch.linspace(0, frames - 1, num_frames).round().long()
    video = from_bytes(clips[:, index])
    if (height, width) == (side, side):
        return video
    flat = video.transpose(1, 2).flatten(0, 1)
    flat = functional.interpolate(flat, size=(side, side), mode="area")
    return flat.unflatten(0, (count, num_frames)).transpose(1, 2)
