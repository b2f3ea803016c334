"""The best of several clips: which one is kept, how many are made, and who says so."""

import json
import shutil
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModel, AutoProcessor

import kinoflow.sample.pipeline
from kinoflow.configs.errors import UserError
from kinoflow.data.clips.buckets import parse
from kinoflow.data.latents.kino import read_latents
from kinoflow.data.video import read
from kinoflow.sample.__main__ import main
from kinoflow.sample.best import UndecodedError, best_take, seed_of
from kinoflow.sample.card import ReleaseConfig
from kinoflow.sample.evaluation.strict import StrictConfig, StrictJudge
from kinoflow.sample.evaluation.verifier import Score, StrictVerifier
from kinoflow.sample.export import export
from kinoflow.sample.generate import Sampling
from kinoflow.sample.job import Job, Sampler
from kinoflow.sample.pipeline import Pipeline
from kinoflow.sample.plan import Plan
from kinoflow.sample.release import Release, write
from kinoflow.sample.request import ClipRequest
from tests.conditioning.writing import write_clip

PROMPT = "a red star moves left on a gray background"
BUCKET = parse("16x32x32@16")


class Scores:
    """A verifier that gives these scores in turn, and notes what it sees."""

    def __init__(self, *likelihoods, passed=()):
        self.scores = [Score(passed=i in passed, likelihood=x) for i, x in enumerate(likelihoods)]
        self.seen = []

    def knows(self, prompt):
        return "star" in prompt

    def score(self, prompt, frames, fps):
        assert (prompt, fps) == (PROMPT, 16)
        self.seen.append(frames)
        return self.scores[len(self.seen) - 1]


def strict_judge():
    torch.manual_seed(0)
    judge = StrictJudge(StrictConfig(widths=(4, 4, 4, 8), reading_width=4, places=2, hidden=(8, 8)))
    judge.init_weights()
    return judge


@pytest.fixture
def choosing(tiny_release, tmp_path):
    """The tiny release with a verifier, which makes the best of three."""
    folder = Path(shutil.copytree(tiny_release.folder, tmp_path / "choosing"))
    strict_judge().save_pretrained(folder / "verifier")
    return write(folder, config=replace(tiny_release.config, best_of=3), parts={})


def planned(prompt, seed, best_of):
    sampling = Sampling()
    return Plan(prompt=prompt, negative=None, seed=seed, bucket=BUCKET, sampling=sampling, best_of=best_of)


def frames_of(latent):
    return np.full((1, 1, 1, 3), latent.item(), np.uint8)


def taken(scores, best_of, seed=5):
    """Which is kept, by its number; the seeds that were made; how many were left out."""
    plan, made, left = planned(PROMPT, seed, best_of), [], []

    def make(one):
        made.append(one.seed)
        assert replace(one, seed=seed) == plan
        return torch.full((1, 1, 1, 1, 1), float(len(made) - 1))

    take = best_take(plan, scores, make, frames_of, left.append)
    assert np.array_equal(take.frames, frames_of(take.latent))
    return take.latent.item(), made, sum(left)


@pytest.mark.parametrize(
    ("scores", "best_of", "kept", "count"),
    [
        (Scores(-3.0, -1.0, -2.0), 3, 1, 3),
        (Scores(-1.0, -1.0, -2.0), 3, 0, 3),  # the first of equals
        (Scores(-3.0, -9.0, -1.0, passed={1}), 3, 1, 2),  # nothing is wrong with it: the search ends
        (Scores(-9.0, -1.0, passed={0}), 2, 0, 1),
        (Scores(-9.0), 1, 0, 1),
    ],
)
def test_the_first_that_passes_or_the_likeliest_is_kept(scores, best_of, kept, count):
    seeds = [5, seed_of(5, 1), seed_of(5, 2)]
    assert taken(scores, best_of) == (kept, seeds[:count], best_of - count)


def test_no_two_takes_of_any_clips_share_their_noise():
    """The generator of the CPU reads 32 bits of a seed."""
    found = [seed_of(seed, take) for seed in (0, 1, 2, 2**63 - 1) for take in range(50)]
    assert found[::50] == [0, 1, 2, 2**63 - 1]
    assert len({torch.randn(1, generator=torch.Generator().manual_seed(s)).item() for s in found}) == 200


