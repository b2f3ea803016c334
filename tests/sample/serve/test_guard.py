"""Who may come in, and with how much."""

import pytest

from kinoflow.sample.serve.guard import MAX_BODY, MAX_FORM, is_loopback
from tests.sample.serve.fake import FORM, TOKEN
from tests.sample.serve.test_api import refusal

WITH_TOKEN = {"Authorization": f"Bearer {TOKEN}"}


@pytest.mark.parametrize(
    "header", [{}, {"Authorization": TOKEN}, {"Authorization": f"Basic {TOKEN}"}, {"Authorization": "Bearer"},
               {"Authorization": f"Bearer {TOKEN}x"}, {"Authorization": b"Bearer \xff"}],
)  # fmt: skip
@pytest.mark.parametrize("path", ["/v1/videos", "/v1/models", "/metrics", "/v1/nothing", "/health/"])
def test_without_the_token_nothing_is_told(client, header, path):
    client = client(token=TOKEN)
    answer = client.get(path, headers=header)
    assert refusal(answer, 401)["type"] == "authentication_error"
    assert answer.headers["www-authenticate"] == "Bearer"


def test_with_the_token_all_is_as_without_one(client):
    client = client(token=TOKEN)
    far = {"Host": "kino.example.org", "Origin": "https://kino.example.org"}
    assert client.post("/v1/videos", json=FORM, headers=WITH_TOKEN | far).status_code == 200
    assert client.get("/metrics", headers={"Authorization": f"bearer  {TOKEN}"}).status_code == 200
    assert client.get("/health").status_code == client.get("/").status_code == 200


@pytest.mark.parametrize(
    ("host", "origin", "code"),
    [
        ("evil.example", None, "forbidden_host"),
        ("127.0.0.1.evil.example:8000", None, "forbidden_host"),
        ("[", None, "forbidden_host"),
        ("localhost:8000", "https://evil.example", "forbidden_origin"),
        ("localhost:8000", "null", "forbidden_origin"),
        ("localhost:8000", "http://localhost:9000", "forbidden_origin"),
        ("localhost:8000", "http://localhost:8000", None),
        ("[::1]:8000", "http://[::1]:8000", None),
        ("127.0.0.1", None, None),
    ],
)
def test_without_a_token_other_sites_cannot_use_a_browser_here(client, host, origin, code):
    headers = {"Host": host} | ({} if origin is None else {"Origin": origin})
    answer = client().post("/v1/videos", data=FORM, headers=headers)
    assert answer.status_code == (200 if code is None else 403)
    if code is not None:
        assert refusal(answer, 403)["code"] == code


def test_a_body_of_more_than_a_mebibyte_is_413_and_a_form_of_more_than_its_pictures_take(client):
    client = client()

    def pieces(most):
        for _ in range(most // 2**16 + 1):
            yield b"x" * 2**16

    kinds = [{"Content-Type": kind} for kind in ("application/json", "multipart/form-data; boundary=x")]
    for kind, most in zip(kinds, (MAX_BODY, MAX_FORM), strict=True):
        for content in (b"x" * (most + 1), pieces(most)):
            refused = refusal(client.post("/v1/videos", content=content, headers=kind), 413)
            assert f"larger than {most:,} bytes" in refused["message"]
    short = '{"prompt": "a star"' + " " * (MAX_BODY - 20) + "}"
    assert len(short) == MAX_BODY
    assert client.post("/v1/videos", content=short, headers=kinds[0]).status_code == 200


def test_what_is_loopback():
    assert all(map(is_loopback, ("localhost", "127.0.0.1", "127.9.9.9", "::1")))
    assert not any(map(is_loopback, ("0.0.0.0", "::", "192.168.0.2", "", "localhost.evil.example")))
