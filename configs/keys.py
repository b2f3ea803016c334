"""The keys of a schema: their types in words, their defaults, and the line of text below each field."""

from __future__ import annotations

import ast
import functools
import inspect
import json
import textwrap
import types
import typing
from collections.abc import Iterator, Sequence
from dataclasses import MISSING, dataclass, fields, is_dataclass
from itertools import pairwise
from typing import Any, Literal, Union, get_args, get_origin


@dataclass(frozen=True, kw_only=True)
class Key:
    """One ``key=value`` that a command takes."""

    name: str
    """Dotted: optimizer.lr."""
    kind: str
    """Its type in words: "a float"."""
    default: Any
    """`dataclasses.MISSING` where a source must give it."""
    line: str
    """What it means: the string below the field; empty without one."""


def describe_keys(schema: Any, values: Any = None, parent: str = "") -> Iterator[Key]:
    """Every key of `schema`, sections opened, with the defaults that `values`, an instance, has."""
    lines = _lines(schema)
    for name, kind in hints(schema).items():
        default = defaults(schema).get(name, MISSING) if values is None else getattr(values, name)
        if is_dataclass(bare(kind)):
            inner = default if is_dataclass(default) else None
            yield from describe_keys(bare(kind), inner, f"{parent}{name}.")
        else:
            yield Key(name=parent + name, kind=describe(kind), default=default, line=lines.get(name, ""))


def key_table(schema: type) -> str:
    """The keys for ``--help``: ``key=default  what it means (type)``, section by section.

    A type that the default shows is left out.
    """
    sections: dict[str, list[Key]] = {}
    for key in describe_keys(schema):
        sections.setdefault(key.name.rpartition(".")[0], []).append(key)
    blocks = []
    for name, keys in sections.items():
        about = inspect.getdoc(bare(type_at(schema, name.split(".")))) if name else None
        given = [f"{key.name}={_shown(key.default)}" for key in keys]
        width = max(map(len, given))
        blocks.append(f"{name}: {about.splitlines()[0]}" if about else "keys and their defaults:")
        for left, key in zip(given, keys, strict=True):
            default = key.default
            evident = default if isinstance(default, tuple) else describe(type(default)) == key.kind
            kind = "" if evident else f" ({key.kind})"
            blocks[-1] += f"\n  {left:<{width}}  {key.line.removesuffix('.')}{kind}"
    return "\n\n".join(blocks)


def _shown(default: Any) -> str:
    if default is MISSING:
        return "..."
    return default if isinstance(default, str) else json.dumps(default, separators=(",", ":"))


@functools.cache
def _lines(schema: type) -> dict[str, str]:
    """The string below each field, in the class and in those that it extends."""
    found = {}
    for owner in filter(is_dataclass, reversed(schema.__mro__)):
        (definition,) = ast.parse(textwrap.dedent(inspect.getsource(typing.cast(type, owner)))).body
        for pair in pairwise(typing.cast(ast.ClassDef, definition).body):
            match pair:
                case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(text))):
                    found[name] = " ".join(text.split())
    return found


# ------------------------------------------------------------------------------------------------- types


@functools.cache
def hints(schema: Any) -> dict[str, Any]:
    """The type of every field that can be given."""
    found = typing.get_type_hints(schema)
    return {field.name: found[field.name] for field in fields(schema) if field.init}


def defaults(schema: Any) -> dict[str, Any]:
    """The value of every field that has one by itself."""
    given = [field for field in fields(schema) if field.init]
    made = {field.name: field.default_factory() for field in given if field.default_factory is not MISSING}
    return {field.name: field.default for field in given if field.default is not MISSING} | made


def bare(kind: Any) -> Any:
    """The type without ``| None``."""
    union = get_origin(kind) in (Union, types.UnionType)
    (only,) = [each for each in get_args(kind) if each is not type(None)] if union else [kind]
    return only


def type_at(kind: Any, path: Sequence[str | int]) -> Any:
    """The type at the end of a path of fields, items and entries; None where there is no such thing."""
    for step in path:
        kind = bare(kind)
        origin, arguments = get_origin(kind), get_args(kind)
        if is_dataclass(kind):
            kind = hints(kind).get(str(step))
        elif origin is tuple and isinstance(step, int):
            kind = arguments[0 if arguments[-1] is Ellipsis else step]
        else:
            kind = arguments[1] if origin is dict else None
    return kind


def describe(kind: Any) -> str:
    """The type in words: "a float", "one of tae, dit", "a list of 2 values (float, float)"."""
    if type(None) in get_args(kind):
        return f"{describe(bare(kind))} or null"
    origin, arguments = get_origin(kind), get_args(kind)
    words = f"{'an' if kind is int else 'a'} {_name(kind)}"
    if is_dataclass(kind):
        words = f"a mapping with the keys {', '.join(hints(kind))}"
    elif origin is Literal:
        words = f"one of {', '.join(map(str, arguments))}"
    elif origin is dict:
        words = f"a mapping of names to {_name(arguments[1])}"
    elif origin is tuple:
        endless = arguments[-1] is Ellipsis
        words = f"a list of {_name(arguments[0]) if endless else f'{len(arguments)} values {_name(kind)}'}"
    return words


def _name(kind: Any) -> str:
    """A type inside another: "float", "(int, int, int)"."""
    inner = ["..." if each is Ellipsis else _name(each) for each in get_args(kind)]
    return f"({', '.join(inner)})" if inner else str(getattr(kind, "__name__", kind))
