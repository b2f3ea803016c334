"""Every command's --help, and the keys that those with a configuration list in it."""

import subprocess
import sys
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any

import pytest

from kinoflow.__main__ import main
from kinoflow.configs.keys import bare, describe, describe_keys, hints, key_table
from kinoflow.data.engine.config import CurateConfig
from kinoflow.sample.card import ReleaseConfig
from kinoflow.train.plan.config import PlanConfig
from kinoflow.train.run.config import RunConfig
from kinoflow.train.tasks.precompute import PrecomputeConfig

SCHEMAS = {"train": RunConfig, "train precompute": PrecomputeConfig, "train plan": PlanConfig}
COMMANDS = [
    "",
    "sample",
    "sample evaluate",
    "sample again",
    "sample upsample",
    "sample export-diffusers",
    "sample push",
    *(f"tae {verb}" for verb in ("", "encode", "decode", "reconstruct", "info", "inflate")),
    *(
        f"data {verb}"
        for verb in ("", "curate", "select", "caption", "embed", "world", "cut", "check", "info")
    ),
    *SCHEMAS,
    "train export",
    "train configs/models/dit_mini.yaml run=x",
    "train plan configs/models/dit_mini.yaml --json",
    "train export runs/a",
]
WIDTH = 110


def leaves(value: Any, parent: str = "") -> list[str]:
    """The keys of a config, found through an instance: another way than that of the code under test."""
    found = []
    for item in fields(value):
        inner = getattr(value, item.name)
        name = parent + item.name
        found += leaves(inner, f"{name}.") if is_dataclass(inner) else [name]
    return found


@pytest.mark.parametrize("flag", ["-h", "--help"])
@pytest.mark.parametrize("words", COMMANDS)
def test_help_ends_well(words: str, flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        status = main([*words.split(), flag])
    except SystemExit as stop:  # argparse's way
        status = stop.code
    said = capsys.readouterr()
    assert (status, said.err) == (0, "")
    assert said.out.startswith("usage: kinoflow")


@pytest.mark.parametrize("words", SCHEMAS)
def test_help_lists_every_key_with_a_line_of_its_own(words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*words.split(), "--help"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert not [line for line in lines if len(line) > WIDTH]
    listed = [line.split("=")[0].strip() for line in lines if line.startswith("  ") and "=" in line]
    assert sorted(key for key in listed if " " not in key) == sorted(leaves(SCHEMAS[words]()))


@pytest.mark.parametrize(
    "schema", [*SCHEMAS.values(), CurateConfig, ReleaseConfig], ids=lambda schema: schema.__name__
)
def test_every_field_has_its_line(schema: type) -> None:
    assert [key.name for key in describe_keys(schema) if not key.line] == []


def test_export_says_what_its_words_are(capsys: pytest.CaptureFixture[str]) -> None:
    main(["train", "export", "--help"])
    said = capsys.readouterr().out
    assert "  RUN " in said and "  RELEASE " in said


def test_the_front_door_imports_nothing_heavy() -> None:
    code = (
        "import sys\nfrom kinoflow.__main__ import main\ntry:\n    main(['--help'])\nexcept SystemExit:\n"
        "    pass\nsys.exit(' '.join({'torch', 'numpy', 'omegaconf', 'pydantic'} & set(sys.modules)) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


@dataclass(frozen=True, kw_only=True)
class Inner:
    """What lies inside.

    More of it.
    """

    width: int = 8
    """How wide."""
    sides: tuple[tuple[int, int], ...] = ()
    names: dict[str, float] | None = None
    """Two lines
    as one."""


@dataclass(frozen=True, kw_only=True)
class Base:
    name: str
    """What it is called."""
    inner: Inner = field(default_factory=lambda: Inner(width=9))
    """The inside."""


@dataclass(frozen=True, kw_only=True)
class Whole(Base):
    steps: int = 3
    """How many."""
    other: Inner | None = None


def test_keys_come_with_type_default_and_line_from_bases_and_sections() -> None:
    keys = {key.name: key for key in describe_keys(Whole)}
    assert list(keys) == [
        "name",
        *(f"inner.{name}" for name in ("width", "sides", "names")),
        "steps",
        *(f"other.{name}" for name in ("width", "sides", "names")),
    ]
    assert (keys["inner.width"].default, keys["other.width"].default) == (9, 8)
    assert keys["name"].line == "What it is called." and keys["inner.sides"].line == ""
    assert keys["inner.names"].line == "Two lines as one."
    assert [keys[name].kind for name in ("name", "steps", "inner.sides", "inner.names")] == [
        "a str",
        "an int",
        "a list of (int, int)",
        "a mapping of names to float or null",
    ]
    assert describe(bare(hints(Whole)["other"])) == "a mapping with the keys width, sides, names"


def test_the_table_shows_what_to_write() -> None:
    assert key_table(Base) == (
        "keys and their defaults:\n"
        "  name=...  What it is called (a str)\n"
        "\n"
        "inner: What lies inside.\n"
        "  inner.width=9     How wide\n"
        "  inner.sides=[]     (a list of (int, int))\n"
        "  inner.names=null  Two lines as one (a mapping of names to float or null)"
    )
