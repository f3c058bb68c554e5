"""One run is one directory: `fit` continues it, numbers it, or refuses it, and nothing else writes to it."""

import fcntl
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import yaml
from lightning.pytorch.loggers import TensorBoardLogger

from lightning_distill.commands.main import main
from lightning_distill.commands.run_directory import CHOSEN, DEFAULT, has_run
from lightning_distill.commands.run_lock import LOCK
from lightning_distill.commands.training import DistillCLI
from lightning_distill.errors import ConfigurationError
from tests.command_errors import error_line
from tests.preloaded import with_package
from tests.processes import ROOT
from tests.toy import ToyModule

CONFIG = """
trainer:
  accelerator: cpu
  max_steps: 2
  default_root_dir: runs/demo
  enable_progress_bar: false
  enable_model_summary: false
  limit_val_batches: 1
  callbacks:
  - class_path: AtomicCheckpoint
    init_args: {dirpath: "${trainer.default_root_dir}/checkpoints", every_n_train_steps: 1}
  - class_path: TensorBoardLayout
data:
  class_path: ShapesData
  init_args: {size: 40, batch_size: 4, prompts_per_category: 1}
model:
  class_path: tests.toy.ToyModule
  init_args: {width: 4}
"""
LAST = "runs/demo/checkpoints/last.ckpt"
pytestmark = pytest.mark.filterwarnings("ignore:Checkpoint directory", "ignore:.*has other model settings")


