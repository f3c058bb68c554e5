"""Which setting of a command line is wrong, and why, after jsonargparse has rejected it.

jsonargparse lists all types that a setting of a class accepts. The diagnosis reads the settings once more, source by source,
along the types of the classes that they name, and returns the first fault in one line.
"""

import inspect
from argparse import Action
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from lightning_distill.commands.config_files import BASE
from lightning_distill.commands.config_sources import CLASS_KEYS, merge, read_sources
from lightning_distill.commands.module_faults import module_fault
from lightning_distill.commands.setting_types import (
    accepts,
    choices,
    classes,
    default_class,
    describe,
    find_class,
    is_partial,
    item_type,
    later_arguments,
    module_classes,
    parameters,
    quoted,
    required,
    subclass_names,
    with_article,
)
from lightning_distill.suggestions import LISTED, VERY_SIMILAR, nearest, suggestion

OPTIONS = frozenset({"c", "h", "help", "print_config", "print_shtab"})
"""Options that are not settings."""
OTHER_KEYS = frozenset({BASE, "config", "ckpt_path", "weights_only"})
"""Top-level keys that any config may have."""


class Diagnosis:
    """The settings of a command line along the types of a parser.

    Args:
        actions: Actions of the parser.
        arguments: Arguments that it parses.
    """

    def __init__(self, actions: Sequence[Action], arguments: Sequence[str]) -> None:
        typed = {action.dest: getattr(action, "_typehint", Any) for action in actions if not action.dest.endswith(".help")}
        # A group such as `trainer` has an action of its own, which loads a file.
        groups = {name for name in typed if any(each.startswith(f"{name}.") for each in typed)}
        self.types = {name: annotation for name, annotation in typed.items() if name not in groups}
        self.arguments = arguments

    def first_fault(self) -> str | None:
        """The first fault in one line, or None if there is none that the types show."""
        settings: Any = {}
        for source in read_sources(self.arguments):
            settings = merge(settings, source)
            if (fault := next(self._group("", source, settings), None)) is not None:
                return fault
        return next(self._resolved_faults(settings), None) or next(self._missing(settings), None)

    def _resolved_faults(self, settings: dict[str, Any]) -> Iterator[str]:
        """Faults of the values that interpolations stand for."""
        try:
            resolved = OmegaConf.to_container(OmegaConf.create(settings), resolve=True)
        except (OmegaConfBaseException, ValueError, RecursionError):
            return  # reported where they are resolved
        used = _interpolated(settings, resolved)
        if isinstance(used, dict):
            yield from self._group("", used, resolved, names=False)

    def _missing(self, settings: dict[str, Any]) -> Iterator[str]:
        for path, annotation in self.types.items():
            value: Any = settings
            for key in path.split("."):
                value = value.get(key) if isinstance(value, dict) else None
            if value is not None:
                yield from _missing(path, value, annotation)

    def _group(self, path: str, source: Mapping[str, Any], settings: Any, names: bool = True) -> Iterator[str]:
        """Faults of a group of settings that is not a class, such as `trainer`, or of all settings; see `_faults`."""
        prefix = f"{path}." if path else ""
        for given, value in source.items():
            key = str(given).removesuffix("+")
            name = f"{prefix}{key}"
            inner = settings.get(key) if isinstance(settings, dict) else None
            if name in self.types:
                yield from _faults(name, value, self.types[name], inner, names)
            elif any(known.startswith(f"{name}.") for known in self.types):
                if isinstance(value, dict):
                    yield from self._group(name, value, inner, names)
                elif value is not None:
                    yield f"{name} is {quoted(value)}; set its settings by name, such as {self._example(name)}"
            elif path or key not in OPTIONS | OTHER_KEYS:
                known = {each.removeprefix(prefix).partition(".")[0] for each in self.types if each.startswith(prefix)}
                yield f"{name} is not a setting; {suggestion(key, known - OPTIONS)}"

    def _example(self, group: str) -> str:
        return next(each for each in self.types if each.startswith(f"{group}."))


def _faults(path: str, value: Any, annotation: Any, settings: Any, names: bool) -> Iterator[str]:
    """Faults of a setting.

    Args:
        path: Its dotted name.
        value: Its value in one source.
        annotation: Its type.
        settings: Its value in all sources up to that one, which names the class if the source does not.
        names: Whether unknown names of settings are faults. A class of an earlier source leaves its settings behind.
    """
    if isinstance(value, str) and "${" in value:
        return
    kinds, item = classes(annotation), item_type(annotation)
    if not kinds and item is None:
        if not accepts(annotation, value):
            yield _wrong_value(path, value, annotation)
    elif isinstance(value, list):
        if item is None:
            yield f"{path} is a list; set it to one {_base_names(kinds)}, by its class_path and init_args"
            return
        merged = settings if isinstance(settings, list) else []
        for i, each in enumerate(value):
            yield from _item_faults(path, each, item, merged[i - len(value)] if len(merged) >= len(value) else each, names)
    elif isinstance(value, dict):
        if item is not None and (not kinds or isinstance(settings, list)):
            last = settings[-1] if isinstance(settings, list) and settings else value
            yield from _item_faults(path, value, item, last, names)
        else:
            yield from _class_faults(path, value, kinds, settings, names)
    elif not accepts(annotation, value):
        kinds = kinds or classes(item)
        if not isinstance(value, str) or not value.replace(".", "").replace(":", "").isidentifier():
            yield _not_an_object(path, value, kinds, annotation)
        elif find_class(value, kinds) is None:
            yield _unknown_class(path, value, kinds)


