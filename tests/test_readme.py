"""Every command in the pages exists, with its flags, and so does every file that they name or link.

Nothing is run: a command goes through the parser that it would meet, and stops behind it.
"""

import argparse
import re
import shlex
import tomllib
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any, NoReturn
from unittest import mock

import pytest

from kinoflow import __main__ as kinoflow
from kinoflow.configs.errors import UserError
from kinoflow.configs.schema import load
from kinoflow.train.__main__ import USAGE as TRAIN_USAGE
from tests.launch_lines import LAUNCHERS, LineError, read
from tests.test_configs import SCHEMAS, sources

ROOT = Path(__file__).parents[1]
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md")),
    *(
        ROOT / "docs" / name
        for name in (
            "cluster.md",
            "data.md",
            "latents.md",
            "notes.md",
            "own-videos.md",
            "planning.md",
            "server.md",
        )
    ),
    *sorted((ROOT / "sample" / "mini").glob("*.md")),
]
SHELL = {"bash", "console", "sh", "shell"}
# Programs that are not ours: nothing of theirs is checked but the files and extras they name.
OTHERS = {
    "torchfrtrace", "git", "openssl", "cd", "pip", "ray", "source", "nvidia-smi", "pre-commit", "pytest",
    "vllm",
}  # fmt: skip
# Folders that commands make: what a page names there need not be there yet.
LEFT_BY_USE = {line.strip("/") for line in (ROOT / ".gitignore").read_text().splitlines() if line[-1:] == "/"}
SEPARATORS = {"&&", "||", "|", ";", "&"}


class ParsedError(BaseException):
    """Raised behind a parser, past every ``except Exception`` of the command."""


def fences(text: str) -> Iterator[tuple[str, str]]:
    for block in re.finditer(r"^ *```(\w*)[^\n]*\n(.*?)^ *```", text, re.MULTILINE | re.DOTALL):
        yield block[1], block[2]


def commands(text: str) -> Iterator[list[str]]:
    """The simple commands of the page's shell blocks, as words; of a console block the lines behind ``$``."""
    for language, block in fences(text):
        if language not in SHELL:
            continue
        lines = block.replace("\\\n", " ").splitlines()
        if language == "console":
            lines = [line.strip().removeprefix("$ ") for line in lines if line.strip().startswith("$ ")]
        for line in lines:
            yield from split(line)


def split(line: str) -> Iterator[list[str]]:
    lexer = shlex.shlex(line, posix=True, punctuation_chars="&|;<>")
    lexer.whitespace_split = True
    words: list[str] = []
    for word in lexer:
        if word in SEPARATORS:
            yield words
            words = []
        else:
            words.append(word)
    if words:
        yield words


def command_problems(words: list[str]) -> Iterator[str]:
    """What is wrong with one command, in words; nothing when it could run."""
    while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
        words = words[1:]
    if not words:
        return
    program, rest = Path(words[0]).name, words[1:]
    program = program if "/" not in words[0] or words[0].startswith(".venv/bin/") else words[0]
    yield from missing_files(words)
    if program == "make":
        yield from make_problems(rest)
    elif program == "kinoflow":
        yield from kinoflow_problems(rest)
    elif program in LAUNCHERS and "kinoflow.sample" in rest:
        started = rest.index("kinoflow.sample")
        yield from launch_problems([*words[: started + 1], "kinoflow.train"])
        yield from kinoflow_problems(rest[started:])
    elif program in LAUNCHERS:
        yield from launch_problems(words)
    elif program in {"python", "python3"} and rest[:1] == ["-m"]:
        yield from [] if rest[1] in OTHERS | {"venv"} else kinoflow_problems(rest[1:])
    elif program not in OTHERS and not (ROOT / words[0]).is_file():
        yield f"{words[0]} is no command that this test knows"
    yield from extras_problems(rest)


def missing_files(words: list[str]) -> Iterator[str]:
    """Words that look like a file of the repository: below one of its folders, or a YAML."""
    for word in words:
        value = word.rpartition("=")[2]
        top = value.partition("/")[0]
        ours = "/" in value and top not in {"", ".", *LEFT_BY_USE} and (ROOT / top).is_dir()
        if (ours or re.fullmatch(r"[\w./-]+\.yaml", value)) and not (ROOT / value).exists():
            yield f"{value} does not exist"