@pytest.fixture(autouse=True)
def work(tmp_path, monkeypatch) -> Path:
    """Working directory with `run.yaml`."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.yaml").write_text(CONFIG)
    return tmp_path


@pytest.fixture
def finished(work) -> bytes:
    """The last checkpoint of a finished run in `runs/demo`."""
    fit()
    return Path(LAST).read_bytes()


def fit(*arguments: str, config: str = "run.yaml") -> DistillCLI:
    return DistillCLI(["fit", "--config", config, *arguments])


def refuse(*_: object) -> None:
    raise ConfigurationError("model.width is 4; set it to 5")


def files(directory: Path | str = ".") -> list[str]:
    """Relative paths of all files and directories, without those of the settings."""
    place = Path(directory)
    return sorted(str(path.relative_to(place)) for path in place.rglob("*") if path.suffix != ".yaml" or path.parent != place)


def steps(directory: str) -> int:
    return torch.load(f"{directory}/checkpoints/last.ckpt", weights_only=False)["global_step"]


def test_a_run_is_one_directory(finished):
    assert [path.name for path in Path("runs").iterdir()] == ["demo"]
    names = {path.name.partition(".tfevents")[0] for path in Path("runs/demo").iterdir()}
    assert names == {"config.yaml", "events.out", "hparams.yaml", "checkpoints"}
    assert yaml.safe_load(Path("runs/demo/config.yaml").read_text())["trainer"]["max_steps"] == 2
    assert CHOSEN not in os.environ


def test_one_setting_moves_everything(work):
    fit("--trainer.default_root_dir=elsewhere/a")
    assert [path.name for path in work.iterdir() if path.suffix != ".yaml"] == ["elsewhere"]
    assert steps("elsewhere/a") == 2


def test_a_run_without_the_setting_has_a_directory_of_its_own(work):
    (work / "run.yaml").write_text(CONFIG.replace("  default_root_dir: runs/demo\n", ""))
    fit()
    fit()
    assert has_run(Path(DEFAULT))
    assert steps(f"{DEFAULT}-2") == 2


def test_a_second_run_is_numbered(finished, caplog):
    cli = fit("--trainer.max_steps=1")
    assert Path(LAST).read_bytes() == finished
    assert steps("runs/demo-2") == 1
    assert cli.trainer.default_root_dir == "runs/demo-2"
    assert next(Path("runs/demo-2").glob("events.*"))
    saved = yaml.safe_load(Path("runs/demo-2/config.yaml").read_text())["trainer"]
    assert saved["default_root_dir"] == "runs/demo-2"
    assert saved["callbacks"][0]["init_args"]["dirpath"] == "runs/demo-2/checkpoints"
    fit("--trainer.max_steps=1")
    assert steps("runs/demo-3") == 1


def test_literal_paths_move_with_a_numbered_run(work, finished):
    (work / "literal.yaml").write_text(CONFIG.replace("${trainer.default_root_dir}/", f"{work}/runs/demo/"))
    fit("--trainer.max_steps=1", config="literal.yaml")
    assert Path(LAST).read_bytes() == finished
    assert steps("runs/demo-2") == 1
    fit("--trainer.max_steps=1", config="runs/demo-2/config.yaml")
    assert steps("runs/demo-2-2") == 1


@pytest.mark.parametrize("path", ["last", LAST])
def test_a_checkpoint_of_the_run_continues_it(finished, path):
    fit(f"--ckpt_path={path}", "--trainer.max_steps=4")
    assert [each.name for each in Path("runs").iterdir()] == ["demo"]
    assert steps("runs/demo") == 4
    limits = [
        yaml.safe_load(Path(f"runs/demo/{name}.yaml").read_text())["trainer"]["max_steps"] for name in ("config", "config-2")
    ]
    assert limits == [2, 4]
    assert len(list(Path("runs/demo").glob("events.*"))) == 2


def test_continuing_a_run_names_the_later_one(finished):
    for _ in range(2):
        fit("--trainer.max_steps=1")
    with pytest.warns(UserWarning, match=r"ckpt_path last continues the run in 'runs/demo'; set .* to 'runs/demo-3' to"):
        fit("--ckpt_path=last", "--trainer.max_steps=3")
    assert steps("runs/demo") == 3


def test_a_checkpoint_of_a_numbered_run_continues_that_run(finished):
    fit("--trainer.max_steps=1")
    fit("--ckpt_path=runs/demo-2/checkpoints/last.ckpt", "--trainer.max_steps=3")
    assert (steps("runs/demo"), steps("runs/demo-2")) == (2, 3)
    assert not Path("runs/demo-3").exists()


@pytest.mark.parametrize("other", ["runs/other", "runs/07/other-3"])
def test_a_checkpoint_of_another_run_starts_a_numbered_run(finished, other):
    fit(f"--trainer.default_root_dir={other}", "--trainer.max_steps=1")
    fit(f"--ckpt_path={other}/checkpoints/last.ckpt", "--trainer.max_steps=3")
    assert Path(LAST).read_bytes() == finished
    assert (steps(other), steps("runs/demo-2")) == (1, 3)


def test_a_checkpoint_for_requeued_jobs_continues_the_run(finished):
    """Lightning resumes from it without `--ckpt_path`."""
    Path("runs/demo/hpc_ckpt_1.ckpt").write_bytes(finished)
    fit("--trainer.max_steps=3")
    assert steps("runs/demo") == 3


def test_output_of_another_run_elsewhere_raises(capsys, work, finished):
    (work / "elsewhere.yaml").write_text(CONFIG.replace("${trainer.default_root_dir}", "runs/demo"))
    error = error_line(capsys, "fit", "--config", "elsewhere.yaml", "--trainer.default_root_dir=new")
    assert "AtomicCheckpoint.dirpath is 'runs/demo/checkpoints', which has files of another run; set it to another" in error
    assert not Path("new").exists()
    assert Path(LAST).read_bytes() == finished


@pytest.mark.parametrize(
    "variables",
    [
        {"LOCAL_RANK": "0", "WORLD_SIZE": "2", "RANK": "0", "TORCHELASTIC_RUN_ID": "a"},
        {"SLURM_NTASKS": "2", "SLURM_PROCID": "1", "SLURM_JOB_NAME": "train"},
    ],
)
def test_processes_of_a_launcher_raise_in_an_occupied_directory(capsys, monkeypatch, finished, variables):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    error = error_line(capsys, "fit", "--config", "run.yaml")
    assert (
        "trainer.default_root_dir is 'runs/demo', which has a run; continue that run with --ckpt_path last, or set "
        "trainer.default_root_dir to another directory"
    ) in error


def test_processes_that_lightning_starts_use_the_same_directory(work, finished):
    arguments = ("--trainer.devices=2", "--trainer.strategy=ddp", "--trainer.max_steps=1")
    with_package().run(["-m", "lightning_distill", "fit", "--config", "run.yaml", *arguments], work)
    assert Path(LAST).read_bytes() == finished
    assert steps("runs/demo-2") == 1
    assert sorted(path.name for path in Path("runs").iterdir()) == ["demo", "demo-2"]


@pytest.fixture
def other_run(work) -> Iterator[subprocess.Popen[str]]:
    """A process that has locked `runs/demo`."""
    lines = "from lightning_distill.commands.run_lock import lock_directory", "from pathlib import Path"
    code = "\n".join([*lines, "file = lock_directory(Path('runs/demo'))", "print('locked', flush=True)", "input()"])
    with subprocess.Popen(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "locked\n"
        yield process
        process.kill()


def test_a_second_run_at_the_same_time_raises_before_anything_is_built(capsys, monkeypatch, other_run):
    monkeypatch.setattr("tests.toy.ToyModule.__init__", lambda *_, **__: pytest.fail("the model was built"))
    error = error_line(capsys, "fit", "--config", "run.yaml")
    start = f"error: trainer.default_root_dir is 'runs/demo', which a running fit uses (process {other_run.pid} on "
    assert error.startswith(start)
    assert " since 20" in error
    assert files("runs/demo") == [LOCK]


def test_a_killed_run_leaves_no_lock(other_run):
    other_run.kill()
    other_run.wait()
    assert Path("runs/demo", LOCK).is_file()
    fit()
    assert steps("runs/demo") == 2
    assert not Path("runs/demo", LOCK).exists()


def test_the_lock_is_not_inherited_by_forked_processes(monkeypatch):
    """Workers of data loaders may outlive a killed run by seconds."""
    found = []

    def look(*_: object) -> None:
        child = os.fork()
        if child == 0:
            with Path("runs/demo", LOCK).open() as file:
                run = json.load(file)  # of the parent, which still has its lock
                try:
                    fcntl.lockf(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
                except BlockingIOError:
                    os._exit(7 if run["pid"] == os.getppid() else 1)
            os._exit(0)
        found.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))

    monkeypatch.setattr("tests.toy.ToyModule.on_train_start", look, raising=False)
    fit()
    assert found == [7]


def test_a_disk_without_locks_warns(monkeypatch):
    monkeypatch.setattr(fcntl, "lockf", lambda *_: (_ for _ in ()).throw(OSError(38, "Function not implemented")))
    with pytest.warns(UserWarning, match="has no locks; start no second run in this directory"):
        fit()
    assert steps("runs/demo") == 2


def test_dry_runs_write_nothing(work, finished):
    before = files()
    fit("--trainer.fast_dev_run=true", "--trainer.callbacks+=LearningRateMonitor")
    fit("--trainer.fast_dev_run=1", "--trainer.default_root_dir=new")
    assert files() == before
    assert Path(LAST).read_bytes() == finished


@pytest.mark.parametrize("command", ["validate", "predict"])
def test_evaluation_leaves_no_files(monkeypatch, finished, command):
    monkeypatch.setattr("tests.toy.ToyModule.predict_step", lambda *_: None, raising=False)
    before = files()
    cli = DistillCLI([command, "--config", "run.yaml", "--ckpt_path=last"])
    assert cli.trainer.default_root_dir == "runs/demo"
    assert files() == before


def test_refused_runs_leave_no_files(capsys, monkeypatch, work):
    before = files()
    monkeypatch.setattr("tests.toy.ToyModule.on_train_start", refuse, raising=False)
    monkeypatch.setattr("lightning_distill.commands.training.SaveConfig.on_train_start", lambda *_: None)
    assert "model.width is 4" in error_line(capsys, "fit", "--config", "run.yaml")
    assert files() == before
    monkeypatch.undo()
    monkeypatch.chdir(work)
    fit()
    before = files()
    monkeypatch.setattr("tests.toy.ToyModule.on_fit_start", refuse, raising=False)
    assert "model.width is 4" in error_line(capsys, "fit", "--config", "run.yaml", "--ckpt_path=last", "--trainer.max_steps=5")
    assert files() == before


def test_refused_runs_remove_no_files_of_others(capsys, monkeypatch, work):
    """Another run below the directory and a user beside it write files in the meantime."""

    def write_and_refuse(*_: object) -> None:
        Path("runs/other/checkpoints").mkdir(parents=True)
        Path("runs/other/checkpoints/last.ckpt").touch()
        Path("runs/notes.txt").touch()
        Path("runs/events.out.tfevents.1.host.0.0").touch()
        refuse()

    monkeypatch.setattr("tests.toy.ToyModule.on_fit_start", write_and_refuse, raising=False)
    assert "model.width is 4" in error_line(capsys, "fit", "--config", "run.yaml", "--trainer.default_root_dir=runs")
    others = ["events.out.tfevents.1.host.0.0", "notes.txt", "other", "other/checkpoints", "other/checkpoints/last.ckpt"]
    assert files("runs") == others


@pytest.mark.parametrize("logger", ["TensorBoardLogger", "CSVLogger"])
def test_a_run_without_a_step_leaves_no_files(work, logger):
    fit("--trainer.max_steps=0", f"--trainer.logger={logger}", "--trainer.logger.save_dir=runs/demo/curves")
    assert files() == []
    fit()
    assert [path.name for path in Path("runs").iterdir()] == ["demo"]


def test_the_root_of_the_file_system_is_not_searched(capsys, monkeypatch):
    monkeypatch.setattr(Path, "rglob", lambda *_: pytest.fail("searched the tree"))
    monkeypatch.setattr("lightning_distill.commands.run_directory.has_run", lambda path: path == Path("/"))
    error = error_line(capsys, "fit", "--config", "run.yaml", "--trainer.default_root_dir=/")
    assert "trainer.default_root_dir is '/', which has a run; continue that run" in error


def test_the_directory_is_named_when_the_run_begins(caplog, capsys, monkeypatch, finished):
    caplog.set_level("INFO")
    with monkeypatch.context() as context:
        context.setattr("tests.toy.ToyModule.on_fit_start", refuse, raising=False)
        assert "model.width is 4" in error_line(capsys, "fit", "--config", "run.yaml")
    assert "runs/demo-2" not in caplog.text
    fit("--trainer.max_steps=1")
    assert "which has a run; this run writes to 'runs/demo-2'. Add --ckpt_path last" in caplog.text


@pytest.mark.parametrize("process", [lambda: "", lambda: "1:", lambda: f"{os.getpid()}:", lambda: f"{os.getppid()}:"])
def test_a_variable_left_in_the_environment_is_ignored(monkeypatch, work, process):
    monkeypatch.setenv(CHOSEN, f"{process()}elsewhere")
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    monkeypatch.setattr(
        "tests.toy.ToyModule.on_train_start",
        lambda *_: locks.append(Path("runs/demo", LOCK).exists()),
        raising=False,
    )
    locks: list[bool] = []
    fit()
    assert locks == [True]
    assert steps("runs/demo") == 2
    assert not Path("elsewhere").exists()


def test_a_directory_that_is_removed_during_the_run_ends_it_in_one_line(capsys, monkeypatch):
    def remove(module: ToyModule, *_: object) -> None:
        shutil.rmtree("runs")
        module.logger.experiment.flush()

    monkeypatch.setattr("tests.toy.ToyModule.on_train_batch_end", remove, raising=False)
    with pytest.raises(SystemExit) as end:
        main(["fit", "--config", "run.yaml", "--trainer.log_every_n_steps=1"])
    assert end.value.code == 1
    errors = capsys.readouterr().err
    assert "error: trainer.default_root_dir 'runs/demo' was removed while the run was writing to it; start the run" in errors
    assert "Traceback" not in errors


def test_the_lock_of_a_later_run_stays(monkeypatch):
    """The directory is removed, and another run begins in one of the same name."""

    def replace(*_: object) -> None:
        shutil.rmtree("runs/demo")
        Path("runs/demo").mkdir()
        Path("runs/demo", LOCK).touch()

    monkeypatch.setattr("tests.toy.ToyModule.on_train_start", replace, raising=False)
    with pytest.warns(UserWarning, match="'runs/demo' was removed during the run; it has only what was written later"):
        fit("--trainer.logger=false")
    assert Path("runs/demo", LOCK).exists()


def test_an_interrupted_run_keeps_its_files(monkeypatch):
    monkeypatch.setattr(
        "tests.toy.ToyModule.on_train_batch_end", lambda *_: (_ for _ in ()).throw(ValueError("a bug")), raising=False
    )
    with pytest.raises(ValueError, match="a bug"):
        fit()
    assert Path("runs/demo/config.yaml").is_file()


BELOW = {
    "trainer.default_root_dir": ["--trainer.default_root_dir=run.yaml/run"],
    "AtomicCheckpoint.dirpath": ["--trainer.callbacks+=AtomicCheckpoint", "--trainer.callbacks.dirpath=run.yaml/run"],
    "FinalReport.directory": ["--trainer.callbacks+=FinalReport", "--trainer.callbacks.directory=run.yaml/run"],
    "ExportPipeline.directory": ["--trainer.callbacks+=ExportPipeline", "--trainer.callbacks.directory=run.yaml/run"],
    "TensorBoardLogger.save_dir": ["--trainer.logger=TensorBoardLogger", "--trainer.logger.save_dir=run.yaml/run"],
    "SimpleProfiler.dirpath": ["--trainer.profiler=SimpleProfiler", "--trainer.profiler.dirpath=run.yaml/run"],
}


@pytest.mark.parametrize("setting", BELOW)
def test_outputs_that_cannot_be_written_raise_before_anything_is_built(capsys, monkeypatch, work, setting):
    monkeypatch.setattr("tests.toy.ToyModule.__init__", lambda *_, **__: pytest.fail("the model was built"))
    error = error_line(capsys, "fit", "--config", "run.yaml", *BELOW[setting])
    assert f"{setting} is 'run.yaml/run', which cannot be written ('" in error
    assert files() == []


def test_curves_of_runs_are_entries_of_their_directories():
    cli = fit()
    (logger,) = cli.trainer.loggers
    assert isinstance(logger, TensorBoardLogger)
    assert os.path.normpath(logger.log_dir) == "runs/demo"


def test_home_directory_and_variables_in_outputs(monkeypatch, work):
    monkeypatch.setenv("HOME", str(work / "home"))
    monkeypatch.setenv("BIG", str(work / "big"))
    fit(
        "--trainer.default_root_dir=~/run",
        "--trainer.callbacks+=AtomicCheckpoint",
        "--trainer.callbacks.dirpath=$BIG/checkpoints",
    )
    assert steps(str(work / "home" / "run")) == 2
    assert steps(str(work / "big")) == 2
    assert sorted(path.name for path in work.iterdir()) == ["big", "home", "run.yaml"]
