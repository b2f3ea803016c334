"""The video API, with a maker that is quick."""

import json
import sqlite3
from fractions import Fraction

import pytest

from kinoflow.data.video import probe
from kinoflow.sample.request import ClipRequest
from kinoflow.sample.serve.jobs import Jobs
from tests.sample.serve.fake import FORM, FakeMaker, until

UNKNOWN = "video_" + "0" * 32


def refusal(response, status: int) -> dict:
    """The error of an answer, which has OpenAI's form and one line."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    (error,) = response.json().values()
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"] and "\n" not in error["message"] and "Traceback" not in response.text
    return error


def test_a_clip_from_request_to_file(client, tmp_path):
    client = client()
    client.gate.clear()
    video = client.ask(seed=7)
    assert (video["object"], video["status"], video["progress"]) == ("video", "queued", 0)
    assert (video["model"], video["seconds"], video["size"]) == ("fake", "1", "32x32")
    assert (video["completed_at"], video["error"], video["seed"]) == (None, None, 7)
    assert client.begun(video["id"])["status"] == "in_progress"
    client.gate.set()
    done = client.ended(video["id"])
    assert (done["status"], done["progress"]) == ("completed", 100)
    assert isinstance(done["completed_at"], int) and done["created_at"] == video["created_at"]
    assert done["figures"]["seconds"] > 0
    content = client.get(f"/v1/videos/{video['id']}/content")
    assert content.headers["content-type"] == "video/mp4"
    assert content.headers["x-content-type-options"] == "nosniff"
    (tmp_path / "clip.mp4").write_bytes(content.content)
    info = probe(tmp_path / "clip.mp4")
    assert (info.frames, info.width, info.fps) == (16, 32, Fraction(16))
    assert info.metadata["prompt"] == FORM["prompt"]
    part = client.get(f"/v1/videos/{video['id']}/content", headers={"Range": "bytes=4-7"})
    assert (part.status_code, part.content) == (206, b"ftyp")


@pytest.mark.parametrize("kind", ["json", "data", "files"])
def test_json_and_forms_are_the_same(client, kind):
    values = FORM | {"size": "48x32", "seconds": "1", "fps": "24", "seed": "3", "guidance_scale": "2.5"}
    values |= {"num_inference_steps": "9", "negative_prompt": "blur", "model": "fake"}
    steered = {"guidance_kind": "apg", "guidance_interval": "0.1:0.9"}
    values |= steered | {"guidance_rescale": "0.7", "cache": "0.02"}
    body = {name: (None, value) for name, value in values.items()} if kind == "files" else values
    video = client().post("/v1/videos", **{kind: body}).json()
    expected = {"size": "48x32", "seconds": "1", "fps": "24", "seed": 3, "guidance_scale": 2.5}
    expected |= {"num_frames": 24, "num_inference_steps": 9, "negative_prompt": "blur"}
    expected |= steered | {"guidance_rescale": 0.7, "cache": 0.02}
    assert expected.items() <= video.items()


@pytest.mark.parametrize(
    ("asked", "frames", "fps"),
    [
        ({}, 16, "16"),
        ({"seconds": 1}, 16, "16"),
        ({"seconds": "1.001"}, 16, "16"),
        ({"seconds": "1.001", "fps": "24000/1001"}, 24, "24000/1001"),
        ({"seconds": 1.0, "fps": 24}, 24, "24"),
        ({"num_frames": 1}, 1, "16"),
        ({"fps": "24000/1001"}, 24, "24000/1001"),
    ],
)
def test_lengths(client, asked, frames, fps):
    video = client().ask(**asked)
    assert (video["num_frames"], video["fps"]) == (frames, fps)
    assert float(video["seconds"]) == pytest.approx(float(frames / Fraction(fps)), abs=6e-4)


@pytest.mark.parametrize(
    ("asked", "param", "said"),
    [
        ({"prompt": None}, "prompt", "valid string"),
        ({"prompt": " \n"}, "prompt", "empty; describe"),
        ({"prompt": "x" * 2001}, "prompt", "longer than 2,000 characters; shorten it"),
        ({"prompt": "a\0b"}, "prompt", "NUL character; leave it out"),
        ({"prompt": "\ud800"}, "prompt", "not Unicode text"),
        ({"negative_prompt": "x" * 2001}, "negative_prompt", "shorten it"),
        ({"negative_prompt": "blur", "guidance_scale": 1}, "negative_prompt", "steers away from nothing"),
        ({"model": "sora-2"}, "model", "use fake, or leave it out"),
        ({"seconds": 4}, "seconds", "fake makes 1 s at 16 fps, 0.062 s at 16 fps, 1.001 s at"),
        ({"seconds": "1e999999999"}, "seconds", "write 2 for example"),
        ({"seconds": "-1"}, "seconds", "not a number of seconds"),
        ({"seconds": "1/0"}, "seconds", "not a number of seconds"),
        ({"seconds": 1, "num_frames": 16}, "seconds", "give one of the two"),
        ({"size": "big"}, "size", "write WIDTHxHEIGHT"),
        ({"size": "0x32"}, "size", "write WIDTHxHEIGHT"),
        ({"num_frames": 10**9}, "num_frames", "num_frames 16 size 32x32 fps 16"),
        ({"num_frames": True}, "num_frames", "true is not a number"),
        ({"num_inference_steps": 251}, "num_inference_steps", "use 1 to 250"),
        ({"num_inference_steps": 1.5}, "num_inference_steps", "not a whole number"),
        ({"seed": "many"}, "seed", "not a whole number"),
        ({"fps": "1/0"}, "fps", "write 16 or 24000/1001"),
        ({"guidance_scale": "much"}, "guidance_scale", "not a number"),
        ({"guidance_kind": "best"}, "guidance_kind", "not known; use cfg, zero-star, apg"),
        ({"guidance_interval": "half"}, "guidance_interval", "write A:B, for example 0.1:0.9"),
        ({"cache": True}, "cache", "true is not a number"),
        (
            {"num_inference_step": 3},
            "num_inference_step",
            "no such parameter; did you mean num_inference_steps?",
        ),
        ({"first_frame": "x"}, "first_frame", "no such parameter; known are prompt,"),
        ({"input_reference": "x"}, "input_reference", "no file; send multipart/form-data with a PNG"),
    ],
)
def test_a_bad_value_is_400_and_one_line_with_a_remedy(client, asked, param, said):
    client = client()
    error = refusal(client.post("/v1/videos", content=json.dumps(FORM | asked), headers=JSON), 400)
    assert error["type"] == "invalid_request_error" and error["param"] == param
    assert said in error["message"]
    assert client.get("/v1/videos").json()["data"] == []


JSON = {"Content-Type": "application/json"}


@pytest.mark.parametrize(
    "text", ["", "{", "[1]", '"a"', "[" * 100_000, '{"seed": ' + "9" * 5000 + "}", b"\xff"], ids=range(7)
)
def test_a_body_that_is_no_object_is_400(client, text):
    assert "JSON" in refusal(client().post("/v1/videos", content=text, headers=JSON), 400)["message"]


def test_other_addresses_methods_and_types(client):
    client = client()
    for method, path, status in (
        ("GET", "/v1/nothing", 404),
        ("GET", f"/v1/videos/{UNKNOWN}", 404),
        ("GET", f"/v1/videos/{UNKNOWN}/content", 404),
        ("DELETE", f"/v1/videos/{UNKNOWN}", 404),
        ("GET", "/v1/videos/..%2f..%2fetc%2fpasswd/content", 404),
        ("PUT", "/v1/videos", 405),
        ("GET", "/v1/videos?limit=0", 400),
        ("GET", "/v1/videos?limit=101", 400),
        ("GET", "/v1/videos?order=up", 400),
        ("GET", f"/v1/videos?after={UNKNOWN}", 400),
        ("GET", f"/v1/videos/{UNKNOWN}/content?variant=thumbnail", 400),
    ):
        refusal(client.request(method, path), status)
    assert "application/json" in refusal(client.post("/v1/videos", content="prompt"), 415)["message"]
    broken = {"Content-Type": "multipart/form-data; boundary=x"}
    refusal(client.post("/v1/videos", content=b"--y\r\nnothing", headers=broken), 400)


def test_a_full_queue_is_429_and_says_when_to_come_again(client):
    client = client(queue=2)
    client.gate.clear()
    client.begun(client.ask()["id"])
    waiting = [client.ask()["id"] for _ in range(2)]
    full = client.post("/v1/videos", json=FORM)
    assert refusal(full, 429)["code"] == "queue_full"
    assert int(full.headers["retry-after"]) >= 1
    client.gate.set()
    assert [client.ended(id)["status"] for id in waiting] == ["completed"] * 2
    client.ended(client.ask()["id"])


def test_what_fails_tells_the_client_no_more_than_it_needs(client, caplog):
    client = client()
    broken, bug = (client.ended(client.ask(prompt=f"a {word}")["id"]) for word in ("broken", "bug"))
    assert (broken["status"], bug["status"]) == ("failed", "failed")
    assert broken["error"] == {
        "code": "server_error",
        "message": f"{broken['id']}.mp4: the disk is full",
    }
    assert "its log says why" in bug["error"]["message"] and "secret" not in str(bug)
    assert "a secret" in caplog.text
    assert bug["completed_at"] is None
    refusal(client.get(f"/v1/videos/{bug['id']}/content"), 409)
    assert client.ended(client.ask()["id"])["status"] == "completed"


def test_a_bug_of_a_route_is_500_without_internals(client, monkeypatch):
    client = client()
    monkeypatch.setattr(client.maker, "check", lambda _: {}["a secret"])
    assert "secret" not in refusal(client.post("/v1/videos", json=FORM), 500)["message"]


def test_a_list_that_cannot_be_written_is_503(client, monkeypatch):
    client = client()

    def full(*_, **__):
        raise sqlite3.OperationalError("database or disk is full")

    monkeypatch.setattr(client.app.state.server.jobs, "add", full)
    assert "free space" in refusal(client.post("/v1/videos", json=FORM), 503)["message"]


def test_content_is_there_when_the_clip_is(client):
    client = client()
    client.gate.clear()
    running, waiting = client.ask()["id"], client.ask()["id"]
    client.begun(running)
    for id in (running, waiting):
        error = refusal(client.get(f"/v1/videos/{id}/content"), 409)
        assert error["code"] == "video_not_ready" and "ask again" in error["message"]


def test_deleting_in_every_state(client, tmp_path):
    client = client()
    done = client.ended(client.ask()["id"])["id"]
    client.gate.clear()
    running, waiting = client.ask()["id"], client.ask(prompt="never")["id"]
    client.begun(running)
    for id in (done, waiting, running):
        answer = client.delete(f"/v1/videos/{id}").json()
        assert answer == {"id": id, "object": "video.deleted", "deleted": True}
        refusal(client.get(f"/v1/videos/{id}"), 404)
    until(lambda: client.maker.left == 2)  # the one in progress was given up while the gate was shut
    assert list((tmp_path / "serve" / "clips").iterdir()) == []
    client.gate.set()
    last = client.ended(client.ask(prompt="last")["id"])
    assert last["status"] == "completed"
    assert client.maker.made == [FORM["prompt"], "last"]
    assert [path.stem for path in (tmp_path / "serve" / "clips").iterdir()] == [last["id"]]


def test_pages(client):
    client = client(queue=100)
    ids = [client.ask(seed=seed)["id"] for seed in range(5)]
    page = client.get("/v1/videos?limit=2").json()
    assert [video["id"] for video in page["data"]] == ids[:-3:-1]
    assert (page["object"], page["has_more"]) == ("list", True)
    assert (page["first_id"], page["last_id"]) == (ids[4], ids[3])
    page = client.get(f"/v1/videos?limit=3&order=asc&after={ids[1]}").json()
    assert [video["id"] for video in page["data"]] == ids[2:]
    assert not page["has_more"]


def test_so_many_clips_are_kept(client, tmp_path):
    client = client(keep=2)
    ids = [client.ended(client.ask(seed=seed)["id"])["id"] for seed in range(4)]
    until(lambda: len(client.get("/v1/videos").json()["data"]) == 2)
    until(lambda: {path.stem for path in (tmp_path / "serve" / "clips").iterdir()} == set(ids[2:]))
    refusal(client.get(f"/v1/videos/{ids[0]}"), 404)


def test_a_clip_that_somebody_else_removed(client, tmp_path):
    client = client()
    id = client.ended(client.ask()["id"])["id"]
    (tmp_path / "serve" / "clips" / f"{id}.mp4").unlink()
    assert "make it again" in refusal(client.get(f"/v1/videos/{id}/content"), 404)["message"]


def test_a_start_removes_what_a_killed_server_left_and_nothing_else(client, tmp_path):
    clips = tmp_path / "serve" / "clips"
    clips.mkdir(parents=True)
    for name in (f"{UNKNOWN}.mp4", f".{UNKNOWN}.12-ab.mp4", "mine.mp4", f"{UNKNOWN}.txt"):
        (clips / name).touch()
    client()
    assert sorted(path.name for path in clips.iterdir()) == ["mine.mp4", f"{UNKNOWN}.txt"]


def test_a_job_that_brings_the_server_down_is_given_up(client, tmp_path):
    request = FakeMaker().check(ClipRequest(prompt="a large clip"))
    for attempt in range(3):
        jobs = Jobs(tmp_path / "serve" / "jobs.sqlite")
        if attempt == 0:
            jobs.add("video_a", request, most=1)
        assert jobs.take() is not None
        jobs.close()
    client = client()
    assert "ended 3 times" in client.ended("video_a")["error"]["message"]
    assert client.maker.made == []


def test_the_model_is_listed_with_its_clips(client):
    (model,) = client().get("/v1/models").json()["data"]
    assert (model["id"], model["object"]) == ("fake", "model")
    assert model["clips"][2] == {
        "num_frames": 24, "size": "48x32", "fps": "24000/1001", "seconds": "1.001",
    }  # fmt: skip
    assert model["defaults"]["num_inference_steps"] == 50


def test_health_and_metrics(client):
    client = client()
    assert client.get("/health").json() == {"status": "ok"}
    client.ended(client.ask()["id"])
    client.ended(client.ask(prompt="a bug")["id"])
    client.gate.clear()
    client.begun(client.ask()["id"])
    client.ask()
    lines = client.get("/metrics").text.splitlines()
    for line in (
        'kinoflow_jobs{status="completed"} 1.0',
        'kinoflow_jobs{status="failed"} 1.0',
        'kinoflow_jobs{status="in_progress"} 1.0',
        'kinoflow_jobs{status="queued"} 1.0',
        "kinoflow_queue_length 1.0",
        'kinoflow_jobs_ended_total{status="completed"} 1.0',
        'kinoflow_jobs_ended_total{status="failed"} 1.0',
        "kinoflow_job_seconds_count 1.0",
        "kinoflow_wait_seconds_count 3.0",
    ):
        assert line in lines
    client.app.state.server.worker.stop(60.0)
    refusal(client.get("/health"), 503)