def make_problems(words: list[str]) -> Iterator[str]:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for word in words:
        name, equals, _ = word.partition("=")
        if equals and not re.search(rf"\$\((value )?{name}\)", makefile):
            yield f"the Makefile does not use {name}"
        elif not equals and not re.search(rf"^{re.escape(name)}:", makefile, re.MULTILINE):
            yield f"the Makefile has no target {name}"


def extras_problems(words: list[str]) -> Iterator[str]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    for names in re.findall(r"(?:kinoflow|\.)\[([\w,]+)\]", " ".join(words)):
        for name in names.split(","):
            if name not in project["optional-dependencies"]:
                yield f"pyproject.toml has no extra {name}"


def kinoflow_problems(words: list[str]) -> Iterator[str]:
    """Send ``kinoflow WORDS`` through its parsers."""
    words = [words[0].removeprefix("kinoflow."), *words[1:]]
    if words[:1] == ["train"]:
        yield from train_problems(words[1:])
        return
    words = ["cpu" if word == "cuda" else word for word in words]  # a parser may ask for the device
    said = StringIO()
    try:
        with redirect_stderr(said), redirect_stdout(said):
            command, rest = kinoflow._parse(words)
            entry = kinoflow.COMMANDS[command][0]()
            with mock.patch.object(argparse.ArgumentParser, "parse_args", parse_and_stop):
                entry(rest)
        yield f"no parser saw kinoflow {shlex.join(words)}"
    except ParsedError:
        return
    except SystemExit as stop:
        if stop.code:
            yield said.getvalue().strip().splitlines()[-1]


_parse_args = argparse.ArgumentParser.parse_args


def parse_and_stop(self: argparse.ArgumentParser, *args: Any, **options: Any) -> NoReturn:
    _parse_args(self, *args, **options)
    raise ParsedError


def launch_problems(words: list[str]) -> Iterator[str]:
    """Of a command that starts `kinoflow train` by any launcher, or by none."""
    try:
        launch = read(words)
    except LineError as error:
        yield str(error)
    else:
        yield from train_problems(list(launch.words))


def train_problems(words: list[str]) -> Iterator[str]:
    verb = words[0] if words and re.fullmatch(r"[a-z]+", words[0]) else ""
    if verb and f"train {verb}" not in TRAIN_USAGE:
        yield f"kinoflow train has no {verb}"
    elif "--help" in words:
        return
    elif verb in SCHEMAS:
        try:
            load(SCHEMAS[verb], sources(verb, words[1:] if verb else words))
        except UserError as error:
            yield str(error)
    elif verb == "export" and len([word for word in words if word not in ("--adapter", "--int8")]) != 3:
        yield "kinoflow train export takes RUN and RELEASE"


def link_problems(page: Path) -> Iterator[str]:
    text = re.sub(r"^ *```.*?^ *```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    targets = re.findall(r"\]\(<?([^)\s>]+)", text) + re.findall(r"(?:src|href|srcset)=\"([^\"\s]+)", text)
    for target in targets:
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = page.parent / path if path else page
        if not file.exists():
            yield f"link to {target}: there is no such file"
        elif anchor and anchor not in anchors(file.read_text(encoding="utf-8")):
            yield f"link to {target}: there is no such heading"


