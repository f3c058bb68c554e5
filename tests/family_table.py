"""Table of test outcomes by teacher family: `pytest --family-table FILE` writes it into a Markdown file."""

from pathlib import Path

import pytest

COLUMNS = {
    "identity": "test_new_student_equals_the_teacher_for_every_interval",
    "derivative": "test_time_derivative_equals_finite_differences",
    "ZeRO-3": "test_sharded_training_equals_one_process[{}-deepspeed_stage_3]",
    "FSDP2": "test_sharded_training_equals_one_process[{}-fsdp2]",
    "LoRA": "test_lora_student_shares_the_weights_and_equals_the_teacher_at_first",
    "export": "test_training_resumes_and_its_export_samples_equally_in_another_process",
}
"""Tests by column of the table."""
SIGNS = {"passed": "yes", "failed": "**no**"}
BEGIN, END = "<!-- what families have passed -->", "<!-- end -->"


class FamilyTable:
    """Collects the outcomes of tests by family, and writes the table at the end of a session.

    Args:
        path: Markdown file with a marked table.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.outcomes: dict[tuple[str, str], str] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when != "call" or "[" not in report.nodeid:
            return
        name, parameters = report.nodeid.rpartition("::")[2].removesuffix("]").split("[")
        family = parameters.split("-")[0]
        for column, test in COLUMNS.items():
            expected = test.format(family) if "{}" in test else test
            if (f"{name}[{parameters}]" if "{}" in test else name) == expected:
                before = self.outcomes.get((family, column), "passed")
                self.outcomes[family, column] = report.outcome if before == "passed" else before

    def pytest_sessionfinish(self) -> None:
        if missing := COLUMNS.keys() - {column for _, column in self.outcomes}:
            raise pytest.UsageError(f"no test of {', '.join(sorted(missing))} was executed; {self.path} is unchanged")
        families = list(dict.fromkeys(family for family, _ in self.outcomes))
        lines = [f"| tiny pipeline | {' | '.join(COLUMNS)} |", f"|---|{'---|' * len(COLUMNS)}"]
        for family in sorted(families):
            signs = [SIGNS.get(self.outcomes.get((family, column), ""), "-") for column in COLUMNS]
            lines.append(f"| `{family}` | {' | '.join(signs)} |")
        text = self.path.read_text()
        start, stop = text.index(BEGIN) + len(BEGIN), text.index(END)
        self.path.write_text(f"{text[:start]}\n" + "\n".join(lines) + f"\n{text[stop:]}")
