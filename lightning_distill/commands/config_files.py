"""Where configuration files are found, and what is refused in them before anything is built."""

import math
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import yaml

from lightning_distill.errors import ConfigurationError

BASE = "base"
_PACKAGE = Path(__file__).resolve().parents[1]


def config_directory() -> Path:
    """The directory of the shipped configs: inside an installed package, beside it in a checkout."""
    inside = _PACKAGE / "configs"
    return inside if inside.is_dir() else _PACKAGE.parent / "configs"


def shipped_configs() -> list[str]:
    """Names of the configs that come with the package, sorted."""
    return sorted(path.name for path in config_directory().glob("*.yaml"))


def find_config(name: str) -> Path:
    """The file that `--config NAME` means.

    Args:
        name: A path, looked up from the working directory first; a bare name is then looked up among the shipped configs.

    Raises:
        ConfigurationError: If there is no such file.
    """
    path = Path(name)
    if path.is_file():
        return path
    shipped = config_directory() / name
    if path.name == name and shipped.is_file():
        return shipped
    raise ConfigurationError(
        f"config {name!r} is neither a file seen from {Path.cwd()} nor a shipped config; "
        f"the shipped ones are {', '.join(shipped_configs()) or 'none'}"
    )


def config_chain(name: str) -> list[Path]:
    """The files that a config consists of, to be read in this order: those it names under `base`, then itself.

    `base` is the name of a config, or a list of names, seen from the file's directory first. Later files override earlier.

    Raises:
        ConfigurationError: If a file is missing, is not YAML, has a key twice, or builds on itself.
    """
    return _chain(find_config(name), ())


def without_keys(text: str, names: Collection[str]) -> str:
    """The text of a config without what it has under some names at its top."""
    root = yaml.compose(text, Loader=yaml.SafeLoader)
    items = _items(root)
    for i, (key, value) in enumerate(items):
        if key.value in names:
            start, end = key.start_mark.index, value.end_mark.index
            if getattr(root, "flow_style", False):  # with the comma between it and its neighbour
                end = items[i + 1][0].start_mark.index if i + 1 < len(items) else end
                start = items[i - 1][1].end_mark.index if i and i + 1 == len(items) else start
            return without_keys(text[:start] + text[end:], names)
    return text


def _chain(path: Path, above: tuple[Path, ...]) -> list[Path]:
    if path.resolve() in above:
        raise ConfigurationError(f"config {path} builds on itself; remove one {BASE!r} of {', '.join(map(str, above))}")
    try:
        root = yaml.compose(path.read_text(), Loader=yaml.SafeLoader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"config {path} is not valid YAML: {' '.join(str(error).split())}") from error
    _refuse_duplicate_keys(root, path)
    files = []
    for key, value in _items(root):
        if key.value == BASE:
            nodes = value.value if isinstance(value, yaml.SequenceNode) else [value]
            if not all(isinstance(node, yaml.ScalarNode) and node.value for node in nodes):
                raise ConfigurationError(f"config {path} has a {BASE!r} that names no config; give a name, or a list of names")
            for name in (node.value for node in nodes):
                beside = path.parent / name
                files += _chain(beside if beside.is_file() else find_config(name), (*above, path.resolve()))
    return [*files, path]


def _refuse_duplicate_keys(root: yaml.Node | None, path: Path) -> None:
    pending = [root]
    while pending:
        node = pending.pop()
        seen: set[str] = set()
        for key, value in _items(node):
            if key.value in seen:
                line = key.start_mark.line + 1
                raise ConfigurationError(f"config {path} gives {key.value!r} twice, again in line {line}; keep one of them")
            seen.add(key.value)
            pending.append(value)
        if isinstance(node, yaml.SequenceNode):
            pending.extend(node.value)


def _items(node: yaml.Node | None) -> list[tuple[yaml.Node, yaml.Node]]:
    return node.value if isinstance(node, yaml.MappingNode) else []


def check_learning_rates(settings: Any) -> None:
    """Raise where a setting named `lr` is negative, infinite or not a number; an optimizer would say so only after loading.

    Raises:
        ConfigurationError: With the path of the setting.
    """
    for path, value in flatten(settings).items():
        if path.rpartition(".")[2] == "lr" and isinstance(value, int | float) and not 0 <= value < math.inf:
            raise ConfigurationError(f"{path} is {value}; set the learning rate to 0 or more")


def flatten(settings: Any) -> dict[str, Any]:
    """Leaves of nested dicts and lists by their dotted path."""
    return dict(_leaves(settings, ""))


def _leaves(value: Any, path: str) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict | list) and value:
        items = value.items() if isinstance(value, dict) else enumerate(value)
        for key, inner in items:
            yield from _leaves(inner, f"{path}.{key}" if path else str(key))
    else:
        yield path, value
