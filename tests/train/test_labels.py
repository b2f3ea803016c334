"""A run that learns classes: what its data must be, and the release that comes of it."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch

from kinoflow.configs.errors import UserError
from kinoflow.configs.schema import dump, load
from kinoflow.data.latents.index import LatentIndex, read_index
from kinoflow.data.latents.shards import LatentDataset, begin
from kinoflow.dit_video import UNet
from kinoflow.sample.card import ReleaseConfig
from kinoflow.sample.release import Release
from kinoflow.train.__main__ import main
from kinoflow.train.plan.flops import dit_flops, total
from kinoflow.train.run.config import RunConfig
from kinoflow.train.run.processes import Processes
from kinoflow.train.run.spread import Spread
from kinoflow.train.tasks.flow_task import FlowTask
from kinoflow.train.tasks.held_out import HeldOut
from tests.labelled import CLASSES, write_pictures
from tests.train.tiny import STREAMS

SHAPES = {
    "unet": ["model=unet", "unet.channels=[8,16]", "unet.layers=1", "unet.width=8", "unet.classes=3"],
    "dit": ["model=dit", "dit.width=16", "dit.depth=1", "dit.heads=2", "dit.ffn=24", "dit.latent_channels=1",
            "dit.text_widths=[]", "dit.classes=3"],
}  # fmt: skip
every_backbone = pytest.mark.parametrize("name", SHAPES)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return write_pictures(tmp_path_factory.mktemp("pictures"))


@pytest.fixture(scope="module")
def others(tmp_path_factory):
    return write_pictures(tmp_path_factory.mktemp("others"), seed=1)


def task(name, pictures, *words):
    config = load(RunConfig, [*SHAPES[name], f"data.latents={pictures}", "data.batch_size=6", *words])
    return FlowTask(config)


def prepared(made):
    processes = Processes(rank=0, size=1, device=torch.device("cpu"))
    made.prepare(Spread(config=made.config, processes=processes))
    return made


def test_a_batch_has_the_labels_of_its_pictures_and_drops_some(pictures):
    made = task("unet", pictures, "flow.drop_all=0.5")
    dataset, dropped = LatentDataset(pictures), []
    (bucket,) = dataset.buckets
    every = dataset.get(bucket, np.arange(12), np.zeros((12, 1), np.int64))
    assert every.labels.tolist() == [0, 1, 2] * 4 and every.texts == ()
    for step in range(40):
        batch = made.batch(step, 0, 1)
        for latent, label in zip(batch.latent, batch.condition.index.tolist(), strict=True):
            (place,) = [i for i in range(12) if torch.equal(latent, every.latent[i])]
            assert label in (int(every.labels[place]), 3)
            dropped.append(label == 3)
    assert 0.4 < sum(dropped) / len(dropped) < 0.6
    halves = [made.batch(7, i, 2).condition.index for i in range(2)]
    assert torch.equal(torch.cat(halves), made.batch(7, 0, 1).condition.index)
    assert HeldOut(pictures, 4, 32)[0].condition.index.tolist() == [
        label for label in (0, 1, 1, 2) for _ in range(8)
    ]


@every_backbone
def test_some_steps_make_the_loss_smaller(name, pictures):
    made = prepared(task(name, pictures))
    optimizer = torch.optim.AdamW(made.model.parameters(), lr=1e-2)
    losses = []
    for step in range(60):
        loss = made.loss(made.model, made.batch(step, 0, 1), step).total
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert np.mean(losses[-10:]) < 0.6 * np.mean(losses[:3])


def test_the_log_counts_cells_and_the_transformers_flops(pictures):
    made = task("dit", pictures)
    batch = made.batch(0, 0, 1)
    assert made.tokens(batch) == 6 * 4 * 4
    assert made.flops(batch) == 6 * total(dit_flops(made.config.dit, 16, ())).model
    unet = task("unet", pictures)
    assert (unet.tokens(batch), unet.flops(batch)) == (6 * 8 * 8, 0)


@pytest.mark.parametrize(
    ("name", "words", "said"),
    [
        ("unet", ["unet.classes=4"], r"unet\.classes: 4, but .* holds labels of 3 classes; set unet\.cl"),
        (
            "dit",
            ["dit.classes=0", "dit.text_widths=[4]"],
            r"dit\.classes: 0, but .* holds labels of 3 classes; set dit\.classes=3 dit\.text_widths=\[\]$",
        ),
        ("unet", ["unet.latent_channels=3"], r"unet\.latent_channels: 3, but .* holds 1; set unet\.latent"),
        ("unet", ["unet.channels=[8,8,8,8,8]"], r"data\.buckets: 1x8x8@1: latent height: 8 is no m"),
        ("dit", ["dit.patch_size=[1,3,3]"], r"data\.buckets: 1x8x8@1: latent height: 8 does not divide"),
        ("unet", ["preview_every=1", "preview_prompts=world"], "preview_prompts: a run that learns classes"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_one_line_before_the_first_step(pictures, name, words, said):
    with pytest.raises(UserError, match=said) as error:
        prepared(task(name, pictures, *words))
    assert "\n" not in str(error.value)


def test_texts_for_a_model_of_labels_are_refused(latents):
    with pytest.raises(
        UserError, match=r"unet\.classes: 3, but .* holds texts; set unet\.classes=0 unet\.text_w"
    ):
        prepared(task("unet", latents))


def test_pooled_text_that_is_not_stored_is_refused(tmp_path):
    index = LatentIndex(
        buckets={"1x16x16@16": 0}, shard_size=4, captions_per_clip=1, widths=(2, 3), made_from={"tae": ""},
        latent_mean=(0.0, 0.0), latent_std=(1.0, 1.0),
    )  # fmt: skip
    begin(tmp_path, index, [np.zeros((1, width)) for width in index.widths])
    words = ["model=mmdit", *STREAMS, "mmdit.text_widths=[2,3]", f"data.latents={tmp_path}"]
    assert FlowTask(load(RunConfig, words)).data.latents.index.widths == (2, 3)
    with pytest.raises(UserError, match=r"mmdit\.pooled_width: 4, but .* holds no pooled text; set mmdit"):
        _ = FlowTask(load(RunConfig, [*words, "mmdit.pooled_width=4"])).data.latents


def test_held_out_pictures_have_the_same_classes(pictures, others, tmp_path):
    watched = ["validation.every=10"]
    assert task("unet", pictures, f"validation.latents={others}", *watched).held_out
    shutil.copytree(others, tmp_path / "swapped")
    index = tmp_path / "swapped" / "index.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | {"classes": [*CLASSES[::-1]]}))
    with pytest.raises(UserError, match="swapped: has other classes than"):
        _ = task("unet", pictures, f"validation.latents={tmp_path / 'swapped'}", *watched).held_out


@pytest.fixture(scope="module")
def run(start_job, pictures, tmp_path_factory):
    """A U-Net after three steps."""
    folder = tmp_path_factory.mktemp("runs") / "digits"
    words = [f"run={folder}", f"data.latents={pictures}", "steps=3", "data.batch_size=6", "data.workers=0"]
    job = start_job("command", [*SHAPES["unet"], *words])
    assert job.wait() == [0], job.text()
    return folder


def test_export_writes_a_release_that_needs_nothing_else(run, pictures, tmp_path, capsys):
    target = tmp_path / "release"
    assert main(["export", str(run), str(target)]) == 0
    assert f"next: kinoflow sample --label dark --weights {target}" in capsys.readouterr().out
    assert sorted(path.name for path in target.iterdir()) == ["kinoflow.yaml", "unet"]
    release = Release.load(target)
    assert release.config == ReleaseConfig(
        name="digits", buckets=("1x8x8@1",), default_bucket="1x8x8@1", classes=CLASSES, pixels=1
    )
    assert UNet.from_pretrained(target / "unet").config == load(RunConfig, SHAPES["unet"]).unet
    before = (target / "kinoflow.yaml").read_bytes()
    assert main(["export", str(run), str(target)]) == 0
    assert (target / "kinoflow.yaml").read_bytes() == before


def test_export_keeps_a_card_and_names_its_classes(run, tmp_path):
    target = tmp_path / "release"
    target.mkdir()
    buckets = ("1x8x8@1", "1x16x16@1")
    card = ReleaseConfig(name="mine", buckets=buckets, default_bucket="1x16x16@1", pixels=1, best_of=3)
    dump(card, target / "kinoflow.yaml")
    assert main(["export", str(run), str(target)]) == 0
    # There is no verifier of classes.
    assert Release.load(target).config == replace(card, name="digits", classes=CLASSES, best_of=1)


def test_export_beside_another_backbone_is_refused(run, tmp_path, capsys):
    (tmp_path / "release" / "dit").mkdir(parents=True)
    assert main(["export", str(run), str(tmp_path / "release")]) == 2
    assert f"has dit/, and {run} gives unet/; name another folder" in capsys.readouterr().err


def test_validate_and_average_take_it(run, others, latents, tmp_path, capsys):
    target = tmp_path / "release"
    assert main(["export", str(run), str(target)]) == 0
    capsys.readouterr()
    assert main(["validate", str(target), str(others), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert 0 < found["validation_loss"] < 10
    assert main(["validate", str(target), str(latents)]) == 2
    assert "made with another autoencoder" in capsys.readouterr().err
    assert main(["average", str(tmp_path / "mean"), str(target), str(target)]) == 0
    own, mean = (UNet.from_pretrained(folder / "unet").state_dict() for folder in (target, tmp_path / "mean"))
    assert all(torch.equal(own[key], mean[key]) for key in own)
    assert Release.load(tmp_path / "mean").config.classes == CLASSES


def test_a_plan_is_made_for_a_transformer_of_labels_and_refused_for_a_unet(capsys):
    words = ["data.buckets=[1x64x64@1]", "--json"]
    assert main(["plan", *SHAPES["dit"], *words]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["text_encoders"] == [] and found["precomputation"] == {}
    assert not any("cross" in part for part in found["flops"]["per_clip"]["1x64x64@1"])
    assert main(["plan", *SHAPES["unet"], *words]) == 2
    assert "model: unet needs no cluster; the planner takes dit, mmdit and tae" in capsys.readouterr().err


def test_folders_of_texts_read_as_before(latents):
    assert read_index(latents).classes == ()
    assert "classes" not in json.loads((latents / "index.json").read_text())
