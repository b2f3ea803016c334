"""What the stages measure, against pictures of which it is known."""

import numpy as np
import pytest

from kinoflow.data.engine import borders, duplicates, motion, quality
from kinoflow.data.engine.config import CurateConfig, Rule, SelectConfig
from kinoflow.data.engine.duplicates import Hashed, picture_hash
from kinoflow.data.engine.score import SCHEMA, SCORES
from kinoflow.data.engine.selection import select
from tests.data.engine.planting import boxed, lettered, resized, shot

cv2 = pytest.importorskip("cv2")


def gray(picture: np.ndarray) -> np.ndarray:
    return cv2.cvtColor(np.ascontiguousarray(picture), cv2.COLOR_RGB2GRAY)


def texture(height: int = 120, width: int = 200, seed: int = 0) -> np.ndarray:
    noise = np.random.default_rng(seed).integers(0, 256, (height, width), np.uint8)
    return cv2.GaussianBlur(noise, (0, 0), 3)


def sides_of(picture: np.ndarray) -> list[float]:
    return list(borders.borders(gray(picture)).values())


def test_borders_are_what_no_picture_of_the_shot_shows() -> None:
    street = shot("street")[:4]
    depths = [sides_of(picture) for picture in boxed(street, 18)]
    assert borders.share(np.array(depths)) == pytest.approx(36 / 180, abs=0.01)
    assert borders.share(np.array([sides_of(picture) for picture in street])) < 0.02
    dark = [[1.0, 1.0, 1.0, 1.0], *depths]  # it begins with a black frame
    assert borders.share(np.array(dark)) == borders.share(np.array(depths))
    sides = np.full_like(street[0], 90)
    sides[:, 80:-80] = street[0][:, 80:-80]
    assert borders.share(np.array([sides_of(sides)])) == pytest.approx(0.5, abs=0.01)
    sky = street[0].copy()
    sky[:60] = 180  # flat, but at one side
    assert borders.share(np.array([sides_of(sky)])) < 0.02


@pytest.mark.parametrize("step", [(0, 0), (2, 0), (-1, 3)])
def test_flow_is_the_shift(step: tuple[int, int]) -> None:
    big, (x, y) = texture(160, 260), step
    before, after = big[20:140, 20:220], big[20 - y : 140 - y, 20 - x : 220 - x]
    found = motion.motion(before, after)
    assert found["flow_x"] * 200 == pytest.approx(x, abs=0.15)
    assert found["flow_y"] * 200 == pytest.approx(y, abs=0.15)
    assert found["flow"] * 200 == pytest.approx(np.hypot(x, y), abs=0.4)
    assert motion.amount(np.array([found["flow"]] * 3), 48.0) == pytest.approx(2000 * found["flow"])


def test_a_steady_camera_does_not_shake() -> None:
    steady = np.full(100, 0.004)
    assert motion.shake(steady, steady, 25.0) == pytest.approx(0, abs=1e-6)
    t = np.arange(100) / 25
    hand = 0.006 * np.diff(np.sin(2 * np.pi * 6 * t))  # 6 Hz, 6 thousandths far
    assert motion.shake(hand, 0 * hand, 25.0) == pytest.approx(6 / np.sqrt(2), rel=0.25)
    slow = 0.05 * np.diff(np.sin(2 * np.pi * 0.2 * t))
    assert motion.shake(slow, 0 * slow, 25.0) < 1
    assert motion.shake(steady[:2], steady[:2], 25.0) == 0


def test_blur_light_and_flicker() -> None:
    sharp = gray(shot("rabbit")[0])
    blurred = [quality.sharpness(cv2.GaussianBlur(sharp, (0, 0), sigma)) for sigma in (1, 2, 4)]
    assert quality.sharpness(sharp) > 2 * blurred[0] > 4 * blurred[1] > 8 * blurred[2]
    half = np.zeros((10, 10), np.uint8)
    half[:5] = 128
    assert quality.brightness(half) == {"luma": 64.0, "contrast": 64.0, "clipped": 0.5}
    assert quality.flicker(np.linspace(0, 200, 50)) == pytest.approx(0, abs=1e-9)
    assert quality.flicker(np.array([100.0, 104.0] * 20)) == pytest.approx(4)
    assert quality.flicker(np.array([1.0, 2.0])) == 0


def test_text_is_measured_and_a_face_is_none() -> None:
    pytest.importorskip("rapidocr")
    from kinoflow.data.engine.text import text_share

    plain = shot("car")[0]
    (written,) = lettered(plain[None])
    assert text_share(plain) == 0
    assert 0.05 < text_share(written) < 0.3


