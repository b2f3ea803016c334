"""configs: what wins over what, round trips, and one line for every mistake."""

import json
from dataclasses import dataclass, field, fields, is_dataclass
from fractions import Fraction
from pathlib import Path
from typing import Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kinoflow.configs.errors import UserError
from kinoflow.configs.schema import dump, from_dict, load, to_dict


@dataclass(frozen=True, kw_only=True)
class Optimizer:
    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.95)
    schedule: Literal["constant", "cosine"] = "constant"

    def __post_init__(self) -> None:
        if self.lr <= 0:
            raise ValueError(f"optimizer.lr must be positive, got {self.lr}")


@dataclass(frozen=True, kw_only=True)
class Level:
    width: int = 8
    strides: tuple[tuple[int, int], ...] = ((2, 2),)


@dataclass(frozen=True, kw_only=True)
class Run:
    model: Literal["tae", "dit"]
    run: str = "runs/a"
    steps: int = 10
    name: str | None = None
    compile: bool = False
    buckets: tuple[str, ...] = ("16x64x64@16",)
    weights: dict[str, float] = field(default_factory=dict)
    optimizer: Optimizer = field(default_factory=Optimizer)
    discriminator: Optimizer | None = None
    levels: tuple[Level, ...] = ()


def write(folder: Path, name: str, text: str) -> str:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return str(path)


def message(*sources: str) -> str:
    with pytest.raises(UserError) as caught:
        load(Run, sources)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_sources_win_from_left_to_right(tmp_path: Path) -> None:
    first = write(tmp_path, "a.yaml", "model: tae\nsteps: 1\noptimizer: {lr: 1e-2, schedule: cosine}\n")
    second = write(tmp_path, "b.yaml", "steps: 2\noptimizer:\n  lr: 0.5\n")
    config = load(Run, [first, "steps=7", second, "optimizer.betas=[0.1, 0.2]"])
    assert config.model == "tae"
    assert config.steps == 2
    assert config.optimizer == Optimizer(lr=0.5, betas=(0.1, 0.2), schedule="cosine")
    assert config.run == "runs/a"


def test_types_are_those_of_the_schema() -> None:
    config = load(
        Run, ["model=dit", "levels=[{width: 3, strides: [[1, 2], [4, 4]]}, {}]", "discriminator.lr=2"]
    )
    assert config.levels == (Level(width=3, strides=((1, 2), (4, 4))), Level())
    assert config.discriminator == Optimizer(lr=2.0)
    assert type(to_dict(config)["discriminator"]["lr"]) is float
    assert load(Run, ["model=dit"]).discriminator is None
    assert load(Run, ["model=dit", "discriminator.lr=2", "discriminator=null"]).discriminator is None


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("007", "007"),
        ("1e5", "1e5"),
        ("", ""),
        ("a: b", "a: b"),
        ("x=y", "x=y"),
        ("runs/b", "runs/b"),
        ("'q'", "q"),
    ],
)
def test_text_stays_as_typed(text: str, value: str) -> None:
    assert load(Run, ["model=dit", f"run={text}"]).run == value
    assert load(Run, ["model=dit", "name=null"]).name is None


def test_a_lone_text_is_a_list_of_it(tmp_path: Path) -> None:
    path = write(tmp_path, "a.yaml", "buckets: 1x8x8@16\n")
    for source in ("buckets=1x8x8@16", "buckets=[1x8x8@16]", path):
        assert load(Run, ["model=dit", source]).buckets == ("1x8x8@16",)
    assert load(Run, ["model=dit", "buckets=007"]).buckets == ("007",)
    assert load(Run, ["model=dit", "buckets=a", "buckets=[b,c]"]).buckets == ("b", "c")
    assert from_dict(Run, {"model": "dit", "buckets": "a"}).buckets == ("a",)


