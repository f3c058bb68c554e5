"""A plan, as a table and as numbers for machines."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from rich import box
from rich.table import Table

from lightning_distill.planning.machine import Machine, Plan

GIB = 2**30


def plan_table(plan: Plan, title: str) -> Table:
    """A row for each network and each thing that takes memory."""
    table = Table(title=title, box=box.SIMPLE, padding=(0, 1))
    for name in ("", "parameters", "that train"):
        table.add_column(name, justify="right" if name else "left")
    for name, (count, trained) in plan.parameters.items():
        table.add_row(name.replace("_", " "), f"{count / 1e6:,.1f} M", f"{trained / 1e6:,.1f} M" if trained else "")
    table.add_section()
    table.add_row("memory of a GPU", "GiB", "")
    for name, value in plan.gpu.items():
        table.add_row(f"  {name}", f"{value / GIB:,.2f}", "")
    table.add_row("  peak", f"{plan.peak / GIB:,.2f}", "")
    if plan.cpu:
        table.add_section()
        table.add_row("memory of the CPU, a process", "GiB", "")
        for name, value in plan.cpu.items():
            table.add_row(f"  {name}", f"{value / GIB:,.2f}", "")
    table.add_section()
    table.add_row("received by a GPU in a step", "GiB", "")
    for phase, value in plan.communication.items():
        table.add_row(f"  {phase}", f"{value / GIB:,.2f}", "")
    return table


def verdict(plan: Plan, machine: Machine, enough: int | None, others: Sequence[str]) -> str:
    """Whether the machine is large enough, which would be, and what else to do, in a sentence or two."""
    fits = machine.holds(plan.peak)
    have = f"{machine.processes} x {machine.gpu_memory:g} GB"
    first = (
        f"{plan.strategy} {'fits' if fits else 'does not fit'} on {have}, of which {machine.reserve:g} GB a GPU are left free"
    )
    second = "no machine of up to 64 is large enough" if enough is None else f"the smallest that fits has {enough}"
    sentence = f"{first}; {second}."
    if fits:
        return sentence
    return (
        f"{sentence} On {have} {', '.join(others)} would fit." if others else f"{sentence} No other strategy would fit either."
    )


def plan_numbers(plan: Plan, machine: Machine, enough: int | None, others: Sequence[str]) -> dict[str, Any]:
    """All of it as plain values, in bytes."""
    return {
        **asdict(plan),
        "peak": plan.peak,
        "machine": asdict(machine),
        "fits": machine.holds(plan.peak),
        "smallest": enough,
        "strategies_that_fit": list(others),
    }
