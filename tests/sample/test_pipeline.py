"""One way from a prompt to frames, whoever asks and in whatever company."""

import threading
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
import torch

import kinoflow
from kinoflow.configs.errors import UserError
from kinoflow.data.video import probe, read, write
from kinoflow.sample.batch import GivenUpError
from kinoflow.sample.best import Take
from kinoflow.sample.generate import generate
from kinoflow.sample.pipeline import Pipeline
from kinoflow.sample.release import Release
from kinoflow.sample.request import ClipRequest

PROMPT = "a red star moves left"
REQUESTS = [
    ClipRequest(prompt=prompt, seed=seed, steps=3)
    for prompt, seed in [(PROMPT, 5), ("a blue ring", 5), ("☂ déjà vu", 0), (PROMPT, 6)] * 2
]


@pytest.fixture
def pipeline(tiny_release):
    return Pipeline(tiny_release)


def test_it_makes_what_generate_makes(pipeline, tiny_release):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    parts = tiny_release.backbone(), tiny_release.tae(), tiny_release.encoder()
    size = {"frames": 16, "height": 32, "width": 32, "fps": Fraction(16), "num_steps": 3}
    (expected,) = generate(*parts, [PROMPT], seeds=[5], negative="a ring", **size)
    torch.set_num_threads(threads)
    video = pipeline(PROMPT, seed=5, steps=3, negative="a ring", latent=True)
    assert np.array_equal(video.frames, expected.numpy()) and video.fps == 16
    assert torch.get_num_threads() == threads
    pieces = list(pipeline.decode(pipeline.plan(REQUESTS[0]), Take(latent=video.latent)))
    assert np.array_equal(np.concatenate(pieces), video.frames)
    assert pipeline(PROMPT, seed=5, steps=3).latent is None


@pytest.mark.parametrize("at_once", [2, 3, 8])
def test_a_prompt_and_seed_are_equal_alone_in_a_batch_and_in_another_order(pipeline, at_once):
    alone = [next(pipeline.batch([request])).frames for request in REQUESTS[:4]] * 2
    together = [video.frames for video in pipeline.batch(REQUESTS, at_once=at_once)]
    backwards = [video.frames for video in pipeline.batch(REQUESTS[::-1], at_once=at_once)]
    for one, many, back in zip(alone, together, backwards[::-1], strict=True):
        assert np.array_equal(one, many) and np.array_equal(one, back)
    assert len({frames.tobytes() for frames in alone}) == 4


def test_the_shipped_release_is_equal_in_a_batch():
    """Real kernels at real sizes, the accelerated decoder and text encoders of transformers among them."""
    pipeline = Pipeline(Release.load())
    requests = [
        ClipRequest(prompt=PROMPT, seed=seed, steps=1, frames=1, negative="a blue ring") for seed in (0, 1, 2)
    ]
    alone = [next(pipeline.batch([request], at_once=1)).frames for request in requests]
    for one, many in zip(alone, pipeline.batch(requests, at_once=3), strict=True):
        assert np.array_equal(one, many.frames)


def test_what_fails_in_a_batch_comes_out_at_its_place(pipeline):
    def work(item):
        if item == 2:
            raise UserError("two: no")
        return item

    results = pipeline.at_once(work, [0, 1, 2, 3], 2)
    assert [next(results), next(results)] == [0, 1]
    with pytest.raises(UserError, match="two: no"):
        next(results)
    with pytest.raises(UserError, match="batch: 0; use 1 or more"):
        pipeline.at_once(work, [0], 0)


def test_progress_counts_velocities_and_frames_and_can_stop(pipeline):
    parts = []
    pipeline(PROMPT, steps=3, solver="heun", progress=parts.append)
    plan = pipeline.plan(replace(REQUESTS[0], solver="heun"))
    assert sum(parts) == plan.num_steps == 3 * 2 + 16
    assert parts[:6] == [1] * 6

    def stop(count):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pipeline(PROMPT, steps=3, progress=stop)


def test_a_video_is_saved_with_what_made_it(pipeline, tmp_path):
    video = pipeline(PROMPT, seed=5, steps=3)
    path = video.save(tmp_path / "a" / "clip.mp4", crf=0)
    assert video.metadata.items() <= probe(path).metadata.items()
    write(tmp_path / "plain.mp4", video.frames, fps=16, crf=0)
    assert np.array_equal(read(path), read(tmp_path / "plain.mp4"))


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"prompt": " "}, "prompt: empty"),
        ({"diffusion": 0.5}, "diffusion: euler adds no noise"),
        ({"seed": 2**63}, "seed: 9223372036854775808"),
        ({"frames": 17}, "makes no such clips"),
    ],
)
def test_what_cannot_be_made_is_refused_before_any_model_is_read(pipeline, asked, said, monkeypatch):
    monkeypatch.delattr(Release, "backbone")
    with pytest.raises(UserError, match=said):
        pipeline.plan(replace(REQUESTS[0], **asked))


def test_it_is_opened_by_name(tiny_release):
    pipeline = kinoflow.Pipeline.from_pretrained(tiny_release.folder, device="cpu")
    assert (pipeline.release.name, pipeline.dtype) == ("tiny", torch.float32)
    with pytest.raises(UserError, match=r"revision: .* is a folder, which has none"):
        Pipeline.from_pretrained(tiny_release.folder, revision="v1")
    with pytest.raises(UserError, match="threads: 0"):
        Pipeline.from_pretrained(tiny_release.folder, threads=0)


def test_a_batch_that_is_given_up_ends_at_the_next_step(pipeline):
    begun, ended = threading.Event(), []
    plan = pipeline.plan(REQUESTS[0])

    def work(number):
        if number == 0:
            return 0
        try:
            while True:
                pipeline.make(plan, progress=lambda _: begun.set())
        except GivenUpError as error:
            ended.append(error)
            raise

    results = pipeline.at_once(work, [0, 1], 2)
    assert next(results) == 0
    begun.wait()
    results.close()
    assert len(ended) == 1
    pipeline.make(plan)  # what was given up is that batch, not the pipeline
