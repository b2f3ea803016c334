"""The house: which folder may import which, which library lives in which room, and how long things may be.

The imports are read with `ast`, so those inside functions and under TYPE_CHECKING count as well.
"""

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# Package -> what it may import; nothing else may.
ARROWS: dict[str, set[str]] = {
    "configs": set(),
    "data": {"configs"},
    "conditioning": {"configs"},
    "tae": {"configs", "data"},
    "dit_video": {"configs", "conditioning"},
    "sample": {"configs", "data", "tae", "conditioning", "dit_video"},
    "train": {"configs", "data", "tae", "conditioning", "dit_video", "sample"},
    "kinoflow": {"data", "tae", "sample", "train"},
}
# An arrow that starts in these files only.
FROM_ONLY: dict[tuple[str, str], set[str]] = {
    ("tae", "data"): {
        f"tae/{name}.py" for name in ("codec", "latent_file", "jobs", "folders", "report", "__main__")
    }
}
# An arrow that reaches these names only: a module, or one thing in it.
TO_ONLY: dict[tuple[str, str], set[str]] = {
    ("dit_video", "conditioning"): {"conditioning.TextEmbedding", "conditioning.embedding.TextEmbedding"},
    **{("kinoflow", package): {f"{package}.__main__.main"} for package in ARROWS},
}
# Library -> the only files that import it.
ROOMS: dict[str, set[str]] = {
    "deepspeed": {"train/engine.py", "train/checkpoint.py", "dit_video/parallel.py"},
    "transformers": {"conditioning/encoders.py", "train/text.py"},
    "tokenizers": {"conditioning/encoders.py", "train/text.py"},
    "av": {"data/video.py", "data/video_writer.py", "data/audio.py"},
    "decord": {"data/video.py"},
    "xformers": {"dit_video/attention.py"},
}
MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 50
MAX_TEST_FUNCTION_LINES = 60
IMPORTERS = {"import_module", "__import__"}


@dataclass(frozen=True, kw_only=True)
class Import:
    """One imported name: ``from data import video`` gives "data.video"; unknown is a computed name."""

    name: str
    line: int

    @property
    def top(self) -> str:
        return self.name.partition(".")[0]


def sources(root: Path) -> list[Path]:
    """Every Python file of the project below ``root``: kinoflow.py and the packages, found, not listed."""
    files = [*root.glob("*.py"), *root.glob("[!.]*/**/*.py")]
    outside = {"tests", "build", "docs"}
    return sorted(file for file in files if file.relative_to(root).parts[0] not in outside)


