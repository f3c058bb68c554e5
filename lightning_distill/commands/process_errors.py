"""One-line errors for processes that wait for each other in vain, and for a port that is taken."""

import errno
import os
import re
import socket

from lightning.fabric.plugins.environments import LightningEnvironment
from lightning.pytorch import Trainer
from torch.distributed import DistError
from torch.distributed.checkpoint.api import CheckpointException

from lightning_distill.errors import ConfigurationError, RunError

# Messages of gloo, NCCL and torch's store; their classes are RuntimeError and its subclasses.
_TIMED_OUT = re.compile(r"timed? ?out", re.IGNORECASE)
_LOST = re.compile(r"connection (?:was )?(?:closed|reset)|closed by peer|broken pipe|pair closure", re.IGNORECASE)
_COLLECTIVE = re.compile(r"gloo|nccl|tcpstore|store->|wait\(|socket|recvvalue|sendbytes|recv operation|peer", re.IGNORECASE)
_PORT_TAKEN = re.compile(r"EADDRINUSE|address already in use", re.IGNORECASE)


def check_port(trainer: Trainer) -> None:
    """Check that the port for the rendezvous is free, in the process that starts the others.

    Raises:
        ConfigurationError: If MASTER_PORT names a port in use.
    """
    environment = getattr(trainer.strategy, "cluster_environment", None)
    port = os.environ.get("MASTER_PORT", "")
    starts_others = isinstance(environment, LightningEnvironment) and not environment.creates_processes_externally
    if trainer.world_size == 1 or not starts_others or not port.isdecimal() or not trainer.is_global_zero:
        return
    with socket.socket() as server:
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as torch's store does
        try:
            server.bind(("", int(port)))
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                raise port_error() from error
            raise


def port_error() -> ConfigurationError:
    """The error for a port that another program uses."""
    return ConfigurationError(
        f"the environment variable MASTER_PORT is {os.environ.get('MASTER_PORT')}, a port that another program on this machine "
        "uses; set it to a free port, or unset it on a single machine"
    )


def process_error(error: BaseException) -> RunError | ConfigurationError | None:
    """The one-line error of a process that waits for another one or has lost it, or None if the error has another cause."""
    texts: list[str] = []
    collective: list[str] = []
    cause: BaseException | None = error
    while cause is not None:
        failures = [failure for failure, _ in cause.failures.values()] if isinstance(cause, CheckpointException) else [cause]
        for failure in failures:
            if isinstance(failure, RuntimeError):
                texts.append(text := str(failure))
                collective += [text] if isinstance(failure, DistError) or _COLLECTIVE.search(text) else []
        cause = cause.__cause__ or cause.__context__
    if any(_PORT_TAKEN.search(text) for text in texts):
        return port_error()
    rank = os.environ.get("RANK", os.environ.get("LOCAL_RANK", "0"))
    if any(_LOST.search(text) for text in collective):
        return RunError(
            f"process {rank} has lost the connection to another process, which has ended; its error is above or in its own "
            "output; resume with --ckpt_path last"
        )
    if any(_TIMED_OUT.search(text) for text in collective):
        return RunError(
            f"process {rank} has waited for another process until trainer.strategy.timeout (default 0:30:00): that one hangs "
            "or is much slower; look at its output, raise the timeout if it only needs longer, and resume with --ckpt_path last"
        )
    return None
