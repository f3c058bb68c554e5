import errno
import os
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from lightning_distill.errors import ConfigurationError, StorageError
from lightning_distill.outputs import (
    atomic_file,
    check_directory,
    check_file,
    directory_contents,
    storage_error,
    unfinished_path,
    writing,
)


@pytest.fixture
def full_disk(tmp_path) -> Iterator[Path]:
    """Directory on a disk of 16 KiB."""
    place = tmp_path / "small"
    place.mkdir()
    if (
        os.geteuid()
        or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16k", "tmpfs", place], capture_output=True).returncode
    ):
        pytest.skip("only root can mount a small disk")
    yield place
    subprocess.run(["umount", "-l", place], check=True)


def test_a_check_leaves_nothing_behind(tmp_path):
    check_directory(tmp_path, "out")
    check_directory(tmp_path / "new" / "run", "out")
    check_file(tmp_path / "new" / "image.png", "--out")
    assert not list(tmp_path.iterdir())


def test_directories_below_a_file_raise(tmp_path):
    (tmp_path / "file").touch()
    for path in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(
            ConfigurationError, match=r"^out is '.*', which cannot be written \('.*file' is not a directory\); set it"
        ):
            check_directory(path, "out")
    with pytest.raises(
        ConfigurationError, match=r"^--out is '.*a\.png', which cannot be written \('.*file' is not a directory\)"
    ):
        check_file(tmp_path / "file" / "a.png", "--out")
    with pytest.raises(ConfigurationError, match="which is a directory; set it to the name of a file"):
        check_file(tmp_path, "--out")


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="there is no /proc")
def test_a_directory_that_refuses_files_raises():
    with pytest.raises(ConfigurationError, match="'/proc/no/such', which cannot be written"):
        check_directory("/proc/no/such", "trainer.default_root_dir")


def test_urls_are_not_checked():
    check_directory("s3://bucket/run", "trainer.default_root_dir")


def test_a_dangling_link_raises(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "nothing")
    with pytest.raises(ConfigurationError, match="is not a directory"):
        check_directory(tmp_path / "link" / "run", "out")


def test_a_full_disk_raises_before_a_run(full_disk):
    (full_disk / "large").write_bytes(bytes(16 << 10))
    with pytest.raises(ConfigurationError, match="no space left on device"):
        check_directory(full_disk / "run", "out")


@pytest.mark.parametrize(
    "write", [lambda path: path.write_bytes(bytes(1 << 20)), lambda path: save_file({"a": torch.ones(1 << 20)}, path)]
)
def test_a_full_disk_is_one_line_with_the_output(full_disk, write):
    with (
        pytest.raises(StorageError, match=r"^no space left on the disk of 'run/student'; free some space, or") as error,
        writing("run/student"),
    ):
        write(full_disk / "a")
    assert "\n" not in str(error.value)


def test_a_full_disk_keeps_the_old_file_and_no_part_of_the_new_one(full_disk):
    with atomic_file(full_disk / "a") as file:
        file.write(b"old")
    with pytest.raises(StorageError, match=str(full_disk / "a")), atomic_file(full_disk / "a") as file:
        file.write(bytes(1 << 20))
    assert list(full_disk.iterdir()) == [full_disk / "a"]
    assert (full_disk / "a").read_bytes() == b"old"


def test_torch_save_on_a_full_disk_is_recognized(full_disk):
    with pytest.raises(StorageError, match="no space left"), atomic_file(full_disk / "a") as file:
        torch.save(torch.ones(1 << 20), file)
    assert not list(full_disk.iterdir())


def test_atomic_files_replace_leftovers(tmp_path):
    path = tmp_path / "new" / "a"
    path.parent.mkdir()
    unfinished_path(path).write_bytes(b"of a killed process")
    with atomic_file(path) as file:
        file.write(b"content")
    assert path.read_bytes() == b"content"
    assert list(path.parent.iterdir()) == [path]


def test_errors_of_a_disk_name_their_file():
    failed = storage_error(OSError(errno.EIO, "Input/output error", "runs/a"))
    assert str(failed) == "'runs/a': input/output error; check its disk"
    serialized = SafetensorError("Error while serializing: I/O error: File too large (os error 27)")
    assert str(storage_error(serialized, "student")) == "'student': file too large; check its disk"
    wrapped = RuntimeError("a step failed")
    wrapped.__cause__ = OSError(errno.EDQUOT, "Disk quota exceeded")
    assert "no space left on the disk; free" in str(storage_error(wrapped))


def test_other_errors_are_unchanged():
    assert storage_error(FileNotFoundError(errno.ENOENT, "No such file", "a")) is None
    with pytest.raises(ValueError, match="a bug"), writing("out"):
        raise ValueError("a bug")


def test_probes_of_other_processes_are_no_contents(tmp_path):
    """Processes of one run check the same directory at the same time."""
    with tempfile.TemporaryDirectory(prefix=".probe-", dir=tmp_path):
        assert directory_contents(tmp_path) == []
    (tmp_path / "file").touch()
    assert directory_contents(tmp_path) == [tmp_path / "file"]
