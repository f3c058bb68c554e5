from pathlib import Path

import numpy as np
import pytest
from lightning.pytorch import Trainer
from PIL import Image

from lightning_distill.callbacks import WritePredictions
from lightning_distill.data import ShapesData
from lightning_distill.errors import ConfigurationError
from tests.callbacks.distillation import PixelDistillation


def predict(directory: Path, **settings: str) -> list:
    settings = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "default_root_dir": directory} | settings
    module = PixelDistillation(strength=1.0)
    trainer = Trainer(callbacks=[WritePredictions()], **settings)
    return trainer.predict(module, ShapesData(size=8, batch_size=4, prompts_per_category=1))


def test_one_file_per_prompt_with_the_prompt_as_text(tmp_path: Path) -> None:
    batches = predict(tmp_path)
    files = sorted((tmp_path / "predictions").iterdir())
    assert [file.name for file in files] == [f"{i:06}.png" for i in range(6)]
    images = [image for batch in batches for image in batch]
    data = ShapesData(size=8, batch_size=4, prompts_per_category=1)
    data.setup("predict")
    prompts = [prompt for batch in data.predict_dataloader() for prompt in batch["prompt"]]
    for path, image, prompt in zip(files, images, prompts, strict=True):
        with Image.open(path) as written:
            assert written.info["prompt"] == prompt
            pixels = np.asarray(written).astype(int)
        assert np.abs(pixels - image.permute(1, 2, 0).mul(255).numpy()).max() <= 0.5 + 1e-3


def test_earlier_files_are_not_overwritten(tmp_path: Path) -> None:
    predict(tmp_path)
    with pytest.raises(ConfigurationError, match=r"predictions' already has PNG files.*set trainer\.default_root_dir"):
        predict(tmp_path)
