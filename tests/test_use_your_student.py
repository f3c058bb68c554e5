"""The page on using students and the README's exports: commands and code run in order, on a tiny pipeline as FLUX.1-dev."""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from diffusers import DiffusionPipeline
from safetensors.torch import save_file

from lightning_distill.commands.main import main
from lightning_distill.export.formats import FORMATS
from lightning_distill.export.mark import ExportMark
from lightning_distill.students.two_time import TwoTimeEmbedding
from lightning_distill.teachers.families import FAMILIES as KNOWN
from tests.processes import ROOT
from tests.teachers.tiny_families import FAMILIES
from tests.tiny import FLUX_DEV_SHIFT, save_tiny_pipeline

TEXT = (ROOT / "docs" / "use_your_student.md").read_text().replace("a lighthouse at dawn", "a red circle")  # known words
BASE = "black-forest-labs/FLUX.1-dev"
EXPORTS = (ROOT / "README.md").read_text().split("## Exports\n")[1].split("\n## ")[0]
BLOCKS = re.findall(r"(?:<!-- (needs torchao) -->\n)?```(python|bash)\n(.*?)```", EXPORTS + TEXT, flags=re.DOTALL)


def tiny_run(name: str, lora: dict[str, Any] | None) -> None:
    """Train for two steps, as the config of this name does for longer."""
    model = {
        "adapter": {"init_args": {"pretrained": BASE}},
        "student": {"max_drift": 10.0, "lora": lora},
        "guidance": {"kind": "embedded", "scale": 3.5},
        "ema_decay": 0.5,
        "lr_scheduler": None,
        "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 1e-2}},
        "metric": None,
        "validation": {"nfe": [1, 4], "average_velocity": False},
    }
    checkpoints = {"dirpath": f"runs/{name}/checkpoints", "every_n_train_steps": 2}
    config = {
        "base": "shapes_student.yaml",
        "model": {"class_path": "MeanFlow", "init_args": model},
        "data": {"init_args": {"size": 8, "batch_size": 4, "prompts_per_category": 1}},
        "trainer": {
            "accelerator": "cpu",
            "max_steps": 2,
            "limit_val_batches": 1,
            "logger": False,
            "enable_progress_bar": False,
            "default_root_dir": f"runs/{name}",
            "callbacks": [{"class_path": "AtomicCheckpoint", "init_args": checkpoints}, {"class_path": "ExportPipeline"}],
        },
    }
    Path(f"{name}.yaml").write_text(yaml.safe_dump(config))
    main(["fit", "--config", f"{name}.yaml"])


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A working directory with the base, a run with and one without LoRA, and a style."""
    with pytest.MonkeyPatch.context() as patch:
        directory = tmp_path_factory.mktemp("workspace")
        patch.chdir(directory)
        torch.manual_seed(0)
        save_tiny_pipeline(Path(BASE), guidance_embeds=True, scheduler=FLUX_DEV_SHIFT)
        Path("FLUX.1-dev").symlink_to(BASE)  # the card of a local base has the last part of its path
        # These layers are in ComfyUI's names at any width.
        tiny_run("flux_meanflow_lora", {"rank": 2, "targets": ["attn.to_out.0", "ff.net.2"]})
        tiny_run("flux_meanflow", None)
        layer = "transformer.transformer_blocks.0.attn.to_q"
        save_file(
            {f"{layer}.lora_A.weight": torch.randn(2, 64), f"{layer}.lora_B.weight": torch.randn(64, 2)}, "my_style.safetensors"
        )
        yield directory


def execute(code: str, names: dict[str, Any]) -> None:
    """Run code with images of the size of the tiny base."""
    exec(code.replace("512", "32"), names)
    assert names["image"].size == (32, 32)


def test_commands_and_code_run_in_order(workspace: Path) -> None:
    names: dict[str, Any] = {}
    for condition, language, block in BLOCKS:
        if language == "python" and not condition:
            execute(block, names)
        elif language == "bash":
            for line in block.replace("\\\n", " ").strip().splitlines():
                python, option, package, *arguments = shlex.split(line)
                assert (python, option, package) == ("python", "-m", "lightning_distill")
                if "--push_to_hub" not in arguments:
                    main(arguments)
    assert {path.name for path in Path("student").iterdir() if path.is_dir()} == {
        "any_step",
        "lora_1",
        "lora_4",
        "stock_1",
        "stock_4",
    }
    assert ExportMark.read(Path("for_comfyui")).kind == "comfyui"
    assert all(Path(f"{name}.png").is_file() for name in "xyz")


def test_code_for_quantised_bases_runs(workspace: Path) -> None:
    pytest.importorskip("torchao.quantization", reason='pip install -c constraints.txt -e ".[8bit]"')
    (code,) = (block for condition, _, block in BLOCKS if condition)
    execute(code, {})


def test_formats_are_those_of_the_package() -> None:
    table = TEXT.split("| format |")[1].split("\n\n")[0]
    assert set(re.findall(r"`(\w+)`", table)) >= set(FORMATS)


def test_named_embedders_are_those_of_the_families() -> None:
    """Modules that have to stay out of quantisation."""
    (sentence,) = re.findall(r"keep the embedder out of\s+quantisation: (.*?)\.\s", TEXT, flags=re.DOTALL)
    named = set(re.findall(r"`(\w+)`", sentence))
    found: set[str] = set()
    for build in FAMILIES.values():
        pipeline: DiffusionPipeline = build()
        student = KNOWN[type(pipeline).__name__].network_class.from_config(pipeline.transformer.config)
        embedders = [name.split(".") for name, part in student.named_modules() if isinstance(part, TwoTimeEmbedding)]
        assert embedders
        assert all(named & {*parts} for parts in embedders), f"the page lacks {embedders}"
        found |= {each for parts in embedders for each in parts}
    assert named <= found
