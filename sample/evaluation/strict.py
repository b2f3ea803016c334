"""The strict judge: a small network that names everything that a caption of the world can name.

What it answers is compared with the whole caption (`data.world.questions`). The first judge averages over
places; this one looks at several, and keeps when and where they are. Letters: b clips, f frames, c channels,
h w sides, k places.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from kinoflow.data.world import WORDS
from kinoflow.data.world.questions import QUESTIONS
from kinoflow.sample.evaluation.judge import (
    ALPHABET,
    Judging,
    level,
    prepared,
    read_sign,
    sign_reader,
    spell,
)

_MOMENTS = 4  # mean x and y, mean square of each
_TIMES = 4  # a clip's frames are halved twice, and each of what is left is looked at
# Of the few numbers that say where and how long, each tells more than one of the thousand features beside it,
# and learns faster for being larger.
_OF_POSITIONS, _OF_SECONDS, _USUAL_SECONDS = 4.0, 8.0, 1.5


@dataclass(frozen=True, kw_only=True)
class StrictConfig:
    """Shape of the strict judge and the names of its classes. Clips are brought to 16 x side x side."""

    side: int = 64
    widths: tuple[int, ...] = (24, 40, 64, 96)
    reading_width: int = 32
    places: int = 8
    """Places that it looks at in each of four times."""
    value_width: int = 24
    hidden: tuple[int, ...] = (144, 96)
    questions: dict[str, tuple[str, ...]] = field(default_factory=lambda: dict(QUESTIONS))
    letters: int = max(map(len, WORDS))

    def __post_init__(self) -> None:
        if len(self.widths) != 4 or len(self.hidden) != 2:
            raise ValueError("widths, hidden: the strict judge has four levels and two hidden layers")
        if min(*self.widths, *self.hidden, self.reading_width, self.places, self.value_width) < 1:
            raise ValueError("widths: each must be at least 1")
        if self.side % 8:
            raise ValueError("side: must be a multiple of 8")

    @property
    def frames(self) -> int:
        """Of the clips that it sees."""
        return 4 * _TIMES


@dataclass(frozen=True, kw_only=True)
class Answers:
    """Logits of each question, and of each letter of the sign."""

    classes: Mapping[str, Float[Tensor, "b _"]]
    letters: Float[Tensor, "b letters classes"]


class StrictJudge(Judging):
    """Spatio-temporal convolutions; places found by attention, whose features and positions answer."""

    config_type = StrictConfig
    config: StrictConfig

    def __init__(self, config: StrictConfig) -> None:
        super().__init__()
        self.config = config
        first, second, third, fourth = config.widths
        self.stem = level(3, first, (3, 5, 5), (2, 2, 2))
        self.level2 = level(first, second, (3, 3, 3), (1, 2, 2))
        self.level3 = level(second, third, (3, 3, 3), (2, 2, 2))
        self.level4 = level(third, fourth, (3, 3, 3), (1, 1, 1))
        self.where = nn.Conv3d(fourth, config.places, 1)
        self.what = nn.Conv3d(fourth, config.value_width, 1)
        looked = _TIMES * config.places * (config.value_width + _MOMENTS)
        self.hidden1 = nn.Linear(looked + 2 * fourth + 1, config.hidden[0])
        self.hidden2 = nn.Linear(config.hidden[0], config.hidden[1])
        self.heads = nn.ModuleDict(
            {key: nn.Linear(config.hidden[1], len(names)) for key, names in config.questions.items()}
        )
        self.reader = sign_reader(first, config.reading_width)
        self.row = nn.Conv2d(config.reading_width, 1, 1)
        self.letters = nn.Linear(config.reading_width * (config.side // 4), config.letters * len(ALPHABET))

    def forward(self, video: Float[Tensor, "b 3 f h w"], seconds: Float[Tensor, " b"]) -> Answers:
        """Judge clips of exactly the configured frames and side, RGB in [-1, 1].

        `seconds` is from the first to the last frame: what is slow in a short clip goes as far in a long one.
        """
        x = self.stem(video.contiguous(memory_format=torch.channels_last_3d))
        letters = read_sign(x.mean(dim=2), self.reader, self.row, self.letters)
        x = self.level4(self.level3(self.level2(x)))
        whole = torch.cat((x.mean(dim=(2, 3, 4)), x.amax(dim=(2, 3, 4))), dim=1)
        lasts = _OF_SECONDS * (seconds.to(x)[:, None] - _USUAL_SECONDS)
        known = torch.cat((self._look(x), whole, lasts), dim=1)
        known = self.hidden2(self.hidden1(known).relu()).relu()
        return Answers(classes={key: head(known) for key, head in self.heads.items()}, letters=letters)

    def _look(self, x: Float[Tensor, "b c f h w"]) -> Float[Tensor, "b d"]:
        """What is at each of k places in each frame, where that is, in [-4, 4], and how far it spreads."""
        weights = rearrange(self.where(x), "b k f h w -> b f k (h w)").softmax(dim=-1)
        values = rearrange(self.what(x), "b c f h w -> b f (h w) c")
        down, across = (torch.linspace(-1, 1, size).to(x) for size in x.shape[-2:])
        grid = torch.cartesian_prod(down, across)
        moments = _OF_POSITIONS * torch.cat((grid, grid.square()), dim=-1)
        return torch.cat((weights @ values, weights @ moments), dim=-1).flatten(1)

    def prepare(self, clips: UInt8[Tensor, "b f h w 3"]) -> Float[Tensor, "b 3 frames side side"]:
        """Clips of any size as it sees them (`prepared`)."""
        return prepared(clips, self.config.frames, self.config.side)

    @torch.no_grad()
    def judge(
        self, clips: Sequence[UInt8[np.ndarray, "f h w 3"]], fps: Fraction, batch_size: int = 16
    ) -> tuple[dict[str, str], ...]:
        """The answer to each question, and the word, of uint8 RGB clips of any size, in evaluation mode."""
        self.eval()
        labels: list[dict[str, str]] = []
        for start in range(0, len(clips), batch_size):
            labels += self.name(self.answers(clips[start : start + batch_size], fps))
        return tuple(labels)

    def answers(self, clips: Sequence[UInt8[np.ndarray, "f h w 3"]], fps: Fraction) -> Answers:
        """The logits of uint8 RGB clips of any size, all at once."""
        video = torch.cat([self.prepare(torch.from_numpy(np.asarray(clip))[None]) for clip in clips])
        return self(video, torch.tensor([float((len(clip) - 1) / fps) for clip in clips]))

    def name(self, seen: Answers) -> list[dict[str, str]]:
        """The likeliest classes by name."""
        chosen = {key: logits.argmax(dim=1).tolist() for key, logits in seen.classes.items()}
        return [
            {key: self.config.questions[key][chosen[key][index]] for key in chosen} | {"word": spell(word)}
            for index, word in enumerate(seen.letters.argmax(dim=2).tolist())
        ]
