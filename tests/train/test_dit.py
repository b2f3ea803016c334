"""What one step of the backbone regresses onto, and which texts it drops."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from kinoflow.conditioning.embedding import TextEmbedding
from kinoflow.dit_video.flow.matching import FlowConfig, perturb
from kinoflow.dit_video.flow.paths import cond_ot, cosine
from kinoflow.dit_video.lora import LoRAConfig
from kinoflow.train.tasks.flow import FlowBatch
from kinoflow.train.tasks.flow_data import FlowData
from kinoflow.train.tasks.flow_task import FlowTask


def task(flow):
    """A task without a model or data: what is tested asks for neither."""
    made = FlowTask.__new__(FlowTask)
    made.config = SimpleNamespace(flow=flow, lora=LoRAConfig())
    return made


def data(flow, captions=2, widths=(4, 5, 6)):
    """Clips with so many captions, for encoders of these widths."""
    made = FlowData(SimpleNamespace(flow=flow), None)
    index = SimpleNamespace(widths=widths, captions_per_clip=captions)
    made.__dict__["latents"] = SimpleNamespace(index=index)
    return made


def test_texts_are_dropped_all_at_once_and_each_alone():
    flow = FlowConfig(drop_all=0.1, drop_each=0.2)
    choices = data(flow)._choices(np.random.default_rng(0), 50_000)
    assert choices.shape == (50_000, 3)
    dropped = choices == -1
    assert dropped.mean(0).tolist() == pytest.approx([0.28] * 3, abs=0.008)
    assert dropped.all(1).mean() == pytest.approx(0.1 + 0.9 * 0.2**3, abs=0.005)
    kept = np.sort(choices, axis=1)[~dropped.any(1)]
    assert (kept[:, 0] == kept[:, 2]).all()  # one caption of a clip for all encoders
    assert set(kept[:, 0].tolist()) == {0, 1}


def test_the_draw_is_that_of_earlier_runs():
    """A resumed run sees the texts that it would have seen: rows first, then encoders, from one stream."""
    rng, flow = np.random.default_rng(5), FlowConfig()
    caption = rng.integers(2, size=(64, 1))
    dropped = (rng.random((64, 1)) < flow.drop_all) | (rng.random((64, 3)) < flow.drop_each)
    choices = data(flow)._choices(np.random.default_rng(5), 64)
    assert np.array_equal(choices, np.where(dropped, -1, caption))
    assert (choices == -1).any() and (choices >= 0).any()


def test_a_label_is_dropped_with_probability_eta_alone():
    """Those that drop the text of one encoder have no meaning for it."""
    flow = FlowConfig(drop_all=0.3, drop_each=0.9)
    choices = data(flow, captions=1, widths=())._choices(np.random.default_rng(0), 50_000)
    assert choices.shape == (50_000, 1)
    assert set(choices[:, 0].tolist()) == {-1, 0}
    assert (choices == -1).mean() == pytest.approx(0.3, abs=0.008)


@pytest.mark.parametrize(("name", "path"), [("cond_ot", cond_ot), ("cosine", cosine)])
def test_the_loss_is_the_distance_to_the_velocity_of_the_configured_path(name, path):
    text = TextEmbedding(hidden=torch.zeros(3, 2, 4), mask=torch.ones(3, 2, dtype=torch.bool))
    batch = FlowBatch(
        latent=torch.randn(3, 2, 1, 4, 4),
        noise=torch.randn(3, 2, 1, 4, 4),
        time=torch.rand(3),
        condition=(text,),
        dropout=torch.tensor(0),
    )
    seen = []

    def model(x_t, time, texts):
        seen.append((x_t, time, texts))
        return torch.ones_like(x_t)

    loss = task(FlowConfig(path=name)).loss(model, batch, 0).total
    expected = perturb(batch.latent, batch.noise, batch.time, path)
    torch.testing.assert_close(loss, (1 - expected.velocity).square().mean())
    assert torch.equal(seen[0][0], expected.x_t) and seen[0][1] is batch.time and seen[0][2] == (text,)
