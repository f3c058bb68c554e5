"""Licenses of teachers, from directories and from the cache of the hub."""

from pathlib import Path

import pytest

from lightning_distill.export import teacher_license as module
from lightning_distill.export.teacher_license import TeacherLicense, teacher_license

CARD = "---\nlicense: other\nlicense_name: my-license\nlicense_link: LICENSE.md\n---\n# Model\n"


def test_license_of_the_readme_of_a_directory(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text(CARD)
    (tmp_path / "LICENSE.md").write_text("terms")
    (tmp_path / "notice.txt").write_text("notice")
    expected = TeacherLicense("other", "my-license", "LICENSE.md", (tmp_path / "LICENSE.md", tmp_path / "notice.txt"))
    assert teacher_license(str(tmp_path)) == expected


def test_a_license_file_without_metadata_is_named(tmp_path: Path) -> None:
    directory = tmp_path / "My Teacher"
    directory.mkdir()
    (directory / "LICENSE").write_text("terms")
    found = teacher_license(str(directory))
    assert found == TeacherLicense("other", "my-teacher-license", "LICENSE", (directory / "LICENSE",))
    assert "whose license ([my-teacher-license](LICENSE)) applies" in found.sentence()


def test_unknown_licenses_leave_the_sentence_alone(tmp_path: Path) -> None:
    assert teacher_license(str(tmp_path)) == TeacherLicense()
    assert teacher_license("PixelAdapter").sentence() == (
        "The weights derive from the teacher's weights, whose license applies to them."
    )


def test_metadata_that_cannot_be_read_gives_a_warning(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("---\nlicense: [\n---\n")
    with pytest.warns(UserWarning, match=r"metadata of .*README\.md cannot be read .* names no license"):
        assert teacher_license(str(tmp_path)).license is None


def test_license_of_a_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "README.md").write_text(CARD)
    monkeypatch.setattr(module, "hf_hub_download", lambda *_, **__: str(tmp_path / "README.md"))
    link = "https://huggingface.co/owner/name/blob/v2/LICENSE.md"
    assert teacher_license("owner/name", "v2") == TeacherLicense("other", "my-license", link)

    def offline(*_: str, **__: str | None) -> str:
        raise OSError("offline")

    monkeypatch.setattr(module, "hf_hub_download", offline)
    with pytest.warns(UserWarning, match="license of owner/name cannot be read from the hub"):
        assert teacher_license("owner/name") == TeacherLicense()
