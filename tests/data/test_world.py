"""The world: what is drawn is what is said, and the same everywhere."""

import hashlib
import itertools
import math
import re
from collections import Counter
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest

from kinoflow.configs.errors import UserError
from kinoflow.data import world
from kinoflow.data.world import draw
from kinoflow.data.world.captions import MOTION_PHRASES
from kinoflow.data.world.words import word_bitmap

SECOND = Fraction(16)
TRAIN = [world.sample_scene(seed, split="train") for seed in range(3000)]


def clip(scene, frames=16, size=64, fps=SECOND, width=None):
    return world.render(scene, frames=frames, height=size, width=width or size, fps=fps)


def alone(*, shape="square", color="red", **about):
    return world.Scene(things=(world.Thing(shape=shape, color=color, **about),), background="black")


def coverage(frames, background="black", color="red"):
    """How much of each pixel is the thing, from its channel of most contrast."""
    ground, ink = np.array(draw.GROUND_VALUES[background]), np.array(draw.COLOR_VALUES[color])
    channel = np.abs(ink - ground).argmax()
    return (frames[..., channel].astype(float) - ground[channel]) / (ink - ground)[channel]


def centre(frames):
    """Centroid (x, y) in sides, and the diameter of a disc of equal area, for each frame."""
    cover = coverage(frames)
    total = cover.sum((1, 2))
    rows, columns = (np.arange(n) + 0.5 - n / 2 for n in cover.shape[1:])
    side = min(cover.shape[1:])
    x = (cover * columns).sum((1, 2)) / total / side
    y = (cover * rows[:, None]).sum((1, 2)) / total / side
    return x, y, np.sqrt(total * 4 / math.pi) / side


# --- the same bytes anywhere ---------------------------------------------------------------------------

GOLDEN = {
    ("train", 0, 16, 64, 64, Fraction(16)): "8726b815cf8eceaf",
    ("heldout", 9, 32, 128, 128, Fraction(16)): "88f8fa5186cbb093",
    ("train", 5, 24, 72, 128, Fraction(24000, 1001)): "19d0dd9d2bd51d85",
    ("train", 10, 1, 96, 64, Fraction(16)): "8e3531c220f65798",
}


def digest(key):
    split, seed, frames, height, width, fps = key
    scene = world.sample_scene(seed, split=split)
    pixels = world.render(scene, frames=frames, height=height, width=width, fps=fps)
    return hashlib.sha256(pixels.tobytes()).hexdigest()[:16]


@pytest.mark.parametrize("key", GOLDEN, ids=str)
def test_a_seed_gives_the_same_bytes_for_ever(key):
    assert digest(key) == GOLDEN[key]


def test_scenes_and_captions_of_a_seed_are_fixed():
    text = "\n".join(f"{scene} {world.caption(scene, seed)}" for seed, scene in enumerate(TRAIN[:500]))
    assert hashlib.sha256(text.encode()).hexdigest()[:16] == "9f621d9962fb2120"


def test_the_window_draws_what_the_whole_frame_would(monkeypatch):
    turned = [
        alone(shape=s, motion="spins", diameter=0.6) for s in world.SHAPES if s not in ("circle", "ring")
    ]
    scenes = turned + [alone(shape=s, texture="dotted", diameter=0.6) for s in world.SHAPES] + TRAIN[:30]
    windowed = [clip(scene, frames=9) for scene in scenes]
    monkeypatch.setattr(draw, "_REACH", 4.0)
    for scene, fast in zip(scenes, windowed, strict=True):
        assert np.abs(fast.astype(int) - clip(scene, frames=9)).max() <= 1, scene


@pytest.mark.parametrize("shape", world.SHAPES)
def test_edges_are_antialiased_like_a_supersampled_drawing(shape):
    scene = alone(shape=shape, x=0.013, y=-0.027)
    fine = clip(scene, frames=1, size=1024)[0].astype(float)
    box = fine.reshape(64, 16, 64, 16, 3).mean((1, 3))
    error = np.abs(box - clip(scene, frames=1)[0])
    assert error.mean() < 0.6
    assert error.max() < 75  # a sharp tip inside a pixel


