"""The shipped students of few steps: what they bring along, and that their clips show what is asked for."""

import pytest

from kinoflow.configs.errors import UserError
from kinoflow.sample.evaluation.judge import Judge
from kinoflow.sample.pipeline import Pipeline
from kinoflow.sample.release import DEFAULT_RELEASE, Release

PROMPTS = {
    "an orange square moves up on a navy background": ("orange", "square", "moves up"),
    "a blue heart grows on a black background": ("blue", "heart", "grows"),
    "a green ring bounces on a brown background": ("green", "ring", "bounces"),
}


@pytest.mark.parametrize(("name", "passes"), [("eight", 8), ("four", 4)])
def test_a_students_clips_show_what_is_asked_for(name: str, passes: int) -> None:
    pipeline = Pipeline.from_pretrained(lora=[name], device="cpu", dtype="fp32")
    sampling = pipeline.release.config.sampling
    assert (sampling.num_steps, sampling.guidance_scale, sampling.schedule) == (passes, 1, "shifted")
    videos = [pipeline(prompt, seed=0) for prompt in PROMPTS]
    assert {video.passes.computed for video in videos} == {passes}
    seen = Judge.from_pretrained(DEFAULT_RELEASE / "judge").judge([video.frames for video in videos]).labels
    found = [tuple(label[key] for key in ("color", "shape", "motion")) for label in seen]
    assert found == list(PROMPTS.values())


def test_half_of_a_student_is_another_model() -> None:
    whole, half, none = (Release.load(lora=words).weights_hash for words in (["eight"], ["eight:0.5"], []))
    assert len({whole, half, none}) == 3


def test_a_student_that_is_not_there_is_named() -> None:
    with pytest.raises(UserError, match=r"lora: two: no such folder, and .*mini has eight, four"):
        Release.load(lora=["two"])
