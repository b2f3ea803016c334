"""Clips to latent files and back: exact where the autoencoder is, equal by every route, clear in errors."""

import json
import zipfile
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from kinoflow.configs.errors import UserError
from kinoflow.data import video
from kinoflow.data.latents.kino import read_info
from kinoflow.tae import TAE, Posterior, TAEConfig
from kinoflow.tae.__main__ import main
from kinoflow.tae.codec.codec import Codec
from kinoflow.tae.model.pixels import from_bytes

SMALL = TAEConfig(
    patch_size=(2, 4, 4),
    channels=8,
    multipliers=(1, 2, 2),
    strides=((2, 2, 2), (2, 1, 1)),
    encoder_blocks=(1, 1, 1),
    decoder_blocks=(1, 1, 1),
    latent_channels=4,
    norm="rms",
    attention=False,
)
NTSC = Fraction(30000, 1001)


class Pooling(TAE):
    """Means over 8x8x8 blocks as latents: exact for clips that are constant on them."""

    def __init__(self) -> None:
        nn.Module.__init__(self)
        none = (0, 0, 0, 0)
        self.config = TAEConfig(channels=32, encoder_blocks=none, decoder_blocks=none, latent_channels=3)
        self.unused = nn.Parameter(torch.zeros(1))

    def encode(self, video: Tensor) -> Posterior:
        video = from_bytes(video.movedim(1, -1))
        missing = -video.shape[2] % 8
        filled = torch.cat((video, video[:, :, -1:].expand(-1, -1, missing, -1, -1)), dim=2)
        mean = nn.functional.avg_pool3d(filled, 8)
        return Posterior(mean=mean, logvar=torch.zeros_like(mean))

    def decode(self, latent: Tensor, frames: int) -> Tensor:
        for dim in (2, 3, 4):
            latent = latent.repeat_interleave(8, dim=dim)
        return latent[:, :, :frames]


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    torch.manual_seed(0)
    model = TAE(SMALL)
    model.init_weights()
    for parameter in model.parameters():  # nothing stays zero, so that every layer has a say
        nn.init.normal_(parameter, std=0.2)
    folder = tmp_path_factory.mktemp("weights")
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def codec(weights) -> Codec:
    return Codec(TAE.from_pretrained(weights), name="random")


