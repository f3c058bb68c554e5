from pathlib import Path

import pytest
import yaml

from lightning_distill.commands import config_files
from lightning_distill.commands.config_files import (
    check_numbers,
    config_chain,
    config_directory,
    find_config,
    flatten,
    shipped_configs,
    without_keys,
)
from lightning_distill.errors import ConfigurationError


@pytest.fixture
def shipped(tmp_path, monkeypatch) -> Path:
    """Package directory with two configs, and an empty working directory."""
    directory = tmp_path / "package" / "configs"
    directory.mkdir(parents=True)
    (directory / "one.yaml").write_text("model: shipped\n")
    (directory / "two.yaml").write_text("model: two\n")
    monkeypatch.setattr(config_files, "PACKAGE_DIRECTORY", directory.parent)
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return directory


def test_the_working_directory_has_priority(shipped):
    assert find_config("one.yaml") == shipped / "one.yaml"
    Path("one.yaml").write_text("model: mine\n")
    assert find_config("one.yaml").read_text() == "model: mine\n"


def test_home_directory_of_a_config(shipped, monkeypatch):
    monkeypatch.setenv("HOME", str(shipped))
    assert find_config("~/two.yaml") == shipped / "two.yaml"


def test_a_path_never_names_a_shipped_config(shipped):
    with pytest.raises(ConfigurationError):
        find_config("elsewhere/one.yaml")
    assert find_config(str(shipped / "one.yaml")) == shipped / "one.yaml"


def test_a_missing_config_raises_with_the_names_of_shipped_configs(shipped):
    with pytest.raises(ConfigurationError, match=r"'three.yaml' is neither .*; choose one of one.yaml, two.yaml$"):
        find_config("three.yaml")
    with pytest.raises(ConfigurationError, match=r"'two.yml' is neither .*; did you mean two.yaml\?$"):
        find_config("two.yml")
    Path("mine.yaml").write_text("")
    with pytest.raises(ConfigurationError, match=r"did you mean mine.yaml\?$"):
        find_config("mime.yaml")


def test_configs_of_a_checkout_are_beside_the_package(shipped):
    assert config_directory() == shipped
    shipped.rename(shipped.parents[1] / "configs")
    assert config_directory() == shipped.parents[1] / "configs"
    assert shipped_configs() == ["one.yaml", "two.yaml"]


def test_bases_are_read_before_their_config(shipped):
    Path("local.yaml").write_text("model: local\n")
    Path("middle.yaml").write_text("base: local.yaml\nmodel: middle\n")
    Path("top.yaml").write_text("base: [one.yaml, middle.yaml]\nmodel: top\n")
    assert [path.name for path in config_chain("top.yaml")] == ["one.yaml", "local.yaml", "middle.yaml", "top.yaml"]


@pytest.mark.parametrize(
    ("text", "rest"),
    [
        ("base: a.yaml\nmodel: b\n", "\nmodel: b\n"),
        ("# why\nbase:\n- a.yaml\n- b.yaml\nmodel: b\n", "# why\nmodel: b\n"),
        ("model:\n  base: a\n", "model:\n  base: a\n"),
        ("{base: a.yaml, seed_everything: 3}", "{seed_everything: 3}"),
        ("{seed_everything: 3, base: [a.yaml, b.yaml]}", "{seed_everything: 3}"),
        ("{base: a.yaml}", "{}"),
        ("lr", "lr"),
    ],
)
def test_the_key_base_is_removed(text, rest):
    assert without_keys(text, ["base"]) == rest


def test_only_top_level_keys_are_removed():
    text = "a: 1\nmodel:\n  a: 2\nb:\n  c: 3\nd: 4\n"
    assert yaml.safe_load(without_keys(text, ["a", "b"])) == {"model": {"a": 2}, "d": 4}


def test_a_config_that_is_its_own_base_raises(shipped):
    Path("a.yaml").write_text("base: b.yaml\n")
    Path("b.yaml").write_text("base: a.yaml\n")
    with pytest.raises(ConfigurationError, match=r"a.yaml is its own 'base'"):
        config_chain("a.yaml")
    Path("loop.yaml").write_text(f"base: ../{Path.cwd().name}/loop.yaml\n")
    with pytest.raises(ConfigurationError, match=r"loop.yaml is its own 'base'"):
        config_chain("loop.yaml")


