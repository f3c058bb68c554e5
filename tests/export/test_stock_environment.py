"""Stock pipelines and LoRA files load without this package: with its import blocked, and in a fresh environment."""

import json
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from lightning_distill.export.card import ModelCard
from lightning_distill.export.formats import PlannedExport
from lightning_distill.export.students import export_student
from lightning_distill.teachers.student_options import LoraOptions, StudentOptions
from tests.preloaded import with_diffusers
from tests.processes import ROOT, clean_environment, run_isolated
from tests.tiny import PROMPTS, load_adapter, perturb_weights, sample_images, save_tiny_pipeline

CARD = ModelCard("MeanFlow", "tiny", (1, 2, 4), 32, 32)
STOCK = [PlannedExport("stock", nfe) for nfe in (1, 2, 4)]
LORA = [PlannedExport("lora", nfe) for nfe in (1, 2)]
UNREACHABLE = (
    r"(Failed to establish a new connection|Temporary failure in name resolution|No matching distribution found)[^\n]*"
)
"""Errors of pip without an index of packages."""

ABSENT = """
import importlib.util
found = [name for name in ("lightning", "pytorch_lightning", "lightning_distill") if importlib.util.find_spec(name)]
assert not found, found
"""
# Arguments: prompts, the base model, and exports, each of whose images are written beside it.
SAMPLE = """
import json, sys
sys.modules.update(dict.fromkeys(["lightning", "lightning_distill", "pytorch_lightning", "lightning_fabric"]))  # not importable
from pathlib import Path
import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler
prompts, base, *exports = json.loads(sys.argv[1]), *sys.argv[2:]
for export in exports:
    mark = json.loads(Path(export, "export.json").read_text())
    pipeline = DiffusionPipeline.from_pretrained(export if mark["kind"] == "stock" else base)
    if mark["kind"] == "lora":
        pipeline.load_lora_weights(export, weight_name="pytorch_lora_weights.safetensors")
        pipeline.scheduler = FlowMatchEulerDiscreteScheduler.from_config(mark["scheduler"]["config"])
    pipeline.set_progress_bar_config(disable=True)
    generators = [torch.Generator().manual_seed(i) for i in range(len(prompts))]
    size = {"height": mark["height"], "width": mark["width"], "num_inference_steps": mark["nfe"][0]}
    images = pipeline(prompt=prompts, generator=generators, output_type="pt", **size, **mark["arguments"]).images
    torch.save(images, export + ".pt")
"""


def perturb_trained(student: nn.Module) -> nn.Module:
    """Add noise to LoRA and time embedders."""
    with torch.no_grad():
        for parameter in student.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn_like(parameter))
    return student


class Exports:
    """A base model, a student without LoRA as stock pipelines, a LoRA student as LoRA files, and the images of both.

    Args:
        directory: Where they are written.
    """

    def __init__(self, directory: Path) -> None:
        torch.manual_seed(0)
        self.directory = directory
        self.base = save_tiny_pipeline(directory / "tiny", scheduler={"shift": 2.0})
        self.images: dict[str, Tensor] = {}
        adapter = load_adapter(self.base)
        for planned, lora, change in ((STOCK, None, perturb_weights), (LORA, LoraOptions(rank=2), perturb_trained)):
            student = change(adapter.build_student(adapter.load_teacher(), StudentOptions(lora=lora))[0]).eval()
            export_student(adapter, student, directory / planned[0].format, CARD, planned)
            for each in planned:
                path = directory / each.format / each.folder
                assert not list(path.rglob("*.py"))
                assert each.nfe is not None
                self.images[str(path)] = sample_images(adapter, student, PROMPTS, each.nfe)
        (directory / "sample.py").write_text(SAMPLE)

    def arguments(self, kind: str) -> list[str]:
        """Arguments of Python that sample with the exports of a kind."""
        return ["sample.py", json.dumps(PROMPTS), self.base, *self._paths(kind)]

    def check(self, kind: str) -> None:
        """Compare the images of the exports of a kind with the student's."""
        for path in self._paths(kind):
            expected = self.images[path]
            assert expected.std() > 1e-3
            torch.testing.assert_close(torch.load(f"{path}.pt"), expected, rtol=0, atol=1e-5)

    def _paths(self, kind: str) -> list[str]:
        return [path for path in self.images if Path(path).parent.name == kind]


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory) -> Exports:
    return Exports(tmp_path_factory.mktemp("exports"))


@pytest.mark.parametrize("kind", ["stock", "lora"])
def test_exports_load_with_this_package_and_lightning_blocked(kind: str, exports: Exports) -> None:
    with_diffusers().run(exports.arguments(kind), exports.directory)
    exports.check(kind)


@pytest.fixture(scope="module")
def fresh_python(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., None]]:
    """Runs Python in a new virtual environment, which has nothing but pip at first."""
    directory = tmp_path_factory.mktemp("fresh") / "environment"
    run_isolated(["-m", "venv", directory], directory.parent)
    environment = {name: value for name, value in clean_environment().items() if name != "PYTHONPATH"}

    def run(*command: str, cwd: Path) -> None:
        run_isolated(command, cwd, environment=environment, timeout=900, python=directory / "bin" / "python")

    yield run
    shutil.rmtree(directory)  # more than a gigabyte


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.skipif(sys.platform == "win32", reason="other layout of virtual environments")
def test_exports_load_in_a_fresh_environment(exports: Exports, fresh_python: Callable[..., None]) -> None:
    """The stock pipelines with torch, diffusers and transformers alone; LoRA with peft as well."""
    for kind, packages in {"stock": ["torch", "diffusers", "transformers"], "lora": ["peft"]}.items():
        install = ["-m", "pip", "install", "--quiet", "-c", str(ROOT / "constraints.txt"), *packages]
        try:
            fresh_python(*install, cwd=exports.directory)
        except AssertionError as error:
            if found := re.search(UNREACHABLE, str(error)):
                pytest.skip(f"pip reaches no index: {found[0]}")
            raise
        fresh_python("-c", ABSENT, cwd=exports.directory)
        fresh_python(*exports.arguments(kind), cwd=exports.directory)
        exports.check(kind)
