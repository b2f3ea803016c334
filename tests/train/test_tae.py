"""The autoencoder's training step: the adversarial term, its start, and who gets which gradient."""

from pathlib import Path

import pytest
import torch
from torch import nn

from kinoflow.configs.errors import UserError
from kinoflow.configs.schema import load
from kinoflow.data.clips.buckets import parse
from kinoflow.data.world import sample_scene
from kinoflow.sample.evaluation.world import reconstruction_psnr, renders
from kinoflow.tae import TAE
from kinoflow.tae.training.losses import generator_hinge
from kinoflow.tae.training.perceptual import PerceptualDistance
from kinoflow.train.run.config import RunConfig
from kinoflow.train.run.optimizer import adamw, learning_rate
from kinoflow.train.run.processes import Processes
from kinoflow.train.run.spread import Spread
from kinoflow.train.tasks.tae import TAETask, every_nth

START = 2
SOURCES = [
    "data.workers=0",
    "tae.channels=32",
    "tae.multipliers=[1,1]",
    "tae.strides=[[2,2,2]]",
    "tae.encoder_blocks=[1,1]",
    "tae.decoder_blocks=[1,1]",
    "tae.latent_channels=4",
    "discriminator.channels=8",
    "discriminator.depth=2",
    "loss.adversarial=0.05",
    f"loss.adversarial_start={START}",
    "data.buckets=['4x16x16@16']",
    "data.batch_size=2",
    "data.world_share=1",
]


@pytest.fixture
def task(tmp_path: Path) -> TAETask:
    return TAETask(load(RunConfig, [*SOURCES, f"run={tmp_path}"]))


def gradients(model: nn.Module) -> list[torch.Tensor]:
    return [parameter.grad for parameter in model.parameters() if parameter.grad is not None]


def test_the_adversarial_term_switches_on_at_its_step(task: TAETask) -> None:
    critic = task.discriminator
    assert critic is not None
    models = {"autoencoder": task.model, "discriminator": critic}
    optimizers = {name: torch.optim.Adam(model.parameters(), lr=1e-3) for name, model in models.items()}
    for step in range(START + 2):
        batch = task.batch(step, 0, 1)
        before = {name: nn.utils.parameters_to_vector(m.parameters()).detach() for name, m in models.items()}
        critic.requires_grad_(False)
        found = task.loss(task.model, batch, step)
        found.total.backward()
        critic.requires_grad_(True)
        assert not gradients(critic), "the autoencoder's loss reaches the discriminator"
        assert found.output is not None and not found.output.requires_grad
        own = task.discriminator_loss(critic, batch, found.output, step)
        assert ("generator" in found.parts, own is not None) == (step >= START,) * 2
        if own is not None:
            count = len(gradients(task.model))
            saved = [grad.clone() for grad in gradients(task.model)]
            own.total.backward()
            assert len(gradients(task.model)) == count
            for grad, kept in zip(gradients(task.model), saved, strict=True):
                assert torch.equal(grad, kept), "the discriminator's loss reaches the autoencoder"
            assert gradients(critic)
            assert set(own.parts) == {"real", "fake"}
        for name, optimizer in optimizers.items():
            optimizer.step()
            optimizer.zero_grad()
            moved = nn.utils.parameters_to_vector(models[name].parameters()) - before[name]
            assert bool(moved.any()) == (name == "autoencoder" or step >= START)


def test_the_term_is_the_hinge_of_the_reconstruction_at_its_weight(task: TAETask) -> None:
    batch, weights = task.batch(START, 0, 1), task.config.loss
    found, before = task.loss(task.model, batch, START), task.loss(task.model, batch, START - 1)
    assert task.discriminator is not None
    expected = generator_hinge(task.discriminator(task.model(batch.video, batch.noise).video))
    torch.testing.assert_close(found.parts["generator"], expected)
    torch.testing.assert_close(
        found.total - before.total, weights.adversarial * expected, atol=1e-6, rtol=1e-4
    )
    assert set(found.parts) - set(before.parts) == {"generator"}


def test_without_weight_there_is_no_discriminator(tmp_path: Path) -> None:
    task = TAETask(load(RunConfig, [*SOURCES, f"run={tmp_path}", "loss.adversarial=0"]))
    assert task.discriminator is None
    assert "generator" not in task.loss(task.model, task.batch(START, 0, 1), START).parts