def noise(frames: int, height: int, width: int) -> np.ndarray:
    coarse = np.random.default_rng(0).integers(0, 256, (frames, height // 8 + 1, width // 8 + 1, 3), np.uint8)
    return coarse.repeat(8, axis=1).repeat(8, axis=2)[:, :height, :width]


@pytest.fixture(scope="module")
def clip(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("clip") / "noise.mp4"
    video.write(path, noise(45, 37, 50), fps=NTSC)
    return path


def decoded(codec: Codec, path: Path, start: int = 0, end: int | None = None) -> np.ndarray:
    return np.concatenate(list(codec.decode(path, start=start, end=end)))


@pytest.mark.parametrize("frames", [1, 8, 31, 33, 41, 70])
@pytest.mark.parametrize("name", ["clip.kino", "clip.zarr"])
def test_exact_autoencoder_gives_exact_frames(tmp_path, frames, name):
    """Grey blocks of 8 frames and 8x8 pixels, with sides that are no multiple of 8, come back whole."""
    blocks = noise(frames // 8 + 1, 26, 41).repeat(8, axis=0)[:frames, :, :, :1].repeat(3, axis=3)
    source = tmp_path / "blocks.mp4"
    video.write(source, blocks, fps=NTSC, crf=0)
    original = video.read(source)
    assert np.abs(original.astype(int) - blocks).max() <= 2
    codec = Codec(Pooling(), name="pooling")
    info = codec.encode(source, tmp_path / name)
    assert (info.frames, info.height, info.width, info.fps) == (frames, 26, 41, NTSC)
    assert np.array_equal(decoded(codec, tmp_path / name), original)


def test_decoding_a_file_equals_reconstructing(tmp_path, codec, clip):
    codec.encode(clip, tmp_path / "clip.kino")
    pairs = list(codec.reconstruct(clip))
    whole = decoded(codec, tmp_path / "clip.kino")
    assert np.array_equal(whole, np.concatenate([pair.decoded for pair in pairs]))
    assert np.array_equal(np.concatenate([pair.source for pair in pairs]), video.read(clip))
    assert whole.std() > 5  # not one flat colour, which would make all this easy


@pytest.mark.parametrize(("start", "end"), [(0, 1), (15, 17), (31, 33), (40, 45), (44, 45), (7, 40)])
def test_range_equals_slice(tmp_path, codec, clip, start, end):
    codec.encode(clip, tmp_path / "clip.kino")
    whole = decoded(codec, tmp_path / "clip.kino")
    part = decoded(codec, tmp_path / "clip.kino", start, end).astype(int)
    # Of a part of a tile only what it is made of is computed, in shapes that round in their own way.
    apart = np.abs(part - whole[start:end])
    assert apart.max() <= 1 and np.count_nonzero(apart) <= 1e-4 * apart.size + 1


def test_range_reads_only_its_tiles(tmp_path, weights, clip):
    """With the last chunk gone, frames whose tiles do not need it still decode."""
    codec = Codec(TAE.from_pretrained(weights), name="random", tiling="blend")
    codec.encode(clip, tmp_path / "clip.zarr")
    whole = decoded(codec, tmp_path / "clip.zarr", 40, 45)
    chunks = sorted(path for path in (tmp_path / "clip.zarr" / "latent" / "c").rglob("*") if path.is_file())
    assert len(chunks) == 2
    chunks[1].unlink()
    assert len(decoded(codec, tmp_path / "clip.zarr", 0, 5)) == 5
    assert whole.shape[0] == 5
    with pytest.raises(UserError, match="latent frames 4:6 are missing"):
        decoded(codec, tmp_path / "clip.zarr", 40, 45)


def test_file_says_what_it_holds(tmp_path, codec, clip):
    written = codec.encode(clip, tmp_path / "clip.kino")
    info = read_info(tmp_path / "clip.kino")
    assert info == written
    assert info.fps == NTSC
    assert info.source == "noise.mp4"
    assert info.color["matrix"] == "bt709"
    assert info.tae_sha256 == codec.sha256
    with zipfile.ZipFile(tmp_path / "clip.kino") as archive:
        chunks = [name for name in archive.namelist() if "/c/" in name]
    assert len(chunks) == 2  # of 4 latent frames each


def test_a_picture_is_a_clip_of_one_frame(tmp_path, codec):
    Image.fromarray(noise(1, 30, 20)[0]).save(tmp_path / "a.png")
    codec.encode(tmp_path / "a.png", tmp_path / "a.kino")
    assert decoded(codec, tmp_path / "a.kino").shape == (1, 30, 20, 3)


def test_spatial_tiles_keep_the_size(tmp_path, weights, clip):
    tiled = Codec(TAE.from_pretrained(weights), name="random", spatial_tile=32)
    tiled.encode(clip, tmp_path / "clip.kino")
    assert decoded(tiled, tmp_path / "clip.kino", 0, 3).shape == (3, 37, 50, 3)


def test_another_autoencoder_is_named(tmp_path, codec, clip):
    codec.encode(clip, tmp_path / "clip.kino")
    other = Codec(Pooling(), name="pooling")
    with pytest.raises(UserError, match=rf"random \({codec.sha256[:12]}\), not pooling"):
        decoded(other, tmp_path / "clip.kino")


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-200])


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as archive:
        chunk = next(entry for entry in archive.infolist() if "/c/" in entry.filename)
    data[chunk.header_offset + 100] ^= 0xFF
    path.write_bytes(bytes(data))


def other_zip(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("hello.txt", "hello")


@pytest.mark.parametrize(
    "spoil",
    [truncate, flip, other_zip, lambda path: path.write_text("hello"), lambda path: path.write_bytes(b"")],
)
def test_damaged_file(tmp_path, codec, clip, spoil):
    path = tmp_path / "clip.kino"
    codec.encode(clip, path)
    spoil(path)
    with pytest.raises(UserError, match=r"clip\.kino: .*damaged") as caught:
        decoded(codec, path)
    assert "\n" not in str(caught.value)


def test_newer_version(tmp_path, codec, clip):
    codec.encode(clip, tmp_path / "clip.zarr")
    meta = tmp_path / "clip.zarr" / "zarr.json"
    meta.write_text(meta.read_text().replace('"version": 1', '"version": 2'))
    with pytest.raises(UserError, match="version 2"):
        read_info(tmp_path / "clip.zarr")


def test_missing_file_and_range_outside(tmp_path, codec, clip):
    with pytest.raises(UserError, match="no such file"):
        read_info(tmp_path / "nothing.kino")
    codec.encode(clip, tmp_path / "clip.kino")
    for start, end in ((0, 46), (5, 5), (-1, 3)):
        with pytest.raises(UserError, match="has frames 0:45"):
            decoded(codec, tmp_path / "clip.kino", start, end)


@pytest.mark.parametrize("name", ["clip.kino", "clip.zarr"])
@pytest.mark.parametrize("fault", [KeyboardInterrupt(), OSError(28, "No space left on device")])
def test_interrupted_encoding_leaves_the_old_file(tmp_path, codec, clip, name, fault):
    path = tmp_path / name
    codec.encode(clip, path)
    before = read_info(path)

    def stop(done: int) -> None:
        raise fault

    with pytest.raises((KeyboardInterrupt, UserError), match="disk is full" if fault.args else None):
        codec.encode(clip, path, progress=stop)
    assert read_info(path) == before
    assert [entry.name for entry in tmp_path.iterdir()] == [name]


def test_a_foreign_folder_is_not_replaced(tmp_path, codec, clip):
    (tmp_path / "mine.zarr").mkdir()
    (tmp_path / "mine.zarr" / "diary.txt").write_text("x")
    with pytest.raises(UserError, match="not a latent file"):
        codec.encode(clip, tmp_path / "mine.zarr")
    with pytest.raises(UserError, match=r"\.kino"):
        codec.encode(clip, tmp_path / "clip.npz")
    assert [entry.name for entry in tmp_path.rglob("*.txt")] == ["diary.txt"]


def run(capsys, *arguments: object) -> dict:
    assert main([*map(str, arguments), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_commands_agree(tmp_path, capsys, weights, clip):
    model = ("--weights", weights)
    encoded = run(capsys, "encode", clip, tmp_path / "a.kino", *model)
    run(capsys, "decode", tmp_path / "a.kino", tmp_path / "b.mp4", *model)
    figures = run(capsys, "reconstruct", clip, tmp_path / "c.mp4", *model)
    assert (tmp_path / "b.mp4").read_bytes() == (tmp_path / "c.mp4").read_bytes()
    assert video.probe(tmp_path / "c.mp4").fps == NTSC
    assert encoded["frames"] == figures["frames"] == 45
    assert encoded["bytes"] == (tmp_path / "a.kino").stat().st_size
    assert encoded["ratio"] == pytest.approx(45 * 37 * 50 * 3 / (6 * 4 * 5 * 7 * 2))
    assert 0 < figures["psnr"] < 100
    assert -1 <= figures["ssim"] <= 1
    assert len(figures["psnr_by_frame"]) == 45
    part = run(capsys, "decode", tmp_path / "a.kino", tmp_path / "d.mp4", *model, "--start", 40)
    assert part["frames"] == 5
    info = run(capsys, "info", tmp_path / "a.kino")
    assert info["fps"] == "30000/1001"


def test_side_by_side_has_the_source_on_the_left(tmp_path, capsys, weights, clip):
    run(capsys, "reconstruct", clip, tmp_path / "c.mp4", "--side-by-side", "--weights", weights, "--crf", 1)
    both, source = video.read(tmp_path / "c.mp4"), video.read(clip)
    assert both.shape == (45, 37, 100, 3)
    left, right = (np.abs(half.astype(int) - source).mean() for half in np.split(both, 2, axis=2))
    assert left < 10 < 3 * left < right


def test_without_json_a_person_gets_a_table_and_the_path(tmp_path, capsys, weights, clip):
    assert main(["reconstruct", str(clip), str(tmp_path / "c.mp4"), "--weights", str(weights)]) == 0
    printed = capsys.readouterr().out
    assert "psnr" in printed
    assert "ssim" in printed
    assert printed.rstrip().endswith(str(tmp_path / "c.mp4"))


@pytest.mark.parametrize("command", ["encode", "decode", "reconstruct", "info"])
def test_bad_input_is_one_line_and_exit_2(tmp_path, capsys, weights, command):
    (tmp_path / "bad.mp4").write_bytes(b"not a clip")
    arguments = [command, str(tmp_path / "bad.mp4")]
    if command != "info":
        arguments += [
            str(tmp_path / ("out.kino" if command == "encode" else "out.mp4")),
            "--weights",
            str(weights),
        ]
    assert main(arguments) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.count("\n") == 1
    assert "bad.mp4" in printed.err
    assert [entry.name for entry in tmp_path.iterdir()] == ["bad.mp4"]


def test_missing_weights(tmp_path, capsys, clip):
    missing = tmp_path / "nowhere"
    assert main(["encode", str(clip), str(tmp_path / "a.kino"), "--weights", str(missing)]) == 2
    assert str(missing) in capsys.readouterr().err


def test_ctrl_c_is_one_line_and_exit_130(tmp_path, capsys, weights, clip, monkeypatch):
    def interrupt(self, latent, frames):
        raise KeyboardInterrupt

    monkeypatch.setattr(TAE, "decode", interrupt)
    assert main(["reconstruct", str(clip), str(tmp_path / "c.mp4"), "--weights", str(weights)]) == 130
    assert capsys.readouterr().err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_tiling_and_memory_on_the_command_line(tmp_path, weights, clip, capsys):
    model = ["--weights", str(weights), "--json"]
    for tiling in ("halo", "blend"):
        words = ["encode", str(clip), str(tmp_path / f"{tiling}.kino"), "--tiling", tiling]
        assert main([*words, "--memory", "500MB", *model]) == 0
    assert main([*words, "--memory", "1MB", *model]) == 2
    assert "is too little for frames of 56x40; give" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main([*words, "--memory", "much", *model])
    assert "'much' is not a size; write it as 8GiB" in capsys.readouterr().err


def test_the_mode_reaches_the_tiles(weights, clip):
    """With random weights the two modes differ."""
    frames = {}
    for tiling in ("halo", "blend"):
        codec = Codec(TAE.from_pretrained(weights), name="random", tiling=tiling)
        frames[tiling] = np.concatenate([pair.decoded for pair in codec.reconstruct(clip)])
    assert frames["halo"].shape == frames["blend"].shape == (45, 37, 50, 3)
    assert not np.array_equal(frames["halo"], frames["blend"])
