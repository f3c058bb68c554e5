"""Names of the pipelines that ship with the package."""

from pathlib import Path

SHIPPED = {"shapes-teacher": "shapes_teacher", "shapes-student": "shapes_student"}
_DIRECTORY = Path(__file__).resolve().parents[1] / "pretrained"


def resolve_pretrained(name: str) -> str:
    """The directory of a shipped pipeline; any other directory or hub id comes back as it is."""
    return str(_DIRECTORY / SHIPPED[name]) if name in SHIPPED else name
