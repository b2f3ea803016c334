"""Configuration: dataclass defaults < YAML files, left to right < ``key=value`` overrides.

A schema is a frozen, keyword-only dataclass whose fields are ``bool``, ``int``, ``float``, ``str``,
``Literal``, ``tuple``, ``dict`` and other such dataclasses, each optionally ``| None``. A field without a
default must be given by a source. Rates are written as strings ("24000/1001"), never as floats; in a YAML
file text that looks like a number needs quotes. A lone text may stand for a list of texts.

Every mistake in a source is a `UserError` of one line that names the source, the key and the remedy.
"""

from __future__ import annotations

import difflib
import functools
import io
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, get_args, get_origin

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from kinoflow.configs.errors import UserError, os_error_line
from kinoflow.configs.files import write_text
from kinoflow.configs.keys import bare, defaults, describe, describe_keys, hints, type_at

if TYPE_CHECKING:
    from pydantic import TypeAdapter
    from pydantic_core import ErrorDetails

__all__ = ["UserError", "dump", "from_dict", "load", "to_dict"]

T = TypeVar("T")
Layer = tuple[str, dict[str, Any]]
"""What a source says, behind what a message about it begins with: "FILE: ", or nothing for an override."""
Steps = tuple[str | int, ...]
"""The way to a value: names of fields and indices of items."""
_HERE = Path(__file__).parent


def load(schema: type[T], sources: Sequence[str]) -> T:
    """Build ``schema`` from its defaults and ``sources``, the later ones winning.

    Each source is a YAML file (``configs/models/dit_mini.yaml``) or an override (``optimizer.lr=1e-4``). A
    YAML file may start from others, ``base: [other.yaml]``, relative to itself, merged before it. Mappings
    merge key by key; lists replace. A ``configs/…`` that is not below the working folder is taken from the
    installed package, ``configs/NAME.yaml`` from whichever of its folders has it.

    Raises:
        UserError: an unknown key, a value of the wrong type, a missing value or file, malformed YAML, a
            cycle of bases, or a value that the schema's own ``__post_init__`` refuses.
    """
    layers: list[Layer] = []
    for source in sources:
        key, equals, _ = str(source).partition("=")
        if equals and "/" not in key:  # a path such as runs/lr=3/config.yaml is a file
            layers.append(("", _parse_override(schema, str(source))))
        elif str(source).endswith((".yaml", ".yml")):
            layers.extend(_read_layers(Path(source), chain=()))
        else:
            raise UserError(f'"{source}" is neither a YAML file (*.yaml) nor an override (key=value)')
    return _build(schema, layers)


def from_dict(schema: type[T], mapping: Mapping[str, Any]) -> T:
    """Build ``schema`` from its defaults and a nested mapping; the inverse of `to_dict`.

    Raises:
        UserError: as `load`, without a source's name in front.
    """
    return _build(schema, [("", dict(mapping))])


def to_dict(config: Any) -> dict[str, Any]:
    """The config as plain JSON types: tuples become lists, `Fraction` and `Path` become strings."""
    if not is_dataclass(config) or isinstance(config, type):
        raise TypeError(f"to_dict wants a dataclass instance, got {config!r}")
    return {field.name: _plain(getattr(config, field.name)) for field in fields(config)}


def dump(config: Any, path: str | os.PathLike[str]) -> None:
    """Write the config as YAML that `load` reads back to an equal one; the file appears whole or not at all.

    Raises:
        UserError: the file cannot be written.
    """
    path = Path(path)
    text = OmegaConf.to_yaml(OmegaConf.create(to_dict(config)))
    try:
        write_text(path, text)
    except OSError as error:
        raise UserError(os_error_line(path, error)) from None


def _plain(value: Any) -> Any:
    if is_dataclass(value):
        return to_dict(value)
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Fraction | os.PathLike) else value


# ---------------------------------------------------------------------------------------------- sources