def test_what_the_verifier_cannot_tell_of_is_made_once():
    left = []
    take = best_take(
        planned("a cat", 1, 4), Scores(), lambda one: torch.full((1, 1, 1, 1, 1), float(one.seed)),
        lambda latent: 1 / 0, left.append,
    )  # fmt: skip
    assert (take.latent.item(), take.frames, left) == (1, None, [3])


@pytest.mark.parametrize("passed", [{1}, ()])
def test_the_kept_clip_is_the_one_of_its_seed_alone(choosing, passed):
    """Frames, latent, passes and progress."""
    scores = Scores(-3.0, -1.0, -2.0, passed=passed)
    object.__setattr__(choosing, "verifier", scores)  # a cached property of a frozen class
    pipeline, told = Pipeline(choosing), []
    request = ClipRequest(prompt=PROMPT, seed=4, steps=2)
    plan = pipeline.plan(request)
    assert plan.best_of == 3
    video = pipeline.make(plan, latent=True, progress=told.append)
    count = 2 if passed else 3
    assert len(scores.seen) == count and sum(told) == plan.num_steps == 3 * 2 + 16
    alone = [pipeline(PROMPT, seed=seed_of(4, take), steps=2, best_of=1, latent=True) for take in range(3)]
    assert len({video.frames.tobytes() for video in alone}) == 3
    assert np.array_equal(video.frames, alone[1].frames) and torch.equal(video.latent, alone[1].latent)
    assert all(np.array_equal(*pair) for pair in zip(scores.seen, [v.frames for v in alone], strict=False))
    assert video.passes.computed == count * alone[0].passes.computed
    assert video.metadata["best_of"] == "3" and video.metadata["seed"] == "4"
    assert "best_of" not in alone[0].metadata


def test_more_than_a_prompt_is_made_once_unless_asked(choosing, tiny_release):
    """Longer clips are made in windows, whose end the verifier may not know."""
    pipeline = Pipeline(choosing)
    assert pipeline.plan(ClipRequest(prompt=PROMPT, frames=1)).best_of == 3
    longer = ClipRequest(prompt=PROMPT, frames=64)
    assert pipeline.plan(longer).windows is not None and pipeline.plan(longer).best_of == 1
    assert pipeline.plan(replace(longer, best_of=2)).best_of == 2
    with pytest.raises(UserError, match=r"best_of: tiny has no verifier/ to choose by; leave it out"):
        Pipeline(tiny_release).plan(ClipRequest(prompt=PROMPT, best_of=2))
    assert Pipeline(tiny_release).plan(ClipRequest(prompt=PROMPT, best_of=1)).best_of == 1
    for count in (0, -1, 101):
        with pytest.raises(UserError, match=rf"best_of: {count} is not in 1\.\.100"):
            pipeline.plan(ClipRequest(prompt=PROMPT, best_of=count))
        with pytest.raises(UserError, match=rf"best_of: {count} is not in 1\.\.100"):
            ReleaseConfig(name="x", best_of=count)


def test_a_release_that_lost_its_verifier_says_so(choosing):
    shutil.rmtree(choosing.folder / "verifier")
    with pytest.raises(UserError, match=r"kinoflow\.yaml: best_of: 3, and no verifier/ to choose by"):
        Release.load(choosing.folder)


