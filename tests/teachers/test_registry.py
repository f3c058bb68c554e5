from pathlib import Path

import pytest

from lightning_distill.teachers.registry import check_location, resolve_pretrained


def test_home_directory_of_a_pipeline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "flux").mkdir()
    (tmp_path / "flux" / "model_index.json").write_text("{}")
    assert resolve_pretrained("~/flux") == str(tmp_path / "flux")
    check_location("~/flux", None)


def test_other_names_stay() -> None:
    assert resolve_pretrained("owner/model") == "owner/model"
    assert Path(resolve_pretrained("shapes-teacher")).is_dir()
