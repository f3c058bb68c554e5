import os
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
import yaml
from lightning.pytorch import Trainer

from lightning_distill.callbacks.random_state import RandomState
from lightning_distill.commands.main import main
from lightning_distill.commands.training import ALWAYS, DistillCLI, warn_oversubscription
from tests.toy import read_losses

ROOT = Path(__file__).parents[2]
BASE = """
trainer:
  accelerator: cpu
  max_steps: 3
  logger: false
  enable_progress_bar: false
  enable_model_summary: false
  limit_val_batches: 0
  callbacks:
  - class_path: AtomicCheckpoint
    init_args: {dirpath: checkpoints, every_n_train_steps: 1}
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
    """A working directory with two configs, `top.yaml` on `base.yaml`."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "base.yaml").write_text(BASE)
    (tmp_path / "top.yaml").write_text(TOP)
    return tmp_path


def printed(capsys, *arguments: str) -> dict:
    with pytest.raises(SystemExit) as end:
        main(["fit", *arguments, "--print_config"])
    assert end.value.code == 0
    return yaml.safe_load(capsys.readouterr().out)


def refused(capsys, *arguments: str, code: int = 2) -> str:
    """What a command that must fail writes on stderr as its error."""
    with pytest.raises(SystemExit) as end:
        main(list(arguments))
    assert end.value.code == code
    errors = capsys.readouterr().err
    assert "Traceback" not in errors
    assert "usage:" not in errors
    return errors[errors.index("error: ") :]


def test_configs_build_on_each_other_and_the_command_line_comes_last(capsys):
    config = printed(capsys, "--config", "top.yaml", "--model.width=8", "--trainer.max_steps=7")
    assert config["trainer"]["max_steps"] == 7
    assert config["trainer"]["logger"] is False
    assert config["model"]["init_args"]["width"] == 8
    assert config["data"]["init_args"] | {"size": 40, "batch_size": 8} == config["data"]["init_args"]
    assert config["seed_everything"] == 0


def test_short_names_of_data_and_callbacks(capsys):
    config = printed(capsys, "--config", "top.yaml", "--trainer.callbacks+=RandomState")
    assert config["data"]["class_path"].startswith("lightning_distill.data")
    names = [callback["class_path"].rpartition(".")[2] for callback in config["trainer"]["callbacks"]]
    assert names == ["AtomicCheckpoint", "RandomState"]


@pytest.mark.parametrize("key", ["student.lora", "init_args.student.lora"])
def test_null_is_null_at_any_depth(capsys, key):
    config = printed(capsys, "--config", "flux_meanflow_lora.yaml", f"--model.{key}=null", "--model.ema_decay=null")
    assert config["model"]["init_args"]["student"]["lora"] is None
    assert config["model"]["init_args"]["ema_decay"] is None


def test_a_printed_config_is_a_config(capsys, work):
    first = printed(capsys, "--config", "top.yaml")
    (work / "again.yaml").write_text(yaml.safe_dump(first))
    assert printed(capsys, "--config", "again.yaml") == first


@pytest.mark.parametrize(
    ("threads", "devices", "warned"), [("2", 2, True), ("1", 2, False), ("2", 1, False), ("", 2, False), ("2,1", 2, False)]
)
def test_more_threads_than_cores_are_warned_of(monkeypatch, recwarn, threads, devices, warned):
    monkeypatch.setenv("OMP_NUM_THREADS", threads)
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    strategy = "ddp" if devices > 1 else "auto"
    trainer = Trainer(accelerator="cpu", devices=devices, strategy=strategy, logger=False, enable_checkpointing=False)
    warn_oversubscription(trainer)
    assert any("2 processes of 2 threads share 2 cores" in str(warning.message) for warning in recwarn) == warned


def test_fit_trains_with_the_callbacks_that_every_run_has():
    cli = DistillCLI(["fit", "--config", "top.yaml"])
    assert len(read_losses("losses.jsonl")) == 3
    kinds = [type(callback) for callback in cli.trainer.callbacks]
    assert all(kinds.count(kind) == 1 for kind in ALWAYS)


def test_a_listed_callback_is_not_added_again():
    cli = DistillCLI(["fit", "--config", "top.yaml", "--trainer.callbacks+=RandomState"])
    assert [type(callback) for callback in cli.trainer.callbacks].count(RandomState) == 1


@pytest.mark.parametrize("command", ["validate", "test"])
def test_other_commands_read_the_same_configs(command):
    main(["fit", "--config", "top.yaml"])
    main([command, "--config", "top.yaml", "--trainer.limit_val_batches=1", "--ckpt_path=last"])


def test_the_settings_are_saved_with_the_log_and_a_rerun_is_no_error():
    logger = ["--trainer.logger=CSVLogger", "--trainer.logger.save_dir=runs", "--trainer.logger.version=same"]
    for width in (4, 8):
        main(["fit", "--config", "top.yaml", *logger, f"--model.width={width}"])
        (saved,) = Path("runs").rglob("config.yaml")
        assert yaml.safe_load(saved.read_text())["model"]["init_args"]["width"] == width
    main(["validate", "--config", "top.yaml", *logger])
    assert yaml.safe_load(saved.read_text())["model"]["init_args"]["width"] == 8


def test_without_a_logger_no_settings_are_saved(work):
    main(["fit", "--config", "top.yaml"])
    assert not list(work.rglob("config.yaml"))


