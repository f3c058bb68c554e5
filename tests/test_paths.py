from pathlib import Path

import pytest

from lightning_distill.errors import ConfigurationError
from lightning_distill.paths import expand_path


@pytest.mark.parametrize(
    ("path", "expanded"),
    [
        ("~/images", "/home/ada/images"),
        ("~", "/home/ada"),
        ("$DATA/images", "/data/images"),
        ("${DATA}/train-{00000..00009}.tar", "/data/train-{00000..00009}.tar"),
        ("$DATA/$DATA", "/data//data"),
        ("images/~", "images/~"),
        ("black-forest-labs/FLUX.1-dev", "black-forest-labs/FLUX.1-dev"),
        ("hf://owner/name", "hf://owner/name"),
        ("costs 5$", "costs 5$"),
        ("", ""),
    ],
)
def test_home_directory_and_variables(path: str, expanded: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/ada")
    monkeypatch.setenv("DATA", "/data")
    assert expand_path(path, "data.directory") == expanded


def test_names_that_exist_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "$UNSET").mkdir()
    assert expand_path("$UNSET", "data.directory") == "$UNSET"


def test_unknown_names_raise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("UNSET", raising=False)
    with pytest.raises(
        ConfigurationError, match=r"data\.directory is '\$UNSET/a', but the environment variable UNSET is not set"
    ):
        expand_path("$UNSET/a", "data.directory")
    with pytest.raises(ConfigurationError, match=r"data\.directory is '~nobody-here/a', but there is no such user"):
        expand_path("~nobody-here/a", "data.directory")
