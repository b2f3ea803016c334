"""The patch discriminator: its scores' shape and reach, and that it can be trained by its hinge loss."""

import pytest
import torch

from kinoflow.tae.training.discriminator import DiscriminatorConfig, PatchDiscriminator
from kinoflow.tae.training.losses import discriminator_hinge, generator_hinge


def build(channels: int = 8, depth: int = 3) -> PatchDiscriminator:
    torch.manual_seed(0)
    model = PatchDiscriminator(DiscriminatorConfig(channels=channels, depth=depth))
    model.init_weights()
    return model


@pytest.mark.parametrize(("frames", "depth"), [(1, 3), (5, 3), (8, 2)])
def test_a_score_for_every_frame_and_patch(frames: int, depth: int) -> None:
    scores = build(depth=depth)(torch.randn(2, 3, frames, 32, 48))
    assert scores.shape == (2, 1, frames, 32 >> depth, 48 >> depth)


def test_no_clip_of_the_batch_sees_another() -> None:
    model, clips = build(), torch.randn(3, 3, 4, 16, 16)
    alone = torch.cat([model(clip) for clip in clips.split(1)])
    torch.testing.assert_close(model(clips), alone)


def test_a_score_reaches_through_time_and_space_no_further_than_its_patch() -> None:
    """Three layers of kernel 4 and stride 2 under a head of kernel 3: 38 pixels, and four frames each way."""
    model = build(depth=3)
    for index in range(len(model.norms)):
        model.norms[index] = torch.nn.Identity()  # a norm shares its statistics over the whole clip
    clip = torch.randn(1, 3, 13, 96, 96, requires_grad=True)
    model(clip)[0, 0, 6, 6, 6].backward()
    assert clip.grad is not None
    seen = clip.grad[0].abs().sum(dim=0).nonzero()
    extent = seen.max(dim=0).values - seen.min(dim=0).values + 1
    assert extent.tolist() == [9, 38, 38]


def test_hinge_gradients_are_its_closed_form() -> None:
    """Real pulls only below 1, fake only above -1; the decoder is always pulled up."""
    real = torch.tensor([2.0, 0.5], dtype=torch.float64, requires_grad=True)
    fake = torch.tensor([-3.0, 0.25], dtype=torch.float64, requires_grad=True)
    grads = torch.autograd.grad(discriminator_hinge(real, fake), (real, fake))
    assert [grad.tolist() for grad in grads] == [[0.0, -0.25], [0.0, 0.25]]
    assert torch.autograd.grad(generator_hinge(fake), fake)[0].tolist() == [-0.5, -0.5]


def test_it_learns_to_tell_moving_from_still() -> None:
    """The same frames, in motion or not: only a discriminator that sees time can tell."""
    model, generator = build(), torch.Generator().manual_seed(1)
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3, betas=(0.5, 0.9))
    for _ in range(40):
        still = torch.randn(4, 3, 1, 16, 16, generator=generator).expand(-1, -1, 4, -1, -1)
        moving = torch.stack([still[:, :, t].roll(2 * t, dims=-1) for t in range(4)], dim=2)
        loss = discriminator_hinge(model(moving), model(still))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert float(loss.detach()) < 0.3


@pytest.mark.parametrize("wrong", [{"channels": 0}, {"depth": 0}])
def test_an_impossible_shape_is_named(wrong: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="discriminator"):
        DiscriminatorConfig(**wrong)
