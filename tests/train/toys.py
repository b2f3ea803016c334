"""A training task of a few matrices."""

import time

import torch
from torch import nn

from kinoflow.train.run.task import Loss


class Net(nn.Module):
    """Odd sizes, so that ZeRO splits inside parameters and pads; a bare parameter; a buffer."""

    def __init__(self, width=23):
        super().__init__()
        layers = nn.Linear(7, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, 5)
        self.layers = nn.Sequential(*layers)
        self.shift = nn.Parameter(torch.zeros(5))
        self.register_buffer("scale", torch.arange(1.0, 6.0))

    def forward(self, x):
        return self.layers(x) * self.scale + self.shift


class Critic(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(5, 11), nn.SiLU(), nn.Linear(11, 1))

    def forward(self, y):
        return self.layers(y)


class Toy:
    """A regression; with `adversarial` a critic joins from step 3 on. pause slows every step down.

    In the steps `spoiled` the last sample of the global batch is no number.
    """

    def __init__(self, config, *, adversarial=False, pause=0.0, width=23, spoiled=()):
        torch.manual_seed(config.seed)
        self.config, self.pause, self.spoiled = config, pause, spoiled
        self.model = Net(width)
        self.discriminator = Critic() if adversarial else None

    source = "toys"
    base = None

    def names(self, step, index, slices):
        return [f"toy {step} {index}/{slices}"]

    def validate(self, model, processes):
        return {}

    def prepare(self, spread):
        """There is nothing to do."""

    def batch(self, step, index, slices):
        generator = torch.Generator().manual_seed(self.config.seed * 1000 + step)
        batch = torch.randn(self.config.data.batch_size, 7, generator=generator)
        if step in self.spoiled:
            batch[-1, 3] = torch.nan
        return batch.chunk(slices)[index]

    def loss(self, model, batch, step):
        time.sleep(self.pause)
        output = model(batch)
        error = (output - target(batch)).square().mean()
        total = error
        if self.discriminator is not None and step >= 3:
            total = error - self.discriminator(output).mean()
        return Loss(total=total, parts={"error": error, "constant": 2.0}, output=output.detach())

    def discriminator_loss(self, discriminator, batch, output, step):
        if step < 3:
            return None
        fake = discriminator(output)
        total = (fake - discriminator(target(batch))).square().mean()
        return Loss(total=total, parts={"fake": fake.mean()})

    def preview(self, model, folder, step, processes):
        assert not model.training
        output = model(torch.ones(2, 7))
        if processes.rank == 0:
            torch.save(output, folder / "output.pt")

    def close(self):
        """Nothing is open."""

    def samples(self, batch):
        return len(batch)

    def tokens(self, batch):
        return batch.numel()

    def flops(self, batch):
        return 0.0

    def export(self, state, folder):
        (folder / "tae").mkdir()
        for name in ("config.json", "model.safetensors"):
            (folder / "tae" / name).touch()
        torch.save(dict(state), folder / "tae" / "toy.pt")


def target(batch):
    return 10 * batch[:, :5].sin()
