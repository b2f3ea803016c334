"""Every configs/*.yaml: its header states a command and a result, it loads, and its model can be built."""

import re
import shlex
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

from kinoflow.configs.schema import load, to_dict
from kinoflow.data.clips.buckets import parse
from kinoflow.data.engine.config import CurateConfig
from kinoflow.dit_video.flow.known import KnownConfig
from kinoflow.dit_video.mmdit import MMDiT
from kinoflow.dit_video.unet import UNet
from kinoflow.dit_video.video_dit import VideoDiT
from kinoflow.sample.evaluation.judge import Judge, JudgeConfig
from kinoflow.sample.evaluation.strict import StrictConfig, StrictJudge
from kinoflow.sample.upsample import STEPS, WINDOW_SHARE
from kinoflow.tae.model.tae import TAE
from kinoflow.train.mini.config import EncoderConfig, TextTrainConfig
from kinoflow.train.plan.config import PlanConfig
from kinoflow.train.plan.workload import DiTWorkload
from kinoflow.train.run.config import RunConfig
from kinoflow.train.tasks.precompute import PrecomputeConfig

ROOT = Path(__file__).parents[1]
FILES = sorted((ROOT / "configs").rglob("*.yaml"))
# What stands behind `train` in a launch command -> the schema of its sources.
SCHEMAS: dict[str, type] = {"": RunConfig, "precompute": PrecomputeConfig, "plan": PlanConfig}
SCALES = {"K": 1e3, "M": 1e6, "B": 1e9}

every_file = pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)


@dataclass(frozen=True, kw_only=True)
class Header:
    """The comment that opens a YAML: launch commands as (schema, sources), and the result to expect."""

    launches: list[tuple[type, list[str]]]
    expected: str


def read_header(text: str) -> Header:
    lines = []
    for line in text.splitlines():
        if not line.startswith("#"):
            break
        lines.append(line.removeprefix("#"))
    joined = "\n".join(lines).replace("\\\n", " ")
    commands = [line for line in joined.splitlines() if line.startswith("   ")]
    # An export and a mean take no keys; tests/test_readme.py knows their words.
    ours = r"\bkinoflow[. ](train (?!export|average)|data (curate|select))"
    launches = [launch(line) for line in commands if re.search(ours, line)]
    expected = re.search(r"^ Expected:(.+)", joined, re.MULTILINE | re.DOTALL)
    return Header(launches=launches, expected=" ".join(expected[1].split()) if expected else "")


def launch(command: str) -> tuple[type, list[str]]:
    words = shlex.split(command)
    if "data" in words:
        return CurateConfig, words[words.index("--config") + 1 :]
    words = words[next(i for i, word in enumerate(words) if word in ("train", "kinoflow.train")) + 1 :]
    verb = words.pop(0) if words and re.fullmatch(r"[a-z]+", words[0]) else ""
    return SCHEMAS[verb], sources(verb, words)


def sources(verb: str, words: list[str]) -> list[str]:
    """The words that its schema reads; the one flag of `train plan` is none of them."""
    return [word for word in words if not (verb == "plan" and word == "--json")]


def build(config: RunConfig) -> nn.Module:
    """The run's model without memory; names every kind, so that a new one cannot pass unseen."""
    with torch.device("meta"):
        if config.model == "tae":
            return TAE(config.tae)
        if config.model == "dit":
            return VideoDiT(config.dit)
        if config.model == "unet":
            return UNet(config.unet)
        if config.model == "mmdit":
            return MMDiT(config.mmdit)
        if config.model in ("judge", "strict", "verifier"):
            return Judge(JudgeConfig()) if config.model == "judge" else StrictJudge(StrictConfig())
        assert config.model == "text"
        return build_text(config.text)


