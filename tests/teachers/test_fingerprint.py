"""Any change of a component's files shows, except in the middle of large ones."""

from pathlib import Path

import pytest

from lightning_distill.teachers.fingerprint import SAMPLE, fingerprint

PARTS = ["vae", "text_encoder"]


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    for part in (*PARTS, "transformer"):
        (tmp_path / part).mkdir()
        (tmp_path / part / "config.json").write_text(part)
    (tmp_path / "text_encoder" / "model.safetensors").write_bytes(bytes(3 * SAMPLE))
    return tmp_path


def test_the_order_of_components_and_other_files_do_not_count(directory: Path) -> None:
    before = fingerprint(directory, PARTS)
    (directory / "transformer" / "config.json").write_text("other")
    (directory / "README.md").write_text("of the whole")
    assert fingerprint(directory, PARTS[::-1]) == before
    assert len(before) == 16


@pytest.mark.parametrize("place", [0, SAMPLE - 1, 2 * SAMPLE, 3 * SAMPLE - 1])
def test_weights_that_changed_show(directory: Path, place: int) -> None:
    before = fingerprint(directory, PARTS)
    file = directory / "text_encoder" / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[place] = 1
    file.write_bytes(content)
    assert fingerprint(directory, PARTS) != before


def test_names_sizes_and_small_files_show(directory: Path) -> None:
    seen = {fingerprint(directory, PARTS)}
    (directory / "vae" / "config.json").write_text("vax")
    seen.add(fingerprint(directory, PARTS))
    (directory / "vae" / "config.json").rename(directory / "vae" / "other.json")
    seen.add(fingerprint(directory, PARTS))
    (directory / "text_encoder" / "model.safetensors").write_bytes(bytes(4 * SAMPLE))
    seen.add(fingerprint(directory, PARTS))
    assert len(seen) == 4
