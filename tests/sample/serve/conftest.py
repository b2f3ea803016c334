"""A client of a server whose maker is quick and waits when it is told to."""

import threading
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import pytest
from starlette.testclient import TestClient

from kinoflow.sample.serve.app import ServeConfig, create_app
from tests.sample.serve.fake import FORM, FakeMaker, until


class Client(TestClient):
    """Starlette's, at this machine's address, with the few steps that most tests begin with."""

    maker: FakeMaker
    gate: threading.Event

    def ask(self, **more: Any) -> dict[str, Any]:
        """Queue a clip."""
        done = self.post("/v1/videos", json=FORM | more)
        assert done.status_code == 200, done.text
        return done.json()

    def video(self, id: str) -> dict[str, Any]:
        return self.get(f"/v1/videos/{id}").json()

    def ended(self, id: str) -> dict[str, Any]:
        """The video when it is made or has failed."""
        return until(lambda: (video := self.video(id))["status"] in ("completed", "failed") and video)

    def begun(self, id: str) -> dict[str, Any]:
        """The video when the worker holds it."""
        return until(lambda: (video := self.video(id))["progress"] == 50 and video)


@pytest.fixture
def client(tmp_path) -> Any:
    """Makes a client, by the server's config; its gate is open."""
    with ExitStack() as stack:

        def start(**config: Any) -> Client:
            gate = threading.Event()
            gate.set()
            maker = FakeMaker(gate.is_set)
            app = create_app(maker, ServeConfig(folder=tmp_path / "serve", **config))
            opened = Client(app, base_url="http://127.0.0.1:8000", raise_server_exceptions=False)
            opened.maker, opened.gate = maker, gate
            return stack.enter_context(opened)

        yield start


Start = Callable[..., Client]