def test_the_command_makes_it_again_and_lists_name_it(choosing, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    weights = ["--weights", str(choosing.folder)]
    Path("list.csv").write_text(f"prompt,best-of,seed\n{PROMPT},,1\n{PROMPT},1,1\n{PROMPT},2,1\n")
    assert main(["--prompts", "list.csv", "--out", "clips", "--steps", "1", *weights, "--json"]) == 0
    clips = json.loads(capsys.readouterr().out)["clips"]
    assert [clip.get("best_of") for clip in clips] == ["3", None, "2"]
    for clip in clips:
        assert main(["again", clip["path"], *weights]) == 0
    assert main([PROMPT, "--best-of", "0", *weights]) == 2
    assert "--best-of: 0 is not in 1..100" in capsys.readouterr().err
    # Another verifier might keep another clip.
    other = strict_judge()
    torch.nn.init.zeros_(other.hidden1.weight)
    other.save_pretrained(choosing.folder / "verifier")
    capsys.readouterr()
    assert main(["again", clips[0]["path"], *weights]) == 2
    assert "made otherwise (verifier " in capsys.readouterr().err


def test_the_figures_say_with_which_seed_the_kept_one_is_made_alone(choosing, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    scores = Scores(-3.0, -1.0, -2.0)
    monkeypatch.setattr(StrictVerifier, "score", lambda self, *given: scores.score(*given))
    argv = [PROMPT, "--weights", str(choosing.folder), "--steps", "1", "--json"]
    assert main([*argv, "--seed", "7", "--out", "best.mp4"]) == 0
    (best,) = json.loads(capsys.readouterr().out)["clips"]
    assert (best["seed"], best["kept_seed"]) == (7, seed_of(7, 1))
    assert main([*argv, "--seed", str(best["kept_seed"]), "--best-of", "1", "--out", "alone.mp4"]) == 0
    (alone,) = json.loads(capsys.readouterr().out)["clips"]
    assert alone["kept_seed"] == alone["seed"] == best["kept_seed"]
    assert np.array_equal(read("alone.mp4"), read("best.mp4"))


def test_diffusers_get_one_that_makes_the_first(choosing, tmp_path):
    (choosing.folder / "text" / "ul2" / "x").touch()
    export(choosing, tmp_path / "out")
    assert Release.load(tmp_path / "out").config.best_of == 1


def test_the_verifier_knows_what_names_a_colour_and_a_shape():
    verifier = StrictVerifier(strict_judge(), BUCKET)
    asked = (PROMPT, "an enormous blue star", "a star", "a cat", 'a sign that reads "KITE"', "")
    assert [verifier.knows(prompt) for prompt in asked] == [True, True, False, False, False, False]


@pytest.mark.parametrize("prompt", [PROMPT, f'{PROMPT} under a sign that reads "KITE"', "a red star"])
def test_a_score_is_the_likelihood_of_all_that_is_asked(prompt):
    """From the judge's answers, one by one, those of the first thing and the word six times.

    A picture is a clip that stands still.
    """
    judge = strict_judge()
    frames = np.random.default_rng(0).integers(0, 256, (16, 32, 32, 3), dtype=np.uint8)
    score = StrictVerifier(judge, BUCKET).score(prompt, frames, Fraction(16))
    with torch.no_grad():
        answers = judge.eval()(judge.prepare(torch.from_numpy(frames)[None]), torch.tensor([15 / 16]))
    wants = {"color": "red", "shape": "star", "texture": "plain", "second_shape": "", "camera": "still"}
    wants |= {"second_color": "", "second_texture": "", "relation": ""}
    if "moves" in prompt:
        wants |= {"motion": "moves left", "background": "gray", "pattern": ""}
    if "KITE" not in prompt:
        wants |= {"sign": ""}
    total = sum(
        answers.classes[key].softmax(1)[0, judge.config.questions[key].index(value)].log()
        * (6 if key in ("color", "shape", "motion") else 1)
        for key, value in wants.items()
    )
    word = "KITE" if "KITE" in prompt else ""
    letters = [" ABCDEFGHIJKLMNOPQRSTUVWXYZ".index(letter) for letter in word.ljust(judge.config.letters)]
    total += 6 * sum(answers.letters[0, i].softmax(0)[letter].log() for i, letter in enumerate(letters))
    assert not score.passed and score.likelihood == pytest.approx(total.item(), abs=1e-3)
    verifier = StrictVerifier(judge, BUCKET)
    still = verifier.score(prompt, np.repeat(frames[:1], 16, axis=0), Fraction(16))
    assert verifier.score(prompt, frames[:1], Fraction(1)) == still


@pytest.fixture
def clip_verifier(tmp_path):
    return write_clip(tmp_path / "clip", ["a", "red", "star"])


def test_a_clip_model_chooses_by_its_own_cosines(tiny_release, clip_verifier, tmp_path):
    """By transformers' own forward pass, of eight frames of sixteen."""
    folder = Path(shutil.copytree(tiny_release.folder, tmp_path / "choosing"))
    shutil.copytree(clip_verifier, folder / "verifier")
    pipeline = Pipeline(write(folder, config=replace(tiny_release.config, best_of=3), parts={}))
    prompt, seeds = "a red kite", [seed_of(2, take) for take in range(3)]
    clips = [pipeline(prompt, seed=seed, steps=2, best_of=1).frames for seed in seeds]
    processor, model = AutoProcessor.from_pretrained(clip_verifier), AutoModel.from_pretrained(clip_verifier)
    pictures = [Image.fromarray(clip[i]) for clip in clips for i in (0, 2, 4, 6, 9, 11, 13, 15)]
    given = processor(text=[prompt], images=pictures, padding="max_length", max_length=6, return_tensors="pt")
    with torch.no_grad():
        found = model(**given).logits_per_image.view(3, 8).mean(dim=1) / model.logit_scale.exp()
    verifier = pipeline.release.verifier
    scores = [verifier.score(prompt, clip, Fraction(16)) for clip in clips]
    assert [score.likelihood for score in scores] == pytest.approx(found.tolist(), abs=1e-5)
    assert not any(score.passed for score in scores) and len(set(found.tolist())) == 3
    video = pipeline(prompt, seed=2, steps=2)
    assert np.array_equal(video.frames, clips[int(found.argmax())])
    assert verifier.knows("anything") and not verifier.knows(" ")


@pytest.mark.parametrize("damage", ["no json", "no weights", "gone"])
def test_a_damaged_verifier_is_named(choosing, clip_verifier, damage):
    folder = choosing.folder / "verifier"
    if damage == "no json":
        (folder / "config.json").write_text("{")
    elif damage == "no weights":
        (folder / "model.safetensors").unlink()
    else:
        shutil.rmtree(folder)
        shutil.copytree(clip_verifier, folder)
        (folder / "model.safetensors").write_bytes(b"x")
    with pytest.raises(UserError, match="verifier"):
        Pipeline(choosing)(PROMPT, steps=1)


def test_a_take_that_cannot_be_looked_at_is_not_lost(choosing, tmp_path, monkeypatch, capsys):
    """The second one; it is the one of its seed alone."""
    monkeypatch.chdir(tmp_path)
    object.__setattr__(choosing, "verifier", Scores(-1.0, -1.0))
    pipeline, tries = Pipeline(choosing), []
    plain = kinoflow.sample.pipeline.decode_pieces

    def second_fails(*args):
        tries.append(args)
        if len(tries) == 2:
            raise RuntimeError("CUDA out of memory.\nTried to allocate 20 GiB")
        return plain(*args)

    with monkeypatch.context() as patch:
        patch.setattr(kinoflow.sample.pipeline, "decode_pieces", second_fails)
        with pytest.raises(UndecodedError, match=r"^CUDA out of memory. Tried to allocate 20 GiB$") as caught:
            pipeline(PROMPT, seed=4, steps=2)
        tries.clear()
        request = ClipRequest(prompt=PROMPT, seed=4, steps=2)
        sampler = Sampler(pipeline, crf=18.0, quiet=False)
        with pytest.raises(UserError, match=r"its latent is kept, run: kinoflow tae decode x\.kino x\.mp4"):
            sampler.run(Job(plan=pipeline.plan(request), out=Path("x.mp4")))
    alone = pipeline(PROMPT, seed=seed_of(4, 1), steps=2, best_of=1, latent=True).latent
    assert torch.equal(caught.value.latent, alone)
    (kept,) = read_latents(Path("x.kino"), 0, 2, (2, 4, 4, 4))
    tae = choosing.tae()
    mean = torch.from_numpy(kept).float().transpose(0, 1)[None]
    torch.testing.assert_close(tae.normalize(mean), alone, rtol=0, atol=5e-3)