@pytest.mark.filterwarnings("ignore:Checkpoint directory")
def test_a_checkpoint_never_overrides_settings(capsys):
    main(["fit", "--config", "top.yaml"])
    resume = ["fit", "--config", "top.yaml", "--ckpt_path=checkpoints/last.ckpt", "--trainer.max_steps=5"]
    with pytest.warns(UserWarning, match="was saved under other settings") as warned:
        cli = DistillCLI([*resume, "--model.lr=0.5", "--model.pause=0.001"])
    assert cli.model.lr == 0.5
    assert cli.trainer.optimizers[0].param_groups[0]["lr"] == 0.5
    (message,) = [str(item.message) for item in warned if "was saved under other settings" in str(item.message)]
    assert "this run keeps its own: lr 0.5 (checkpoint: 0.01), pause 0.001 (checkpoint: 0.0)" in message


@pytest.mark.filterwarnings("ignore:Checkpoint directory", "error:.*was saved under other settings")
def test_the_same_settings_resume_in_silence():
    main(["fit", "--config", "top.yaml"])
    for path in ("last", "checkpoints/last.ckpt"):
        main(["fit", "--config", "top.yaml", f"--ckpt_path={path}", "--trainer.max_steps=4"])


def test_last_without_a_checkpoint(capsys, work):
    error = refused(capsys, "fit", "--config", "top.yaml", "--ckpt_path=last")
    assert error == (
        f"error: ckpt_path is 'last', but there is no last checkpoint in {work / 'checkpoints'}; "
        "leave ckpt_path out to start afresh, or give the checkpoint's file\n"
    )
    assert not (work / "losses.jsonl").exists()


def test_best_in_a_new_process(capsys):
    assert "ckpt_path 'best' is only known to the process that trained" in refused(
        capsys, "validate", "--config", "top.yaml", "--ckpt_path=best"
    )


def test_a_checkpoint_that_is_not_there(capsys):
    error = refused(capsys, "fit", "--config", "top.yaml", "--ckpt_path=nothing.ckpt")
    assert error == "error: ckpt_path 'nothing.ckpt' does not exist; give an existing checkpoint or leave ckpt_path out\n"


def test_a_torn_checkpoint(capsys):
    main(["fit", "--config", "top.yaml"])
    whole = Path("checkpoints/last.ckpt").read_bytes()
    Path("torn.ckpt").write_bytes(whole[: len(whole) // 2])
    assert "ckpt_path 'torn.ckpt' cannot be read" in refused(capsys, "fit", "--config", "top.yaml", "--ckpt_path=torn.ckpt")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config", "none.yaml"], "config 'none.yaml' is neither a file"),
        (["--config", "top.yaml", "--model.lr=-1"], "model.init_args.lr is -1.0; set the learning rate to 0 or more"),
        (["--config", "top.yaml", "--data.size=2"], "data.batch_size 4 is larger than data.size 2"),
        (["--config", "top.yaml", "--data.sise=2"], "data is ShapesData, which has no setting 'sise'; correct its name"),
        (["--config", "top.yaml", "--model.width=wide"], "model.width: Expected a <class 'int'>. Got value: wide; correct its"),
        (["--config", "top.yaml", "--trainer.strategy=nonsense"], "the trainer does not go with this machine or its settings"),
        (["--config", "top.yaml", "--trainer.max_steps=-2"], "You passed in -2); correct them"),
        (["--config", "top.yaml", "--trainer.val_check_interval=0"], "trainer.val_check_interval is 0; give a number of steps"),
        (
            ["--config", "top.yaml", "--ckpt_path=spread"],
            "ckpt_path 'spread' is a directory, of a strategy that spreads",
        ),
        (["--config", "top.yaml", "--model.lr=fast"], "fast"),
        (["--config", "twice.yaml"], "config twice.yaml gives 'model' twice, again in line 2; keep one of them"),
    ],
)
def test_refused_before_training(capsys, work, arguments, message):
    (work / "twice.yaml").write_text("model: ToyModule\nmodel: ToyModule\n")
    (work / "spread").mkdir()
    error = refused(capsys, "fit", *arguments)
    assert message in error
    assert error.count("\n") == 1
    assert not (work / "losses.jsonl").exists()


def test_what_only_logs_is_left_out_where_there_is_no_logger(work):
    (work / "monitored.yaml").write_text("base: top.yaml\ntrainer:\n  callbacks+: [LearningRateMonitor]\n")
    main(["fit", "--config", "monitored.yaml"])
    assert len(read_losses(work / "losses.jsonl")) == 3


def test_a_loss_that_is_not_finite(capsys):
    error = refused(capsys, "fit", "--config", "top.yaml", "--model.break_at=1", code=1)
    assert error.startswith("error: the loss became nan at step 1; ")
    assert torch.load("checkpoints/last.ckpt", weights_only=False)["global_step"] == 1


def test_other_errors_keep_their_traceback(monkeypatch):
    def broken(*arguments):
        raise ValueError("a bug")

    monkeypatch.setattr("tests.toy.ToyModule.training_step", broken)
    with pytest.raises(ValueError, match="a bug"):
        main(["fit", "--config", "top.yaml"])


def test_sample_goes_to_its_own_module(monkeypatch):
    calls = []
    module = types.ModuleType("lightning_distill.commands.sample")
    module.main = calls.append
    monkeypatch.setitem(sys.modules, "lightning_distill.commands.sample", module)
    monkeypatch.setattr("lightning_distill.commands.sample", module, raising=False)
    main(["sample", "--nfe", "4"])
    assert calls == [["--nfe", "4"]]


def test_the_module_runs_from_the_shell(work):
    shell = subprocess.run(
        [sys.executable, "-m", "lightning_distill", "fit", "--config", "none.yaml"],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert shell.returncode == 2
    assert shell.stderr.splitlines()[-1].startswith("error: config 'none.yaml' is neither a file")
