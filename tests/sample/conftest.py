"""A whole release in miniature with random weights, and text encoders that need no checkpoint."""

import hashlib
import shutil
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import pytest
import torch

from kinoflow.conditioning.embedding import TextEmbedding
from kinoflow.conditioning.encoders import quiet
from kinoflow.configs.pretrained import save_pretrained
from kinoflow.dit_video.video_dit import DiTConfig, VideoDiT
from kinoflow.sample.__main__ import main
from kinoflow.sample.card import ReleaseConfig
from kinoflow.sample.evaluation.judge import Judge, JudgeConfig
from kinoflow.sample.release import Release, write
from kinoflow.tae.model.config import TAEConfig
from kinoflow.tae.model.tae import TAE
from tests.conditioning.writing import write_byt5, write_metaclip, write_ul2
from tests.shaken import shake

WIDTHS = (8, 6, 8)


class HashEncoder:
    """States drawn from a hash of the prompt, as many as it has words and one more."""

    def __call__(self, prompts: list[str], fps: Fraction) -> tuple[TextEmbedding, ...]:
        del fps
        length = max(len(prompt.split()) for prompt in prompts) + 1
        rows = [self._row(prompt, length) for prompt in prompts]
        mask = torch.stack([torch.arange(length) <= len(prompt.split()) for prompt in prompts])
        hidden = torch.stack(rows) * mask[..., None]
        return tuple(TextEmbedding(hidden=hidden[..., :width], mask=mask) for width in WIDTHS)

    def null(self) -> tuple[TextEmbedding, ...]:
        return self([""], Fraction(16))

    def _row(self, prompt: str, length: int) -> torch.Tensor:
        seed = int.from_bytes(hashlib.sha256(prompt.encode()).digest()[:4], "big")
        return torch.randn(length, max(WIDTHS), generator=torch.Generator().manual_seed(seed))


def tiny_tae() -> TAE:
    config = TAEConfig(
        patch_size=(8, 8, 8),
        channels=32,
        multipliers=(1,),
        strides=(),
        encoder_blocks=(1,),
        decoder_blocks=(1,),
        latent_channels=4,
        attention=False,
        latent_mean=(0.1, 0.2, 0.0, -0.1),
        latent_std=(1.0, 0.5, 2.0, 1.0),
    )
    torch.manual_seed(0)
    tae = TAE(config)
    tae.init_weights()
    return tae.eval()


def tiny_dit() -> VideoDiT:
    config = DiTConfig(
        width=32, depth=2, heads=2, ffn=48, latent_channels=4, text_widths=WIDTHS, max_tokens=(8, 8, 8)
    )
    torch.manual_seed(1)
    dit = VideoDiT(config)
    dit.init_weights()
    return shake(dit).eval()


@pytest.fixture(scope="session")
def tiny_release_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("release")
    parts = {name: tmp_path_factory.mktemp(name) for name in ("tae", "dit", "text", "judge")}
    tiny_tae().save_pretrained(parts["tae"])
    tiny_dit().save_pretrained(parts["dit"])
    torch.manual_seed(2)
    judge = Judge(JudgeConfig(widths=(4, 4, 4, 8), reading_width=4))
    judge.init_weights()
    judge.save_pretrained(parts["judge"])
    for name in ("ul2", "byt5", "metaclip"):
        (parts["text"] / name).mkdir()
        (parts["text"] / name / "config.json").write_text("{}")
    config = ReleaseConfig(
        name="tiny",
        buckets=("16x32x32@16", "1x32x32@16", "40x32x48@24000/1001"),
        default_bucket="16x32x32@16",
    )
    write(folder, config=config, parts=parts)
    return folder


@pytest.fixture(scope="session")
def reading_folder(tiny_release_folder, tmp_path_factory):
    """The tiny release with a backbone that reads what is known."""
    folder = Path(shutil.copytree(tiny_release_folder, tmp_path_factory.mktemp("reading") / "release"))
    torch.manual_seed(7)
    dit = VideoDiT(replace(tiny_dit().config, known=True))
    dit.init_weights()
    shutil.rmtree(folder / "dit")
    save_pretrained(folder / "dit", config=dit.config, state=shake(dit).state_dict())
    return folder


@pytest.fixture(scope="session")
def whole_release_folder(tiny_release_folder, tmp_path_factory):
    """The tiny release with real, tiny text encoders of the widths that its transformer takes."""
    folder = Path(shutil.copytree(tiny_release_folder, tmp_path_factory.mktemp("whole") / "release"))
    torch.manual_seed(3)
    with quiet():
        write_ul2(folder / "text" / "ul2", width=8)
        write_byt5(folder / "text" / "byt5", width=6)
        write_metaclip(folder / "text" / "metaclip", width=8)
    return folder


@pytest.fixture
def tiny_release(tiny_release_folder, monkeypatch):
    monkeypatch.setattr(Release, "encoder", lambda self, text_cache=None, device="cpu": HashEncoder())
    return Release.load(tiny_release_folder)


@pytest.fixture
def run(tiny_release, tmp_path, monkeypatch, capsys):
    """Runs the command in an empty folder, two steps on the tiny release; gives code, stdout, stderr."""
    monkeypatch.chdir(tmp_path)

    def command(*argv):
        code = main([*argv, "--weights", str(tiny_release.folder), "--steps", "2"])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return command