def anchors(text: str) -> set[str]:
    """GitHub's names for the headings."""
    titles = re.findall(r"^#+ +(.+?) *$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.fixture(autouse=True)
def _in_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_the_commands_exist(page: Path) -> None:
    found = list(commands(page.read_text(encoding="utf-8")))
    problems = [f"{shlex.join(words)}: {problem}" for words in found for problem in command_problems(words)]
    assert problems == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_the_links_lead_somewhere(page: Path) -> None:
    assert list(link_problems(page)) == []


def test_the_readme_shows_the_commands() -> None:
    """A page whose blocks this test cannot read would pass every test above."""
    found = commands((ROOT / "README.md").read_text(encoding="utf-8"))
    shown = {" ".join([Path(words[0]).name, *words[1:2]]) for words in found}
    assert {"make sample", "make test", "kinoflow sample", "kinoflow tae"} <= shown


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("make smaple", "no target smaple"),
        ("make sample PROMT=x", "does not use PROMT"),
        ("kinoflow smple x", "invalid choice: 'smple'"),
        ('kinoflow sample "a star" --sed 7', "unrecognized arguments: --sed"),
        ("kinoflow sample 'a star' --seed seven", "invalid int value: 'seven'"),
        ("kinoflow sample evaluate --realease x", "unrecognized arguments"),
        ("kinoflow tae encode a.mp4", "the following arguments are required"),
        ("kinoflow tae encoode a.mp4 b.kino", "invalid choice: 'encoode'"),
        ("python -m kinoflow.data world out --clip", "expected one argument"),
        ("python -m kinoflow.train configs/none.yaml run=x", "configs/none.yaml does not exist"),
        (
            "OMP_NUM_THREADS=1 torchrun --nproc-per-node 2 -m kinoflow.train stps=3 run=x",
            'did you mean "steps"?',
        ),
        ("torchrun train.py", "has no -m"),
        ("kinoflow train exprt a b", "kinoflow train has no exprt"),
        ("kinoflow train exprt --help", "kinoflow train has no exprt"),
        ("kinoflow train plan cluster.gpu=8 --json", 'did you mean "cluster.gpus"?'),
        ("kinoflow train plan --jsn", '"--jsn" is neither a YAML'),
        ("kinoflow train export a", "takes RUN and RELEASE"),
        ("kinoflow train precompute otu=x", 'did you mean "out"?'),
        ("pip install 'kinoflow[trian]'", "no extra trian"),
        ("cd x && make smaple", "no target smaple"),
        ("ffplay out.mp4", "no command that this test knows"),
        ("./gone.sh", "no command that this test knows"),
    ],
)
def test_a_wrong_command_is_caught(line: str, problem: str) -> None:
    found = [problem for words in split(line) for problem in command_problems(words)]
    assert any(problem in text for text in found), found


@pytest.mark.parametrize(
    "line",
    [
        'make sample PROMPT="a red star; it\'s | big" ARGS="--seed 7"',
        "make check test  # both",
        'kinoflow sample "a star" --out star.mp4 --seed 7 --size 64x64 --json',
        "kinoflow sample --help",
        "kinoflow train plan --help",
        "kinoflow --version",
        "kinoflow tae reconstruct in.mp4 out.mp4 --side-by-side --device cuda",
        ".venv/bin/kinoflow data world out --clips 3 | head",
        "torchrun --nproc-per-node 2 -m kinoflow.train run=x steps=3 deepspeed.zero_stage=3",
        "kinoflow train export runs/a out",
        "kinoflow train plan configs/mini/mini_dit.yaml cluster.gpus=8 --json",
        "git clone https://example.org/kinoflow && cd kinoflow && .ci/run",
        "pip install 'kinoflow[train,gpu]'",
    ],
)
def test_a_right_command_passes(line: str) -> None:
    known = OTHERS | {"head"}
    with mock.patch(f"{__name__}.OTHERS", known):
        assert [problem for words in split(line) for problem in command_problems(words)] == []


def test_blocks_and_links_are_read(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "# One page, read\n[a](b.md) [c](#one-page-read) [d](page.md#gone) [e](https://x.org)\n"
        '<img src="f.png" alt="x">\n```bash\nmake a \\\n  b   # why\n```\n'
        "```console\n$ make c\nwritten: out.mp4\n```\n```python\nmake(d)\n```\n",
        encoding="utf-8",
    )
    assert list(commands(page.read_text(encoding="utf-8"))) == [["make", "a", "b"], ["make", "c"]]
    assert [text.split(":")[0] for text in link_problems(page)] == [
        "link to b.md",
        "link to page.md#gone",
        "link to f.png",
    ]


def test_the_map_of_the_paper_leads_to_the_code() -> None:
    """Twenty facts and more; each names a file, and a name that is defined (or, in a YAML, written) in it."""
    page = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (.+?) \| `([\w/.]+)` \| `(.+?)` \|$", page, re.MULTILINE)
    assert len(rows) >= 20
    for fact, path, name in rows:
        text = (ROOT / path).read_text(encoding="utf-8")
        found = rf"^(class|def) {name}\b" if path.endswith(".py") else re.escape(name)
        assert re.search(found, text, re.MULTILINE), f"{fact}: {path} has no {name}"
