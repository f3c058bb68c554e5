"""Run Python scripts in new processes without the seconds that their imports take.

A process imports modules once, and forks for each script. A forked process has the imported modules, and nothing of earlier
tests.
"""

import contextlib
import functools
import gc
import importlib
import json
import os
import runpy
import select
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any

from tests.processes import ROOT, TAIL, TIMEOUT, clean_environment


class RunningScript:
    """A script in a forked process.

    Attributes:
        pid: Its process and process group; that of the first rank if there are several.
        output: The joint output of all processes, after the script has ended.
    """

    def __init__(self, pid: int, codes: IO[str]) -> None:
        self.pid = pid
        self.output = ""
        self._codes = codes
        self._code: int | None = None

    def wait(self, timeout: float | None) -> int | None:
        """The first exit code other than 0, or 0; None if a process runs longer than `timeout` seconds."""
        if self._code is None and select.select([self._codes], [], [], timeout)[0]:
            self._code = int(self._codes.readline())
        return self._code

    def kill(self) -> None:
        """Kill all processes, and wait until they have ended."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, signal.SIGKILL)
        self.wait(None)


class PreloadedPython:
    """A Python process that has imported modules and waits for scripts.

    Args:
        modules: The modules to import.
    """

    def __init__(self, *modules: str) -> None:
        self.code = tempfile.TemporaryDirectory()  # where diffusers and transformers copy code of checkpoints
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.preloaded", *modules],
            cwd=ROOT,
            env=clean_environment(HF_MODULES_CACHE=self.code.name),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    @contextlib.contextmanager
    def start(
        self,
        command: Sequence[str | Path],
        directory: Path,
        *,
        processes: int = 1,
        environment: dict[str, str] | None = None,
    ) -> Iterator[RunningScript]:
        """Start a script in one or more forked processes; none of them outlives the context.

        Args:
            command: A script or `-m` and a module, and arguments.
            directory: Working directory.
            processes: Number of processes. Several are ranks of one machine, as a launcher starts them.
            environment: Environment; None is `clean_environment()`. Variables that are read at an import have no effect.
        """
        stdin, stdout = self.process.stdin, self.process.stdout
        assert stdin is not None
        assert stdout is not None
        with tempfile.NamedTemporaryFile("w+", errors="replace") as output:
            request = {
                "command": [*map(str, command)],
                "directory": str(directory),
                "processes": processes,
                "environment": clean_environment() if environment is None else environment,
                "output": output.name,
            }
            print(json.dumps(request), file=stdin, flush=True)
            script = RunningScript(int(stdout.readline()), stdout)
            try:
                yield script
            except BaseException:  # such as the time limit of the test
                print(output.read()[-TAIL:])
                raise
            finally:
                script.kill()
                output.seek(0)
                script.output = output.read()

    def run(
        self, command: Sequence[str | Path], directory: Path, *, timeout: float = TIMEOUT, check: bool = True, **options: Any
    ) -> subprocess.CompletedProcess[str]:
        """Run a script to its end.

        Args:
            command: A script or `-m` and a module, and arguments.
            directory: Working directory.
            timeout: Seconds after which all processes are killed.
            check: Whether the exit code must be 0.
            options: Further arguments of `start`.

        Returns:
            The first exit code other than 0, if any, and in `stdout` the joint output of all processes.

        Raises:
            AssertionError: If the command fails or exceeds its time; the message ends with the output.
        """
        with self.start(command, directory, **options) as script:
            code = script.wait(timeout)
        line = " ".join(map(str, command))
        if code is None:
            raise AssertionError(f"{line} exceeded {timeout:g} seconds; its output:\n{script.output[-TAIL:]}")
        if check and code != 0:
            raise AssertionError(f"{line} exited with {code}; its output:\n{script.output[-TAIL:]}")
        return subprocess.CompletedProcess([*map(str, command)], code, script.output)

    def close(self) -> None:
        """End the process."""
        self.process.communicate()
        self.code.cleanup()


@functools.cache
def with_package() -> PreloadedPython:
    """A process that has imported this package."""
    return PreloadedPython("lightning_distill.commands.training", "tests.sharding.train_tiny")


@functools.cache
def with_diffusers() -> PreloadedPython:
    """A process that has imported what exported pipelines of all families need, and nothing of this package."""
    import diffusers  # not in the process that is started

    from lightning_distill.teachers.families import FAMILIES

    pipelines = (getattr(diffusers, name).__module__ for name in FAMILIES)
    return PreloadedPython(*pipelines, "transformers.models.auto.modeling_auto")


def main() -> None:
    """Import the modules, then read a request per line, and write the process group and the exit code of each."""
    for name in sys.argv[1:]:
        importlib.import_module(name)
    gc.collect()
    gc.freeze()
    for line in sys.stdin:
        request = json.loads(line)
        ranks: dict[int, int] = {}
        for rank in range(request["processes"]):
            if (process := os.fork()) == 0:
                run_script(request, rank)
                return
            ranks[process] = rank
            os.setpgid(process, next(iter(ranks)))
        print(next(iter(ranks)), flush=True)
        print(wait_for(ranks), flush=True)


def wait_for(ranks: dict[int, int]) -> int:
    """Wait for processes; the first that fails ends the others. Returns its exit code, or 0."""
    group, failure = next(iter(ranks)), 0
    for _ in ranks:
        code = os.waitstatus_to_exitcode(os.waitpid(-group, 0)[1])
        if code != 0 and failure == 0:
            failure = code
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(group, signal.SIGKILL)
    return failure


def run_script(request: dict[str, Any], rank: int) -> None:
    """Run the script of a request in this process, as `python` runs it."""
    output = os.open(request["output"], os.O_WRONLY | os.O_APPEND)
    for stream, file in enumerate((os.open(os.devnull, os.O_RDONLY), output, output)):
        os.dup2(file, stream)
    os.chdir(request["directory"])
    os.environ.clear()
    os.environ.update(request["environment"])
    if request["processes"] > 1:
        os.environ |= {"LOCAL_RANK": str(rank), "NODE_RANK": "0", "WORLD_SIZE": str(request["processes"])}
        if "lightning.fabric.utilities.rank_zero" in sys.modules:  # it has read the rank at its import
            sys.modules["lightning.fabric.utilities.rank_zero"].rank_zero_only.rank = rank
    first, *arguments = request["command"]
    folder = request["directory"] if first == "-m" else str(Path(first).resolve().parent)
    sys.path[:1] = [folder, *os.environ["PYTHONPATH"].split(os.pathsep)]
    if first == "-m":
        sys.argv[:] = arguments
        runpy.run_module(arguments[0], run_name="__main__", alter_sys=True)
    else:
        sys.argv[:] = [first, *arguments]
        runpy.run_path(first, run_name="__main__")


if __name__ == "__main__":
    main()
