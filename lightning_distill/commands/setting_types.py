"""What the type of a setting accepts: classes by name, their settings, and plain values."""

import collections.abc
import inspect
import types
from collections.abc import Callable, Iterator, Mapping
from enum import Enum
from functools import cache
from importlib import import_module
from os import PathLike
from typing import Any, Literal, Union, get_args, get_origin

from jsonargparse import ArgumentError, ArgumentParser
from jsonargparse._parameter_resolvers import get_signature_parameters
from torch import Tensor

from lightning_distill.commands.module_faults import module_fault

NAMES: Mapping[Any, str] = {int: "an integer", float: "a number", bool: "true or false", str: "a string", type(None): "null"}
LISTS = (list, collections.abc.Sequence, collections.abc.Iterable, set)
LARGEST_VALUE = 80
"""Characters of a value that a message quotes."""


def members(annotation: Any) -> tuple[Any, ...]:
    """Types of a union, or the type itself."""
    if get_origin(annotation) in (Union, types.UnionType):
        return tuple(inner for each in get_args(annotation) for inner in members(each))
    return (annotation,)


def classes(annotation: Any) -> tuple[type, ...]:
    """Base classes of the objects that a setting is built from: of `Callable[..., Optimizer]`, what it returns."""
    found: list[type] = []
    for member in members(annotation):
        if get_origin(member) is collections.abc.Callable:
            found += classes(get_args(member)[1])
        elif inspect.isclass(member) and member not in NAMES and not _is_plain(member):
            found.append(member)
    return tuple(found)


def item_type(annotation: Any) -> Any:
    """Type of the items of a list of objects; None if the setting is no such list."""
    for member in members(annotation):
        if get_origin(member) in LISTS and classes(item := get_args(member)[0]):
            return item
    return None


def subclass_names(bases: tuple[type, ...]) -> set[str]:
    """Names of the concrete public classes that a setting accepts without their modules."""
    return {kind.__name__ for base in bases for kind in _subclasses(base) if not inspect.isabstract(kind)}


def module_classes(module: str, bases: tuple[type, ...]) -> set[str]:
    """Names of the concrete public classes of an importable module that a setting accepts."""
    return {
        name
        for name, kind in vars(import_module(module)).items()
        if inspect.isclass(kind) and issubclass(kind, bases) and not inspect.isabstract(kind) and not name.startswith("_")
    }


def find_class(name: str, bases: tuple[type, ...]) -> Any:
    """Class or function of a name, with or without its module, that builds an instance of one of the bases; None if none."""
    if "." not in name:
        return next((kind for base in bases for kind in _subclasses(base) if kind.__name__ == name), None)
    module, _, attribute = name.rpartition(".")
    if not module or module_fault(module) is not None:
        return None
    kind = getattr(import_module(module), attribute, None)
    if inspect.isclass(kind):
        return kind if issubclass(kind, bases) else None
    return kind if callable(kind) else None


def default_class(bases: tuple[type, ...]) -> type | None:
    """Class of a setting that names none: its own type, if that has settings and can be built."""
    if len(bases) != 1 or inspect.isabstract(bases[0]):
        return None
    return bases[0] if parameters(bases[0]) else None


def is_partial(annotation: Any) -> bool:
    """Whether further arguments of a class come later, as the parameters of an optimizer."""
    return later_arguments(annotation) != 0


def later_arguments(annotation: Any) -> int | None:
    """Number of leading arguments of a class that are no settings, as the parameters of an optimizer; None if not known."""
    for member in members(annotation):
        if get_origin(member) is collections.abc.Callable:
            arguments = get_args(member)[0]
            return len(arguments) if isinstance(arguments, list) else None
    return 0


@cache
def parameters(kind: Callable[..., Any]) -> dict[str, Any]:
    """Types of the settings of a class by name, those of its base classes included."""
    return {parameter.name: parameter.annotation for parameter in get_signature_parameters(kind)}


@cache
def required(kind: Callable[..., Any]) -> tuple[str, ...]:
    """Settings of a class without a default."""
    return tuple(each.name for each in get_signature_parameters(kind) if each.default is inspect.Parameter.empty)


def accepts(annotation: Any, value: Any) -> bool:
    """Whether a plain value is valid for the members of a type that are not classes."""
    plain = tuple(each for each in members(annotation) if not classes(each) and item_type(each) is None)
    if not plain:
        return False
    if any(each is Any or each is inspect.Parameter.empty for each in plain):
        return True
    if value is None:  # the parser takes it for a setting that is not given
        return type(None) in plain
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--value", type=Union[plain])  # noqa: UP007  # of a tuple
    try:
        parser.parse_object({"value": value})
    except (ArgumentError, TypeError, ValueError):
        return False
    return True


def choices(annotation: Any) -> list[str]:
    """The words that a setting accepts, empty if it also accepts other texts."""
    found: list[str] = []
    for member in members(annotation):
        if member is str:
            return []
        if get_origin(member) is Literal:
            found += [str(value) for value in get_args(member)]
        elif inspect.isclass(member) and issubclass(member, Enum):
            found += list(member.__members__)
    return list(dict.fromkeys(found))


def describe(annotation: Any) -> str:
    """The values that a setting accepts, in words."""
    words: list[str] = [f"one of {', '.join(found)}"] if (found := choices(annotation)) else []
    for member in members(annotation):
        if member in NAMES:
            words.append(NAMES[member])
        elif get_origin(member) in LISTS:
            words.append(f"a list, each {describe(get_args(member)[0])}")
        elif get_origin(member) is tuple:
            words.append("a list" if Ellipsis in get_args(member) else f"a list of {len(get_args(member))} values")
        elif get_origin(member) in (dict, Mapping) or member is dict:
            words.append("settings by name")
        elif inspect.isclass(member) and issubclass(member, PathLike):
            words.append("a path")
        elif kinds := classes(member):
            words.append(" or ".join(with_article(kind.__name__) for kind in kinds))
    unique = list(dict.fromkeys(words)) or ["a value of another type"]
    return ", ".join(unique[:-1]) + " or " + unique[-1] if len(unique) > 1 else unique[0]


def with_article(name: str) -> str:
    """The name after "a" or "an"."""
    return f"an {name}" if name[:1] in "AEIOUaeiou" else f"a {name}"


def quoted(value: Any) -> str:
    """A value in a message, cut if it is long."""
    text = "null" if value is None else repr(value)
    return text if len(text) <= LARGEST_VALUE else f"{text[:LARGEST_VALUE]}..."


def _is_plain(kind: type) -> bool:
    return kind.__module__ in ("builtins", "datetime") or issubclass(kind, Enum | PathLike | Tensor)


def _subclasses(base: type) -> Iterator[type]:
    pending, seen = [base], set()
    while pending:
        kind = pending.pop()
        if kind in seen:
            continue
        seen.add(kind)
        pending += kind.__subclasses__()
        if not kind.__name__.startswith("_") and "<locals>" not in kind.__qualname__:
            yield kind