def test_bases_merge_first_and_relative_to_their_file(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    write(tmp_path, "root.yaml", "model: tae\nsteps: 1\nrun: root\nname: root\n")
    write(tmp_path / "deep", "middle.yaml", "base: ../root.yaml\nsteps: 2\nrun: middle\n")
    top = write(tmp_path, "top.yaml", "base: [root.yaml, deep/middle.yaml]\nsteps: 3\n")
    config = load(Run, [top])
    assert (config.model, config.steps, config.run, config.name) == ("tae", 3, "middle", "root")


def test_a_circle_of_bases_is_named(tmp_path: Path) -> None:
    first = write(tmp_path, "a.yaml", "base: [b.yaml]\nmodel: tae\n")
    write(tmp_path, "b.yaml", "base: [a.yaml]\n")
    assert "a.yaml -> b.yaml -> a.yaml" in message(first)


def test_unknown_keys_name_the_file_and_the_nearest_key(tmp_path: Path) -> None:
    path = write(tmp_path, "x.yaml", "optimzer:\n  lr: 1\n")
    assert message(path) == f'{path}: unknown key "optimzer.lr"; did you mean "optimizer.lr"?'
    assert message("optimizer.lrr=1") == 'unknown key "optimizer.lrr"; did you mean "optimizer.lr"?'
    assert 'did you mean "optimizer.schedule"?' in message("schedule=cosine")
    assert "the keys are model, run, steps" in message("zzz=1")
    assert 'unknown key "levels[1].widht"; did you mean "levels[1].width"?' in message(
        "model=tae", "levels=[{}, {widht: 2}]"
    )


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("optimizer.lr=fast", 'optimizer.lr: "fast" is not a float'),
        ("optimizer.lr=true", "optimizer.lr: true is not a float"),
        ("steps=1.5", "steps: 1.5 is not an int"),
        ("compile=maybe", 'compile: "maybe" is not a bool'),
        ("optimizer.schedule=cosin", 'optimizer.schedule: "cosin" is not one of constant, cosine'),
        ("optimizer.betas=[0.1]", "optimizer.betas: [0.1] is not a list of 2 values (float, float)"),
        ("optimizer.betas=0.1", "optimizer.betas: 0.1 is not a list of 2 values"),
        ("optimizer=3", "optimizer: 3 is not a mapping with the keys lr, betas, schedule"),
        ("optimizer=null", "optimizer: null is not a mapping"),
        ("steps=null", "steps: null is not an int"),
        ("weights.x=heavy", 'weights.x: "heavy" is not a float'),
        ("weights=3", "weights: 3 is not a mapping of names to float"),
        ("levels=[{strides: [[1, x]]}]", 'levels[0].strides[0][1]: "x" is not an int'),
        ("levels=[{strides: [[1, 2, 3]]}]", "levels[0].strides[0]: [1, 2, 3] is not a list of 2 values"),
        ("levels=[{width: wide}]", 'levels[0].width: "wide" is not an int'),
        ("buckets=[a, 1]", "buckets[1]: 1 is not a str; put it in quotes"),
        ("steps=2.0", "steps: 2.0 is not an int"),
        ("compile=1", "compile: 1 is not a bool"),
        ("steps.a=1", 'steps: {"a": 1} is not an int'),
        ("levels=[{tags: 3}]", 'unknown key "levels[0].tags"'),
        ("discriminator.lr=-1", "discriminator: optimizer.lr must be positive"),
        ("steps=!!binary aGk=", "Object of type bytes is not JSON serializable; write it as text"),
        ("buckets=[a, [b]]", 'buckets[1]: ["b"] is not a str'),
        ("optimizer.lr=-1", "optimizer.lr must be positive, got -1.0"),
    ],
)
def test_wrong_values_name_key_value_and_type(override: str, expected: str) -> None:
    assert message("model=tae", override).startswith(expected)


def test_a_wrong_type_in_a_file_names_the_file(tmp_path: Path) -> None:
    path = write(tmp_path, "x.yaml", "model: tae\nrun: a\noptimizer:\n  betas: [0.9, 0.95]\n  lr: fast\n")
    assert message(path) == f'{path}: optimizer.lr: "fast" is not a float'


