"""The fingerprint depends on all files of a component, except the middle of large files."""

from pathlib import Path

import pytest

from lightning_distill.teachers.fingerprint import SAMPLE, fingerprint

COMPONENTS = ["vae", "text_encoder"]


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    for component in (*COMPONENTS, "transformer"):
        (tmp_path / component).mkdir()
        (tmp_path / component / "config.json").write_text(component)
    (tmp_path / "text_encoder" / "model.safetensors").write_bytes(bytes(3 * SAMPLE))
    return tmp_path


def test_fingerprint_ignores_component_order_and_other_files(directory: Path) -> None:
    before = fingerprint(directory, COMPONENTS)
    (directory / "transformer" / "config.json").write_text("other")
    (directory / "README.md").write_text("other")
    assert fingerprint(directory, COMPONENTS[::-1]) == before
    assert len(before) == 16


@pytest.mark.parametrize("position", [0, SAMPLE - 1, 2 * SAMPLE, 3 * SAMPLE - 1])
def test_fingerprint_detects_changed_weights(directory: Path, position: int) -> None:
    before = fingerprint(directory, COMPONENTS)
    file = directory / "text_encoder" / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[position] = 1
    file.write_bytes(content)
    assert fingerprint(directory, COMPONENTS) != before


def test_fingerprint_detects_changed_names_sizes_and_small_files(directory: Path) -> None:
    seen = {fingerprint(directory, COMPONENTS)}
    (directory / "vae" / "config.json").write_text("vax")
    seen.add(fingerprint(directory, COMPONENTS))
    (directory / "vae" / "config.json").rename(directory / "vae" / "other.json")
    seen.add(fingerprint(directory, COMPONENTS))
    (directory / "text_encoder" / "model.safetensors").write_bytes(bytes(4 * SAMPLE))
    seen.add(fingerprint(directory, COMPONENTS))
    assert len(seen) == 4