@pytest.mark.parametrize(("frames", "every"), [(16, 8), (16, 1), (5, 2), (3, 8), (1, 8)])
def test_every_nth_comes_to_all_frames(frames: int, every: int) -> None:
    chosen = [range(frames)[every_nth(frames, every, step)] for step in range(7, 7 + every)]
    assert all(len(some) >= frames // every for some in chosen)
    assert {frame for some in chosen for frame in some} == set(range(frames))


def test_the_perceptual_term_is_the_distance_of_its_frames(tmp_path: Path, monkeypatch) -> None:
    asked = []

    class Distance(nn.Module):
        def forward(self, video: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
            asked.append((video, target))
            return (video - target).abs().mean()

    monkeypatch.setattr(PerceptualDistance, "from_file", lambda _: Distance())
    terms = ["loss.perceptual=0.5", "loss.perceptual_every=2", "loss.l1=0", "loss.kl=0", "loss.outlier=0"]
    task = TAETask(load(RunConfig, [*SOURCES, *terms, f"run={tmp_path}"]))
    batch = task.batch(1, 0, 1)
    found = task.loss(task.model, batch, 1)
    ((video, target),) = asked
    assert torch.equal(target, batch.video[:, :, 1::2])
    assert video.shape == target.shape
    torch.testing.assert_close(found.total, 0.5 * found.parts["perceptual"])


def test_a_training_goes_on_from_a_release(task: TAETask, tmp_path: Path) -> None:
    """With weights in plain memory: DeepSpeed refuses others. What inference reads is channels-last."""
    assert isinstance(task.model, TAE)
    task.model.save_pretrained(tmp_path / "tae")
    later = TAETask(load(RunConfig, [*SOURCES, f"run={tmp_path}", f"init_from={tmp_path}"]))
    for name, parameter in later.model.named_parameters():
        assert parameter.is_contiguous(), name
        assert torch.equal(parameter, task.model.state_dict()[name])
    assert later.model.training


def test_the_recipe_trains_the_shipped_weights_on(tmp_path: Path, monkeypatch) -> None:
    """Neither does the loss leap nor does a clip come back worse: at the paper's outlier loss both do."""
    monkeypatch.chdir(Path(__file__).parents[2])
    data = ["data.buckets=[8x64x64@16]", "data.world_share=1", "data.batch_size=2", "init_from=sample/mini"]
    task = TAETask(load(RunConfig, ["configs/tae_mini.yaml", *data, f"run={tmp_path}"]))
    clips = renders([sample_scene(index, split="heldout") for index in range(4)], parse("8x64x64@16"))
    optimizer, losses = adamw(task.model, task.config.optimizer), []
    before = reconstruction_psnr(task.model, clips)
    for step in range(6):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(task.config.optimizer, step, 300)
        loss = task.loss(task.model, task.batch(step, 0, 1), step).total
        loss.backward()
        nn.utils.clip_grad_norm_(task.model.parameters(), task.config.optimizer.grad_clip)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert max(losses) < 0.2
    assert reconstruction_psnr(task.model, clips) > before - 0.1


def test_a_frozen_encoder_gives_the_latents_of_before(task: TAETask, tmp_path: Path) -> None:
    """Weights, gradients and the statistics that normalize the latents."""
    assert isinstance(task.model, TAE)
    mean, std = torch.arange(4.0), torch.arange(1.0, 5.0)
    task.model.with_statistics(mean, std).save_pretrained(tmp_path / "tae")
    sources = [*SOURCES, f"run={tmp_path}", f"init_from={tmp_path}"]
    later = TAETask(load(RunConfig, [*sources, "freeze_encoder=true"]))
    later.loss(later.model, later.batch(0, 0, 1), 0).total.backward()
    trained = {name.partition(".")[0] for name, p in later.model.named_parameters() if p.grad is not None}
    assert trained == {"decoder"}
    state = {name: value + 0.5 for name, value in later.model.state_dict().items()}
    later.export(state, tmp_path / "out")
    exported = TAE.from_pretrained(tmp_path / "out" / "tae").config
    assert (exported.latent_mean, exported.latent_std) == (tuple(mean.tolist()), tuple(std.tolist()))


def test_a_decoder_that_grows_starts_as_the_one_before(task: TAETask, tmp_path: Path) -> None:
    assert isinstance(task.model, TAE)
    task.model.save_pretrained(tmp_path / "tae")
    sources = [
        *SOURCES,
        f"run={tmp_path}",
        f"init_from={tmp_path}",
        "freeze_encoder=true",
        "grow.decoder_blocks=2",
    ]
    later = TAETask(load(RunConfig, sources))
    assert isinstance(later.model, TAE)
    assert later.model.training
    old, new = task.model.state_dict(), later.model.state_dict()
    assert old.keys() < new.keys() and all(torch.equal(old[name], new[name]) for name in old)
    assert later.model.config.decoder_blocks[0] == task.model.config.decoder_blocks[0] + 2
    batch = later.batch(0, 0, 1)
    with torch.no_grad():
        before, after = (model(batch.video).video for model in (task.model, later.model))
    assert torch.equal(before, after)


def test_a_frozen_encoder_does_not_grow() -> None:
    with pytest.raises(UserError, match=r"grow\.encoder_blocks"):
        load(RunConfig, [*SOURCES, "init_from=x", "freeze_encoder=true", "grow.encoder_blocks=1"])


@pytest.mark.parametrize("sources", [["model=tae"], ["model=dit", "init_from=x"]], ids=str)
@pytest.mark.parametrize(("key", "value"), [("freeze_encoder", "true"), ("grow.decoder_blocks", "2")])
def test_only_a_trained_autoencoder_is_frozen_or_grows(sources: list[str], key: str, value: str) -> None:
    with pytest.raises(UserError, match=key.partition(".")[0]):
        load(RunConfig, [*sources, f"{key}={value}"])


def test_encoder_and_decoder_are_compiled_before_the_run(tmp_path: Path, monkeypatch) -> None:
    compiled = []
    monkeypatch.setattr(nn.Module, "compile", lambda part, **options: compiled.append(part))
    for sources in ([], ["parallel.compile=true"]):
        task = TAETask(load(RunConfig, [*SOURCES, f"run={tmp_path}", *sources]))
        assert compiled == []
        processes = Processes(rank=0, size=1, device=torch.device("cpu"))
        task.prepare(Spread(config=task.config, processes=processes))
    assert compiled == [task.model.encoder, task.model.decoder]


def test_a_batch_of_a_bucket_that_does_not_divide_is_refused_before_the_first_step(tmp_path: Path) -> None:
    buckets = "data.buckets=['4x16x16@16','1x16x16@16 weight=0.001 batch=3']"
    task = TAETask(load(RunConfig, [*SOURCES, buckets, f"run={tmp_path}"]))
    processes = Processes(rank=0, size=2, device=torch.device("cpu"))
    with pytest.raises(UserError, match=r"^data\.buckets: the 3 clips of a batch of 1x16x16@16 .* into 2"):
        task.prepare(Spread(config=task.config, processes=processes))