def test_the_last_source_that_gives_the_key_is_named(tmp_path: Path) -> None:
    first = write(tmp_path, "a.yaml", "model: tae\nsteps: many\noptimizer: {lr: fast}\n")
    second = write(tmp_path, "b.yaml", "optimizer: {lr: slow}\nlevels: [{}, {width: x}]\n")
    assert message(first, second, "optimizer.schedule=cosine").startswith(f'{first}: steps: "many"')
    assert message(first, second, "steps=1").startswith(f'{second}: optimizer.lr: "slow"')
    assert message(first, second, "steps=1", "optimizer.lr=x").startswith('optimizer.lr: "x"')
    assert message(first, second, "steps=1", "optimizer.lr=1").startswith(f"{second}: levels[1].width")
    assert load(Run, [first, second, "steps=1", "optimizer.lr=1", "levels=[]"]).levels == ()


def test_an_unknown_key_is_refused_though_a_later_source_drops_it(tmp_path: Path) -> None:
    path = write(tmp_path, "a.yaml", "discriminator: {lrr: 1}\n")
    assert message("model=tae", path, "discriminator=null").startswith(f'{path}: unknown key "discriminator')


def test_interpolation_reaches_defaults_and_brings_no_unknown_keys(tmp_path: Path) -> None:
    path = write(tmp_path, "a.yaml", "name: ${run}-${steps}\ndiscriminator: ${optimizer}\n")
    config = load(Run, ["model=tae", path, "optimizer.lr=3"])
    assert (config.name, config.discriminator) == ("runs/a-10", Optimizer(lr=3.0))
    path = write(tmp_path, "b.yaml", "weights: {x: 1}\noptimizer: ${weights}\n")
    assert 'unknown key "optimizer.x"' in message("model=tae", path)


def test_a_section_keeps_the_defaults_that_its_field_gives() -> None:
    @dataclass(frozen=True, kw_only=True)
    class Pair:
        first: Optimizer = field(default_factory=lambda: Optimizer(lr=0.5, betas=(0.1, 0.2)))
        weights: dict[str, float] = field(default_factory=lambda: {"a": 1.0})

    config = load(Pair, ["first.schedule=cosine", "weights.b=.inf"])
    assert config.first == Optimizer(lr=0.5, betas=(0.1, 0.2), schedule="cosine")
    assert config.weights == {"a": 1.0, "b": float("inf")}


def test_a_missing_value_is_asked_for(tmp_path: Path) -> None:
    assert message("steps=3") == "model is not given; add model=... (one of tae, dit)"
    assert message(write(tmp_path, "x.yaml", "model: ???\n")).startswith("model is not given")


def test_a_missing_file_names_the_nearest(tmp_path: Path) -> None:
    near = write(tmp_path, "dit_mini.yaml", "model: dit\n")
    missing = str(tmp_path / "dit_mni.yaml")
    assert message(missing) == f"{missing}: there is no such file; did you mean {near}?"
    assert "there is no such file" in message("nowhere/at/all.yaml")


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("model: tae\nrun: [1, 2\n", "malformed YAML"),
        ("model: tae\noptimizer:\n  lr: 1\n lr: 2\n", "line 4"),
        ("model: tae\nmodel: dit\n", "line 2"),
        ("- a\n- b\n", "holds a list"),
        ("model: ${nothing}\n", "nothing"),
        ("base: 3\n", "base: 3 is not a list of YAML files"),
        ("base: [gone.yaml]\n", "there is no such file"),
    ],
)
def test_malformed_files_say_where(tmp_path: Path, text: str, part: str) -> None:
    assert part in message(write(tmp_path, "x.yaml", text))


def test_unreadable_files_are_one_line(tmp_path: Path) -> None:
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00model")
    assert "not UTF-8" in message(str(tmp_path / "binary.yaml"))
    (tmp_path / "folder.yaml").mkdir()
    assert "cannot be read" in message(str(tmp_path / "folder.yaml"))


