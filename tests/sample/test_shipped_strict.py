"""The shipped strict judge on real renders."""

import pytest

from kinoflow.data.clips.buckets import parse
from kinoflow.data.world import caption, sample_scene
from kinoflow.data.world.questions import QUESTIONS, answers
from kinoflow.sample.evaluation.strict import StrictJudge
from kinoflow.sample.evaluation.whole import compared
from kinoflow.sample.evaluation.world import renders
from kinoflow.sample.release import DEFAULT_RELEASE


@pytest.fixture(scope="module")
def rendered():
    """Real renders, their complete captions, and what the shipped judge sees in them."""
    judge, bucket = StrictJudge.from_pretrained(DEFAULT_RELEASE / "strict"), parse("32x128x128@16")
    scenes = [sample_scene(seed, split="heldout") for seed in range(24)]
    texts = [caption(scene, seed, complete=True) for seed, scene in enumerate(scenes)]
    return texts, judge.judge(renders(scenes, bucket), bucket.fps), [answers(scene) for scene in scenes]


def test_the_shipped_judge_finds_real_renders_wholly_right_by_their_captions(rendered):
    texts, seen, truth = rendered
    whole = compared(texts, seen, truth)
    assert whole.wholly.real == 1
    assert whole.wholly.share >= 23 / 24


@pytest.mark.parametrize(
    ("index", "old", "new", "keys"),
    [
        (0, "white heart", "pink heart", {"color"}),
        (0, "heart", "star", {"shape"}),
        (0, "moves right", "moves left", {"motion"}),
        (0, "blue diamond", "red diamond", {"second_color"}),
        (0, "diamond", "ring", {"second_shape"}),
        (0, "below", "above", {"relation"}),
        (0, " below a small blue diamond", "",
         {"relation", "second_color", "second_shape", "second_texture"}),
        (0, "teal", "gray", {"background"}),
        (0, "checkered teal", "teal", {"pattern"}),
        (3, "striped ", "", {"texture"}),
        (3, "large", "small", {"size"}),
        (5, "slowly", "fast", {"speed"}),
        (16, "pans right", "zooms in", {"camera"}),
        (16, " while the camera pans right", "", {"camera"}),
        (21, "EXIT", "SUN", {"word"}),
        (21, ' with a sign that reads "EXIT"', "", {"word", "sign"}),
    ],
)  # fmt: skip
def test_the_shipped_judge_sees_what_a_changed_caption_gets_wrong(rendered, index, old, new, keys):
    texts, seen, truth = rendered
    assert old in texts[index]
    whole = compared([texts[index].replace(old, new)], [seen[index]], [truth[index]])
    assert whole.missed[0].seen.keys() == keys
    assert whole.wholly.real == 0


def test_the_shipped_one_is_small_and_knows_every_answer():
    folder = DEFAULT_RELEASE / "strict"
    assert StrictJudge.from_pretrained(folder).config.questions == dict(QUESTIONS)
    assert (folder / "model.safetensors").stat().st_size <= 1_200_000
