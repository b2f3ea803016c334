"""Which clips a step of training takes: its bucket, its crop, the world's share beside a list."""

from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
import torch

from kinoflow.configs.errors import UserError
from kinoflow.data.clips.buckets import parse
from kinoflow.data.video import write
from kinoflow.train.run.config import DataConfig
from kinoflow.train.tasks.clips import ClipSource, draw, to_tensor

BUCKET = "4x32x48@16"
GRAY = 127


@pytest.fixture
def listed(tmp_path: Path) -> str:
    """A list of one gray clip: no scene of the world is gray all over."""
    write(tmp_path / "gray.mp4", np.full((8, 32, 48, 3), GRAY, np.uint8), fps=16)
    (tmp_path / "clips.jsonl").write_text('{"path": "gray.mp4", "caption": "gray"}\n')
    return str(tmp_path / "clips.jsonl")


def source(folder: Path, **keys: object) -> ClipSource:
    keys = {"workers": 0, **keys, "manifest": (keys["manifest"],) if "manifest" in keys else None}
    config = DataConfig(buckets=(BUCKET,), batch_size=3, **keys)  # pyright: ignore[reportArgumentType]
    return ClipSource(config, 5, folder / "quarantine.jsonl")


def is_gray(clips: torch.Tensor) -> bool:
    return bool((clips.std() < 0.02).item())


def test_workers_make_what_the_loop_makes(tmp_path: Path, listed: str) -> None:
    keys = {"manifest": listed, "world_share": 0.5}
    alone, two = source(tmp_path, **keys), source(tmp_path, **keys, workers=2)
    with closing(two):
        for step in range(6):
            assert (alone.batch(step, 0, 1) == two.batch(step, 0, 1)).all()
            assert alone.names(step, 0, 1) == two.names(step, 0, 1)
    assert {name[:5] for step in range(6) for name in alone.names(step, 0, 1)} == {"gray.", "world"}


def test_a_crop_is_a_window_of_the_whole_clip(tmp_path: Path) -> None:
    whole, cropped = source(tmp_path, world_share=1), source(tmp_path, world_share=1, crop=24)
    places = set()
    for step in range(4):
        clips, crops = whole.batch(step, 0, 1), cropped.batch(step, 0, 1)
        assert crops.shape == (3, 3, 4, 24, 24)
        for clip, crop in zip(clips, crops, strict=True):
            windows = clip.unfold(2, 24, 1).unfold(3, 24, 1)
            same = (windows - crop[:, :, None, None]).abs().amax(dim=(0, 1, 4, 5)) == 0
            assert same.any()
            places.add(tuple(same.nonzero()[0].tolist()))
    assert len(places) > 6, "crops do not move"
    assert torch.equal(cropped.batch(2, 0, 1), cropped.batch(2, 0, 1))
    parts = [cropped.batch(2, rank, 3) for rank in range(3)]
    assert torch.equal(torch.cat(parts), cropped.batch(2, 0, 1))


def test_a_crop_larger_than_the_clip_takes_all_of_it(tmp_path: Path) -> None:
    assert source(tmp_path, world_share=1, crop=40).batch(0, 0, 1).shape == (3, 3, 4, 32, 40)


@pytest.mark.parametrize("share", [0.0, 0.3, 0.8, 1.0])
def test_the_world_has_its_share_of_the_steps(tmp_path: Path, listed: str, share: float) -> None:
    clips = source(tmp_path, manifest=listed, world_share=share)
    steps = [is_gray(clips.batch(step, 0, 1)) for step in range(60)]
    assert abs(1 - sum(steps) / 60 - share) < 0.15
    if share:
        world = steps.index(False)
        first = clips.positions(world, 0, 1)[0]
        want = to_tensor([draw(5 * 10**9 + first + i, parse(BUCKET)) for i in range(3)])
        assert torch.equal(clips.batch(world, 0, 1), want)
    for step in range(8):
        both = torch.cat([clips.batch(step, rank, 3) for rank in range(3)])
        assert torch.equal(both, clips.batch(step, 0, 1))


def test_clips_of_a_list_come_mixed_and_each_once_an_epoch(tmp_path: Path) -> None:
    """Neighbours in a list are often cut from one video."""
    count = 24
    for level in range(count):
        clip = np.full((8, 32, 48, 3), 10 * level, np.uint8)
        write(tmp_path / f"{level:02d}.mp4", clip, fps=16)
    lines = [f'{{"path": "{level:02d}.mp4"}}\n' for level in range(count)]
    (tmp_path / "clips.jsonl").write_text("".join(lines))
    clips = source(tmp_path, manifest=str(tmp_path / "clips.jsonl"))
    values = torch.cat([clips.batch(step, 0, 1) for step in range(2 * count // 3)]).add(1).mul(127.5)
    levels = values.mean(dim=(1, 2, 3, 4)).div(10).round().int().view(2, count).tolist()
    assert all(sorted(epoch) == list(range(count)) for epoch in levels)
    assert levels[0] != levels[1]
    steps = [levels[0][i : i + 3] for i in range(0, count, 3)]
    assert sum(max(step) - min(step) > 2 for step in steps) > len(steps) / 2


def test_lists_have_their_share_of_the_clips(tmp_path: Path, listed: str) -> None:
    """Three of four clips are of the list that has one, and gray."""
    rng = np.random.default_rng(0)
    for number in range(5):
        clip = rng.integers(0, 255, (8, 32, 48, 3), np.uint8)
        write(tmp_path / f"{number}.mp4", clip, fps=16)
    lines = [f'{{"path": "{number}.mp4"}}\n' for number in range(5)]
    (tmp_path / "more.jsonl").write_text("".join(lines))
    config = DataConfig(
        buckets=(BUCKET,), batch_size=4, workers=0,
        manifest=(f"{listed} weight=3", str(tmp_path / "more.jsonl")),
    )  # fmt: skip
    clips = ClipSource(config, 5, tmp_path / "quarantine.jsonl")
    grays = [is_gray(clip) for step in range(16) for clip in clips.batch(step, 0, 1)]
    assert len(grays) == 64 and abs(sum(grays) - 48) <= 1
    names = [name == "gray.mp4" for step in range(16) for name in clips.names(step, 0, 1)]
    assert names == grays


def test_a_bucket_that_no_clip_fills_and_a_batch_that_does_not_divide(tmp_path: Path, listed: str) -> None:
    config = DataConfig(buckets=(BUCKET, "64x32x48@16"), manifest=(listed,))
    with pytest.raises(UserError, match=r"^data\.buckets: no clip .* fills 64x32x48@16"):
        ClipSource(config, 5, tmp_path / "quarantine.jsonl")
    with pytest.raises(UserError, match="does not divide into 2 slices"):
        source(tmp_path, world_share=1).batch(0, 0, 2)


def test_a_run_without_clips_or_buckets_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^data\.manifest: .*data\.world_share=1"):
        source(tmp_path)
    with pytest.raises(UserError, match=r"^data\.buckets: name the clips"):
        ClipSource(DataConfig(world_share=1), 5, tmp_path / "quarantine.jsonl")


def test_previews_of_a_list_show_the_list(tmp_path: Path, listed: str) -> None:
    assert is_gray(source(tmp_path, manifest=listed).shown(2))
    assert not is_gray(source(tmp_path, manifest=listed, world_share=0.2).shown(2))
    world = source(tmp_path, world_share=1).shown(2)
    assert torch.equal(world, to_tensor([draw(i, parse(BUCKET), split="heldout") for i in range(2)]))
