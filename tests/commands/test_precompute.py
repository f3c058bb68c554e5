import signal
from pathlib import Path

import pytest
import torch

from lightning_distill.commands.main import main
from lightning_distill.teachers import DiffusersAdapter
from tests.precomputing import write_config
from tests.preloaded import with_package
from tests.processes import clean_environment
from tests.tiny import save_tiny_pipeline

KILLER = """
import os, signal
from lightning_distill.data import ShapesData, ShapesDataset

class Fragile(ShapesDataset):
    def __getitems__(self, indices):
        if indices == [17] and "KILL" in os.environ:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__getitems__(indices)

class FragileShapes(ShapesData):
    def splits(self):
        train = self.require_setup(self._train)
        return super().splits() | {"train": Fragile(train.texts, train.images)}
"""


def contents(directory: str) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in Path(directory).iterdir()}


def test_a_killed_run_resumes_with_the_same_output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    Path("killer.py").write_text(KILLER)
    write_config(tmp_path, data={"class_path": "killer.FragileShapes", "init_args": {"size": 30, "batch_size": 6}})
    teacher = save_tiny_pipeline(tmp_path / "teacher")
    command = ["precompute", "--config=run.yaml", "--shard_size=8", f"--model.adapter.pretrained={teacher}"]
    environment = clean_environment(tmp_path, KILL="1")
    arguments = ["-m", "lightning_distill", *command, "--out=killed"]
    process = with_package().run(arguments, tmp_path, environment=environment, check=False)
    assert process.returncode == -signal.SIGKILL
    before = contents("killed")
    assert {"train-00000.safetensors", "train-00001.safetensors"} == {
        name for name in before if name.startswith("train") and "safe" in name
    }
    main([*command, "--out=killed"])
    main([*command, "--out=uninterrupted"])
    after = contents("killed")
    assert after == contents("uninterrupted")
    assert all(after[name] == before[name] for name in before if name.endswith(".safetensors"))


@pytest.mark.slow
def test_two_processes_write_the_output_of_one(tmp_path: Path) -> None:
    write_config(tmp_path)
    command = ["-m", "lightning_distill", "precompute", "--config=run.yaml", "--shard_size=8"]
    for devices in (1, 2):
        further = [f"--out=out{devices}", f"--trainer.devices={devices}"]
        with_package().run([*command, *further], tmp_path, processes=devices)
    assert contents(str(tmp_path / "out1")) == contents(str(tmp_path / "out2"))


def error_line(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """Error line of a run that exits with code 2."""
    with pytest.raises(SystemExit) as end:
        main(["precompute", *arguments])
    assert end.value.code == 2
    errors = capsys.readouterr().err
    assert "Traceback" not in errors
    return errors[errors.index("error: ") :]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--dtype=float8"], "dtype"),
        (["--shard_size=0"], "shard_size is 0; set it to 1 or more samples"),
        (["--config=none.yaml"], "config 'none.yaml' is neither a file"),
        (["--data.size=2"], "data.batch_size 6 is larger than data.size 2"),
        (["--model.adapter.pretrained=nowhere"], "neither a pipeline directory nor a hub id"),
        (["--model.adapter.torch_dtype=float8"], "adapter.torch_dtype is 'float8'"),
        (["--out=occupied/notes.txt"], "out is 'occupied/notes.txt', which cannot be written ("),
        (["--out=occupied"], "out is 'occupied', which has contents other than precomputed data; choose another directory"),
        (["--trainer.accelerator=cuda"], "trainer.accelerator is 'cuda'; set it to 'auto' or 'cpu' to run without a GPU"),
    ],
)
def test_invalid_settings_are_one_line_before_loading(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    if "cuda" in arguments[0] and torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(DiffusersAdapter, "load", lambda *args, **kwargs: pytest.fail("loaded"))
    write_config(tmp_path)
    Path("occupied").mkdir()
    Path("occupied", "notes.txt").write_text("mine")
    line = error_line(capsys, "--config=run.yaml", *arguments)
    assert message in line
    assert line.count("\n") == 1
    assert not Path("precomputed").exists()
