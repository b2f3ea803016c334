"""Contact sheets show the frames they say, where they say."""

import numpy as np
import pytest
from PIL import Image

from kinoflow.configs.errors import UserError
from kinoflow.data import video
from tests.data.making import gradient


def test_contact_sheet(tmp_path):
    clips = [gradient(9, 20, 30), gradient(2, 40, 30), gradient(1, 20, 30)]
    video.contact_sheet(tmp_path / "a.png", clips, columns=3)
    sheet = np.asarray(Image.open(tmp_path / "a.png"))
    assert sheet.shape == (20 + 4 + 40 + 4 + 20, 3 * 34 - 4, 3)
    for column, frame in enumerate((0, 4, 8)):
        assert np.array_equal(sheet[:20, 34 * column : 34 * column + 30], clips[0][frame])
    assert (sheet[24:64, 68:] == 255).all()  # two frames in three columns
    captions = ["one", "a caption that is much longer than its row is wide", "three"]
    video.contact_sheet(tmp_path / "b.png", clips, columns=3, captions=captions)
    assert len(np.asarray(Image.open(tmp_path / "b.png"))) > len(sheet) + 3 * 12
    with pytest.raises(UserError, match="captions: 1 for 3"):
        video.contact_sheet(tmp_path / "c.png", clips, columns=3, captions=["one"])
    with pytest.raises(UserError, match="nothing to show"):
        video.contact_sheet(tmp_path / "c.png", [], columns=3)
