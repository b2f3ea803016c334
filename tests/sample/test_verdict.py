import numpy as np
import pytest
import torch

from kinoflow.data.world import COLORS, MOTIONS, SHAPES, WORDS
from kinoflow.sample.evaluation.judge import ALPHABET, Judge, JudgeConfig, letter_classes, spell


@pytest.fixture(scope="module")
def judge():
    torch.manual_seed(0)
    judge = Judge(JudgeConfig())
    judge.init_weights()
    return judge.eval()


def test_it_is_small(judge):
    assert sum(parameter.numel() for parameter in judge.parameters()) <= 350_000


def test_verdict_has_a_logit_for_each_class(judge):
    verdict = judge(torch.zeros(2, 3, 16, 64, 64))
    assert verdict.color.shape == (2, len(COLORS))
    assert verdict.shape.shape == (2, len(SHAPES))
    assert verdict.motion.shape == (2, len(MOTIONS))
    assert verdict.letters.shape == (2, 4, len(ALPHABET))
    assert verdict.features.shape == (2, 192)


@pytest.mark.parametrize("word", [*WORDS, ""])
def test_words_survive_spelling(word):
    assert spell(letter_classes(word, 4)) == word


def test_nothing_is_read_behind_the_end_of_a_word():
    assert spell([1, 0, 2, 3]) == "A"


def test_prepare_picks_even_frames_and_averages_areas(judge):
    clip = np.random.default_rng(0).integers(0, 256, (32, 128, 192, 3), dtype=np.uint8)
    video = judge.prepare(torch.from_numpy(clip)[None])
    assert video.shape == (1, 3, 16, 64, 64)
    mean = clip[0, :2, :3].astype(float).mean(axis=(0, 1)) / 127.5 - 1
    np.testing.assert_allclose(video[0, :, 0, 0, 0].numpy(), mean, atol=1e-5)
    last = clip[31, -2:, -3:].astype(float).mean(axis=(0, 1)) / 127.5 - 1
    np.testing.assert_allclose(video[0, :, -1, -1, -1].numpy(), last, atol=1e-5)
    plain = torch.from_numpy(clip[:16, :64, :64].copy())[None]
    assert torch.equal(judge.prepare(plain), plain.permute(0, 4, 1, 2, 3) / 127.5 - 1)


def test_a_clip_is_judged_alike_in_any_batch(judge):
    clips = list(np.random.default_rng(1).integers(0, 256, (3, 16, 64, 64, 3), dtype=np.uint8))
    together, one_by_one = judge.judge(clips), judge.judge(clips, batch_size=1)
    assert together.labels == one_by_one.labels
    np.testing.assert_allclose(together.features, one_by_one.features, atol=1e-4)


@pytest.mark.parametrize(
    ("dtype", "off", "size"), [(torch.float16, 0.01, 800_000), (torch.int8, 0.05, 400_000)]
)
def test_saving_keeps_the_verdict(judge, tmp_path, dtype, off, size):
    judge.save_pretrained(tmp_path, dtype=dtype)
    video = torch.rand(1, 3, 16, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    before, after = judge(video), Judge.from_pretrained(tmp_path)(video)
    torch.testing.assert_close(before.features, after.features, rtol=0.01, atol=off)
    assert (tmp_path / "model.safetensors").stat().st_size < size
    judge.save_pretrained(tmp_path)
    assert torch.equal(Judge.from_pretrained(tmp_path)(video).features, after.features) is (
        dtype == torch.int8
    )