def test_hashes_survive_size_and_noise_and_tell_pictures_apart() -> None:
    names = ("street", "crossing", "rabbit", "car")
    pictures = [shot(name)[10] for name in names]
    own = [picture_hash(gray(picture)) for picture in pictures]
    rng = np.random.default_rng(0)
    for picture, mine in zip(pictures, own, strict=True):
        small = resized(picture, (97, 171)).astype(int) + rng.normal(0, 6, (97, 171, 3))
        spoilt = picture_hash(gray(np.clip(small, 0, 255).astype(np.uint8)))
        assert (mine ^ spoilt).bit_count() <= 6
        assert min((mine ^ other).bit_count() for other in own if other != mine) > 12
    assert picture_hash(np.full((90, 160), 7, np.uint8)) == 0


def hashed(values: list[int], shot: tuple[str, int]) -> Hashed:
    return Hashed(hashes=np.array(values, np.uint64), shot=shot)


def test_duplicates_of_many_clips_are_those_of_all_pairs() -> None:
    """Against comparing each with each; copies have up to two bits of noise, of a part of the pictures."""
    rng = np.random.default_rng(3)
    clips = [hashed(rng.integers(1, 2**63, 12).tolist(), (f"{i}", 0)) for i in range(60)]
    for i in range(0, 60, 3):
        flipped = [
            int(h) ^ (1 << int(rng.integers(63))) ^ (1 << int(rng.integers(63))) for h in clips[i].hashes[:8]
        ]
        clips.append(hashed([0, *flipped], (f"copy {i}", 0)))
    found = duplicates.duplicates(clips, 8)
    assert found == {60 + k: 3 * k for k in range(20)}
    one_shot = [hashed(clips[0].hashes.tolist(), ("a", 4)), hashed(clips[0].hashes.tolist(), ("a", 4))]
    assert duplicates.duplicates(one_shot, 8) == {}
    assert duplicates.duplicates([hashed([], ("a", 0)), hashed([], ("b", 0))], 8) == {}


def test_rules_are_read() -> None:
    assert Rule.parse("0.5:7", "x") == Rule(least=0.5, most=7.0)
    assert Rule.parse(":1e-3", "x") == Rule(most=0.001)
    assert Rule.parse("best 12.5%", "x") == Rule(best=0.125)
    assert Rule.parse(None, "x") is None
    for bad in ("7:0.5", "5", "1:2:3", "best 0%", "best 10", "a:b", "-:3"):
        with pytest.raises(ValueError, match=r"^x: "):
            Rule.parse(bad, "x")


def table(**columns: list[float]) -> object:
    import pyarrow

    count = len(next(iter(columns.values())))
    kinds = {key: pyarrow.float64() for key in SCORES}
    filled = {key: pyarrow.array(columns.get(key, [None] * count), kind) for key, kind in kinds.items()}
    rest = {"path": [f"{i}.mp4" for i in range(count)], "shot": [0] * count, "error": [None] * count,
            "hashes": pyarrow.array([[]] * count, pyarrow.list_(pyarrow.uint64()))}  # fmt: skip
    rest |= {key: [1] * count for key in ("width", "height", "frames")}
    assert rest.keys() | filled.keys() <= SCHEMA.keys()
    return pyarrow.table(rest | filled)


def test_the_best_are_of_those_that_come_so_far() -> None:
    """Ten clips, half too short; of the others the sharper 40 % are two. What is unknown is not dropped."""
    seconds = [0.5, 5.0] * 5
    sharpness = [float(value) for value in (90, 10, 80, 20, 70, 30, 60, 40, 50, 50)]
    config = SelectConfig(sharpness="best 40%", duplicates=None)
    chosen = select(table(seconds=seconds, sharpness=sharpness), config)
    assert chosen.kept.tolist() == [7, 9]
    assert {chosen.ledger[row]["threshold"] for row in (1, 3, 5)} == {"best 40% (40:)"}
    assert all(chosen.ledger[row]["stage"] == "seconds" for row in (0, 2, 4, 6, 8))
    assert [stage.stayed for stage in chosen.stages if stage.name == "sharpness"] == [2]


def test_sections_have_names_of_their_own() -> None:
    base = CurateConfig()
    other = CurateConfig(select=SelectConfig(text=None))
    assert base.fingerprint("scan", "shots") == other.fingerprint("scan", "shots")
    assert base.fingerprint("select") != other.fingerprint("select")