def _read_layers(path: Path, chain: tuple[Path, ...]) -> list[Layer]:
    """A YAML file and its bases, in the order in which they merge."""
    path = path if path.exists() else _packaged(path)
    resolved = path.resolve()
    if resolved in chain:
        names = " -> ".join(link.name for link in (*chain, resolved))
        raise UserError(f"{path}: base: the files include each other in a circle: {names}")
    mapping = _read_yaml(path)
    bases = mapping.pop("base", [])
    bases = [bases] if isinstance(bases, str) else bases
    if not isinstance(bases, list) or not all(isinstance(base, str) for base in bases):
        raise UserError(f'{path}: base: {_show(bases)} is not a list of YAML files, such as ["other.yaml"]')
    layers = [layer for base in bases for layer in _read_layers(path.parent / base, (*chain, resolved))]
    return [*layers, (f"{path}: ", mapping)]


def _packaged(path: Path) -> Path:
    """configs/… as the package brings it, or configs/NAME.yaml in whichever folder it lies there."""
    if path.parts[:1] == ("configs",):
        beside = _HERE.joinpath(*path.parts[1:])
        found = [beside] if beside.exists() else [*_HERE.rglob(path.name)] if len(path.parts) == 2 else []
        return found[0] if len(found) == 1 else path
    return path


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"{path}: there is no such file{_nearest_file(path)}") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UserError(f"{path}: is not UTF-8 text") from None
    try:
        content = OmegaConf.to_container(OmegaConf.load(io.StringIO(text)))
    except yaml.YAMLError as error:
        raise UserError(f"{path}: {_yaml_problem(error)}") from None
    except (OSError, OmegaConfBaseException) as error:  # OmegaConf's word for "a lone number or string"
        raise UserError(f"{path}: is not a mapping of keys to values: {_first_line(error)}") from None
    if not isinstance(content, dict):
        raise UserError(f'{path}: holds a list, not "key: value" lines')
    return {str(key): value for key, value in content.items()}


def _parse_override(schema: type, source: str) -> dict[str, Any]:
    key, _, text = source.partition("=")
    names = key.split(".")
    if not all(names):
        raise UserError(f'"{source}": an override is written key=value, such as optimizer.lr=1e-4')
    try:
        value = OmegaConf.to_container(OmegaConf.from_dotlist([f"value={text}"]))["value"]  # type: ignore[index,call-overload]
    except yaml.YAMLError as error:
        raise UserError(f'"{source}": malformed value: {_yaml_reason(error)}') from None
    except OmegaConfBaseException as error:
        raise UserError(f'"{source}": {_first_line(error)}') from None
    expected = bare(type_at(schema, names))
    lone = expected == tuple[str, ...] and not isinstance(value, list)
    if (expected is str or lone) and not isinstance(value, str) and text not in ("null", "~"):
        value = text  # run=007 stays "007", run= is the empty string
    return _nest(names, value)


def _nest(names: Sequence[str], value: Any) -> dict[str, Any]:
    """(a, b), value -> {a: {b: value}}."""
    for name in reversed(names[1:]):
        value = {name: value}
    return {names[0]: value}


def _yaml_problem(error: yaml.YAMLError) -> str:
    mark = getattr(error, "problem_mark", None)
    return f"{f'line {mark.line + 1}: ' if mark else ''}malformed YAML: {_yaml_reason(error)}"


def _yaml_reason(error: yaml.YAMLError) -> str:
    return getattr(error, "problem", None) or _first_line(error)


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _nearest_file(path: Path) -> str:
    found = {*path.parent.glob("*.y*ml"), *_HERE.rglob("*.yaml")}
    by_name = {file.name: file for file in sorted(found, key=lambda file: file.parent == path.parent)}
    near = difflib.get_close_matches(path.name, by_name, n=1, cutoff=0.0)
    if not near:
        return ""
    file = by_name[near[0]]
    ours = Path("configs") / file.relative_to(_HERE) if file.is_relative_to(_HERE) else file
    return f"; did you mean {ours}?"


# ------------------------------------------------------------------------------------------------ building


def _build(schema: type[T], layers: Sequence[Layer]) -> T:
    """Merge the layers over the defaults, the later ones winning, and let pydantic make the dataclasses."""
    for source, mapping in layers:
        _refuse_unknown(schema, mapping, source)
    start = {name: _plain(value) for name, value in defaults(schema).items()}
    try:
        config = OmegaConf.merge(start, *(mapping for _, mapping in layers))
        plain = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    except MissingMandatoryValue as error:
        raise _not_given(schema, tuple((error.full_key or "?").split("."))) from None
    except OmegaConfBaseException as error:
        raise UserError(f"{error.full_key}: {_first_line(error)}") from None
    _refuse_unknown(schema, plain, "")  # an interpolation may have brought a mapping
    return _validate(schema, plain, layers)


