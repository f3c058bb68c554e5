"""Run commands that start several processes, isolated from the other tests."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import IO

ROOT = Path(__file__).resolve().parents[1]
TIMEOUT = 240.0
"""Seconds that a command may take, below the time limit of a test."""
TAIL = 6000
"""Characters of a command's output in an error message."""

VARIABLES = {
    "LOCAL_RANK",
    "LOCAL_WORLD_SIZE",
    "MASTER_ADDR",
    "MASTER_PORT",
    "NODE_RANK",
    "RANK",
    "STANDALONE_PORT",
    "WORLD_SIZE",
}
PREFIXES = ("GROUP_", "OMPI_", "PL_", "ROLE_", "SLURM_", "TORCHELASTIC_")


def distributed_variables() -> list[str]:
    """Environment variables of ranks, rendezvous, schedulers and Lightning's seed; they alter processes started later."""
    return [name for name in os.environ if name in VARIABLES or name.startswith(PREFIXES)]


def remove_distributed_variables() -> None:
    """Remove the variables that a process group or `seed_everything` has left in the environment."""
    for name in distributed_variables():
        del os.environ[name]


def reserve_port() -> int:
    """A free TCP port that the kernel does not assign to another process within the next minute.

    A closed connection leaves the port in the state TIME_WAIT. The kernel then skips it when it looks for a free port. A server
    that sets SO_REUSEADDR, such as torch's `TCPStore`, can still bind it.
    """
    with socket.socket() as server:
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        server.bind(("127.0.0.1", 0))
        server.listen(1)
        port: int = server.getsockname()[1]
        with socket.create_connection(("127.0.0.1", port)):
            accepted, _ = server.accept()
            accepted.close()  # the side that closes first is the one in TIME_WAIT
    return port


def clean_environment(*paths: Path, **variables: str) -> dict[str, str]:
    """Environment of a command that may start a process group.

    It has a reserved port for the rendezvous, and one thread a process. It lacks the variables of process groups of other tests
    in the same worker.

    Args:
        paths: Directories to import modules from, besides the repository.
        variables: Further variables.
    """
    inherited = {name: value for name, value in os.environ.items() if name not in distributed_variables()}
    if sys.platform == "linux":
        inherited["GLOO_SOCKET_IFNAME"] = "lo"  # by default gloo looks up the host's name, which may not resolve
    return {
        **inherited,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(reserve_port()),
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(map(str, (ROOT, *paths))),
        **variables,
    }


def run_isolated(
    command: Sequence[str | Path],
    directory: Path,
    *,
    environment: dict[str, str] | None = None,
    timeout: float = TIMEOUT,
    check: bool = True,
    python: str | Path = sys.executable,
) -> subprocess.CompletedProcess[str]:
    """Run a Python command and the processes that it starts; none of them outlives the call.

    Args:
        command: Arguments of the Python interpreter.
        directory: Working directory.
        environment: Environment; None is `clean_environment()`.
        timeout: Seconds after which all processes are killed.
        check: Whether the exit code must be 0.
        python: The interpreter.

    Returns:
        The exit code, and in `stdout` the joint output of all processes.

    Raises:
        AssertionError: If the command fails or exceeds its time; the message ends with the output.
    """
    line = [str(python), *map(str, command)]
    # A file, because a pipe stays open while any child process lives.
    with tempfile.TemporaryFile("w+", errors="replace") as output:
        process = subprocess.Popen(
            line,
            cwd=directory,
            env=clean_environment() if environment is None else environment,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            code = process.wait(timeout)
        except subprocess.TimeoutExpired:
            _kill(process)
            raise AssertionError(f"{' '.join(line)} exceeded {timeout:g} seconds; its output:\n{_tail(output)}") from None
        except BaseException:  # such as the time limit of the test
            print(_tail(output))
            raise
        finally:
            _kill(process)
        output.seek(0)
        finished = subprocess.CompletedProcess(line, code, output.read())
    if check and code != 0:
        raise AssertionError(f"{' '.join(line)} exited with {code}; its output:\n{finished.stdout[-TAIL:]}")
    return finished


def _kill(process: subprocess.Popen[bytes]) -> None:
    """Kill a command and the processes that it has started."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _tail(output: IO[str]) -> str:
    output.seek(0)
    return output.read()[-TAIL:]
