"""A later stage of the backbone: it starts from an earlier one and weighs the buckets of its latents."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from kinoflow.configs.errors import UserError
from kinoflow.configs.schema import load
from kinoflow.dit_video import VideoDiT
from kinoflow.dit_video.attention.kernels import math_attention
from kinoflow.train.run.config import RunConfig
from kinoflow.train.run.processes import Processes
from kinoflow.train.run.spread import Spread
from kinoflow.train.tasks import flow_preview as module
from kinoflow.train.tasks.flow_task import FlowTask

SHAPE = ["model=dit", "dit.width=16", "dit.depth=1", "dit.heads=2", "dit.ffn=24"]


def task(*sources: str) -> FlowTask:
    return FlowTask(load(RunConfig, [*SHAPE, *sources]))


def prepared(made: FlowTask) -> VideoDiT:
    processes = Processes(rank=0, size=1, device=torch.device("cpu"))
    made.prepare(Spread(config=made.config, processes=processes))
    return made.model


@pytest.fixture
def earlier(tmp_path: Path) -> Path:
    prepared(task("dit.max_tokens=[1,2,3]")).save_pretrained(tmp_path / "dit")
    return tmp_path


def test_a_stage_grows_the_tables_of_the_one_before(earlier: Path) -> None:
    before = VideoDiT.from_pretrained(earlier / "dit")
    model = prepared(task("dit.max_tokens=[4,6,9]", f"init_from={earlier}"))
    assert model.training
    assert model.config.max_tokens == (4, 6, 9)
    grown, small = (
        model.positions(4, 6, 9).reshape(4, 6, 9, 16),
        before.positions(1, 2, 3).reshape(1, 2, 3, 16),
    )
    torch.testing.assert_close(grown[:, ::3, ::3], small.expand(4, -1, -1, -1))
    assert torch.equal(model.blocks[0].attention.qkv.weight, before.blocks[0].attention.qkv.weight)


def test_the_kernel_is_the_stages_own(earlier: Path) -> None:
    model = prepared(task("dit.max_tokens=[1,2,3]", "dit.attention=math", f"init_from={earlier}"))
    assert VideoDiT.from_pretrained(earlier / "dit").config.attention == "sdpa"
    assert model.config.attention == "math"
    assert all(
        block.attention.kernel is block.cross_attention.kernel is math_attention for block in model.blocks
    )


def test_what_does_not_fit_is_named(earlier: Path) -> None:
    with pytest.raises(
        UserError, match=r"dit\.max_tokens: the width table of .* has 3 rows and cannot shrink to 2"
    ):
        task("dit.max_tokens=[1,2,2]", f"init_from={earlier}")
    with pytest.raises(UserError, match="is another model"):
        task("dit.max_tokens=[1,2,3]", "dit.depth=2", f"init_from={earlier}")


def test_a_stage_that_reads_what_is_known_goes_on_as_one_that_does(tmp_path: Path) -> None:
    prepared(task("dit.known=true")).save_pretrained(tmp_path / "dit")
    with pytest.raises(UserError, match=r"dit\.known: .* give this run dit\.known=true"):
        task(f"init_from={tmp_path}")
    assert prepared(task("dit.known=true", f"init_from={tmp_path}")).known is not None


def test_a_head_that_begins_to_add_to_what_is_shown_starts_at_zero(tmp_path: Path) -> None:
    """All else goes on; and the next stage goes on with the head."""
    before = prepared(task("dit.known=true"))
    for value in before.parameters():
        torch.nn.init.normal_(value)
    before.save_pretrained(tmp_path / "dit")
    words = ("dit.known=true", "dit.shown_variance=0.01", f"init_from={tmp_path}")
    made = prepared(task(*words))
    assert not made.head.weight.any() and not made.head.bias.any()
    for name, value in made.named_parameters():
        assert name in ("head.weight", "head.bias") or torch.equal(value, before.get_parameter(name)), name
    torch.nn.init.ones_(made.head.weight)
    made.save_pretrained(tmp_path / "dit")
    assert torch.equal(prepared(task(*words)).head.weight, made.head.weight)
    with pytest.raises(UserError, match="is another model"):
        task("dit.known=true", f"init_from={tmp_path}")
    with pytest.raises(UserError, match=r"dit\.shown_variance: a straight path"):
        task(*words, "flow.path=cosine")


def test_data_buckets_weigh_what_was_precomputed() -> None:
    stored = SimpleNamespace(buckets=["16x64x64@16 weight=0.8", "1x64x64@16 weight=0.2", "16x64x64@24"])
    plain = task().data
    plain.__dict__["latents"] = stored
    assert [bucket.weight for bucket in plain.buckets] == [0.8, 0.2, 1.0]
    chosen = task(
        "data.buckets=['1x64x64@16 weight=1 batch=4','16x64x64@24 weight=10']", "data.latents=x"
    ).data
    chosen.__dict__["latents"] = stored
    assert [(bucket.weight, bucket.batch_size) for bucket in chosen.buckets] == [
        (0, None),
        (1, 4),
        (10, None),
    ]
    other = task("data.buckets=['8x64x64@16']", "data.latents=x").data
    other.__dict__["latents"] = stored
    with pytest.raises(UserError, match=r"data\.buckets: 8x64x64@16 is not in x, which holds"):
        _ = other.buckets


@pytest.mark.parametrize("own", ["16x64x64@24", "16x64x64@16 weight=0.5 batch=6"])
def test_a_batch_that_does_not_divide_is_refused_before_the_first_step(own: str) -> None:
    """It may come up once in a thousand steps; a bucket that is left out may have what it likes."""
    stored = SimpleNamespace(buckets=["16x64x64@16", "1x64x64@16", "16x64x64@24 batch=5"],
                             sizes=lambda name: (2, 8, 8))  # fmt: skip
    made = task(f"data.buckets=['1x64x64@16 batch=4','{own}']", "data.latents=x", "data.batch_size=10",
                "deepspeed.accumulation=2")  # fmt: skip
    made.data.__dict__["latents"] = stored
    processes = Processes(rank=0, size=2, device=torch.device("cpu"))
    with pytest.raises(
        UserError, match=rf"^data\.buckets: the \d+ clips of a batch of {own} do not .* into 4"
    ):
        made.prepare(Spread(config=made.config, processes=processes))
    fine = task("data.buckets=['1x64x64@16 batch=4']", "data.latents=x", "data.batch_size=10")
    fine.data.__dict__["latents"] = stored
    fine.prepare(Spread(config=fine.config, processes=processes))


def test_previews_without_a_release_or_prompts_are_refused_at_the_start(tmp_path: Path) -> None:
    (tmp_path / "tae").mkdir()
    (tmp_path / "empty.txt").write_text("\n \n")
    release = f"release={tmp_path}"
    for sources, line in (
        (["preview_prompts=world"], r"^release: name the folder"),
        (["preview_prompts=world", "release=nowhere"], r"^release: nowhere has no tae/; name the folder"),
        ([release], r"^data\.latents: name the folder"),
        ([release, "preview_prompts=nowhere.txt"], r"^preview_prompts: nowhere\.txt cannot be read"),
        ([release, f"preview_prompts={tmp_path / 'empty.txt'}"], r"^preview_prompts: .*empty"),
    ):
        with pytest.raises(UserError, match=line):
            prepared(task("preview_every=5", *sources))
    prepared(task("preview_every=5", release, "preview_prompts=world"))
    prepared(task())


def test_prompts_of_previews(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Captions of the toy world for those who ask for them alone."""
    world = task("preview_prompts=world").previews.prompts
    assert len(set(world)) == module.PREVIEW_CLIPS

    def fail(*_: object, **__: object) -> None:
        raise AssertionError("the toy world was asked")

    monkeypatch.setattr(module, "sample_scene", fail)
    (tmp_path / "prompts.txt").write_bytes(b"\xef\xbb\xbfa fox runs\r\n\r  rain on a street \n")
    assert task(f"preview_prompts={tmp_path / 'prompts.txt'}").previews.prompts == [
        "a fox runs",
        "rain on a street",
    ]
    (tmp_path / "odd.txt").write_text("a fox\u2028runs\x0b\x85on\n", encoding="utf-8")
    assert task(f"preview_prompts={tmp_path / 'odd.txt'}").previews.prompts == ["a fox\u2028runs\x0b\x85on"]
    plain = task()
    plain.data.__dict__["latents"] = SimpleNamespace(
        buckets=["1x64x64@16", "16x64x64@16 weight=0.8"],
        num_clips=lambda name: 3 if name.startswith("16x") else 99,
        captions=lambda name, clip: [f"{name.partition(' ')[0]} {clip}", "another caption"],
    )
    assert plain.previews.prompts == ["16x64x64@16 0", "16x64x64@16 1", "16x64x64@16 2"]
