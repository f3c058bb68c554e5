import warnings
from pathlib import Path

import pytest
import torch
import yaml
from lightning.pytorch.callbacks import Checkpoint, LambdaCallback

from lightning_distill.callbacks.random_state import RandomState
from lightning_distill.callbacks.termination import JointTermination
from lightning_distill.commands.main import main
from lightning_distill.commands.training import DEFAULT_CALLBACKS, DistillCLI
from tests.toy import read_losses

BASE = """
trainer:
  accelerator: cpu
  max_steps: 3
  logger: false
  default_root_dir: run
  enable_progress_bar: false
  enable_model_summary: false
  limit_val_batches: 0
  callbacks:
  - class_path: AtomicCheckpoint
    init_args: {dirpath: "${trainer.default_root_dir}/checkpoints", every_n_train_steps: 1}
data:
  class_path: ShapesData
  init_args: {size: 32, batch_size: "${model.init_args.width}", prompts_per_category: 1}
"""
TOP = """
base: base.yaml
model:
  class_path: tests.toy.ToyModule
  init_args: {width: 4, losses: losses.jsonl}
data:
  init_args: {size: 40}
"""


@pytest.fixture(autouse=True)
def work(tmp_path, monkeypatch) -> Path:
    """Working directory with `top.yaml` and its base `base.yaml`."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "base.yaml").write_text(BASE)
    (tmp_path / "top.yaml").write_text(TOP)
    return tmp_path


def printed_config(capsys, *arguments: str) -> dict:
    with pytest.raises(SystemExit) as end:
        main(["fit", *arguments, "--print_config"])
    assert end.value.code == 0
    return yaml.safe_load(capsys.readouterr().out)


def error_line(capsys, *arguments: str, code: int = 2) -> str:
    """Error line of a run that exits with a code."""
    with pytest.raises(SystemExit) as end:
        main(list(arguments))
    assert end.value.code == code
    errors = capsys.readouterr().err
    assert "Traceback" not in errors
    assert "usage:" not in errors
    return errors[errors.index("error: ") :]


def test_configs_override_their_bases_and_arguments_override_configs(capsys):
    config = printed_config(capsys, "--config", "top.yaml", "--model.width=8", "--trainer.max_steps=7")
    assert config["trainer"]["max_steps"] == 7
    assert config["trainer"]["logger"] is False
    assert config["model"]["init_args"]["width"] == 8
    assert config["data"]["init_args"] | {"size": 40, "batch_size": 8} == config["data"]["init_args"]
    assert config["seed_everything"] == 0


def test_class_names_without_modules(capsys):
    config = printed_config(capsys, "--config", "top.yaml", "--trainer.callbacks+=RandomState")
    assert config["data"]["class_path"].startswith("lightning_distill.data")
    names = [callback["class_path"].rpartition(".")[2] for callback in config["trainer"]["callbacks"]]
    assert names == ["AtomicCheckpoint", "RandomState"]


@pytest.mark.parametrize("key", ["student.lora", "init_args.student.lora"])
def test_null_on_the_command_line_is_none_at_any_depth(capsys, key):
    config = printed_config(capsys, "--config", "flux_meanflow_lora.yaml", f"--model.{key}=null", "--model.ema_decay=null")
    assert config["model"]["init_args"]["student"]["lora"] is None
    assert config["model"]["init_args"]["ema_decay"] is None


def test_printed_configs_are_valid_configs(capsys, work):
    first = printed_config(capsys, "--config", "top.yaml")
    (work / "again.yaml").write_text(yaml.safe_dump(first))
    assert printed_config(capsys, "--config", "again.yaml") == first


def test_fit_has_the_default_callbacks():
    cli = DistillCLI(["fit", "--config", "top.yaml"])
    assert len(read_losses("losses.jsonl")) == 3
    kinds = [type(callback) for callback in cli.trainer.callbacks]
    assert all(kinds.count(kind) == 1 for kind in DEFAULT_CALLBACKS)


def test_a_signal_ends_the_run_after_the_callbacks_of_the_step():
    cli = DistillCLI(["fit", "--config", "top.yaml", "--trainer.callbacks+=LambdaCallback"])
    kinds = [type(callback) for callback in cli.trainer.callbacks if not isinstance(callback, Checkpoint)]
    assert kinds.index(JointTermination) > kinds.index(LambdaCallback)


def test_a_default_callback_in_the_settings_is_not_duplicated():
    cli = DistillCLI(["fit", "--config", "top.yaml", "--trainer.callbacks+=RandomState"])
    assert [type(callback) for callback in cli.trainer.callbacks].count(RandomState) == 1


def test_options_before_the_subcommand(capsys, work):
    (work / "outer.yaml").write_text("fit: {trainer: {max_steps: 7}}\n")
    with pytest.raises(SystemExit):
        main(["--config", "outer.yaml", "fit", "--config", "top.yaml", "--trainer.max_epochs=5", "--print_config"])
    trainer = yaml.safe_load(capsys.readouterr().out)["trainer"]
    assert (trainer["max_steps"], trainer["max_epochs"]) == (3, 5)


@pytest.mark.parametrize("command", ["validate", "test"])
def test_evaluation_reads_the_config_of_fit(command):
    main(["fit", "--config", "top.yaml"])
    arguments = [command, "--config", "top.yaml", "--trainer.limit_val_batches=1", "--ckpt_path=last"]
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*other settings")
        main(arguments)
    with pytest.warns(UserWarning, match=r"other settings of the model: model.lr 0.5 \(checkpoint: 0.01\)"):
        main([*arguments, "--model.lr=0.5"])


def test_ckpt_path_last_without_a_checkpoint_raises(capsys, work):
    error = error_line(capsys, "fit", "--config", "top.yaml", "--ckpt_path=last")
    assert error == (
        f"error: ckpt_path is 'last', but there is no last checkpoint in {work / 'run' / 'checkpoints'}; "
        "remove ckpt_path to start from the first step, or set it to the file of a checkpoint\n"
    )
    assert not (work / "losses.jsonl").exists()


@pytest.mark.parametrize(("path", "searched"), [("last", "no last checkpoint in"), ("hpc", "has no hpc_ckpt_")])
def test_evaluation_without_a_checkpoint_does_not_start_from_the_first_step(capsys, path, searched):
    error = error_line(capsys, "test", "--config", "top.yaml", f"--ckpt_path={path}")
    assert searched in error
    assert error.endswith("; set it to the file of a checkpoint, or trainer.default_root_dir to the directory of a run\n")


def test_ckpt_path_best_in_a_new_process_raises(capsys):
    assert "ckpt_path is 'best', which only the training process knows" in error_line(
        capsys, "validate", "--config", "top.yaml", "--ckpt_path=best"
    )


def test_a_missing_checkpoint_raises(capsys):
    error = error_line(capsys, "fit", "--config", "top.yaml", "--ckpt_path=nothing.ckpt")
    assert error == "error: ckpt_path 'nothing.ckpt' does not exist; set it to an existing checkpoint, or remove ckpt_path\n"


def test_a_truncated_checkpoint_raises(capsys):
    main(["fit", "--config", "top.yaml"])
    content = Path("run/checkpoints/last.ckpt").read_bytes()
    Path("truncated.ckpt").write_bytes(content[: len(content) // 2])
    error = error_line(capsys, "fit", "--config", "top.yaml", "--ckpt_path=truncated.ckpt")
    assert "ckpt_path 'truncated.ckpt' is damaged" in error


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config", "none.yaml"], "config 'none.yaml' is neither a file"),
        (["--config", "top.yaml", "--model.lr=-1"], "model.lr is -1.0; set the learning rate to 0 or more"),
        (["--config", "top.yaml", "--data.size=2"], "data.batch_size 4 is larger than data.size 2"),
        (["--config", "top.yaml", "--data.sise=2"], "data.sise is not a setting of ShapesData; did you mean size?"),
        (["--config", "top.yaml", "--model.width=wide"], "model.width is 'wide'; set it to an integer"),
        (
            ["--config", "top.yaml", "--trainer.strategy=dpp"],
            "trainer.strategy is 'dpp', which does not exist; did you mean ddp?",
        ),
        (["--config", "top.yaml", "--trainer.profiler=none"], "the settings of the trainer are invalid, or unsupported"),
        (["--config", "top.yaml", "--trainer.max_step=4"], "trainer.max_step is not a setting; did you mean max_steps?"),
        (["--config", "top.yaml", "--trainer.max_steps=-2"], "trainer.max_steps is -2; set it to an integer of at least -1"),
        (["--config", "top.yaml", "--trainer.default_root_dir=${oc.env:NOWHERE}"], "the environment variable NOWHERE, which"),
        (["--config", "top.yaml", "--seed_everything=-1"], "seed_everything is -1; set it to an integer from 0 to"),
        (
            ["--config", "top.yaml", "--trainer.callbacks+=ModelCheckpoint", "--trainer.callbacks.save_top_k=-5"],
            "ModelCheckpoint does not accept its settings (Invalid value for save_top_k=-5. Must be >= -1); correct them",
        ),
        ([], "data and model are not set; give --config with a file or the name of a shipped config"),
        (["--data=ShapesData"], "model is not set; give --config"),
        (
            ["--config", "top.yaml", "--trainer.default_root_dir=${trainer.default_root_dir}"],
            "trainer.default_root_dir refers to",
        ),
        (["--config", "top.yaml", "--trainer.default_root_dir=$NOWHERE/x"], "trainer.default_root_dir is '$NOWHERE/x', but"),
        (["--config", "top.yaml", "--trainer.max_steps=${data.seizes}"], "trainer.max_steps refers to ${data.seizes}, which"),
        (
            ["--config", "top.yaml", "--trainer.devices=1000", "--trainer.strategy=ddp"],
            "trainer.devices is 1000, the number of",
        ),
        (
            ["--config", "top.yaml", "--trainer.callbacks+", "EarlyStopping"],
            "trainer.callbacks.monitor is not set, and EarlyStop",
        ),
        (
            ["--config", "top.yaml", "--model=broken_module.Own"],
            "model is 'broken_module.Own', but its module cannot be imported (",
        ),
        (["--config", "shapes_meanflow.yaml", "--model.guidance.scale=-1"], "error: model.guidance.scale is -1.0; set it to 0"),
        (
            ["--config", "shapes_meanflow.yaml", "--model.validation.nfe=[2,2]"],
            "error: model.validation.nfe is [2, 2]; give each",
        ),
        (
            ["--config", "shapes_meanflow.yaml", "--model.adapter.pretrained=nowhere"],
            "error: model.adapter.pretrained is 'nowhere'",
        ),
        (["--config", "top.yaml", "more"], "unrecognized arguments: more"),
        (["--config", "top.yaml", "--trainer.val_check_interval=0"], "trainer.val_check_interval is 0; set it to at least"),
        (
            ["--config", "top.yaml", "--ckpt_path=sharded"],
            "ckpt_path 'sharded' is a directory, as of a sharded strategy; set trainer.strategy to that strategy",
        ),
        (["--config", "top.yaml", "--model.lr=fast"], "fast"),
        (["--config", "twice.yaml"], "config twice.yaml has the key 'model' twice, again in line 2; remove one of them"),
    ],
)
def test_invalid_settings_are_one_line_before_training(capsys, work, arguments, message):
    (work / "twice.yaml").write_text("model: ToyModule\nmodel: ToyModule\n")
    (work / "broken_module.py").write_text("class Own(:\n    pass\n")
    (work / "sharded").mkdir()
    error = error_line(capsys, "fit", *arguments)
    assert message in error
    assert error.count("\n") == 1
    assert not (work / "losses.jsonl").exists()


def test_learning_rate_monitor_is_removed_without_a_logger(work):
    (work / "monitored.yaml").write_text("base: top.yaml\ntrainer:\n  callbacks+: [LearningRateMonitor]\n")
    main(["fit", "--config", "monitored.yaml"])
    assert len(read_losses(work / "losses.jsonl")) == 3


def test_a_nan_loss_exits_with_code_1(capsys):
    error = error_line(capsys, "fit", "--config", "top.yaml", "--model.break_at=1", code=1)
    assert error.startswith("error: the loss became nan at step 1; ")
    assert torch.load("run/checkpoints/last.ckpt", weights_only=False)["global_step"] == 1


def test_other_errors_have_a_traceback(monkeypatch):
    def broken(*arguments):
        raise ValueError("a bug")

    monkeypatch.setattr("tests.toy.ToyModule.training_step", broken)
    with pytest.raises(ValueError, match="a bug"):
        main(["fit", "--config", "top.yaml"])