@pytest.mark.parametrize("source", ["steps", "=3", "optimizer.=1", ".steps=1", "steps=[1"])
def test_malformed_overrides(source: str) -> None:
    assert f'"{source}"' in message("model=tae", source)


def test_an_empty_file_changes_nothing(tmp_path: Path) -> None:
    empty = write(tmp_path, "x.yaml", "# nothing yet\n")
    assert load(Run, ["model=tae", empty]) == load(Run, ["model=tae"])


def test_a_path_with_an_equals_sign_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "lr=3").mkdir()
    path = write(tmp_path / "lr=3", "config.yaml", "model: dit\n")
    assert load(Run, [path]).model == "dit"


@settings(max_examples=25)
@given(
    steps=st.integers(-(2**53), 2**53),
    lr=st.floats(1e-300, 1e300),
    run=st.text(st.characters(codec="utf-8", exclude_characters="$", exclude_categories=("Cc", "Cs"))),
    buckets=st.lists(st.text("0123456789x@e.:#-'\" ", max_size=12), max_size=3),
    weights=st.dictionaries(st.from_regex(r"[a-z]{1,5}", fullmatch=True), st.floats(-1e9, 1e9), max_size=3),
    levels=st.lists(st.builds(Level, width=st.integers(1, 9)), max_size=2),
)
def test_dump_and_load_are_inverse(tmp_path_factory: pytest.TempPathFactory, **values: object) -> None:
    values["optimizer"] = Optimizer(lr=values.pop("lr"))  # type: ignore[arg-type]
    values["buckets"], values["levels"] = tuple(values["buckets"]), tuple(values["levels"])  # type: ignore[arg-type]
    config = Run(model="dit", **values)  # type: ignore[arg-type]
    path = tmp_path_factory.getbasetemp() / "round.yaml"
    dump(config, path)
    assert load(Run, [str(path)]) == config
    assert from_dict(Run, json.loads(json.dumps(to_dict(config)))) == config


def test_to_dict_is_plain_json() -> None:
    @dataclass(frozen=True, kw_only=True)
    class Clip:
        fps: Fraction = Fraction(24000, 1001)
        folder: Path = Path("clips")
        sizes: tuple[tuple[int, ...], ...] = ((1, 2),)

    assert to_dict(Clip()) == {"fps": "24000/1001", "folder": "clips", "sizes": [[1, 2]]}
    with pytest.raises(TypeError):
        to_dict({"a": 1})


def test_dump_leaves_the_old_file_when_it_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "config.yaml"
    dump(Run(model="tae"), path)
    before = path.read_text(encoding="utf-8")

    def full(self: Path, target: Path) -> Path:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(UserError, match=r"config\.yaml: the disk is full"):
        dump(Run(model="dit"), path)
    assert path.read_text(encoding="utf-8") == before
    assert [file.name for file in tmp_path.iterdir()] == ["config.yaml"]


def test_packaged_configs_are_found_from_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By their path, and by their name alone, which no two have."""
    monkeypatch.chdir(tmp_path)
    folder = Path(__file__).parents[2] / "configs"
    packaged = sorted(folder.rglob("*.yaml"))
    assert packaged
    for name in (packaged[0].relative_to(folder), packaged[0].name):
        with pytest.raises(UserError) as caught:  # found and read: its keys are not this schema's
            load(Run, [f"configs/{name}", "zzz=1"])
        assert "there is no such file" not in str(caught.value)
    assert len({path.name for path in packaged}) == len(packaged)


def test_every_field_of_the_schema_can_be_set_by_its_key() -> None:
    config = load(Run, ["model=dit", "discriminator.lr=1"])
    for key, value in leaves(config):
        assert load(Run, ["model=dit", "discriminator.lr=1", f"{key}={json.dumps(value)}"]) == config


def leaves(config: object, parent: str = "") -> list[tuple[str, object]]:
    found = []
    for item in fields(config):  # type: ignore[arg-type]
        value = getattr(config, item.name)
        found += (
            leaves(value, f"{parent}{item.name}.") if is_dataclass(value) else [(parent + item.name, value)]
        )
    return found
