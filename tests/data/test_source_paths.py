from pathlib import Path

import pytest

from lightning_distill.data.source_paths import find_files, split_patterns, tar_patterns
from lightning_distill.errors import ConfigurationError


@pytest.fixture(autouse=True)
def _files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("SHARDS", "one")
    for name in ("one/00.tar", "one/01.tar", "one/02.tar", "two/00.tar", "two/deep/er.tar", "a{0,1}.tar", "b[0].tar"):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).touch()
    Path("one/03.tar").mkdir()


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("one/*.tar", ["one/00.tar", "one/01.tar", "one/02.tar"]),
        ("one/{00..02}.tar", ["one/00.tar", "one/01.tar", "one/02.tar"]),
        ("{two,one}/00.tar", ["two/00.tar", "one/00.tar"]),
        ("{two,one}/0[01].tar", ["two/00.tar", "one/00.tar", "one/01.tar"]),
        ("two/**/*.tar", ["two/00.tar", "two/deep/er.tar"]),
        ("two/00.tar::one/0?.tar", ["two/00.tar", "one/00.tar", "one/01.tar", "one/02.tar"]),
        (["two/00.tar", "one/{01..02}.tar::one/00.tar"], ["two/00.tar", "one/01.tar", "one/02.tar", "one/00.tar"]),
        ("$SHARDS/00.tar::${SHARDS}/01.tar", ["one/00.tar", "one/01.tar"]),
        ("a{0,1}.tar", ["a{0,1}.tar"]),  # a name that exists as it is
        ("b[0].tar", ["b[0].tar"]),
    ],
)
def test_patterns(source: str | list[str], expected: list[str]) -> None:
    assert find_files(source, "data.source") == [Path(path) for path in expected]


def test_the_home_directory(tmp_path: Path) -> None:
    assert find_files("~/two/*.tar", "data.source") == [tmp_path / "two" / "00.tar"]


def test_a_file_named_twice_is_read_once() -> None:
    with pytest.warns(UserWarning, match=r"data\.source names 1 files more than once, first one/01\.tar; each is read once"):
        assert find_files("one/01.tar::one/*.tar", "data.source") == [Path(f"one/0{i}.tar") for i in (1, 0, 2)]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("absent/*.tar", r"data\.source is 'absent/\*\.tar', which matches no file; correct the path"),
        ("one/*.tar::absent.tar", r"data\.source is 'absent\.tar', which matches no file"),
        ("one/03.tar", "which matches no file"),
        ("one/{00..05}.tar", r"but 3 of its 6 files are missing, first one/03\.tar; add them, or correct the pattern"),
        ("one/{00..02.tar", "whose braces do not match"),
        ("https://x/{0..9}.tar", "only files of this machine are read"),
        ("pipe:cat x.tar", "only files of this machine are read"),
        ("$ABSENT/x.tar", "the environment variable ABSENT is not set"),
    ],
)
def test_patterns_that_name_no_file_raise(source: str, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        find_files(source, "data.source")


def test_split_patterns() -> None:
    assert split_patterns("a::b :: c") == ["a", "b", "c"]
    assert split_patterns(["a", "b::c"]) == ["a", "b", "c"]
    assert split_patterns("") == []


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("one", ["one/*.tar"]),
        ("~/two", ["HOME/two/*.tar"]),
        (["one", "x.tar"], ["one/*.tar", "x.tar"]),
        ("x-{0..9}.TAR", ["x-{0..9}.TAR"]),
        ("x.tar.gz::y.tgz", ["x.tar.gz", "y.tgz"]),
        ("owner/name", []),
        ("x.parquet", []),
        ("", []),
    ],
)
def test_sources_of_tar_files(source: str | list[str], expected: list[str], tmp_path: Path) -> None:
    assert tar_patterns(source, "data.source") == [pattern.replace("HOME", str(tmp_path)) for pattern in expected]
