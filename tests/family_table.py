"""Table of test outcomes by teacher family: `pytest --family-table FILE` updates it in a Markdown file."""

from pathlib import Path

import pytest

COLUMNS = {
    "identity": ("test_new_student_equals_the_teacher_for_every_interval",),
    "derivative": ("test_time_derivative_equals_finite_differences",),
    "ZeRO-3": ("test_sharded_training_equals_one_process[{}-deepspeed_stage_3]",),
    "FSDP2": ("test_sharded_training_equals_one_process[{}-fsdp2]",),
    "LoRA": ("test_lora_student_shares_the_weights_and_equals_the_teacher_at_first",),
    "any_step": ("test_training_resumes_and_its_export_samples_equally_in_another_process",),
    "stock": (
        "test_stock_pipeline_samples_equal_the_student",
        "test_exports_in_bfloat16_are_as_accurate_as_the_student[{}-stock-1]",
        "test_exports_in_bfloat16_are_as_accurate_as_the_student[{}-stock-4]",
    ),
    "lora": (
        "test_lora_file_on_the_base_samples_equal_the_student",
        "test_exports_in_bfloat16_are_as_accurate_as_the_student[{}-lora-4]",
    ),
    "comfyui": ("test_loaded_file_equals_merged_weights[{}-comfyui]",),
    "kohya": ("test_loaded_file_equals_merged_weights[{}-kohya]",),
    "single_file": ("test_the_file_is_read_back_bit_by_bit", "test_flux_is_read_back_bit_by_bit"),
}
"""Tests by column of the table; a family has to pass all of them that it takes part in."""
SIGNS = {"passed": "yes", "failed": "**no**", "skipped": "-"}
BEGIN, END = "<!-- what families have passed -->", "<!-- end -->"


class FamilyTable:
    """Collects the outcomes of tests by family, and updates the table at the end of a session.

    Cells of tests that the session did not run keep their contents.

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
        for column, tests in COLUMNS.items():
            if {name, f"{name}[{parameters}]"} & {test.format(family) for test in tests}:
                before = self.outcomes.get((family, column), "passed")
                self.outcomes[family, column] = report.outcome if before == "passed" else before

    def pytest_sessionfinish(self) -> None:
        if not self.outcomes:
            raise pytest.UsageError(f"no test of the table was executed; {self.path} is unchanged")
        text = self.path.read_text()
        start, stop = text.index(BEGIN) + len(BEGIN), text.index(END)
        cells = read_table(text[start:stop]) | {key: SIGNS[outcome] for key, outcome in self.outcomes.items()}
        lines = [f"| tiny pipeline | {' | '.join(COLUMNS)} |", f"|---|{'---|' * len(COLUMNS)}"]
        for family in sorted({family for family, _ in cells}):
            lines.append(f"| `{family}` | {' | '.join(cells.get((family, column), '-') for column in COLUMNS)} |")
        self.path.write_text(f"{text[:start]}\n" + "\n".join(lines) + f"\n{text[stop:]}")


def read_table(text: str) -> dict[tuple[str, str], str]:
    """Cells of a Markdown table by row and column."""
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.strip().splitlines()]
    header, _, *body = rows
    return {(row[0].strip("`"), column): cell for row in body for column, cell in zip(header[1:], row[1:], strict=True)}
