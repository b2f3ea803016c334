"""Small networks trained by the product's own loss, on the velocity or on the score, and what they sample."""

from functools import cache
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn
from torch.quasirandom import SobolEngine

from kinoflow.configs.errors import UserError
from kinoflow.configs.schema import load
from kinoflow.dit_video.flow.matching import FlowConfig, perturb, time_quantile
from kinoflow.dit_video.flow.paths import cond_ot, cosine
from kinoflow.sample.card import read_card
from kinoflow.sample.objective import as_velocity
from kinoflow.sample.schedule import linear
from kinoflow.sample.solver import euler_maruyama, fading
from kinoflow.train.run.config import RunConfig
from kinoflow.train.tasks.export import _write_card
from kinoflow.train.tasks.flow import FlowBatch, flow_loss
from tests.dit_video.mixture import Mixture
from tests.sample.two_sample import differ

COUNT, STEPS, BATCH, WIDTH = 2000, 800, 1024, 48
PATHS = {"cond_ot": cond_ot, "cosine": cosine}
DATA = Mixture((0.4, 0.6), (-1.2, 0.8), (0.4, 0.5))


class Net(nn.Module):
    """A field of one dimension: x, t and log t through three hidden layers. It sees no text."""

    def __init__(self) -> None:
        super().__init__()
        sizes = (3, WIDTH, WIDTH, WIDTH)
        layers = [layer for pair in pairwise(sizes) for layer in (nn.Linear(*pair), nn.SiLU())]
        self.layers = nn.Sequential(*layers, nn.Linear(WIDTH, 1))

    def forward(self, x: Tensor, t: Tensor, condition: tuple = ()) -> Tensor:
        assert condition == ()
        t = t.view(-1, *(1,) * (x.ndim - 1)).expand_as(x)
        return self.layers(torch.stack([x, t, 0.25 * (t + 0.01).log()], dim=-1))[..., 0]


def batch(draws: SobolEngine, flow: FlowConfig) -> FlowBatch:
    """Data, noise and times as latents of one value; evenly spread, so that few steps see enough of them."""
    component, data, noise, time = draws.draw(BATCH, dtype=torch.float64).clamp(1e-6, 1 - 1e-6).T
    which = (component > DATA.weights[0]).long()
    mean, std = torch.tensor(DATA.means)[which], torch.tensor(DATA.stds)[which]
    latent = (mean + std * torch.special.ndtri(data)).float().view(-1, 1, 1, 1, 1)
    return FlowBatch(
        latent=latent,
        noise=torch.special.ndtri(noise).float().view_as(latent),
        time=time_quantile(time, flow).float(),
        condition=(),
        dropout=torch.tensor(0),
    )


@cache
def trained(objective: str, path: str) -> Net:
    """A network of this objective."""
    flow, draws = FlowConfig(objective=objective, path=path, time="uniform"), SobolEngine(4, True, 1)
    torch.manual_seed(0)
    net = Net()
    optimizer = torch.optim.Adam(net.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=STEPS)
    for _ in range(STEPS):
        optimizer.zero_grad()
        flow_loss(net, batch(draws, flow), flow).mean().backward()
        optimizer.step()
        schedule.step()
    return net.requires_grad_(requires_grad=False)


def networks(kind, name):
    """The velocity, and the score of a second network; of one network it follows by Proposition 1."""
    path = PATHS[name]
    if kind != "two":
        return as_velocity(trained(kind, name), kind, path), None
    score = trained("score", name)
    return as_velocity(trained("velocity", name), "velocity", path), lambda x, t: score(x, t) / path(t).beta


