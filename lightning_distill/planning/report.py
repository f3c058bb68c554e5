"""A plan as a table, a verdict, and numbers for JSON."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from rich import box
from rich.table import Table

from lightning_distill.planning.machine import Machine, Plan

GIB = 2**30


def plan_table(plan: Plan, title: str) -> Table:
    """Table of the parameters of each network, the memory by purpose, and the communication of each phase."""
    table = Table(title=title, box=box.SIMPLE, padding=(0, 1))
    for name in ("", "parameters", "trainable"):
        table.add_column(name, justify="right" if name else "left")
    for name, (count, trained) in plan.parameters.items():
        table.add_row(name.replace("_", " "), f"{count / 1e6:,.1f} M", f"{trained / 1e6:,.1f} M" if trained else "")
    table.add_section()
    table.add_row("memory per GPU", "GiB", "")
    for name, value in plan.gpu.items():
        table.add_row(f"  {name}", f"{value / GIB:,.2f}", "")
    table.add_row("  peak", f"{plan.peak / GIB:,.2f}", "")
    if plan.cpu:
        table.add_section()
        table.add_row("CPU memory per process", "GiB", "")
        for name, value in plan.cpu.items():
            table.add_row(f"  {name}", f"{value / GIB:,.2f}", "")
    table.add_section()
    table.add_row("received per GPU and step", "GiB", "")
    for phase, value in plan.communication.items():
        table.add_row(f"  {phase}", f"{value / GIB:,.2f}", "")
    return table


def verdict(plan: Plan, machine: Machine, smallest: int | None, alternatives: Sequence[str]) -> str:
    """Text that says whether the machine is sufficient, which machine would be, and what else to do.

    Args:
        plan: The plan.
        machine: Its machine.
        smallest: Smallest sufficient number of GPUs, or None.
        alternatives: Strategies that fit on the machine.
    """
    fits = machine.fits(plan.peak)
    gpus = f"{machine.processes} x {machine.gpu_memory:g} GB"
    result = f"{plan.strategy} {'fits' if fits else 'does not fit'} on {gpus}, with {machine.reserve:g} GB per GPU left free"
    size = (
        "no machine of up to 64 GPUs is sufficient" if smallest is None else f"the smallest sufficient machine has {smallest}"
    )
    text = f"{result}; {size}."
    if fits:
        return text
    if alternatives:
        return f"{text} On {gpus}, {', '.join(alternatives)} would fit."
    return f"{text} No other strategy would fit either."


def plan_numbers(plan: Plan, machine: Machine, smallest: int | None, alternatives: Sequence[str]) -> dict[str, Any]:
    """Table and verdict as plain values, in bytes. Arguments as in `verdict`."""
    return {
        **asdict(plan),
        "peak": plan.peak,
        "machine": asdict(machine),
        "fits": machine.fits(plan.peak),
        "smallest": smallest,
        "strategies_that_fit": list(alternatives),
    }
