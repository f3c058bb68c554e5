"""Isolation of commands that start several processes."""

import os
import socket
import time
from pathlib import Path

import pytest

from tests.processes import clean_environment, remove_distributed_variables, reserve_port, run_isolated

SLEEPING_CHILD = """
import pathlib, subprocess, sys
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
pathlib.Path("pid").write_text(str(child.pid))
print("started", flush=True)
"""


def is_running(pid: int) -> bool:
    """Whether a process runs; killed ones may remain as zombies until they are reaped."""
    status = Path(f"/proc/{pid}/status")
    return status.is_file() and "State:\tZ" not in status.read_text()


def wait_until_ended(pid: int) -> None:
    deadline = time.monotonic() + 10
    while is_running(pid):
        assert time.monotonic() < deadline, f"process {pid} is still running"
        time.sleep(0.02)


def test_reserved_ports_are_not_assigned_again_and_can_be_bound() -> None:
    ports = [reserve_port() for _ in range(20)]
    assert len(set(ports)) == len(ports)
    with socket.socket() as server:
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        server.bind(("", ports[0]))
        server.listen(1)


def test_environment_has_no_variables_of_other_process_groups(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("LOCAL_RANK", "WORLD_SIZE", "MASTER_PORT", "PL_GLOBAL_SEED", "SLURM_NTASKS"):
        monkeypatch.setenv(name, "29500")
    environment = clean_environment(tmp_path, HF_MODULES_CACHE="modules")
    assert not {"LOCAL_RANK", "WORLD_SIZE", "PL_GLOBAL_SEED", "SLURM_NTASKS"} & set(environment)
    assert environment["MASTER_PORT"] not in ("29500", clean_environment()["MASTER_PORT"])
    assert environment["HF_MODULES_CACHE"] == "modules"
    assert environment["PYTHONPATH"].endswith(str(tmp_path))
    remove_distributed_variables()
    assert "MASTER_PORT" not in os.environ


def test_failed_commands_show_their_output(tmp_path: Path) -> None:
    failing = ["-c", "import sys; print('before'); sys.exit('reason')"]
    with pytest.raises(AssertionError, match="exited with 1") as error:
        run_isolated(failing, tmp_path)
    assert "before" in str(error.value)
    assert "reason" in str(error.value)
    assert run_isolated(failing, tmp_path, check=False).returncode == 1


def test_no_child_outlives_a_command(tmp_path: Path) -> None:
    assert run_isolated(["-c", SLEEPING_CHILD], tmp_path).stdout == "started\n"
    wait_until_ended(int((tmp_path / "pid").read_text()))


def test_no_child_outlives_a_timeout(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match=r"exceeded 5 seconds; its output:\nstarted"):
        run_isolated(["-c", SLEEPING_CHILD + "child.wait()"], tmp_path, timeout=5)
    wait_until_ended(int((tmp_path / "pid").read_text()))
