"""Pictures that a clip begins and ends with: sent, checked, kept with the job, given to the pipeline."""

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from starlette.testclient import TestClient

from kinoflow.configs.errors import UserError
from kinoflow.data.video import read
from kinoflow.sample.again import main as again
from kinoflow.sample.output import read_metadata
from kinoflow.sample.pipeline import Pipeline
from kinoflow.sample.release import Release
from kinoflow.sample.serve import pictures
from kinoflow.sample.serve.app import ServeConfig, create_app
from kinoflow.sample.serve.errors import ApiError
from kinoflow.sample.serve.maker import ReleaseMaker
from tests.sample.conftest import HashEncoder
from tests.sample.serve.fake import FORM, until
from tests.sample.serve.test_api import refusal


def encoded(kind: str = "PNG", size=(40, 24), seed: int = 0, **settings) -> bytes:
    """A picture of noise."""
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind, **settings)
    return file.getvalue()


def bomb(width: int, height: int) -> bytes:
    """A small PNG whose header promises so many pixels."""
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    start = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header))
    return start + encoded()[len(start) :]


def moving() -> bytes:
    return encoded("WEBP", save_all=True, append_images=[Image.new("RGB", (40, 24))])


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "serve" / "clips").iterdir())


@pytest.mark.parametrize(("kind", "suffix"), [("PNG", ".png"), ("JPEG", ".jpg"), ("WEBP", ".webp")])
def test_a_picture_is_kept_as_it_came_and_goes_with_its_job(client, tmp_path, kind, suffix):
    client, data = client(), encoded(kind)
    sent = {"input_reference": ("../../name.txt", data, "text/html"), "last_reference": ("b", encoded())}
    video = client.post("/v1/videos", data=FORM | {"seed": "3"}, files=sent).json()
    id = video["id"]
    first, last = f"{id}.first{suffix}", f"{id}.last.png"
    assert (video["input_reference"], video["last_reference"], video["seed"]) == (first, last, 3)
    assert client.ended(id)["status"] == "completed"
    assert names(tmp_path) == sorted([first, last, f"{id}.mp4"])
    back = client.get(f"/v1/videos/{id}/content?variant=input_reference")
    assert back.content == data and back.headers["content-type"] == f"image/{kind.lower()}"
    assert client.get(f"/v1/videos/{id}/content?variant=last_reference").content == encoded()
    client.delete(f"/v1/videos/{id}")
    assert names(tmp_path) == []


@pytest.mark.parametrize(
    ("data", "status", "said"),
    [
        (b"", 400, "no picture that can be read; send a PNG, JPEG or WebP"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", 400, "no picture that can be read"),
        (encoded("GIF"), 400, "no picture that can be read"),
        (encoded("TIFF"), 400, "no picture that can be read"),
        (encoded()[:-200], 400, "no picture that can be read"),
        (moving(), 400, "moves (2 frames); send a picture"),
        (bomb(8192, 4097), 413, "more than 33,554,432 pixels; send a smaller picture"),
        (bomb(10_000, 10_000), 413, "more than 33,554,432 pixels"),
        (bomb(60_000, 60_000), 413, "more than 33,554,432 pixels"),
        (bomb(8192, 4096), 400, "no picture that can be read"),  # few enough to look: there is less
        (b"x" * (pictures.MAX_BYTES + 1), 413, "larger than 10 MiB; send a smaller picture"),
    ],
    ids=range(11),
)
def test_what_is_no_picture_or_too_large_is_refused_in_one_line(client, tmp_path, data, status, said):
    client = client()
    sent = {"input_reference": ("a.png", data, "image/png")}
    error = refusal(client.post("/v1/videos", data=FORM, files=sent), status)
    assert error["message"] == f"input_reference: {error['message'].partition(': ')[2]}"
    assert said in error["message"] and error["param"] == "input_reference"
    assert names(tmp_path) == [] and client.get("/v1/videos").json()["data"] == []


def test_a_bomb_is_not_decoded(monkeypatch):
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda self: pytest.fail("it was decoded"))
    with pytest.raises(ApiError, match="more than"):
        pictures.suffix_of("input_reference", bomb(8192, 4097))


def test_what_cannot_be_asked_leaves_no_picture(client, tmp_path):
    client = client(queue=1)
    client.gate.clear()
    client.begun(client.ask()["id"])
    client.ask()
    first, last = {"input_reference": encoded()}, {"last_reference": encoded()}
    assert refusal(client.post("/v1/videos", data=FORM, files=first), 429)["code"] == "queue_full"
    error = refusal(client.post("/v1/videos", data=FORM, files=last), 400)
    assert "needs input_reference as well" in error["message"] and error["param"] == "last_reference"
    steps = {"num_inference_steps": "300"}
    assert (
        refusal(client.post("/v1/videos", data=FORM | steps, files=first), 400)["param"]
        == "num_inference_steps"
    )
    refusal(client.post("/v1/videos", data=FORM, files={"first_frame": encoded()}), 400)
    assert names(tmp_path) == []
    client.gate.set()


