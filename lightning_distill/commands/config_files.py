"""Lookup of config files, and checks of their contents before any object is built."""

import math
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import yaml

from lightning_distill.errors import ConfigurationError
from lightning_distill.paths import expand_path
from lightning_distill.suggestions import nearest

BASE = "base"
LARGEST_NODE_COUNT = 100_000
"""Largest number of YAML nodes of a config, with its aliases expanded."""
LARGEST_SEED = 2**62
"""Bound of seeds, far below torch's, because the number of an epoch or of an image is added."""
PACKAGE_DIRECTORY = Path(__file__).resolve().parents[1]


def config_directory() -> Path:
    """Directory of the shipped configs: inside an installed package, or beside the package in a checkout."""
    inside = PACKAGE_DIRECTORY / "configs"
    return inside if inside.is_dir() else PACKAGE_DIRECTORY.parent / "configs"


def shipped_configs() -> list[str]:
    """Sorted names of the configs in the package."""
    return sorted(path.name for path in config_directory().glob("*.yaml"))


def find_config(name: str) -> Path:
    """File of `--config NAME`.

    Args:
        name: Path relative to the working directory, or the name of a shipped config. A file in the working directory has
            priority.

    Raises:
        ConfigurationError: If there is no such file.
    """
    path = Path(expand_path(name, "config"))
    if path.is_file():
        return path
    shipped = config_directory() / name
    if path.name == name and shipped.is_file():
        return shipped
    known = {Path(each).stem: each for each in (*shipped_configs(), *(each.name for each in Path().glob("*.yaml")))}
    near = nearest(path.stem, known)
    remedy = f"did you mean {known[near]}?" if near else f"choose one of {', '.join(shipped_configs()) or 'none'}"
    raise ConfigurationError(f"config {name!r} is neither a file in {Path.cwd()} nor a shipped config; {remedy}")


def config_chain(name: str) -> list[Path]:
    """Files of a config in reading order: the configs under its key `base`, then the config.

    `base` is the name of a config or a list of names. The directory of the file has priority over the working directory and the
    shipped configs. Later files override earlier files.

    Raises:
        ConfigurationError: If a file is missing or is not YAML, has a duplicate key, or is its own base.
    """
    return _chain(find_config(name), ())


def without_keys(text: str, names: Collection[str]) -> str:
    """Text of a config without the top-level keys in `names`."""
    root = compose(text, "given on the command line")
    items = _items(root)
    for i, (key, value) in enumerate(items):
        if key.value in names:
            start, end = key.start_mark.index, value.end_mark.index
            if getattr(root, "flow_style", False):  # including the comma before or after it
                end = items[i + 1][0].start_mark.index if i + 1 < len(items) else end
                start = items[i - 1][1].end_mark.index if i and i + 1 == len(items) else start
            return without_keys(text[:start] + text[end:], names)
    return text


def compose(text: str, name: str) -> yaml.Node | None:
    """The nodes of a YAML text; None if it is empty.

    Args:
        text: The text.
        name: Name of the config in messages.

    Raises:
        ConfigurationError: If the text is not YAML, is nested too deeply, or has too many nodes after alias expansion.
    """
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        count = _count_nodes(root, {})
    except yaml.YAMLError as error:
        raise ConfigurationError(f"config {name} is not valid YAML: {' '.join(str(error).split())}") from error
    except RecursionError as error:
        raise ConfigurationError(
            f"config {name} is nested too deeply; nest it less, and let no alias contain itself"
        ) from error
    if count > LARGEST_NODE_COUNT:
        raise ConfigurationError(
            f"config {name} has {count:.3g} values with its aliases expanded, more than {LARGEST_NODE_COUNT}; use fewer aliases"
        )
    return root


def _count_nodes(node: yaml.Node | None, counted: dict[int, int]) -> int:
    """Number of nodes with each alias expanded; each node is visited once."""
    if node is None:
        return 0
    if id(node) not in counted:
        children = [child for pair in _items(node) for child in pair]
        if isinstance(node, yaml.SequenceNode):
            children = node.value
        counted[id(node)] = 1 + sum(_count_nodes(child, counted) for child in children)
    return counted[id(node)]


def _chain(path: Path, above: tuple[Path, ...]) -> list[Path]:
    if path.resolve() in above:
        raise ConfigurationError(f"config {path} is its own {BASE!r}; remove one {BASE!r} of {', '.join(map(str, above))}")
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"config {path} cannot be read ({error}); give a YAML file in UTF-8") from error
    root = compose(text, str(path))
    if not _items(root):
        raise ConfigurationError(
            f"config {path} {_without_settings(root)}; give settings by name, such as `seed_everything: 0`"
        )
    _check_duplicate_keys(root, path)
    files = []
    for key, value in _items(root):
        if key.value == BASE:
            nodes = value.value if isinstance(value, yaml.SequenceNode) else [value]
            if not all(isinstance(node, yaml.ScalarNode) and node.value for node in nodes):
                raise ConfigurationError(
                    f"config {path} has an invalid {BASE!r}; set it to the name of a config, or to a list of names"
                )
            for name in (node.value for node in nodes):
                beside = path.parent / name
                files += _chain(beside if beside.is_file() else find_config(name), (*above, path.resolve()))
    return [*files, path]


def _without_settings(root: yaml.Node | None) -> str:
    if isinstance(root, yaml.SequenceNode):
        return "is a list"
    if isinstance(root, yaml.ScalarNode) and root.tag != "tag:yaml.org,2002:null":
        return f"is the single value {root.value[:40]!r}"
    return "has no settings"


def _check_duplicate_keys(root: yaml.Node | None, path: Path) -> None:
    pending = [root]
    while pending:
        node = pending.pop()
        seen: set[str] = set()
        for key, value in _items(node):
            if key.value in seen:
                line = key.start_mark.line + 1
                raise ConfigurationError(
                    f"config {path} has the key {key.value!r} twice, again in line {line}; remove one of them"
                )
            seen.add(key.value)
            pending.append(value)
        if isinstance(node, yaml.SequenceNode):
            pending.extend(node.value)


def _items(node: yaml.Node | None) -> list[tuple[yaml.Node, yaml.Node]]:
    return node.value if isinstance(node, yaml.MappingNode) else []


def check_numbers(settings: Any) -> None:
    """Check all numbers of a config; an optimizer checks its learning rate only after the model is loaded.

    Raises:
        ConfigurationError: If a number is NaN or infinite, a learning rate is negative, or a seed is out of range.
    """
    for path, value in flatten(settings).items():
        if isinstance(value, bool) or not isinstance(value, int | float):
            continue
        name, last = path.replace(".init_args", ""), path.rpartition(".")[2]
        if last == "seed" and not 0 <= value < LARGEST_SEED:
            raise ConfigurationError(f"{name} is {value}; set it to an integer from 0 to {LARGEST_SEED - 1}")
        if last.endswith("lr") and not 0 <= value < math.inf:
            raise ConfigurationError(f"{name} is {value}; set the learning rate to 0 or more")
        if not math.isfinite(value):
            raise ConfigurationError(f"{name} is {value}; set it to a finite number")


def flatten(settings: Any) -> dict[str, Any]:
    """Leaves of nested dicts and lists by dotted path."""
    return dict(_leaves(settings, ""))


def _leaves(value: Any, path: str) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict | list) and value:
        items = value.items() if isinstance(value, dict) else enumerate(value)
        for key, inner in items:
            yield from _leaves(inner, f"{path}.{key}" if path else str(key))
    else:
        yield path, value
