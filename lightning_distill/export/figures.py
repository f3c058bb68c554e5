"""Measured figures of a model card, as Markdown tables."""

import re
from collections.abc import Mapping

_BY_STEPS = re.compile(r"(?P<measure>.+)/nfe_(?P<nfe>\d+)(?:/(?P<category>.+))?")


def figure_tables(figures: Mapping[str, float]) -> list[str]:
    """Lines of a table with a row for each number of steps, and of a second table of figures without one.

    Args:
        figures: Figures by name, such as "student/accuracy/nfe_4" or "val/prompt_accuracy/nfe_4/colors".
    """
    rows: dict[int, dict[str, float]] = {}
    others: dict[str, float] = {}
    for name, value in figures.items():
        if match := _BY_STEPS.fullmatch(name):
            column = "/".join(part for part in (match["measure"], match["category"]) if part)
            rows.setdefault(int(match["nfe"]), {})[column] = value
        else:
            others[name] = value
    lines: list[str] = []
    if rows:
        columns = sorted({column for row in rows.values() for column in row})
        lines += [f"| steps | {' | '.join(map(_title, columns))} |", "|---:|" + "---:|" * len(columns)]
        lines += [
            f"| {nfe} | {' | '.join(f'{row[column]:.4g}' if column in row else '' for column in columns)} |"
            for nfe, row in sorted(rows.items())
        ]
    if others:
        lines += [*([""] if lines else []), "| | |", "|---|---:|"]
        lines += [f"| {_title(name)} | {value:.4g} |" for name, value in sorted(others.items())]
    return lines


def _title(name: str) -> str:
    return name.removeprefix("val/").replace("/", ", ").replace("_", " ")
