"""Fast precomputed data for tests, with images as latents, and the config of a short run."""

from pathlib import Path
from typing import Any

import yaml
from lightning.fabric import Fabric
from lightning.pytorch import LightningDataModule

from lightning_distill.commands.encode_dataset import PrecomputeOptions, encode_dataset
from lightning_distill.data import Precomputed
from tests.callbacks.distillation import PixelDistillation


def encode(data: LightningDataModule, directory: Path, **options: Any) -> Path:
    """Encode a data set in a single process and return the directory."""
    encode_dataset(
        PixelDistillation(),
        data,
        PrecomputeOptions(**{"out": str(directory), "shard_size": 7} | options),
        Fabric(accelerator="cpu", devices=1),
    )
    return directory


def set_up(directory: Path, stage: str = "fit", **settings: Any) -> Precomputed:
    """Create a DataModule and set it up."""
    data = Precomputed(str(directory), **{"batch_size": 4, "num_workers": 0} | settings)
    data.prepare_data()
    data.setup(stage)
    return data


def write_config(folder: Path, **settings: Any) -> Path:
    """Write the config of a short MeanFlow run on the embedded teacher, with a checkpoint at the end."""
    config = {
        "base": "shapes_student.yaml",
        "model": {
            "class_path": "MeanFlow",
            "init_args": {
                "solution": "bootstrapped",
                "trajectory_fraction": 0.5,
                "caption_dropout": 0.3,
                "cache_latents": False,
                "metric": None,
                "validation": {"nfe": [1], "solver_steps": 1, "samples": 4},
            },
        },
        "data": {"class_path": "ShapesData", "init_args": {"size": 30, "batch_size": 6, "prompts_per_category": 1}},
        "trainer": {
            "accelerator": "cpu",
            "max_steps": 3,
            "limit_val_batches": 0,
            "logger": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "callbacks": [
                {
                    "class_path": "AtomicCheckpoint",
                    "init_args": {"dirpath": "${trainer.default_root_dir}/checkpoints", "every_n_train_steps": 3},
                }
            ],
        },
    }
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump({**config, **settings}))
    return path
