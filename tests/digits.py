"""A small network that reads digits: which of those that a release draws are what was asked for."""

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import affine_grid, cross_entropy, grid_sample

CLASSES = 10
SIDE = 28
_EPOCHS, _BATCH, _RATE = 20, 100, 2e-3
_TURN, _ZOOM, _SHIFT = 0.2, 0.1, 4 / SIDE  # by how much at most: radians, share, half sides


class Reader(nn.Module):
    """Ten logits of pictures of 28 x 28 in [-1, 1]."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for before, after, stride in ((1, 16, 1), (16, 32, 2), (32, 64, 2), (64, 64, 1)):
            layers += [nn.Conv2d(before, after, 3, stride, padding=1), nn.BatchNorm2d(after), nn.ReLU()]
        self.features = nn.Sequential(*layers, nn.Flatten(), nn.Dropout(0.3))
        self.head = nn.Linear(64 * (SIDE // 4) ** 2, CLASSES)

    def forward(self, pictures: Float[Tensor, "n 1 28 28"]) -> Float[Tensor, "n 10"]:
        return self.head(self.features(pictures))


def learn(
    pictures: Float[Tensor, "n 1 28 28"], labels: Int[Tensor, " n"], *, seed: int = 0, epochs: int = _EPOCHS
) -> Reader:
    """A reader of these digits: half a minute of a core for 4,500 of them."""
    torch.manual_seed(seed)
    reader, generator = Reader(), torch.Generator().manual_seed(seed)
    steps = epochs * -(-len(labels) // _BATCH)
    optimizer = torch.optim.AdamW(reader.parameters(), lr=_RATE)
    rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, _RATE, total_steps=steps, pct_start=0.1)
    for _ in range(epochs):
        for chosen in torch.randperm(len(labels), generator=generator).split(_BATCH):
            changed = warped(pictures[chosen], torch.rand(len(chosen), 4, generator=generator))
            optimizer.zero_grad()
            cross_entropy(reader(changed), labels[chosen]).backward()
            optimizer.step()
            rate.step()
    return reader.eval()


def warped(pictures: Float[Tensor, "n 1 h w"], levels: Float[Tensor, "n 4"]) -> Float[Tensor, "n 1 h w"]:
    """Pictures on black, turned, scaled and moved a little, by levels in [0, 1]; 0.5 leaves them."""
    turn, zoom, right, down = (2 * levels - 1).unbind(dim=1)
    scale, angle = 1 + _ZOOM * zoom, _TURN * turn
    cosine, sine = scale * angle.cos(), scale * angle.sin()
    rows = [cosine, -sine, _SHIFT * right, sine, cosine, _SHIFT * down]
    theta = torch.stack(rows, dim=1).view(-1, 2, 3)
    grid = affine_grid(theta, list(pictures.shape), align_corners=False)
    return grid_sample(pictures + 1, grid, align_corners=False) - 1


@torch.no_grad()
def read(reader: nn.Module, pictures: Float[Tensor, "n 1 28 28"]) -> Int[Tensor, " n"]:
    """What each digit is taken for."""
    return torch.cat([reader(part).argmax(dim=1) for part in pictures.split(500)])


def accuracy(reader: nn.Module, pictures: Float[Tensor, "n 1 28 28"], labels: Int[Tensor, " n"]) -> float:
    """The share of digits that are taken for what they are."""
    return (read(reader, pictures) == labels).double().mean().item()
