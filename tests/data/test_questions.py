import pytest

from kinoflow.data.world import caption, sample_scene
from kinoflow.data.world.questions import ABSENT, QUESTIONS, answers, asked, unasked, wrong

SEEDS = range(3000)


def test_a_complete_caption_asks_for_all_that_its_scene_shows_but_medium_and_ordinary():
    for seed in SEEDS:
        scene = sample_scene(seed, split="heldout")
        text, truth = caption(scene, seed, complete=True), answers(scene)
        found = asked(text)
        assert not wrong(found, truth), text
        left = {key: truth[key] for key in truth.keys() - found.keys()}
        assert left.get("size", "medium") == "medium" and left.get("speed", "") == "", text
        assert left.keys() <= {"size", "speed", "sign"}, text


def test_a_caption_that_leaves_something_out_is_right_of_its_scene_unless_a_texture_is_left_out():
    for seed in SEEDS:
        scene = sample_scene(seed)
        text = caption(scene, seed)
        assert set(wrong(asked(text), answers(scene))) <= {"texture"}, text
        assert ("background" in asked(text)) == any(name in text for name in QUESTIONS["background"]), text


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("a star", {"shape": "star"}),
        ("a small spotted red shape gently drifting left on a striped navy background",
         {"size": "small", "texture": "dotted", "color": "red", "speed": "slowly", "motion": "moves left",
          "pattern": "striped", "background": "navy"}),
        ("a striped ring gets bigger above a little blue heart on gray",
         {"texture": "striped", "shape": "ring", "motion": "grows", "relation": "above", "pattern": "",
          "second_color": "blue", "second_shape": "heart", "second_texture": "plain", "background": "gray"}),
        ('a red cross rests and the word "KITE" above while the camera zooms in',
         {"color": "red", "shape": "cross", "motion": "stays still", "word": "KITE", "sign": "top",
          "camera": "zoom in"}),
    ],
)  # fmt: skip
def test_what_texts_ask_for(text, found):
    open_here = () if "background" in found else ("pattern",)
    assert asked(text) == {key: value for key, value in ABSENT.items() if key not in open_here} | found


def test_a_sign_may_be_anywhere_unless_its_place_is_named():
    assert "sign" not in asked('a red cross rests with a sign that says "SUN"')
    assert asked("a red cross rests")["sign"] == ""


def test_what_is_wrong_and_what_of_it_nobody_asked_for():
    text = "a red star bounces next to a small blue heart on a gray background"
    right = asked(text) | {"size": "large", "speed": "fast"}
    assert wrong(asked(text), right) == unasked(asked(text), right) == ()
    seen = right | {"shape": "heart", "second_color": "green", "sign": "top", "second_texture": "dotted"}
    assert set(wrong(asked(text), seen)) == {"shape", "second_color", "sign", "second_texture"}
    assert set(unasked(asked(text), seen)) == {"sign", "second_texture"}
    alone = right | {"second_color": "", "second_shape": "", "second_texture": "", "relation": ""}
    assert wrong(asked(text), alone) and not unasked(asked(text), alone)
    assert set(wrong(asked(text), right | {"background": "navy", "pattern": "striped"})) == {
        "background",
        "pattern",
    }
