"""`export.json`."""

from pathlib import Path

import pytest

from lightning_distill.export.mark import MARK, ExportMark


def test_reading_gives_what_was_written(tmp_path: Path) -> None:
    scheduler = {"class": "FlowMatchEulerDiscreteScheduler", "config": {"shift": 3.0}}
    mark = ExportMark("lora", (4,), "TDM", "owner/name", {"guidance_scale": 1.0}, 512, 768, scheduler)
    mark.write(tmp_path)
    assert ExportMark.read(tmp_path) == mark
    assert '"lightning_distill"' in (tmp_path / MARK).read_text()


@pytest.mark.parametrize("content", ["[]", "{", '{"kind": 3}', '{"kind": "stock", "nfe": 4}', '{"kind": "stock", "nfe": []}'])
def test_damaged_files_raise(content: str, tmp_path: Path) -> None:
    (tmp_path / MARK).write_text(content)
    with pytest.raises(ValueError, match=r"export\.json|Expecting"):
        ExportMark.read(tmp_path)