@pytest.mark.parametrize("name", PATHS)
@pytest.mark.parametrize("sigma", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("kind", ["velocity", "score", "two"])
def test_samples_of_trained_networks_have_the_marginals(name, sigma, kind):
    """σ_t constant to t = 0.8, then fading: at 0.8 and 1 the two-sample test of level 1e-3 sees nothing."""
    (velocity, score), path = networks(kind, name), PATHS[name]
    generator = torch.Generator().manual_seed(2)

    def draw():
        return torch.randn(COUNT, generator=generator)

    x = draw()
    for diffusion, grid, t in (
        (lambda _: sigma, linear(200)[:161], 0.8),
        (fading(path, sigma), linear(200)[160:], 1.0),
    ):
        x = euler_maruyama(
            velocity, x, grid, path=path, diffusion_fn=diffusion, noise_fn=draw, score_fn=score
        )
        truth = DATA.at(t, path).sample(COUNT, torch.Generator().manual_seed(3))[0]
        assert not differ(x, truth), t


@pytest.mark.parametrize("objective", ["velocity", "score"])
def test_the_two_objectives_are_not_exchangeable(objective):
    """The test above can fail: a network read as one of the other objective samples something else."""
    other = {"velocity": "score", "score": "velocity"}[objective]
    velocity = as_velocity(trained(objective, "cosine"), other, cosine)
    noise = torch.randn(COUNT, generator=torch.Generator().manual_seed(2))
    x = euler_maruyama(
        velocity, noise, linear(200), path=cosine, diffusion_fn=lambda _: 0.0, noise_fn=noise.clone
    )
    assert differ(x, DATA.sample(COUNT, torch.Generator().manual_seed(3))[0])


@pytest.mark.parametrize("name", PATHS)
def test_the_loss_of_the_score_is_weighted_by_beta_squared(name):
    """β² ‖s − ∇ log p_t(x|z)‖² of equation 1.16, with s what the model gives over β."""
    flow = FlowConfig(objective="score", path=name)
    drawn = batch(SobolEngine(4, True, 0), FlowConfig())
    sample = perturb(drawn.latent, drawn.noise, drawn.time, PATHS[name])
    beta = PATHS[name](drawn.time).beta
    score = torch.sin(sample.x_t)
    found = flow_loss(lambda x, t, _: beta.view(-1, 1, 1, 1, 1) * torch.sin(x), drawn, flow)
    error = score + drawn.noise / beta.view(-1, 1, 1, 1, 1)
    torch.testing.assert_close(found, beta**2 * error.square().flatten(1).mean(1), atol=1e-5, rtol=1e-4)


def test_an_exported_release_says_what_it_was_trained_on(tmp_path):
    before = tmp_path / "before"
    before.mkdir()
    (before / "kinoflow.yaml").write_text("name: before\nsampling: {guidance_scale: 2.0}\n")
    for objective, path in (("score", "cosine"), ("velocity", "cond_ot")):
        config = load(RunConfig, ["model=dit", f"flow.objective={objective}", f"flow.path={path}"])
        card = tmp_path / objective / "kinoflow.yaml"
        card.parent.mkdir()
        _write_card(card, [before], tmp_path / "run", config)
        sampling = read_card(card.parent).sampling
        assert (sampling.objective, sampling.path, sampling.guidance_scale) == (objective, path, 2.0)


def test_an_exported_release_makes_the_clips_that_it_was_trained_on(tmp_path):
    """And those of what it went on from; not those of the release whose text encoders it took."""
    for name, size in (("parts", "32x128x128@16"), ("before", "16x64x64@16")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "kinoflow.yaml").write_text(
            f"name: x\nbuckets: [{size}]\ndefault_bucket: {size}\n"
        )
    own = "data.buckets=[1x64x64@16 weight=2 batch=4]"
    for more, made, default in (
        ([own], ("1x64x64@16",), "1x64x64@16"),
        ([own, f"init_from={tmp_path}/before"], ("16x64x64@16", "1x64x64@16"), "1x64x64@16"),
        ([own, f"init_from={tmp_path}/parts"], ("32x128x128@16", "1x64x64@16"), "32x128x128@16"),
        ([f"data.latents={tmp_path}/gone"], ("32x128x128@16",), "32x128x128@16"),
    ):
        _write_card(
            tmp_path / "kinoflow.yaml",
            [tmp_path / "new", tmp_path / "parts"],
            tmp_path / "run",
            load(RunConfig, ["model=dit", *more]),
        )
        card = read_card(tmp_path)
        assert (card.buckets, card.default_bucket) == (made, default)


def test_a_model_that_predicts_data_has_no_score():
    with pytest.raises(UserError, match=r"flow.objective: .* use dit.predicts=velocity"):
        load(RunConfig, ["model=dit", "flow.objective=score", "dit.predicts=data"])