def build_text(config: TextTrainConfig) -> nn.ModuleList:
    def t5(shape: EncoderConfig) -> T5EncoderModel:
        config = T5Config(
            d_model=shape.width,
            d_kv=shape.width // shape.heads,
            d_ff=shape.feed_forward,
            num_layers=shape.layers,
            num_heads=shape.heads,
        )
        return T5EncoderModel(config)

    clip = CLIPTextConfig(
        hidden_size=config.metaclip.width,
        intermediate_size=config.metaclip.feed_forward,
        num_hidden_layers=config.metaclip.layers,
        num_attention_heads=config.metaclip.heads,
    )
    return nn.ModuleList([t5(config.ul2), t5(config.byt5), CLIPTextModel(clip)])


def stated_parameters(expected: str) -> float | None:
    """ "5.0M parameters" -> 5.0e6; the discriminator and the frozen parts do not count."""
    stated = re.search(r"([\d.]+)([KMB]) parameters", expected)
    return float(stated[1]) * SCALES[stated[2]] if stated else None


def test_there_are_configs() -> None:
    assert FILES


@every_file
def test_the_header_states_command_and_result(path: Path) -> None:
    header = read_header(path.read_text(encoding="utf-8"))
    assert header.launches, "no comment line '#   ... -m kinoflow.train configs/...' before the first key"
    assert header.expected, "no comment line '# Expected: ...' before the first key"
    own = path.relative_to(ROOT).as_posix()
    assert all(own in sources for _, sources in header.launches), f"a launch command leaves out {own}"


