"""What the camera does, against moves that are rendered from real pictures."""

import itertools

import numpy as np
import pytest

from kinoflow.data import video
from kinoflow.data.engine import motion
from tests.data.making import real_clip

cv2 = pytest.importorskip("cv2")
SIZE, FPS, FRAMES = (160, 90), 24.0, 8
PICTURES = [("bikes.mp4", at) for at in (40, 90, 150, 200)] + [
    ("bigbuckbunny.mp4", at) for at in (10, 60, 120)
]
# Of the picture, in a frame: pixels right and down, growth, radians clockwise.
MOVES = {
    "still": (0, 0, 0, 0), "pan right": (-1, 0, 0, 0), "pan left": (1, 0, 0, 0), "tilt down": (0, -1, 0, 0),
    "tilt up": (0, 1, 0, 0), "zoom in": (0, 0, 1, 0), "zoom out": (0, 0, -1, 0),
    "roll counterclockwise": (0, 0, 0, 1), "roll clockwise": (0, 0, 0, -1),
}  # fmt: skip
SPEEDS = (0.3, 0.8, 2.0)  # pixels of 160 in a frame; of zoom and roll at half a side


def rendered(
    picture: np.ndarray, move: tuple[float, ...], speed: float, noise: np.ndarray
) -> list[np.ndarray]:
    """A window on a picture, moved evenly, with noise of a sensor."""
    height, width = picture.shape
    found, fit = [], 0.7 * min(width / SIZE[0], height / SIZE[1])
    for at, grain in enumerate(noise):
        step = (at - FRAMES / 2) * speed
        right, down, growth, turn = (step * each for each in move)
        scale = np.exp(growth / (SIZE[0] / 2)) / fit
        angle = turn / (SIZE[0] / 2)
        matrix = scale * np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
        shift = np.array(SIZE) / 2 + [right, down] - matrix @ [width / 2, height / 2]
        affine = np.concatenate([matrix, shift[:, None]], axis=1)
        seen = cv2.warpAffine(picture, affine, SIZE, flags=cv2.INTER_AREA, borderMode=cv2.BORDER_REFLECT)
        found.append(np.clip(seen + grain, 0, 255).astype(np.uint8))
    return found


def guess(frames: list[np.ndarray]) -> str:
    seen = [motion.motion(*pair) for pair in itertools.pairwise(frames)]
    x, y, zoom, roll = (
        np.array([each[key] for each in seen]) for key in ("flow_x", "flow_y", "zoom", "roll")
    )
    return motion.camera(x, y, zoom, roll, FPS)


def test_moves_of_real_pictures_are_told_apart() -> None:
    """Seven pictures, nine moves, three speeds."""
    rng, wrong, count = np.random.default_rng(0), [], 0
    for name, at in PICTURES:
        picture = cv2.cvtColor(video.read(real_clip(name), at, at + 1)[0], cv2.COLOR_RGB2GRAY)
        for (move, way), speed in itertools.product(MOVES.items(), SPEEDS):
            found = guess(rendered(picture, way, speed, rng.normal(0, 1, (FRAMES, SIZE[1], SIZE[0]))))
            count += 1
            wrong += [(name, at, move, speed, found)] if found != move else []
    print(len(wrong), "of", count)
    assert len(wrong) <= 0.05 * count, wrong


def test_nothing_is_still() -> None:
    none = np.empty(0)
    assert motion.camera(none, none, none, none, FPS) == "still"


def test_what_moves_by_itself_is_not_the_camera() -> None:
    """A third of the picture goes its own way."""
    picture = cv2.cvtColor(video.read(real_clip("bikes.mp4"), 200, 201)[0], cv2.COLOR_RGB2GRAY)
    noise = np.zeros((FRAMES, SIZE[1], SIZE[0]))
    still, moving = (rendered(picture, MOVES[name], 1.5, noise) for name in ("still", "pan left"))
    for before, after in zip(still, moving, strict=True):
        before[:, :50] = after[:, :50]
    assert guess(still) == "still"
