import sys
from argparse import Action
from collections.abc import Sequence
from typing import Any

import pytest
import yaml

from lightning_distill.commands.config_files import shipped_configs
from lightning_distill.commands.diagnosis import Diagnosis
from lightning_distill.commands.training import DistillCLI

SHIPPED = ["--config", "shapes_meanflow.yaml"]


class _ParserBuiltError(Exception):
    """Carries the actions of the parser."""


@pytest.fixture(scope="module")
def actions() -> Sequence[Action]:
    """Actions of the parser of `fit`."""

    class ParserOnly(DistillCLI):
        def parse_arguments(self, parser: Any, args: Any) -> None:
            raise _ParserBuiltError(self._subcommand_parsers["fit"]._actions)

    with pytest.raises(_ParserBuiltError) as built:
        ParserOnly(["fit"])
    return built.value.args[0]


@pytest.mark.parametrize("config", shipped_configs())
def test_shipped_configs_have_no_fault(actions, config):
    fault = Diagnosis(actions, ["--config", config]).first_fault()
    assert fault is None or fault.startswith("model names no class")  # of bases, which are no complete configs


@pytest.mark.parametrize("config", ["shapes_meanflow.yaml", "shapes_dmd2.yaml", "flux_meanflow_lora.yaml"])
def test_valid_settings_have_no_fault(actions, config):
    overrides = ["--model.guidance.scale=3", "--trainer.callbacks+=RandomState", "--model.optimizer=torch.optim.SGD"]
    assert Diagnosis(actions, ["--config", config, *overrides]).first_fault() is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--model Meanflow", "model is 'Meanflow', which names no LightningModule; did you mean MeanFlow?"),
        ("--data=ImageFoldr", "data is 'ImageFoldr', which names no LightningDataModule; did you mean ImageFolder?"),
        ("--model.optimiser.lr 1e-4", "model.optimiser is not a setting of MeanFlow; did you mean optimizer?"),
        ("--data.batchsize 4", "data.batchsize is not a setting of ShapesData; did you mean batch_size?"),
        ("--trainer.max_step 4", "trainer.max_step is not a setting; did you mean max_steps?"),
        ("--trainer 4", "trainer is '4'; set its settings by name, such as trainer.accelerator"),
        ("--seed 4", "seed is not a setting; did you mean seed_everything?"),
        ("--model.optimizer Adamm", "model.optimizer is 'Adamm', which names no Optimizer; did you mean Adam?"),
        (
            "--model.optimizer=nowhere.Adam",
            "model.optimizer is 'nowhere.Adam', but there is no module nowhere; did you mean Adam?",
        ),
        ("--model.optimizer torch.optim.Admw", "which names no Optimizer; did you mean torch.optim.AdamW?"),
        ("--model TeacherStudentBase", "model is 'TeacherStudentBase', which does not define objective; define it, or choose"),
        (
            "--model.lr_scheduler StepLR",
            "model.lr_scheduler.step_size is not set, and StepLR needs it; set it to",
        ),
        (
            "--model.lr_scheduler.class_path CosineAnnealingLR",
            "model.lr_scheduler.T_max is not set, and CosineAnnealingLR needs it",
        ),
        ("--model.optimizer.lr 1e-4x", "model.optimizer.lr is '1e-4x'; set it to a number"),
        ("--model.ema_decay slow", "model.ema_decay is 'slow'; set it to a number or null"),
        ("--model.lr_scheduler WarmupCosin", "model.lr_scheduler is 'WarmupCosin', which names no "),
        ("--model.guidance.scal 2", "model.guidance.scal is not a setting of Guidance; did you mean scale?"),
        ("--model.guidance 2.0", "model.guidance is '2.0'; set the settings of Guidance by name: kind, scale, "),
        ("--model.student.lora.rnk 4", "model.student.lora.rnk is not a setting of LoraOptions; did you mean rank?"),
        ("--model.validation.nfe [a]", "model.validation.nfe is ['a']; set it to a list, each an integer"),
        (
            "--model.student.time_embedding smoth",
            "model.student.time_embedding is 'smoth'; did you mean smooth? Set it to one of ",
        ),
        ("--trainer.precision bf17", "trainer.precision is 'bf17'; did you mean bf16? Set it to one of 64, 32, 16, "),
        ("--seed_everything abc", "seed_everything is 'abc'; set it to true or false or an integer"),
        ("--trainer.callbacks+=SwichSolution", "which names no Callback; did you mean SwitchSolution?"),
        (
            "--trainer.callbacks+=ExportPipeline --trainer.callbacks.direktory out",
            "trainer.callbacks: ExportPipeline.direktory is not a setting of ExportPipeline; did you mean directory?",
        ),
        ("--trainer.deterministic maybe", "trainer.deterministic is 'maybe'; set it to one of warn, true or false or null"),
        ("--trainer.max_steps", "trainer.max_steps is null; set it to an integer"),
        ("--model.adapter null", "model.adapter is null; set it to a ModelAdapter"),
        ("--model.optimizer.betas [2]", "model.optimizer.betas is [2]; set it to a list of 2 values"),
        ("--trainer.callbacks+=EarlyStopping", "trainer.callbacks.monitor is not set, and EarlyStopping needs it"),
        ("--data ImageFolder", "data.directory is not set, and ImageFolder needs it; set it to a string"),
    ],
)
def test_a_fault_of_an_argument(actions, arguments, message):
    fault = Diagnosis(actions, [*SHIPPED, *arguments.split()]).first_fault()
    assert fault is not None
    assert message in fault
    assert "<class" not in fault


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"trainr": {"max_steps": 3}}, "trainr is not a setting; did you mean trainer?"),
        ({"model": [{"class_path": "MeanFlow"}]}, "model is a list; set it to one LightningModule, by its class_path"),
        (
            {"model": {"class_path": "MeanFlow", "init_args": {"solution": "discrete"}, "solver": "heun"}},
            "model.solver lies beside class_path; move it into model.init_args",
        ),
        ({"model": {"class_path": "MeanFlow", "init_arg": {}}}, "model.init_arg is neither class_path nor init_args"),
        ({"model": {"clas_path": "MeanFlow"}}, "model.clas_path is not a setting of MeanFlow; did you mean class_path?"),
        (
            {"model": {"init_args": {"optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"beta": [0.9, 0.99]}}}}},
            "model.optimizer.beta is not a setting of AdamW; did you mean betas?",
        ),
        (
            {"trainer": {"callbacks": [{"class_path": "SwitchSolution", "init_args": {"threshold": "low"}}]}},
            "trainer.callbacks: SwitchSolution.threshold is 'low'; set it to a number or null",
        ),
        (
            {"model": {"init_args": {"ema_decay": "${model.init_args.solution}"}}},
            "model.ema_decay is 'bootstrapped'; set it to a number or null",
        ),
    ],
)
def test_a_fault_of_a_config(actions, tmp_path, content, message):
    (tmp_path / "own.yaml").write_text(yaml.safe_dump({"base": "shapes_meanflow.yaml", **content}))
    fault = Diagnosis(actions, ["--config", str(tmp_path / "own.yaml")]).first_fault()
    assert fault is not None
    assert message in fault


@pytest.mark.parametrize(
    ("code", "fault"),
    [
        ("from torch import nothing", "its module cannot be imported (ImportError: cannot import name 'nothing' from 'torch' "),
        ("x = 1\nclass C(:\n", "its module cannot be imported (SyntaxError: invalid syntax, "),
        ("x = {}\nx['key']\n", "its module cannot be imported (KeyError: 'key', "),
        ("import nowhere\n", "its module cannot be imported (ModuleNotFoundError: No module named 'nowhere', "),
        (
            "from lightning_distill.methods import MeanFlow as Own\n",
            "which names no LightningModule; did you mean module_of_a_user.Own?",
        ),
    ],
)
def test_a_fault_of_a_module(actions, tmp_path, monkeypatch, code, fault):
    (tmp_path / "module_of_a_user.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "module_of_a_user", raising=False)
    message = Diagnosis(actions, [*SHIPPED, "--model", "module_of_a_user.Ownn"]).first_fault()
    monkeypatch.delitem(sys.modules, "module_of_a_user", raising=False)
    assert message is not None
    assert message.startswith(f"model is 'module_of_a_user.Ownn', but {fault}".replace("but which", "which"))
    assert "cannot" not in fault or f"{tmp_path / 'module_of_a_user.py'}, line {len(code.splitlines())}" in message
    assert "\n" not in message


def test_settings_of_an_earlier_class_are_no_fault(actions):
    assert Diagnosis(actions, [*SHIPPED, "--model", "FlowMatching", "--model.ema_decay=0.9"]).first_fault() is None


def test_a_class_without_a_name(actions):
    fault = Diagnosis(actions, ["--model.ema_decay=0.9"]).first_fault()
    assert fault is not None
    assert fault.startswith("model names no class; set model.class_path to ")