def _item_faults(path: str, value: Any, annotation: Any, settings: Any, names: bool) -> Iterator[str]:
    """Faults of an object in a list, whose path names its class."""
    name = _class_path(settings)
    known = find_class(name, classes(annotation)) if name else None
    yield from _faults(
        f"{path}: {known.__name__}" if known and isinstance(value, dict) else path, value, annotation, settings, names
    )


def _class_faults(path: str, value: Mapping[str, Any], kinds: tuple[type, ...], settings: Any, names: bool) -> Iterator[str]:
    """Faults of a class with its arguments."""
    name = _class_path(settings)
    if name and find_class(name, kinds) is None:
        yield _unknown_class(path, name, kinds)
        return
    kind = find_class(name, kinds) if name else default_class(kinds)
    if kind is None:
        return
    known = parameters(kind)
    if value.keys() & set(CLASS_KEYS):
        for key in value.keys() - {*CLASS_KEYS, "__path__"}:
            if key in known:
                yield f"{path}.{key} lies beside class_path; move it into {path}.init_args"
            else:
                yield (
                    f"{path}.{key} is neither class_path nor init_args, and {kind.__name__} has no setting {key!r}; "
                    f"{suggestion(str(key), known.keys() | set(CLASS_KEYS))}"
                )
        arguments = value.get("init_args") or {}
    else:
        arguments = value
    if not isinstance(arguments, dict):
        yield f"{path}.init_args is {quoted(arguments)}; set the settings of {kind.__name__} by name"
        return
    merged = settings.get("init_args", settings) if isinstance(settings, dict) else {}
    for given, inner in arguments.items():
        key = str(given).removesuffix("+")
        setting = f"{path}.{key}"
        if key in known:
            yield from _faults(setting, inner, known[key], merged.get(key) if isinstance(merged, dict) else None, names)
        elif names and key not in OPTIONS:
            valid = {*known, "class_path", "init_args"} if arguments is value else known.keys()
            yield f"{setting} is not a setting of {kind.__name__}; {suggestion(key, valid)}"


def _missing(path: str, settings: Any, annotation: Any) -> Iterator[str]:
    """Classes without a name, and settings without a default that are not set."""
    if isinstance(settings, list):
        for each in settings:
            yield from _missing(path, each, item_type(annotation))
        return
    kinds, name = classes(annotation), _class_path(settings)
    kind: Any = find_class(name, kinds) if name else default_class(kinds)
    if kind is None:
        if kinds and isinstance(settings, dict):
            yield f"{path} names no class; set {path}.class_path to {_some_names(kinds)}"
        return
    arguments = (settings.get("init_args", settings) or {}) if isinstance(settings, dict) else {}
    if inspect.isabstract(kind):
        lacking = ", ".join(sorted(kind.__abstractmethods__))
        yield f"{path} is {name or kind.__name__!r}, which does not define {lacking}; define it, or choose another class"
        return
    known = parameters(kind)
    later = list(known)[: later_arguments(annotation)]
    for key in required(kind):
        if key not in arguments and key not in later:
            yield f"{path}.{key} is not set, and {kind.__name__} needs it; set it to {describe(known[key])}"
    for key, value in arguments.items():
        if key in known:
            yield from _missing(f"{path}.{key}", value, known[key])


def _interpolated(settings: Any, resolved: Any) -> Any:
    """The resolved values of the settings that are interpolations, in the nesting of the settings; None if there are none."""
    if isinstance(settings, dict):
        parts = {key: _interpolated(value, resolved[key]) for key, value in settings.items()}
        found = {key: value for key, value in parts.items() if value is not None}
        if found and "class_path" in settings:
            found["class_path"] = settings["class_path"]
        return found or None
    return resolved if isinstance(settings, str) and "${" in settings else None


def _class_path(settings: Any) -> str | None:
    name = settings.get("class_path") if isinstance(settings, dict) else settings
    return name if isinstance(name, str) else None


def _base_names(kinds: tuple[type, ...]) -> str:
    return " or ".join(dict.fromkeys(kind.__name__ for kind in kinds))


def _some_names(kinds: tuple[type, ...]) -> str:
    names = sorted(subclass_names(kinds))
    return f"one of {', '.join(names)}" if len(names) <= LISTED else f"the name of {with_article(_base_names(kinds))}"


def _wrong_value(path: str, value: Any, annotation: Any) -> str:
    if isinstance(value, str) and (near := nearest(value, choices(annotation))) is not None:
        return f"{path} is {value!r}; did you mean {near}? Set it to {describe(annotation)}"
    return f"{path} is {quoted(value)}; set it to {describe(annotation)}"


def _unknown_class(path: str, name: str, kinds: tuple[type, ...]) -> str:
    module, _, last = name.rpartition(".")
    if not module:
        return f"{path} is {name!r}, which names no {_base_names(kinds)}; {suggestion(last, subclass_names(kinds))}"
    if (fault := module_fault(module)) is not None:
        near = nearest(last, subclass_names(kinds), VERY_SIMILAR) if fault.startswith("there is no") else None
        remedy = f"did you mean {near}?" if near else "correct the name, or the module"
        return f"{path} is {name!r}, but {fault}; {remedy}"
    own = {f"{module}.{each}" for each in module_classes(module, kinds)}
    near = nearest(name, own, VERY_SIMILAR)
    return (
        f"{path} is {name!r}, which names no {_base_names(kinds)}; "
        f"{f'did you mean {near}?' if near else suggestion(last, subclass_names(kinds))}"
    )


def _not_an_object(path: str, value: Any, kinds: tuple[type, ...], annotation: Any) -> str:
    if len(kinds) == 1 and not is_partial(annotation) and (known := parameters(kinds[0])):
        return f"{path} is {quoted(value)}; set the settings of {kinds[0].__name__} by name: {', '.join(known)}"
    return f"{path} is {quoted(value)}; set it to {describe(annotation)}"
