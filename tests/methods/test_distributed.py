"""Training in two CPU processes with DDP."""

import json
from pathlib import Path

import pytest

from tests.preloaded import with_package
from tests.tiny import save_tiny_pipeline

ALIGNMENT = """
import json, sys
import torch
from lightning import Trainer, seed_everything
from torch.utils.data import DataLoader
from lightning_distill.methods import MeanFlow, TrajectoryAlignment
from tests.methods.gaussian_adapter import GaussianAdapter
from tests.methods.gaussian_runs import VALIDATION, GaussianImages

solution, out = sys.argv[1:]
seed_everything(0)
module = MeanFlow(
    GaussianAdapter("small", teacher="small"), validation=VALIDATION, solution=solution, ema_decay=0.9,
    alignment=TrajectoryAlignment(critic_lr=1e-2), optimizer=lambda p: torch.optim.Adam(p, lr=1e-2),
)
trainer = Trainer(
    default_root_dir=out, max_steps=3, accelerator="cpu", devices=2, strategy="ddp", logger=False, enable_checkpointing=False,
    enable_progress_bar=False, enable_model_summary=False, gradient_clip_val=1.0,
)
trainer.fit(module, DataLoader(GaussianImages(), batch_size=8), DataLoader(GaussianImages(), batch_size=8))
sums = {name: sum(p.double().sum().item() for p in network.parameters())
        for name, network in (("student", module.student), ("critic", module.alignment.critic), ("ema", module.ema))}
sums["next"] = torch.rand(()).item()
with open(f"{out}/rank{trainer.global_rank}.json", "w") as file:
    json.dump(sums, file)
"""

LORA = """
import json, sys
import torch
from lightning import Trainer
from torch.utils.data import DataLoader
from tests.methods.test_lora import method
from tests.tiny import PROMPTS

teacher, out = sys.argv[1:]
module = method(teacher)  # equal weights in both processes; the noise differs
trainer = Trainer(
    default_root_dir=out, max_steps=3, accelerator="cpu", devices=2, strategy="ddp", logger=False, enable_checkpointing=False,
    enable_progress_bar=False, enable_model_summary=False, gradient_clip_val=1.0,
)
torch.manual_seed(trainer.global_rank)
data = [{"image": torch.rand(3, 32, 32), "prompt": PROMPTS[i % 3], "index": i} for i in range(12)]
before = {name: value.clone() for name, value in module.teacher.state_dict().items()}
trainer.fit(module, DataLoader(data, batch_size=2))
assert all(torch.equal(value, before[name]) for name, value in module.teacher.state_dict().items())
networks = {"student": module.student, "critic": module.alignment.critic, "ema": module.ema.module}
assert all(network.proj_out.weight is module.teacher.proj_out.weight for network in networks.values())
sums = {name: sum(p.double().sum().item() for p in network.parameters()) for name, network in networks.items()}
sums["next"] = torch.rand(()).item()
with open(f"{out}/rank{trainer.global_rank}.json", "w") as file:
    json.dump(sums, file)
"""

DISCRIMINATOR = """
import json, sys
import torch
from lightning import Trainer
from torch.utils.data import DataLoader
from lightning_distill.methods import DMD2, LADD, CriticGan
from tests.methods.gaussian_adapter import GaussianAdapter
from tests.methods.gaussian_runs import VALIDATION, GaussianImages

kind, out = sys.argv[1:]
settings = {"DMD2": {"gan": CriticGan(hidden=8), "critic_lr": 1e-2}, "LADD": {"hidden": 8, "real": "data"}}[kind]
module = {"DMD2": DMD2, "LADD": LADD}[kind](
    GaussianAdapter("small"), validation=VALIDATION, ema_decay=0.9, optimizer=lambda p: torch.optim.Adam(p, lr=1e-2), **settings
)
trainer = Trainer(
    default_root_dir=out, max_steps=3, accelerator="cpu", devices=2, strategy="ddp", logger=False, enable_checkpointing=False,
    enable_progress_bar=False, enable_model_summary=False, gradient_clip_val=1.0,
)
torch.manual_seed(7)  # equal random weights in both processes
module.prepare_data()
module.configure_model()
start = sum(p.double().sum().item() for p in module.heads.parameters())
torch.manual_seed(trainer.global_rank)
trainer.fit(module, DataLoader(GaussianImages(), batch_size=8))
paths = {"student": "networks.student", "ema": "networks.ema", **{path: path for path in module.auxiliary.paths}}
networks = {name: module.get_submodule(path) for name, path in paths.items()}
sums = {name: sum(p.double().sum().item() for p in network.parameters()) for name, network in networks.items()}
assert sums["heads"] != start
sums["next"] = torch.rand(()).item()
with open(f"{out}/rank{trainer.global_rank}.json", "w") as file:
    json.dump(sums, file)
"""


@pytest.mark.parametrize("kind", [pytest.param("DMD2", marks=pytest.mark.slow), "LADD"])
def test_discriminator_heads_stay_equal_in_two_processes(kind: str, tmp_path: Path) -> None:
    assert_equal_in_two_processes(DISCRIMINATOR, kind, tmp_path)


@pytest.mark.parametrize("solution", ["discrete", "differential"])
def test_networks_stay_equal_in_two_processes_with_alignment(solution: str, tmp_path: Path) -> None:
    assert_equal_in_two_processes(ALIGNMENT, solution, tmp_path)


@pytest.mark.slow
def test_lora_networks_stay_equal_in_two_processes(tmp_path: Path) -> None:
    assert_equal_in_two_processes(LORA, save_tiny_pipeline(tmp_path / "teacher", guidance_embeds=True), tmp_path)


def assert_equal_in_two_processes(code: str, argument: str, tmp_path: Path) -> None:
    script = tmp_path / "run.py"
    script.write_text(code)
    with_package().run([script, argument, tmp_path], tmp_path, processes=2)
    first, second = (json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in (0, 1))
    assert first.pop("next") != second.pop("next")  # times and noise differ between processes
    assert first == pytest.approx(second, abs=1e-9)
    assert first["student"] != first["ema"]
