"""OpenAI's own client drives the server."""

import warnings

import openai
import pytest
from PIL import Image

from kinoflow.data.video import probe, read
from kinoflow.sample.serve.app import ServeConfig
from tests.sample.serve.fake import TOKEN, FakeMaker, running


@pytest.fixture
def videos(tmp_path):
    """`client.videos` of a client that has the token."""
    config = ServeConfig(folder=tmp_path / "serve", token=TOKEN)
    with running(FakeMaker(), config) as address, warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # OpenAI's own service ends; the form stays
        with openai.OpenAI(base_url=f"{address}/v1", api_key=TOKEN, max_retries=0) as client:
            yield client.videos


def test_a_video_is_made_loaded_down_listed_and_deleted(videos, tmp_path):
    made = videos.create_and_poll(
        prompt="a red star",
        size="48x32",
        seconds="1",
        poll_interval_ms=5,
        extra_body={"seed": 5, "fps": "24"},
    )
    assert (made.status, made.progress, made.size, made.seconds) == ("completed", 100, "48x32", "1")
    assert made.error is None and made.prompt == "a red star"
    videos.download_content(made.id).write_to_file(tmp_path / "star.mp4")
    assert probe(tmp_path / "star.mp4").frames == 24
    others = [videos.create(prompt=f"star {number}").id for number in range(3)]
    assert [video.id for video in videos.list(limit=2)] == [*reversed(others), made.id]
    assert [video.id for video in videos.list(order="asc", after=others[0])] == others[1:]
    assert videos.retrieve(made.id) == made
    assert videos.delete(made.id).deleted
    with pytest.raises(openai.NotFoundError):
        videos.retrieve(made.id)


def test_a_picture_is_sent_as_openai_sends_it(videos, tmp_path):
    picture = tmp_path / "first.png"
    Image.new("RGB", (64, 48), (90, 90, 90)).save(picture)
    for given in (picture, picture.read_bytes(), ("a.png", picture.read_bytes(), "image/png")):
        made = videos.create_and_poll(prompt="a star", input_reference=given, poll_interval_ms=5)
        assert made.status == "completed" and made.input_reference == f"{made.id}.first.png"
        videos.download_content(made.id).write_to_file(tmp_path / "star.mp4")
        assert abs(read(tmp_path / "star.mp4").mean() - 90) < 2
    with pytest.raises(openai.BadRequestError, match="no picture that can be read") as raised:
        videos.create(prompt="a star", input_reference=b"a star")
    assert raised.value.param == "input_reference"


def test_errors_are_those_that_the_client_knows(videos):
    failed = videos.create_and_poll(prompt="a bug", poll_interval_ms=5)
    assert failed.status == "failed" and "its log says why" in failed.error.message
    with pytest.raises(openai.ConflictError):
        videos.download_content(failed.id)
    with pytest.raises(openai.BadRequestError, match="sora-2") as raised:
        videos.create(prompt="a star", model="sora-2")
    assert (raised.value.param, raised.value.code) == ("model", "invalid_value")
    stranger = openai.OpenAI(base_url=str(videos._client.base_url), api_key="another", max_retries=0)
    with stranger, pytest.raises(openai.AuthenticationError):
        stranger.videos.create(prompt="a star")