@pytest.mark.parametrize("text", ["base:\n", "base: {a: 1}\n", "base: [one.yaml, [two.yaml]]\n"])
def test_a_base_without_a_config_name_raises(shipped, text):
    Path("a.yaml").write_text(text)
    with pytest.raises(
        ConfigurationError, match=r"a.yaml has an invalid 'base'; set it to the name of a config, or to a list of names"
    ):
        config_chain("a.yaml")


@pytest.mark.parametrize(
    ("text", "key", "line"),
    [("model: a\ndata: b\nmodel: c\n", "model", 3), ("model:\n  lr: 1\n  lr: 2\n", "lr", 3), ("a:\n- b: 1\n  b: 2\n", "b", 3)],
)
def test_duplicate_keys_raise(shipped, text, key, line):
    Path("double.yaml").write_text(text)
    with pytest.raises(ConfigurationError, match=f"double.yaml has the key '{key}' twice, again in line {line}"):
        config_chain("double.yaml")
    Path("top.yaml").write_text("base: double.yaml\n")
    with pytest.raises(ConfigurationError, match=r"double.yaml has"):
        config_chain("top.yaml")


def test_equal_keys_of_different_mappings_are_no_duplicates(shipped):
    Path("fine.yaml").write_text("a: {lr: 1}\nb: {lr: 1}\n")
    assert len(config_chain("fine.yaml")) == 1


def test_invalid_yaml_raises(shipped):
    Path("broken.yaml").write_text("model: [a\n")
    with pytest.raises(ConfigurationError, match=r"broken.yaml is not valid YAML: "):
        config_chain("broken.yaml")
    Path("latin.yaml").write_bytes("model: é\n".encode("latin-1"))
    with pytest.raises(ConfigurationError, match=r"latin.yaml cannot be read"):
        config_chain("latin.yaml")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("# nothing yet\n", "has no settings"),
        ("null\n", "has no settings"),
        ("{}\n", "has no settings"),
        ("just a text\n", "is the single value 'just a text'"),
        ("- model\n", "is a list"),
    ],
)
def test_a_config_without_settings_raises(shipped, text, reason):
    Path("own.yaml").write_text(text)
    with pytest.raises(ConfigurationError, match=f"config own.yaml {reason}; give settings by name"):
        config_chain("own.yaml")


def test_aliases_are_counted_with_their_expansion(shipped):
    bomb = ["a: &a [x, x, x, x, x, x, x, x, x]"]
    bomb += [f"{name}: &{name} [{', '.join([f'*{before}'] * 9)}]" for name, before in zip("bcdefg", "abcdef", strict=True)]
    Path("bomb.yaml").write_text("\n".join(bomb))
    with pytest.raises(ConfigurationError, match=r"config bomb.yaml has 6\.05e\+06 values with its aliases expanded"):
        config_chain("bomb.yaml")
    Path("few.yaml").write_text("\n".join(bomb[:3]))
    assert len(config_chain("few.yaml")) == 1


@pytest.mark.parametrize("text", ["a: &a [*a]\n", "a: " + "[" * 5000 + "]" * 5000])
def test_endless_nesting_raises(shipped, text):
    Path("deep.yaml").write_text(text)
    with pytest.raises(ConfigurationError, match=r"config deep.yaml is nested too deeply"):
        config_chain("deep.yaml")


@pytest.mark.parametrize("lr", [-1, -1e-9, float("inf"), float("nan")])
def test_invalid_learning_rates_raise(lr):
    with pytest.raises(ConfigurationError, match=r"model\.optimizers\.0\.lr is "):
        check_numbers({"model": {"optimizers": [{"lr": lr}]}})


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_numbers_are_finite(value):
    with pytest.raises(ConfigurationError, match=r"model\.loss\.c is (inf|nan); set it to a finite number"):
        check_numbers({"model": {"init_args": {"loss": {"init_args": {"c": value}}}}})


@pytest.mark.parametrize("seed", [-1, 2**62])
def test_seeds_are_in_range(seed):
    with pytest.raises(ConfigurationError, match=rf"data\.seed is {seed}; set it to an integer from 0 to 4611686018427387903"):
        check_numbers({"data": {"init_args": {"seed": seed}}})


def test_valid_numbers():
    check_numbers({"lr": 0.0, "model": {"lr": 1, "min_lr_shift": -1}, "other": {"lr": None}})


def test_flatten():
    assert flatten({"a": {"b": [1, {"c": 2}], "d": {}}, "e": None}) == {"a.b.0": 1, "a.b.1.c": 2, "a.d": {}, "e": None}