def test_a_thing_is_computed_for_all_frames_at_once_in_a_third_of_the_picture(monkeypatch):
    """What makes twenty clips a second: no loop over frames, and no pixel far from the thing."""
    shapes, distance = [], draw._distance

    def recording(shape, x, y):
        shapes.append(x.shape)
        return distance(shape, x, y)

    monkeypatch.setattr(draw, "_distance", recording)
    for scene in TRAIN[:8]:
        clip(scene, frames=32, size=128)
    assert [frames for frames, _, _ in shapes] == [32] * sum(len(scene.things) for scene in TRAIN[:8])
    assert sum(height * width for _, height, width in shapes) < len(shapes) * 128**2 / 3


# --- motions ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("speed", world.SPEEDS)
@pytest.mark.parametrize("frames", [16, 32, 64])
def test_translations_go_where_they_say_all_the_time(speed, frames):
    ways = {"moves left": (-1, 0), "moves right": (1, 0), "moves up": (0, -1), "moves down": (0, 1)}
    for motion, (dx, dy) in ways.items():
        x, y, diameter = centre(clip(alone(motion=motion, speed=speed, diameter=0.3), frames=frames))
        along, across = (x, y) if dx else (y, x)
        assert np.all(np.diff(along) * (dx + dy) > 0), "never turns back"
        assert abs(along[-1] - along[0]) > (0.15 if frames == 16 else 0.3), "far enough to be seen"
        assert abs(along[0] + along[-1]) < 0.02, "is in the middle at mid-clip"
        assert np.abs(along).max() < 0.4
        assert np.ptp(across) < 1e-3
        assert np.ptp(diameter[2:-2]) < 0.01 or frames > 16


