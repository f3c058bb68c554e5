import os
import socket
import time
from datetime import timedelta
from pathlib import Path

import pytest
from torch.distributed import DistStoreError
from torch.distributed.checkpoint.api import CheckpointException

from lightning_distill.commands.process_errors import process_error
from lightning_distill.commands.training import DistillCLI
from lightning_distill.errors import ConfigurationError, RunError
from tests.processes import clean_environment, run_isolated

HANGING = """
import os, time
from pathlib import Path
import torch
from lightning.pytorch import Callback
from tests.toy import ToyModule

class Toy(ToyModule):
    def configure_model(self):
        pass

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-3)

class Hang(Callback):
    def __init__(self, rank: int):
        self.rank = rank

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        Path(f"pid{trainer.global_rank}").write_text(str(os.getpid()))
        if trainer.global_rank == self.rank and trainer.global_step == 1:
            time.sleep(1000)
"""


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[gloo/transport/tcp/unbound_buffer.cc:81] Timed out waiting 8000ms for recv operation to complete", "has waited"),
        ("wait timeout after 8000ms, keys: /default_pg/0//cpu//0/rank_1 (TCPStore)", "has waited"),
        ("[gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:27501", "has lost the connection"),
        ("NCCL error: Socket Timeout", "has waited"),
        ("the data loader's worker timed out", None),
        ("shape mismatch", None),
    ],
)
def test_lost_processes_have_one_message(text, message):
    for error in (RuntimeError(text), CheckpointException("save", {0: (RuntimeError(text), None)})):
        found = process_error(error)
        assert (found is None) if message is None else (isinstance(found, RunError) and message in str(found))


def test_taken_port_is_a_wrong_setting(monkeypatch):
    monkeypatch.setenv("MASTER_PORT", "29500")
    found = process_error(RuntimeError("The server socket has failed to listen. port: 29500, EADDRINUSE, address in use"))
    assert isinstance(found, ConfigurationError)
    assert "MASTER_PORT is 29500" in str(found)


def fit(directory: Path, *options: str, model: str = "tests.toy.ToyModule", port: int | None = None) -> tuple[int, str]:
    variables = {} if port is None else {"MASTER_PORT": str(port)}
    environment = clean_environment(directory, **variables)
    command = [
        *("-m", "lightning_distill", "fit", f"--model={model}", "--trainer.accelerator=cpu", "--trainer.devices=2"),
        *("--trainer.logger=false", "--trainer.max_steps=4", "--trainer.enable_progress_bar=false"),
        *("--trainer.limit_val_batches=0", "--trainer.enable_checkpointing=false", "--trainer.enable_model_summary=false"),
        *("--data=ShapesData", "--data.size=44", "--data.batch_size=8", "--data.prompts_per_category=1", *options),
    ]
    result = run_isolated(command, directory, environment=environment, check=False)
    return result.returncode, result.stdout


def test_port_in_use_is_found_before_processes_start(tmp_path):
    with socket.socket() as server:
        server.bind(("", 0))
        server.listen()
        code, output = fit(tmp_path, "--trainer.strategy=ddp", port=server.getsockname()[1])
    assert code == 2
    assert "error: the environment variable MASTER_PORT is" in output
    assert "Traceback" not in output


def test_process_that_does_not_start_is_waited_for():
    error = DistStoreError("Timed out after 11 seconds waiting for clients. 1/2 clients joined.")
    assert "has waited for another process" in str(process_error(error))


@pytest.mark.parametrize("strategy", ["DDPStrategy", "FSDP2Strategy", "ZeRO3Strategy"])
def test_time_limit_is_a_setting_of_each_strategy(strategy):
    options = ["--trainer.accelerator=cpu", "--trainer.logger=false", "--trainer.devices=2"]
    settings = [f"--trainer.strategy={strategy}", "--trainer.strategy.timeout=0:10:00"]
    cli = DistillCLI(["--model=tests.toy.ToyModule", "--data=ShapesData", *options, *settings], run=False)
    assert cli.trainer.strategy._timeout == timedelta(minutes=10)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["DDPStrategy", "FSDP2Strategy", "ZeRO3Strategy"])
@pytest.mark.parametrize("rank", [0, 1])
def test_processes_end_if_one_hangs(tmp_path, strategy, rank):
    (tmp_path / "hang.py").write_text(HANGING)
    options = [
        *(f"--trainer.strategy={strategy}", "--trainer.strategy.timeout=0:00:30"),
        *("--trainer.callbacks=hang.Hang", f"--trainer.callbacks.rank={rank}"),
    ]
    code, output = fit(tmp_path, *options, model="hang.Toy")
    assert code not in (0, None)
    assert f"error: process {1 - rank} has waited for another process until trainer.strategy.timeout" in output
    assert "Traceback" not in output
    deadline = time.monotonic() + 20
    for pid in (int((tmp_path / f"pid{rank}").read_text()) for rank in (0, 1)):
        while os.path.exists(f"/proc/{pid}") and "zombie" not in Path(f"/proc/{pid}/status").read_text():
            assert time.monotonic() < deadline, f"process {pid} is still running"
            time.sleep(0.1)