@every_file
def test_the_file_loads_alone_and_as_launched(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    for schema, sources in read_header(path.read_text(encoding="utf-8")).launches:
        alone = load(schema, [path.relative_to(ROOT).as_posix()])
        assert to_dict(alone) != to_dict(schema()), "the file changes nothing"
        launched = load(schema, sources)
        if schema is CurateConfig:  # where its results go is no key
            continue
        assert launched.run if schema is RunConfig else launched.out


@every_file
def test_the_model_is_built(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    header = read_header(path.read_text(encoding="utf-8"))
    for schema, sources in header.launches:
        if schema is not RunConfig:
            assert "model" not in to_dict(load(schema, sources))  # it trains none
            continue
        model = build(load(schema, sources))
        assert all(parameter.is_meta for parameter in model.parameters())
        count, stated = (
            sum(parameter.numel() for parameter in model.parameters()),
            stated_parameters(header.expected),
        )
        assert count > 0
        if stated is not None:
            assert abs(count - stated) <= 0.02 * stated, (
                f"the header states {stated:g} parameters, there are {count}"
            )


def test_the_30b_model_is_the_papers() -> None:
    """48 (8 d² + 3 d f) in the layers; the rest is shared (Movie Gen, table 5)."""
    with torch.device("meta"):
        model = VideoDiT(load(RunConfig, ["configs/models/dit_30b.yaml"]).dit)
    layers = [p.numel() for p in model.blocks.parameters() if p.ndim == 2 and p.shape[0] != 6]
    assert sum(layers) == 48 * (8 * 6144**2 + 3 * 6144 * 16384)
    assert 28.9e9 <= sum(p.numel() for p in model.parameters()) <= 31e9


@pytest.mark.parametrize(("name", "expected"), [("sd3_2b", 2.03e9), ("sd3_8b", 8e9)])
def test_the_two_stream_models_are_the_papers(name: str, expected: float) -> None:
    """38 layers of 2 (6 + 12) d² are the 8 billion of Esser et al. 2024, figure 8, but for the last text."""
    with torch.device("meta"):
        model = MMDiT(load(RunConfig, [f"configs/models/{name}.yaml"]).mmdit)
    d, depth = model.config.width, model.config.depth
    matrices = [p.numel() for p in model.blocks.parameters() if p.ndim == 2]
    assert sum(matrices) == depth * 36 * d**2 - 14 * d**2
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(expected, rel=0.03)


@pytest.mark.parametrize("stage", ["t2i_256", "t2iv_256", "t2iv_768", "sft"])
def test_the_stage_fits_model_and_cluster(stage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its buckets fit its tables, its batch the cluster of its command, its images the paper's share."""
    monkeypatch.chdir(ROOT)
    ((_, sources),) = read_header(
        (ROOT / f"configs/stages/{stage}.yaml").read_text(encoding="utf-8")
    ).launches
    config = load(RunConfig, sources)
    gpus = int(re.search(r"--ntasks (\d+)", (ROOT / f"configs/stages/{stage}.yaml").read_text())[1])
    assert gpus % config.parallel.sequence == 0
    replicas = gpus // config.parallel.sequence
    assert config.data.batch_size % (replicas * config.deepspeed.accumulation) == 0
    assert config.dit.heads % config.parallel.sequence == 0
    buckets = [parse(text) for text in config.data.buckets]
    for bucket in buckets:
        tokens = (-(-bucket.frames // 8), bucket.height // 16, bucket.width // 16)
        assert bucket.height % 16 == bucket.width % 16 == 0
        assert all(n <= table for n, table in zip(tokens, config.dit.max_tokens, strict=True))
        assert tokens[0] * tokens[1] * tokens[2] <= 73728
    images = sum(bucket.weight for bucket in buckets if bucket.frames == 1)
    clips = sum(bucket.weight for bucket in buckets if bucket.frames > 1)
    assert images == pytest.approx({"t2i_256": images, "sft": 0}.get(stage, clips / 10))
    assert len({Fraction(bucket.width, bucket.height) for bucket in buckets}) == 5


def test_the_upsampler_is_the_papers(monkeypatch: pytest.MonkeyPatch) -> None:
    """7B parameters, windows of 14 frames that share 4, 20 steps, twice the sizes of the clips of the 30B."""
    monkeypatch.chdir(ROOT)
    header = read_header((ROOT / "configs/stages/upsample.yaml").read_text(encoding="utf-8"))
    ((_, sources),) = header.launches
    config = load(RunConfig, sources)
    assert sum(p.numel() for p in build(config).parameters()) == pytest.approx(7e9, rel=0.03)
    buckets = [parse(text) for text in config.data.buckets]
    assert {bucket.frames for bucket in buckets} == {1, 14}
    assert config.known == KnownConfig(upsample=1.0)
    assert (STEPS, round(14 * WINDOW_SHARE)) == (20, 4)
    smaller = load(RunConfig, ["configs/stages/t2iv_768.yaml"]).data.buckets
    sizes = {(2 * bucket.height, 2 * bucket.width) for bucket in map(parse, smaller)}
    assert {(bucket.height, bucket.width) for bucket in buckets} == sizes
    work = DiTWorkload(config, [512, 100, 256])
    assert work.problems() == [] and max(clip.tokens for clip in work.clips) == 14 * 72 * 128
    replicas = 64 * 8 // config.parallel.sequence
    assert config.data.batch_size % replicas == 0 and config.dit.heads % config.parallel.sequence == 0


def test_the_tables_grow_from_stage_to_stage() -> None:
    tables = [
        load(RunConfig, [f"configs/{s}.yaml"]).dit.max_tokens for s in ("t2i_256", "t2iv_256", "t2iv_768")
    ]
    assert tables == [(1, 22, 22), (32, 22, 22), (32, 66, 66)]


def test_a_header_is_read() -> None:
    header = read_header(
        "# What it is.\n#\n"
        "#   torchrun --nproc-per-node 8 -m kinoflow.train configs/a.yaml \\\n#     configs/b.yaml run=x\n"
        "#   kinoflow train precompute configs/a.yaml out=y\n#\n"
        "# Expected: 30.1B parameters,\n# slow.\nmodel: dit\n"
    )
    assert header.launches == [
        (RunConfig, ["configs/a.yaml", "configs/b.yaml", "run=x"]),
        (PrecomputeConfig, ["configs/a.yaml", "out=y"]),
    ]
    assert header.expected == "30.1B parameters, slow."
    assert stated_parameters(header.expected) == 30.1e9
    assert read_header("model: dit\n# Expected: late\n") == Header(launches=[], expected="")
