"""The campaign of faults at a few points."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[1] / "benchmarks" / "faults.py"


def campaign(tmp_path: Path, *arguments: str) -> dict[str, dict[str, int]]:
    """Rows of a campaign by kind."""
    command = [sys.executable, str(SCRIPT), "--machine", "test", "--out", str(tmp_path), *arguments]
    environment = {**os.environ, "PYTHONPATH": str(SCRIPT.parents[1])}
    subprocess.run(command, check=True, cwd=tmp_path, env=environment, timeout=900)
    rows = json.loads((tmp_path / "faults_test.json").read_text())["rows"]
    assert all(f"| {row['kind']} |" in (tmp_path / "faults_test.md").read_text() for row in rows)
    return {row["kind"]: row for row in rows}


def test_damaged_images(tmp_path: Path) -> None:
    rows = campaign(tmp_path, "--kinds", "images", "--tries", "60")
    assert rows.keys() == {"damaged images", "damaged images in shards"}
    for row in rows.values():
        assert row["passed"] == row["tried"] == 60
        assert 0 < row["refused"] < 60


@pytest.mark.slow
def test_every_kind_in_one_process(tmp_path: Path) -> None:
    kinds = ["kills", "signals", "checkpoints", "exports", "latents"]
    rows = campaign(tmp_path, "--kinds", *kinds, "--tries", "1")
    assert len(rows) == 8
    assert all(row["passed"] == row["tried"] == 1 for row in rows.values()), rows
