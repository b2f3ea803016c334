from fractions import Fraction

import numpy as np
import pytest
import torch

from kinoflow.data.world.questions import QUESTIONS
from kinoflow.sample.evaluation.judge import ALPHABET
from kinoflow.sample.evaluation.strict import StrictConfig, StrictJudge


@pytest.fixture(scope="module")
def judge():
    torch.manual_seed(0)
    judge = StrictJudge(StrictConfig())
    judge.init_weights()
    return judge.eval()


def test_it_has_a_logit_for_each_answer_and_is_small(judge, tmp_path):
    seen = judge(torch.zeros(2, 3, 16, 64, 64), torch.ones(2))
    assert {key: logits.shape for key, logits in seen.classes.items()} == {
        key: (2, len(names)) for key, names in QUESTIONS.items()
    }
    assert seen.letters.shape == (2, 4, len(ALPHABET))
    judge.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").stat().st_size <= 1_200_000
    again = StrictJudge.from_pretrained(tmp_path)(torch.zeros(2, 3, 16, 64, 64), torch.ones(2))
    torch.testing.assert_close(seen.classes, again.classes, rtol=0.02, atol=0.02)


def test_a_place_is_where_its_features_are(judge):
    """A map that only the first place looks for, one hot cell in each time: its position and its square."""
    cells = [(0, 0), (7, 7), (2, 5), (4, 0)]
    x = torch.zeros(1, judge.config.widths[-1], 4, 8, 8)
    for time, (row, column) in enumerate(cells):
        x[0, 0, time, row, column] = 1
    looking = StrictJudge(judge.config)
    looking.init_weights()
    with torch.no_grad():
        looking.where.weight.zero_()
        looking.where.weight[0, 0] = 100.0
        looked = looking._look(x).unflatten(1, (4, judge.config.places, -1))[0, :, 0]
        grid = torch.linspace(-1, 1, 8)
        for time, (row, column) in enumerate(cells):
            moments = [grid[row], grid[column], grid[row] ** 2, grid[column] ** 2]
            torch.testing.assert_close(looked[time, -4:], 4 * torch.stack(moments))
            what = looking.what(x)[0, :, time, row, column]
            torch.testing.assert_close(looked[time, :-4], what)


def test_a_clip_is_judged_alike_in_any_batch(judge):
    clips = list(np.random.default_rng(1).integers(0, 256, (3, 16, 64, 64, 3), dtype=np.uint8))
    assert judge.judge(clips, Fraction(16)) == judge.judge(clips, Fraction(16), batch_size=1)


def test_it_is_told_how_long_a_clip_lasts(judge):
    video = torch.rand(1, 3, 16, 64, 64, generator=torch.Generator().manual_seed(0))
    one, other = (judge(video, torch.tensor([seconds])).classes["speed"] for seconds in (1.0, 2.0))
    assert not torch.allclose(one, other)