def test_speed_is_in_units_per_second():
    distance = {}
    for fps in (16, 24):
        scene = alone(motion="moves right", speed="slowly", diameter=0.3)
        x, _, _ = centre(clip(scene, frames=fps // 2 + 1, fps=Fraction(fps)))
        distance[fps] = x[-1] - x[0]
    assert distance[16] == pytest.approx(0.09, abs=0.01)
    assert distance[24] == pytest.approx(distance[16], abs=2e-3)
    spin = alone(motion="spins")
    slow, fast = clip(spin, frames=9), clip(spin, frames=13, fps=Fraction(24))
    np.testing.assert_array_equal(slow[8], fast[12])  # half a second in, at any frame rate
    slower = [centre(clip(alone(motion="moves up", speed=s, diameter=0.3)))[1] for s in world.SPEEDS]
    assert abs(slower[0][0]) < abs(slower[1][0]) < abs(slower[2][0])


@pytest.mark.parametrize("speed", world.SPEEDS)
def test_growing_shrinking_bouncing_and_staying(speed):
    for frames in (16, 32):
        _, _, grown = centre(clip(alone(motion="grows", speed=speed), frames=frames))
        assert np.all(np.diff(grown) > 0)
        assert grown[-1] > (1.25 if frames == 16 else 1.6) * grown[0]
        _, _, shrunk = centre(clip(alone(motion="shrinks", speed=speed), frames=frames))
        np.testing.assert_allclose(shrunk, grown[::-1], rtol=0.01)
    x, y, _ = centre(clip(alone(motion="bounces", speed=speed, diameter=0.4), frames=32))
    assert np.ptp(y) > 0.25
    assert np.ptp(x) < 1e-3
    assert y[0] == pytest.approx(y.max(), abs=0.01), "starts on the floor"
    assert np.any(np.diff(y) > 0.005), "and comes down again"
    assert np.any(np.diff(y) < -0.005)
    still = clip(alone())
    assert np.array_equal(still, np.repeat(still[:1], 16, axis=0))


@pytest.mark.parametrize("shape", [s for s in world.SHAPES if s not in ("circle", "ring")])
@pytest.mark.parametrize("speed", world.SPEEDS)
def test_spinning_is_seen_in_every_frame(shape, speed):
    frames = clip(alone(shape=shape, motion="spins", speed=speed))
    x, y, diameter = centre(frames)
    changed = np.abs(np.diff(coverage(frames), axis=0)).sum((1, 2)) / coverage(frames)[0].sum()
    assert np.median(changed) > 0.06
    assert np.ptp(diameter) < 0.01
    assert np.hypot(np.ptp(x), np.ptp(y)) < 0.06


def test_a_moving_camera_moves_the_whole_picture():
    still = replace(alone(), background="striped black")
    pan = clip(replace(still, camera="pan right"))
    x, _, _ = centre(np.where(pan > 60, pan, 14))
    assert np.all(np.diff(x) < 0)
    corner = pan[:, :8, :8].astype(int)
    assert all(np.abs(a - b).max() > 2 for a, b in itertools.pairwise(corner))
    zoom = [
        centre(np.where(c > 60, c, 14))[2]
        for c in (clip(replace(still, camera=f"zoom {w}")) for w in ("in", "out"))
    ]
    assert np.all(np.diff(zoom[0]) > 0)
    assert np.all(np.diff(zoom[1]) < 0)


# --- what is sampled --------------------------------------------------------------------------------------


def test_splits_share_no_combination_and_each_is_uniform():
    train, held = set(world.combinations("train")), set(world.combinations("heldout"))
    assert not train & held
    assert len(train | held) == 8 * 8 * 9 - 2 * 8
    assert 0.08 < len(held) / len(train | held) < 0.13
    assert world.is_heldout("red", "star", "moves left") == (("red", "star", "moves left") in held)
    splits: tuple[world.Split, ...] = ("train", "heldout")
    for split, allowed in zip(splits, (train, held), strict=True):
        drawn = Counter()
        for seed in range(20 * len(held)):
            first = world.sample_scene(seed, split=split).things[0]
            drawn[first.color, first.shape, first.motion] += 1
        assert set(drawn) <= allowed
        mean = 20 * len(held) / len(allowed)
        spread = sum((drawn[c] - mean) ** 2 / mean for c in allowed) / len(allowed)
        assert 0.6 < spread < 1.5  # chi-squared per degree of freedom


def test_every_other_scene_of_new_has_a_new_color_and_no_other_split_has_one():
    scenes = [world.sample_scene(seed, split="new") for seed in range(200)]
    for seed, scene in enumerate(scenes):
        first, *others = scene.things
        assert (first.color in world.NEW_COLORS) == (seed % 2 == 0)
        assert all(thing.color in world.COLORS for thing in others)
        if seed % 2:
            assert (first.color, first.shape, first.motion) in world.combinations("train")
        assert first.color in world.caption(scene, seed, complete=True).split()
    old = {combination[0] for combination in (*world.combinations("train"), *world.combinations("heldout"))}
    assert old == set(world.COLORS) and not old & set(world.NEW_COLORS)
    assert len(world.combinations("new")) == 8 * 9 - 2


def test_every_value_of_every_feature_is_trained_on():
    train = world.combinations("train")
    for values, position in ((world.COLORS, 0), (world.SHAPES, 1), (world.MOTIONS, 2)):
        assert {c[position] for c in train} == set(values)
    assert {s.background for s in TRAIN} == set(world.BACKGROUNDS)
    assert {s.camera for s in TRAIN} == set(world.CAMERAS)
    assert {s.word for s in TRAIN if s.word} == set(world.WORDS)
    assert {t.texture for s in TRAIN for t in s.things} == set(world.TEXTURES)
    assert {s.things[0].size for s in TRAIN} == set(world.SIZES)


def test_shares_of_words_pairs_and_textures():
    assert 0.13 < np.mean([s.word is not None for s in TRAIN]) < 0.17
    assert 0.18 < np.mean([len(s.things) == 2 for s in TRAIN]) < 0.22
    assert 0.66 < np.mean([s.things[0].texture == "plain" for s in TRAIN]) < 0.74


def test_cameras_move_only_where_labels_stay_true_and_one_sees_it():
    moved = [s for s in TRAIN if s.camera != "still"]
    assert len(moved) > 50
    assert all(s.things[0].motion == "stays still" and " " in s.background for s in moved)


def test_the_second_thing_is_smaller_different_beside_and_not_covered():
    pairs = [s for s in TRAIN if len(s.things) == 2][:24]
    assert len(pairs) == 24
    for scene in pairs:
        first, second = scene.things
        assert second.diameter < first.diameter
        assert (second.color, second.shape, second.motion) != (first.color, first.shape, first.motion)
        assert second.color != first.color and second.shape != first.shape
        gap = (first.x - second.x, first.y - second.y)
        assert {"above": gap[1] < -0.3, "below": gap[1] > 0.3, "next to": abs(gap[0]) > 0.3}[scene.relation]
        plain = replace(scene, background="black", things=(second,))
        shown = coverage(clip(plain, frames=1), color=second.color)[0] > 0.9
        ink = np.array(draw.COLOR_VALUES[second.color])
        for frame in clip(scene)[:, shown]:
            assert (np.abs(frame.astype(int) - ink).max(1) < 30).mean() > 0.9, scene


def test_signs_are_legible_and_never_covered():
    for scene in [s for s in TRAIN if s.word][:20]:
        for size in (64, 128):
            frames, cell = clip(scene, size=size), size // 32
            ink = np.kron(word_bitmap(scene.word or ""), np.ones((cell, cell), bool))
            top = cell // 2 + cell if scene.word_place == "top" else size - cell // 2 - cell - 7 * cell
            left = (size - ink.shape[1]) // 2
            board = frames[:, top : top + ink.shape[0], left : left + ink.shape[1], 1]
            assert np.array_equal(board < 128, np.broadcast_to(ink, board.shape))


def test_letters_differ():
    letters = {word_bitmap(chr(c)).tobytes() for c in range(ord("A"), ord("Z") + 1)}
    assert len(letters) == 26
    assert len(set(world.WORDS)) == len(world.WORDS) == 48
    assert set("".join(world.WORDS)) == set("ABCDEFGHIJKLMNOPQRSTUVWXYZ")


def test_things_stand_out():
    for a, b in itertools.combinations(world.COLORS + world.NEW_COLORS, 2):
        assert math.dist(draw.COLOR_VALUES[a], draw.COLOR_VALUES[b]) > 100, (a, b)
    for color, background in itertools.product(world.COLORS, world.BACKGROUNDS):
        assert draw.contrast(color, "plain", background) > 100
    for scene in TRAIN:
        assert draw.contrast(scene.things[0].color, scene.things[0].texture, scene.background) >= 60


# --- captions ---------------------------------------------------------------------------------------------


def says_motion(text, motion):
    return any(re.search(rf"\b{p}\b", text) for pair in MOTION_PHRASES[motion] for p in pair)


def test_complete_captions_name_everything():
    for seed, scene in enumerate(TRAIN[:800]):
        text, first = world.caption(scene, seed, complete=True), scene.things[0]
        assert first.color in text and first.shape in text and scene.background in text
        assert says_motion(text, first.motion)
        assert scene.word is None or f'"{scene.word}"' in text
        assert scene.camera == "still" or "the camera" in text
        assert all(t.color in text and t.shape in text for t in scene.things)


def test_captions_never_say_what_is_not_there():
    for seed, scene in enumerate(TRAIN[:800]):
        text = world.caption(scene, seed)
        named = {color for color in world.COLORS if re.search(rf"\b{color}\b", text)}
        assert named <= {t.color for t in scene.things}
        assert ('"' in text) == (scene.word is not None)
        assert ("camera" in text) == (scene.camera != "still")
        others = [m for m in world.MOTIONS if m != scene.things[0].motion]
        assert not any(says_motion(text, m) for m in others), text


def test_captions_of_images_leave_motion_out():
    for seed, scene in enumerate(TRAIN[:800]):
        text = world.caption(scene, seed, complete=True, image=True)
        assert not any(says_motion(text, motion) for motion in world.MOTIONS), text
        assert not re.search("camera|video|clip|slowly|fast|quickly|gently", text), text
        assert scene.things[0].color in text and scene.things[0].shape in text


def test_captions_vary_stay_short_and_are_often_canonical():
    texts = [world.caption(scene, seed) for seed, scene in enumerate(TRAIN[:1500])]
    lengths = [len(text.split()) for text in texts]
    assert max(lengths) <= 23
    assert np.mean([n > 20 for n in lengths]) < 0.01
    assert len({word for text in texts for word in re.sub('"[A-Z]+"|,', "", text).split()}) < 160
    canonical = re.compile(
        rf"an? ((small|large) )?((striped|dotted|checkered) )?({'|'.join(world.COLORS)}) "
        rf"({'|'.join(world.SHAPES)}) ({'|'.join(world.MOTIONS)})\b"
    )
    assert np.mean([canonical.match(text) is not None for text in texts]) > 0.4
    scene = alone(motion="moves left", speed="slowly")
    assert len({world.caption(scene, seed) for seed in range(200)}) > 40
    assert "a red square moves left slowly on a black background" in {
        world.caption(scene, s) for s in range(50)
    }


def test_labels():
    scene = replace(alone(motion="grows"), word="KITE")
    assert world.labels(scene) == {"color": "red", "shape": "square", "motion": "grows", "word": "KITE"}
    assert world.labels(alone())["word"] == ""


# --- bad input --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("about", "key"),
    [
        ({"shape": "blob"}, "shape"), ({"color": "mauve"}, "color"), ({"size": "huge"}, "size"),
        ({"texture": "furry"}, "texture"), ({"motion": "dances"}, "motion"), ({"speed": "warp"}, "speed"),
        ({"diameter": 0.0}, "diameter"), ({"shape": "ring", "motion": "spins"}, "motion"),
    ],
)  # fmt: skip
def test_things_that_make_no_sense_are_refused(about, key):
    with pytest.raises(UserError, match=rf"^{key}: ") as caught:
        alone(**about)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "change",
    [
        {"background": "plaid"},
        {"camera": "roll"},
        {"word": "kite"},
        {"word": "KITES"},
        {"word": ""},
        {"things": ()},
    ],
)
def test_scenes_that_make_no_sense_are_refused(change):
    with pytest.raises(UserError, match=f"^{next(iter(change))}: "):
        replace(alone(), **change)


def test_seeds_splits_and_sizes_out_of_range():
    with pytest.raises(UserError, match=r"^seed: -1"):
        world.sample_scene(-1, split="train")
    for shape in ((0, 8, 8), (1, 0, 8), (1, 8, 0)):
        frames, height, width = shape
        with pytest.raises(ValueError, match=r"^(frames|height|width): 0 must be positive"):
            world.render(alone(), frames=frames, height=height, width=width, fps=SECOND)
    with pytest.raises(ValueError, match=r"^fps: 0 must be positive"):
        clip(alone(), fps=Fraction(0))


@pytest.mark.parametrize("shape", [(1, 1), (7, 5), (8, 200), (200, 8), (33, 65)])
def test_any_size_can_be_drawn(shape):
    for scene in TRAIN[:40]:
        frames = world.render(scene, frames=2, height=shape[0], width=shape[1], fps=SECOND)
        assert frames.shape == (2, *shape, 3)
