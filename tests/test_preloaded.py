"""Scripts in processes that are forked after their imports."""

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.preloaded import PreloadedPython
from tests.processes import clean_environment
from tests.test_processes import wait_until_ended

RANKS = """
import os, pathlib, sys, time
rank = os.environ["LOCAL_RANK"]
pathlib.Path(f"pid{rank}").write_text(str(os.getpid()))
if rank == sys.argv[1]:
    sys.exit("first failure")
time.sleep(60)
"""


@pytest.fixture(scope="module")
def python() -> Iterator[PreloadedPython]:
    started = PreloadedPython("fractions")
    yield started
    started.close()


def test_script_runs_as_in_a_new_process(python: PreloadedPython, tmp_path: Path) -> None:
    (tmp_path / "neighbour.py").write_text("value = 3")
    (tmp_path / "script.py").write_text(
        "import os, sys\n"
        "print('fractions' in sys.modules, 'colorsys' in sys.modules, 'pytest' in sys.modules, __name__)\n"
        "import neighbour, colorsys\n"
        "print(sys.argv, os.getcwd(), os.environ['EXTRA'], 'LOCAL_RANK' in os.environ, neighbour.value, flush=True)\n"
        "os.system('echo from a child')\n"
    )
    for _ in range(2):  # the second script has nothing of the first
        result = python.run(["script.py", 1], tmp_path, environment=clean_environment(EXTRA="set"))
        assert result.returncode == 0
        expected = ["True False False __main__", f"['script.py', '1'] {tmp_path} set False 3", "from a child"]
        assert result.stdout.splitlines() == expected


def test_module_runs_from_the_working_directory(python: PreloadedPython, tmp_path: Path) -> None:
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "__main__.py").write_text("import sys; print(sys.argv[1:])")
    assert python.run(["-m", "package", "a"], tmp_path).stdout == "['a']\n"


def test_failed_scripts_show_their_output(python: PreloadedPython, tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text("print('before')\nraise ValueError('reason')")
    with pytest.raises(AssertionError, match="exited with 1") as error:
        python.run(["script.py"], tmp_path)
    assert "before" in str(error.value)
    assert "ValueError: reason" in str(error.value)
    (tmp_path / "script.py").write_text("import os; os.kill(os.getpid(), 9)")
    assert python.run(["script.py"], tmp_path, check=False).returncode == -9


def test_first_failure_ends_all_ranks(python: PreloadedPython, tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(RANKS)
    start = time.monotonic()
    result = python.run(["script.py", "1"], tmp_path, processes=2, check=False)
    assert time.monotonic() - start < 30
    assert result.returncode == 1
    assert "first failure" in result.stdout


def test_no_rank_outlives_a_timeout(python: PreloadedPython, tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(RANKS)
    with pytest.raises(AssertionError, match="exceeded 3 seconds"):
        python.run(["script.py", "none"], tmp_path, processes=2, timeout=3)
    for rank in (0, 1):
        wait_until_ended(int((tmp_path / f"pid{rank}").read_text()))
    (tmp_path / "script.py").write_text("print('next')")
    assert python.run(["script.py"], tmp_path).stdout == "next\n"
