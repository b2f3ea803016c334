"""`--rewrite`: the frames are those of the rewritten prompt, the file says both, `again` needs no model."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from kinoflow.conditioning import rewriting
from kinoflow.conditioning.rewriting import Answer
from kinoflow.configs.errors import UserError
from kinoflow.data.video import probe, read
from kinoflow.sample.__main__ import main
from kinoflow.sample.pipeline import Pipeline
from kinoflow.sample.release import DEFAULT_RELEASE
from kinoflow.sample.request import ClipRequest
from kinoflow.sample.rewritten import Prompts
from kinoflow.sample.serve.maker import ReleaseMaker

PROMPT = 'a sign "KITE"'
CAPTION = 'A large sign reads "KITE" on a wall.'


class Model:
    name = "it"

    def __call__(self, instruction, examples, prompt):
        self.instruction = instruction
        return Answer(text={"gone": "", "lost": "A sign."}.get(prompt, CAPTION), whole=True)


@pytest.fixture
def opened(monkeypatch):
    """The model that --rewrite opens, and how it was opened."""
    asked, model = [], Model()

    def open_model(source, *, device, key):
        asked.append((source, str(device), key))
        return model

    monkeypatch.setattr(rewriting, "open_model", open_model)
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    return asked, model


def test_the_clip_is_of_the_rewritten_prompt_and_is_made_again_without_the_model(
    opened, run, tiny_release, monkeypatch, capsys
):
    code, out, _ = run(PROMPT, "--rewrite", "http://host/v1", "--json")
    assert code == 0
    (clip,) = json.loads(out)["clips"]
    assert (clip["path"], clip["prompt"], clip["typed"]) == ("a-sign-kite-0.mp4", CAPTION, PROMPT)
    assert opened[0] == [("http://host/v1", "cpu", "secret")]
    assert run(CAPTION, "--out", "plain.mp4")[0] == 0
    assert np.array_equal(read(clip["path"]), read("plain.mp4"))
    said, plain = probe(clip["path"]).metadata, probe("plain.mp4").metadata
    assert {key: said[key] for key in ("typed", "rewriter")} == {"typed": PROMPT, "rewriter": "it"}
    assert not {"typed", "rewriter"} & plain.keys() and "secret" not in str(said)
    monkeypatch.delattr(rewriting, "open_model")
    assert main(["again", clip["path"], "--weights", str(tiny_release.folder)]) == 0
    assert capsys.readouterr().out == f"{clip['path']}: equal, to the byte\n"


def test_a_list_keeps_its_seeds_and_its_finished_clips(opened, run):
    Path("list.txt").write_text(f"{PROMPT}\na ring\n")
    names = {}
    for more in ([], ["--rewrite", "lm"], ["--rewrite", "lm"]):
        code, out, _ = run("--prompts", "list.txt", "--out", f"clips{len(more)}", *more, "--json")
        assert code == 0
        clips = json.loads(out)["clips"]
        names[len(more)] = [Path(clip["path"]).name for clip in clips]
    assert names[0] == names[2]  # by what was typed
    assert [clip["skipped"] for clip in clips] == [True, True]
    assert clips[0]["prompt"] == CAPTION


def test_lost_quotes_and_no_answer(opened, run, monkeypatch):
    monkeypatch.setattr(Model, "__call__", lambda *_: Answer(text="A sign.", whole=True))
    code, _, err = run(PROMPT, "--rewrite", "lm", "--out", "x.mp4")
    assert code == 0
    assert err.splitlines()[0].startswith('warning: rewrite: it lost "KITE"')
    metadata = probe("x.mp4").metadata
    assert metadata["prompt"] == PROMPT and "typed" not in metadata
    monkeypatch.setattr(Model, "__call__", lambda *_: Answer(text=" ", whole=True))
    Path("list.txt").write_text("a ring\n")
    for words in ([PROMPT], ["--prompts", "list.txt"]):
        code, out, err = run(*words, "--rewrite", "lm")
        assert (code, out, err.count("\n")) == (2, "", 1)
        assert "rewrite: it has no answer to" in err
    assert "list.txt:1: rewrite" in err


def test_a_small_release_tells_the_model_its_words(opened, run, tiny_release):
    tokenizer = DEFAULT_RELEASE / "text" / "ul2" / "tokenizer.json"
    there = tiny_release.folder / "text" / "ul2" / "tokenizer.json"
    shutil.copy(tokenizer, there)
    try:
        assert run(PROMPT, "--rewrite", "lm", "--out", "x.mp4")[0] == 0
    finally:
        there.unlink()
    assert "no words but these: a, above, against," in opened[1].instruction
    assert "fps" not in opened[1].instruction


def test_what_opening_refuses_is_one_line(run, monkeypatch):
    def refuse(*_, **__):
        raise UserError("rewrite: x: holds no causal language model; give its folder or hub id")

    monkeypatch.setattr(rewriting, "open_model", refuse)
    code, out, err = run(PROMPT, "--rewrite", "x")
    assert (code, out, err.count("\n")) == (2, "", 1)


def test_a_pipeline_and_a_server_reword_as_the_command_does(run, opened, tiny_release, tmp_path):
    assert run(PROMPT, "--rewrite", "lm", "--out", "x.mp4")[0] == 0
    pipeline = Pipeline(tiny_release, rewrite="lm")
    video = pipeline(PROMPT, steps=2)
    assert (video.metadata["prompt"], video.metadata["typed"]) == (CAPTION, PROMPT)
    (batched,) = pipeline.batch([ClipRequest(prompt=PROMPT, steps=2)])
    assert batched.metadata == video.metadata and np.array_equal(batched.frames, video.frames)
    maker = ReleaseMaker(pipeline)
    figures = maker.make(ClipRequest(prompt=PROMPT, steps=2), tmp_path / "served.mp4", lambda _: None)
    assert (figures["prompt"], figures["typed"], figures["rewriter"]) == (CAPTION, PROMPT, "it")
    one = video.save(tmp_path / "saved.mp4").read_bytes()
    assert one == (tmp_path / "served.mp4").read_bytes() == Path("x.mp4").read_bytes()


def test_a_release_of_classes_reads_no_prompts(tiny_release):
    release = replace(tiny_release, config=replace(tiny_release.config, classes=("a", "b")))
    with pytest.raises(UserError, match="rewrite: tiny reads no prompts; leave it out"):
        Prompts("lm", release)
    assert Prompts(None, release)("a") == ("a", {})
