"""Peak memory of a process while sharded networks are loaded: below that of an unsharded network."""

import json
from pathlib import Path

import pytest
import torch
from diffusers import FluxTransformer2DModel
from transformers import T5Config, T5EncoderModel

from tests.preloaded import with_package
from tests.sharding.tiny_runs import SEVERAL_RUNS
from tests.tiny import tiny_pipeline

pytestmark = SEVERAL_RUNS
STRATEGIES = ["fsdp2", pytest.param("deepspeed_stage_3", marks=pytest.mark.slow)]
SCRIPT = """
import ctypes, json, sys, threading, time
from lightning import Trainer, seed_everything
from tests.sharding.train_tiny import RepeatableMeanFlow, build_method, training_data
from torch.utils.data import DataLoader

# Allocations of 64 KiB or more return to the system at once, so that the peak is that of memory in use.
M_MMAP_THRESHOLD = -3
assert ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 65536)

def anonymous_memory():
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("RssAnon")) / 1024

class Measured(RepeatableMeanFlow):
    def configure_model(self):
        before, peak, done = anonymous_memory(), [0.0], threading.Event()
        def watch():
            while not done.is_set():
                peak[0] = max(peak[0], anonymous_memory())
                time.sleep(0.002)
        watcher = threading.Thread(target=watch)
        watcher.start()
        super().configure_model()
        done.set()
        watcher.join()
        with open(f"peak{self.global_rank}.json", "w") as file:
            json.dump(peak[0] - before, file)

    def on_fit_start(self):
        sys.exit()

pretrained, strategy, devices = sys.argv[1:]
seed_everything(0)
module = build_method(pretrained, "discrete", True, False, False)
module.__class__ = Measured
trainer = Trainer(max_steps=1, accelerator="cpu", devices=int(devices), strategy=strategy, logger=False,
                  enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)
trainer.fit(module, DataLoader(training_data(), batch_size=4))
"""


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, float]:
    """A pipeline with a transformer of about 240 MiB, and the exact size in MiB."""
    torch.manual_seed(0)
    pipeline = tiny_pipeline()
    config = {name: value for name, value in pipeline.transformer.config.items() if not name.startswith("_")}
    shape = {"num_layers": 8, "num_single_layers": 8, "num_attention_heads": 3, "attention_head_dim": 128}
    pipeline.transformer = FluxTransformer2DModel(**{**config, **shape, "axes_dims_rope": (16, 56, 56)})
    directory = tmp_path_factory.mktemp("medium")
    pipeline.save_pretrained(directory)
    return str(directory), sum(p.numel() * 4 for p in pipeline.transformer.parameters()) / 2**20


@pytest.fixture(scope="module")
def with_large_encoder(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, float]:
    """A pipeline with a T5 encoder of about 190 MiB, and the exact size in MiB."""
    torch.manual_seed(0)
    pipeline = tiny_pipeline()
    config = pipeline.text_encoder_2.config.to_dict() | {"d_ff": 2**17, "num_layers": 8}
    pipeline.text_encoder_2 = T5EncoderModel(T5Config(**config))
    directory = tmp_path_factory.mktemp("encoder")
    pipeline.save_pretrained(directory)
    return str(directory), sum(p.numel() * 4 for p in pipeline.text_encoder_2.parameters()) / 2**20


def peak(strategy: str, directory: str, folder: Path) -> float:
    """Peak memory in MiB of loading the networks, the larger of two processes."""
    (folder / "run.py").write_text(SCRIPT)
    with_package().run(["run.py", directory, strategy, "2"], folder, processes=2)
    return max(json.loads((folder / f"peak{rank}.json").read_text()) for rank in (0, 1))


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_no_process_holds_an_unsharded_transformer(strategy: str, pretrained: tuple[str, float], tmp_path: Path) -> None:
    directory, size = pretrained
    # Half of the teacher and half of the student, and temporary memory.
    assert 0.9 * size < peak(strategy, directory, tmp_path) < 1.6 * size


@pytest.mark.slow
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_no_process_holds_an_unsharded_text_encoder(
    strategy: str, with_large_encoder: tuple[str, float], tmp_path: Path
) -> None:
    directory, size = with_large_encoder
    # Half of the encoder, and temporary memory.
    assert 0.4 * size < peak(strategy, directory, tmp_path) < 0.8 * size
