from pathlib import Path

import numpy as np
import pytest
from lightning.pytorch import Trainer
from PIL import Image

from lightning_distill.callbacks import WritePredictions
from lightning_distill.data import ShapesData
from lightning_distill.errors import ConfigurationError
from tests.callbacks.distillation import PictureDistillation


def predict(directory: Path, **settings: str) -> list:
    settings = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "default_root_dir": directory} | settings
    module = PictureDistillation(strength=1.0)
    trainer = Trainer(callbacks=[WritePredictions()], **settings)
    return trainer.predict(module, ShapesData(size=8, batch_size=4, prompts_per_category=1))


def test_a_file_for_each_prompt_with_the_prompt_inside(tmp_path: Path) -> None:
    batches = predict(tmp_path)
    files = sorted((tmp_path / "predictions").iterdir())
    assert [file.name for file in files] == [f"{i:06}.png" for i in range(6)]
    drawn = [picture for batch in batches for picture in batch]
    data = ShapesData(size=8, batch_size=4, prompts_per_category=1)
    data.setup("predict")
    prompts = [prompt for batch in data.predict_dataloader() for prompt in batch["prompt"]]
    for file, picture, prompt in zip(files, drawn, prompts, strict=True):
        with Image.open(file) as image:
            assert image.info["prompt"] == prompt
            written = np.asarray(image).astype(int)
        assert np.abs(written - picture.permute(1, 2, 0).mul(255).numpy()).max() <= 0.5 + 1e-3


def test_earlier_pictures_are_not_overwritten(tmp_path: Path) -> None:
    predict(tmp_path)
    with pytest.raises(ConfigurationError, match=r"predictions holds pictures already.*set trainer\.default_root_dir"):
        predict(tmp_path)