def _validate(schema: type[T], plain: Any, layers: Sequence[Layer]) -> T:
    from pydantic import ValidationError

    plain = _listed(schema, plain)
    try:
        # Of JSON a strict reader takes lists for tuples and ints for floats, and nothing else for another.
        return _adapter(schema).validate_json(json.dumps(plain), strict=True)
    except ValidationError as error:
        raise _explain(schema, error.errors(include_url=False)[0], layers) from error
    except TypeError as error:  # YAML's !!binary
        raise UserError(f"{_first_line(error)}; write it as text") from None


def _listed(kind: Any, value: Any) -> Any:
    """The value with each text that stands where a list of texts is wanted as a list of it alone."""
    kind = bare(kind)
    if is_dataclass(kind) and isinstance(value, Mapping):
        return {key: _listed(hints(kind).get(key), item) for key, item in value.items()}
    return [value] if kind == tuple[str, ...] and isinstance(value, str) else value


@functools.cache
def _adapter(schema: type[T]) -> TypeAdapter[T]:
    from pydantic import TypeAdapter

    return TypeAdapter(schema)


def _explain(schema: type, problem: ErrorDetails, layers: Sequence[Layer]) -> UserError:
    """What pydantic found, in one line that names the source, the key and the type that it wants."""
    path, value = problem["loc"], problem["input"]
    refusal = problem.get("ctx", {}).get("error")
    if refusal is not None:  # a __post_init__'s; many name their section themselves
        key, text = _dotted(path), _first_line(refusal)
        return UserError(text if not key or key in text else f"{key}: {text}")
    if problem["type"] == "missing":
        if isinstance(path[-1], str):
            return _not_given(schema, path)
        path = path[:-1]  # an item of a list that is too short
    if not path:  # the whole is no JSON: half a character of a name that no encoding has
        return UserError(problem["msg"])
    kind = type_at(schema, path)
    quotes = "; put it in quotes" if bare(kind) is str and isinstance(value, int | float) else ""
    source = next((name for name, mapping in reversed(layers) if _gives(mapping, path)), "")
    return UserError(f"{source}{_dotted(path)}: {_show(value)} is not {describe(kind)}{quotes}")


def _not_given(schema: type, path: Steps) -> UserError:
    key = _dotted(path)
    return UserError(f"{key} is not given; add {key}=... ({describe(type_at(schema, path))})")


def _refuse_unknown(schema: type, mapping: Any, source: str) -> None:
    for key, beside in _unknown(schema, mapping):
        known = [*beside, *(each.name for each in describe_keys(schema))]
        near = difflib.get_close_matches(key, known, n=1)
        near = near or [name for name in known if name.split(".")[-1] == key.split(".")[-1]]  # another parent
        hint = f'did you mean "{near[0]}"?' if near else f"the keys are {', '.join(beside)}"
        raise UserError(f'{source}unknown key "{key}"; {hint}')


def _unknown(
    kind: Any, value: Any, path: Steps = (), beside: Sequence[str] = ()
) -> Iterator[tuple[str, Any]]:
    """Every key that its schema lacks (`kind` is None), and those that there are in its place."""
    kind = bare(kind)
    if is_dataclass(kind):
        beside = [_dotted((*path, name)) for name in hints(kind)]
    if isinstance(value, Mapping) and value and (kind is None or is_dataclass(kind)):
        for name, item in value.items():
            yield from _unknown(type_at(kind, [name]), item, (*path, name), beside)
    elif kind is None:
        yield _dotted(path), beside
    elif get_origin(kind) is tuple and isinstance(value, list):
        for index, item in enumerate(value):
            yield from _unknown(get_args(kind)[0], item, (*path, index))


def _gives(mapping: Any, path: Steps) -> bool:
    """Whether a source says what lies there; a list is of one source, whole."""
    for step in path:
        if isinstance(step, int):
            return True
        if not isinstance(mapping, Mapping) or step not in mapping:
            return False
        mapping = mapping[step]
    return True


def _dotted(path: Steps) -> str:
    return "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in path).removeprefix(".")


def _show(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}..."
