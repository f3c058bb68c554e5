"""A table of what each family has passed, from the suite's own outcomes: `pytest --family-table FILE`."""

from pathlib import Path

import pytest

COLUMNS = {
    "identity": "test_a_new_student_is_the_teacher_for_every_interval",
    "derivative": "test_its_derivative_is_the_limit_of_differences",
    "ZeRO-3": "test_it_trains_spread_over_two_processes[{}-deepspeed_stage_3]",
    "FSDP2": "test_it_trains_spread_over_two_processes[{}-fsdp2]",
    "LoRA": "test_a_lora_student_is_the_teacher_on_the_teachers_own_weights",
    "export": "test_a_run_trains_resumes_and_draws_the_same_elsewhere",
}
SIGNS = {"passed": "yes", "failed": "**no**"}
BEGIN, END = "<!-- what families have passed -->", "<!-- end -->"


class FamilyTable:
    """Collects outcomes by family, and writes them at the end of a session."""

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
        families = list(dict.fromkeys(family for family, _ in self.outcomes))
        lines = [f"| tiny pipeline | {' | '.join(COLUMNS)} |", f"|---|{'---|' * len(COLUMNS)}"]
        for family in sorted(families):
            signs = [SIGNS.get(self.outcomes.get((family, column), ""), "-") for column in COLUMNS]
            lines.append(f"| `{family}` | {' | '.join(signs)} |")
        text = self.path.read_text()
        start, stop = text.index(BEGIN) + len(BEGIN), text.index(END)
        self.path.write_text(f"{text[:start]}\n" + "\n".join(lines) + f"\n{text[stop:]}")