def test_an_empty_field_of_a_form_is_no_picture(client):
    part = b'--x\r\nContent-Disposition: form-data; name="%b"%b\r\n\r\n%b\r\n'
    empty = part % (b"input_reference", b'; filename=""\r\nContent-Type: application/octet-stream', b"")
    body = part % (b"prompt", b"", b"a star") + empty + b"--x--\r\n"
    kind = {"Content-Type": "multipart/form-data; boundary=x"}
    video = client().post("/v1/videos", content=body, headers=kind).json()
    assert video["input_reference"] is None and video["prompt"] == "a star"


def test_a_picture_survives_a_restart_in_another_place_and_strays_do_not(client, tmp_path):
    before = client()
    before.gate.clear()
    ids = [
        before.post("/v1/videos", data=FORM, files={"input_reference": gray(shade)}).json()["id"]
        for shade in (60, 120)
    ]
    before.begun(ids[0])
    before.__exit__()
    clips = tmp_path / "serve" / "clips"
    stray = f"video_{'0' * 32}.first.png"
    (clips / stray).write_bytes(gray(1))
    (tmp_path / "serve").rename(tmp_path / "elsewhere")
    (tmp_path / "serve").symlink_to(tmp_path / "elsewhere")
    after = client()
    for id, shade in zip(ids, (60, 120), strict=True):
        assert after.ended(id)["status"] == "completed"
        assert abs(read(clips / f"{id}.mp4").mean() - shade) < 2
    assert stray not in names(tmp_path)


def gray(shade: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (40, 40), (shade,) * 3).save(file, "PNG")
    return file.getvalue()


def test_a_picture_that_was_taken_away_is_said(client, tmp_path):
    client = client()
    id = client.post("/v1/videos", data=FORM, files={"input_reference": encoded()}).json()["id"]
    client.ended(id)
    (tmp_path / "serve" / "clips" / f"{id}.first.png").unlink()
    missing = refusal(client.get(f"/v1/videos/{id}/content?variant=input_reference"), 404)
    assert "was removed" in missing["message"]
    plain = client.ask()["id"]
    without = refusal(client.get(f"/v1/videos/{plain}/content?variant=input_reference"), 404)
    assert "without a picture" in without["message"]


def test_the_frames_are_those_of_the_pipeline_and_again_makes_them(
    reading_folder, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(Release, "encoder", lambda self, text_cache=None, device="cpu": HashEncoder())
    pipeline = Pipeline(Release.load(reading_folder))
    app = create_app(ReleaseMaker(pipeline), ServeConfig(folder=tmp_path / "serve"))
    sent = {"input_reference": encoded("JPEG"), "last_reference": encoded(seed=1)}
    form = FORM | {"seed": "5", "num_inference_steps": "2"}
    with TestClient(app, base_url="http://localhost") as client:
        assert client.get("/v1/models").json()["data"][0]["takes_pictures"]
        id = client.post("/v1/videos", data=form, files=sent).json()["id"]
        until(lambda: client.get(f"/v1/videos/{id}").json()["status"] == "completed")
    for name, data in sent.items():
        (tmp_path / name).write_bytes(data)
    first, last = tmp_path / "input_reference", tmp_path / "last_reference"
    video = pipeline(FORM["prompt"], seed=5, steps=2, image=first, last=last)
    clip = tmp_path / "serve" / "clips" / f"{id}.mp4"
    assert np.array_equal(read(clip), read(video.save(tmp_path / "own.mp4")))
    assert not np.array_equal(video.frames, pipeline(FORM["prompt"], seed=5, steps=2).frames)
    written = read_metadata(clip)
    assert written["image"] == str(clip.with_name(f"{id}.first.jpg"))
    assert written["image_sha256"] == video.metadata["image_sha256"]
    assert again([str(clip), "--weights", str(reading_folder)]) == 0
    assert "equal, to the byte" in capsys.readouterr().out


def test_a_release_of_text_alone_says_so_by_the_fields_name(tiny_release, tmp_path):
    app = create_app(ReleaseMaker(Pipeline(tiny_release)), ServeConfig(folder=tmp_path / "serve"))
    with TestClient(app, base_url="http://localhost") as client:
        assert not client.get("/v1/models").json()["data"][0]["takes_pictures"]
        error = refusal(client.post("/v1/videos", data=FORM, files={"input_reference": encoded()}), 400)
    assert error["message"].startswith("input_reference: tiny makes clips of text alone")
    assert error["param"] == "input_reference" and names(tmp_path) == []


def test_what_the_pipeline_says_of_a_picture_names_the_field(client, tmp_path, monkeypatch):
    client = client()

    def check(request):
        raise UserError(f"{request.image}: is black; {tmp_path}")

    monkeypatch.setattr(client.maker, "check", check)
    error = refusal(client.post("/v1/videos", data=FORM, files={"input_reference": encoded()}), 400)
    assert error["message"].startswith("input_reference: is black") and error["param"] == "input_reference"
