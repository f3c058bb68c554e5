"""Bounds of the processes and threads of a run on a CPU."""

import os

from lightning.pytorch import Trainer
from lightning.pytorch.accelerators import CPUAccelerator
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from lightning_distill.errors import ConfigurationError

LARGEST_SHARE = 4
"""Largest number of processes for each core."""


def check_cpu_processes(trainer: Trainer) -> None:
    """Check the number of processes and threads of a CPU, and warn if they share cores; excess threads wait by spinning.

    Without OMP_NUM_THREADS, Lightning divides the cores among the processes.

    Raises:
        ConfigurationError: If there are so many processes that they would use up memory and time before the first step.
    """
    threads, cores = os.environ.get("OMP_NUM_THREADS", ""), os.cpu_count() or 1
    processes = trainer.num_devices
    if not isinstance(trainer.accelerator, CPUAccelerator) or processes == 1:
        return
    if processes > LARGEST_SHARE * cores:
        raise ConfigurationError(
            f"trainer.devices is {processes}, the number of processes on a CPU, and this machine has {cores} cores; set it to "
            f"at most {cores}"
        )
    if processes > cores:
        rank_zero_warn(f"trainer.devices is {processes}: {processes} processes share {cores} cores; set it to at most {cores}")
    elif threads.isdecimal() and int(threads) * processes > cores:
        rank_zero_warn(
            f"OMP_NUM_THREADS is {threads}: {processes} processes of {threads} threads share {cores} cores, which is several "
            "times slower; unset it"
        )
