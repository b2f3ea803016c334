"""Settings of guidance and cache: from options to metadata and back, and what is refused."""

from dataclasses import replace
from pathlib import Path

import pytest

from kinoflow.configs.errors import UserError
from kinoflow.configs.schema import load
from kinoflow.sample.__main__ import _parser, main
from kinoflow.sample.card import ReleaseConfig
from kinoflow.sample.generate import Sampling
from kinoflow.sample.guidance import Guidance
from kinoflow.sample.pipeline import Pipeline
from kinoflow.sample.request import ClipRequest
from kinoflow.sample.settings import asked, chosen, described, filled

PLAIN = Sampling()
APG = Guidance(kind="apg", interval=(0.1, 0.9), rescale=0.3, threshold=0.2, momentum=0.0)
NEW = {"guidance_kind", "guidance_interval", "guidance_rescale", "guidance_zero_steps", "guidance_momentum",
       "guidance_threshold", "guidance_parallel", "cache"}  # fmt: skip


@pytest.mark.parametrize(
    "sampling",
    [
        PLAIN,
        Sampling(guidance=APG, cache=0.02),
        Sampling(guidance=Guidance(kind="zero-star", zero_steps=3)),
        Sampling(guidance_scale=1.0),
        Sampling(solver="sde", diffusion=0.5, guidance=Guidance(interval=(1 / 3, 1.0))),
    ],
)
@pytest.mark.parametrize("defaults", [PLAIN, Sampling(guidance=APG, cache=0.1, guidance_scale=7.0)])
def test_metadata_ask_for_the_same_sampling_whatever_the_defaults(sampling, defaults):
    written = {key: str(value) for key, value in described(sampling).items() if value is not None}
    defaults = replace(defaults, guidance=replace(sampling.guidance, kind=defaults.guidance.kind))
    assert chosen(defaults, ClipRequest(prompt="x", **asked(written))) == sampling
    request = filled(ClipRequest(prompt="x", solver=sampling.solver, diffusion=sampling.diffusion), sampling)
    assert chosen(defaults, request) == sampling


def test_metadata_say_no_more_than_what_has_an_effect():
    def told(sampling):
        return {key for key in NEW if described(sampling)[key] is not None}

    assert told(PLAIN) == told(Sampling(guidance=APG, guidance_scale=1.0)) == set()
    assert told(Sampling(guidance=APG)) == NEW - {"guidance_zero_steps", "cache"}
    assert told(Sampling(guidance=Guidance(kind="zero-star"), cache=0.1)) == {
        "guidance_kind", "guidance_zero_steps", "cache"
    }  # fmt: skip


def test_a_release_has_defaults_of_its_own(tmp_path, tiny_release):
    card = tmp_path / "kinoflow.yaml"
    card.write_text(
        "name: x\nsampling: {guidance_scale: 6.0, cache: 0.02, "
        "guidance: {kind: apg, interval: [0.1, 0.9], rescale: 0.3, threshold: 0.2, momentum: 0.0}}\n"
    )
    sampling = load(ReleaseConfig, [str(card)]).sampling
    assert sampling == Sampling(guidance_scale=6.0, cache=0.02, guidance=APG)
    pipeline = Pipeline(replace(tiny_release, config=replace(tiny_release.config, sampling=sampling)))
    assert pipeline.plan(ClipRequest(prompt="x")).sampling == sampling
    plain = {"guidance_kind": "cfg", "guidance_interval": (0.0, 1.0), "guidance_rescale": 0.0, "cache": 0.0}
    found = pipeline.plan(ClipRequest(prompt="x", **plain)).sampling
    assert found.guidance.is_plain and found.cache == 0


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--guidance-interval", "0.5:0.5"], "--guidance-interval: 0.5:0.5 is not two rising times in 0..1"),
        (["--guidance-rescale", "2"], "--guidance-rescale: 2.0 is not in 0..1; try 0.7"),
        (["--cache", "nan"], "cache: nan is not in 0..1; try 0.05"),
    ],
)
def test_mistakes_are_one_line(run, argv, said):
    code, _, err = run("a star", *argv)
    assert code == 2 and said in err and err.count("\n") == 1
    assert list(Path().iterdir()) == []


def test_zero_star_needs_more_steps_than_it_leaves_out():
    with pytest.raises(UserError, match="num_steps: 1 are too few for guidance_kind zero-star, of which the"):
        Sampling(num_steps=1, guidance=Guidance(kind="zero-star"))


@pytest.mark.parametrize("argv", [["--guidance-interval", "half"], ["--guidance-kind", "best"]])
def test_malformed_options_exit_with_2(argv, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["a star", *argv])
    assert stop.value.code == 2 and argv[1] in capsys.readouterr().err


def test_the_option_knows_every_kind():
    (option,) = (action for action in _parser()._actions if action.dest == "guidance_kind")
    assert tuple(option.choices or ()) == ("cfg", "zero-star", "apg")
    for kind in option.choices or ():
        assert Guidance(kind=kind).kind == kind
