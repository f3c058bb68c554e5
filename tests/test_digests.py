import shutil
import subprocess

import pytest

from lightning_distill.digests import MANIFEST, find_damage, write_manifest


@pytest.fixture
def directory(tmp_path):
    (tmp_path / "part").mkdir()
    (tmp_path / "part" / "weights").write_bytes(bytes(range(256)) * 20_000)  # more than one chunk
    (tmp_path / "config.json").write_text("{}")
    write_manifest(tmp_path)
    return tmp_path


def test_undamaged_directory_has_no_damage(directory):
    (directory / "notes.txt").write_text("added later")
    assert find_damage(directory) is None


@pytest.mark.parametrize("position", [0, 1_500_000, -1])
def test_one_flipped_bit_is_found(directory, position):
    content = bytearray((directory / "part" / "weights").read_bytes())
    content[position] ^= 0x10
    (directory / "part" / "weights").write_bytes(content)
    assert find_damage(directory).startswith("part/weights is not what was written")


def test_missing_file_is_found(directory):
    (directory / "config.json").unlink()
    assert find_damage(directory) == "config.json is missing"


@pytest.mark.parametrize("line", ["no digest", f"{'0' * 64}  ../outside", f"{'0' * 64}  /etc/passwd"])
def test_invalid_manifest_is_found(directory, line):
    with (directory / MANIFEST).open("a") as file:
        file.write(f"{line}\n")
    assert "invalid line" in find_damage(directory)


def test_manifest_that_is_not_text_is_found(directory):
    (directory / MANIFEST).write_bytes(b"\xff\xfe\x00")
    assert find_damage(directory) == f"{MANIFEST} is not text"


@pytest.mark.skipif(shutil.which("sha256sum") is None, reason="needs sha256sum")
def test_sha256sum_reads_the_manifest(directory):
    subprocess.run(["sha256sum", "--check", "--strict", "--quiet", MANIFEST], cwd=directory, check=True)