def imports(file: Path, root: Path) -> Iterator[Import]:
    package = file.relative_to(root).parent.parts
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (Import(name=alias.name, line=node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = list(package[: len(package) - node.level + 1]) if node.level else []
            base += node.module.split(".") if node.module else []
            for alias in node.names:
                yield Import(name=".".join([*base, alias.name]), line=node.lineno)
        elif isinstance(node, ast.Call) and called(node) in IMPORTERS:
            first = node.args[0] if node.args else None
            literal = isinstance(first, ast.Constant) and isinstance(first.value, str)
            yield Import(name=first.value if literal else "", line=node.lineno)  # type: ignore[union-attr,arg-type]


def called(node: ast.Call) -> str:
    return node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")


def broken_arrows(root: Path) -> list[str]:
    found = []
    for file in sources(root):
        path = file.relative_to(root).as_posix()
        here = path.removesuffix(".py").partition("/")[0]
        if here not in ARROWS:
            found.append(f"{path}: {here} has no arrows; add it to ARROWS")
            continue
        for item in imports(file, root):
            where = f"{path}:{item.line}"
            if not item.name:
                found.append(f"{where}: imports a computed name; spell it out")
            elif item.top in ARROWS and item.top != here:
                found += [f"{where}: {problem}" for problem in arrow_problems(here, path, item)]
    return found


def arrow_problems(here: str, path: str, item: Import) -> Iterator[str]:
    arrow = (here, item.top)
    if item.top not in ARROWS[here]:
        yield f"{here} may not import {item.top}"
    elif path not in FROM_ONLY.get(arrow, {path}):
        yield f"{here} imports {item.top} only from {', '.join(sorted(FROM_ONLY[arrow]))}"
    elif item.name not in TO_ONLY.get(arrow, {item.name}):
        yield f"{here} imports from {item.top} only {', '.join(sorted(TO_ONLY[arrow]))}"


def strangers(root: Path) -> list[str]:
    """Libraries imported outside their room."""
    return [
        f"{path}:{item.line}: {item.top} is imported only in {', '.join(sorted(ROOMS[item.top]))}"
        for file in sources(root)
        for path in [file.relative_to(root).as_posix()]
        for item in imports(file, root)
        if item.top in ROOMS and path not in ROOMS[item.top]
    ]


def too_long(root: Path) -> list[str]:
    found = []
    tests = sorted((root / "tests").rglob("*.py"))
    for file in [*sources(root), *tests]:
        path, text = file.relative_to(root).as_posix(), file.read_text(encoding="utf-8")
        lines = len(text.splitlines())
        if lines > MAX_FILE_LINES:
            found.append(f"{path}: {lines} lines, at most {MAX_FILE_LINES}")
        most = MAX_TEST_FUNCTION_LINES if file in tests else MAX_FUNCTION_LINES
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                length = (node.end_lineno or node.lineno) - node.lineno + 1
                if length > most:
                    found.append(f"{path}:{node.lineno}: {node.name} has {length} lines, at most {most}")
    return found


def test_the_arrows_hold() -> None:
    assert broken_arrows(ROOT) == []


def test_one_library_one_room() -> None:
    assert strangers(ROOT) == []


def test_files_and_functions_are_short() -> None:
    assert too_long(ROOT) == []


def test_the_arrows_have_no_cycle_and_name_what_exists() -> None:
    order = list(ARROWS)
    for package, targets in ARROWS.items():
        assert all(order.index(target) < order.index(package) for target in targets)
        assert (ROOT / package).is_dir() or (ROOT / f"{package}.py").is_file()
    seen = {file.relative_to(ROOT).parts[0].removesuffix(".py") for file in sources(ROOT)}
    assert seen == set(ARROWS)


def test_the_imports_are_seen_at_all() -> None:
    """A reader that finds nothing would pass every test above."""
    names = {item.name for file in sources(ROOT) for item in imports(file, ROOT)}
    assert {"sample.__main__.main", "av", "transformers.AutoTokenizer", "UserError"} <= names


def plant(root: Path, path: str, text: str) -> None:
    file = root / path
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text, encoding="utf-8")


@pytest.mark.parametrize(
    ("path", "text", "problem"),
    [
        ("data/a.py", "import tae", "data/a.py:1: data may not import tae"),
        ("data/a.py", "import torch, tae.model", "data may not import tae"),
        ("data/a.py", "import tae.model as model", "data may not import tae"),
        ("data/a.py", "from tae.model import TAE", "data may not import tae"),
        ("data/a.py", "from .. import tae", "data may not import tae"),
        ("data/deep/a.py", "from ...tae import model", "data may not import tae"),
        ("data/a.py", "def f():\n    from tae import model", "data/a.py:2: data may not import tae"),
        ("data/a.py", "if TYPE_CHECKING:\n    import tae.model", "data may not import tae"),
        ("data/a.py", "import importlib\nimportlib.import_module('tae.model')", "data may not import tae"),
        ("data/a.py", "import_module('tae')", "data may not import tae"),
        ("data/a.py", "__import__('tae')", "data may not import tae"),
        ("data/a.py", "import_module(f'{x}.model')", "imports a computed name"),
        ("configs/a.py", "import data", "configs may not import data"),
        ("conditioning/a.py", "import data.world", "conditioning may not import data"),
        (
            "tae/model.py",
            "from data import video",
            "tae imports data only from tae/__main__.py, tae/codec.py, tae/folders.py",
        ),
        ("tae/codec.py", "from sample import generate", "tae may not import sample"),
        (
            "dit_video/model.py",
            "from conditioning.encoders import PromptEncoder",
            "only conditioning.TextEmb",
        ),
        ("dit_video/model.py", "import conditioning.embedding", "only conditioning.TextEmbedding"),
        ("dit_video/model.py", "from tae.model import TAEConfig", "dit_video may not import tae"),
        ("sample/a.py", "from train import config", "sample may not import train"),
        ("data/a.py", "import kinoflow", "data may not import kinoflow"),
        ("kinoflow.py", "from sample.generate import generate", "kinoflow imports from sample only"),
        ("kinoflow.py", "import dit_video.model", "kinoflow may not import dit_video"),
        ("rooms/a.py", "import torch", "rooms has no arrows"),
    ],
)
def test_a_planted_arrow_is_caught(tmp_path: Path, path: str, text: str, problem: str) -> None:
    plant(tmp_path, path, text + "\n")
    found = broken_arrows(tmp_path)
    assert len(found) == 1
    assert problem in found[0]


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("tae/codec.py", "from data import video\nfrom data.video import read\nfrom tae.model import TAE"),
        ("tae/layers.py", "from . import model\nfrom .model import TAE\nfrom .. import configs"),
        ("dit_video/model.py", "from conditioning import TextEmbedding"),
        ("dit_video/model.py", "from conditioning.embedding import TextEmbedding"),
        ("kinoflow.py", "def f():\n    from sample.__main__ import main"),
        ("tests/data/test_x.py", "import train.loop, deepspeed, av"),
        ("train/a.py", "import torch, sample.generate, data.video"),
    ],
)
def test_what_is_allowed_passes(tmp_path: Path, path: str, text: str) -> None:
    plant(tmp_path, path, text + "\n")
    assert broken_arrows(tmp_path) == []
    assert strangers(tmp_path) == []


@pytest.mark.parametrize("library", sorted(ROOMS))
def test_a_planted_library_is_caught(tmp_path: Path, library: str) -> None:
    for room in ROOMS[library]:
        plant(tmp_path, room, f"import {library}\n")
    assert strangers(tmp_path) == []
    plant(tmp_path, "sample/a.py", f"def f():\n    from {library}.x import y\n")
    plant(tmp_path, "sample/b.py", f"import importlib\nimportlib.import_module('{library}')\n")
    assert [line.partition(": ")[0] for line in strangers(tmp_path)] == ["sample/a.py:2", "sample/b.py:2"]


def test_planted_lengths_are_caught(tmp_path: Path) -> None:
    body = "\n".join(["    x = 1"] * MAX_FUNCTION_LINES)
    plant(tmp_path, "data/a.py", f"def f():\n{body}\n")
    plant(tmp_path, "tests/test_a.py", f"def f():\n{body}\n")
    plant(tmp_path, "data/b.py", "x = 1\n" * (MAX_FILE_LINES + 1))
    assert [line.partition(" has ")[0] for line in too_long(tmp_path)] == [
        "data/a.py:1: f",
        f"data/b.py: {MAX_FILE_LINES + 1} lines, at most {MAX_FILE_LINES}",
    ]
