"""Pictures of the student beside its teacher's, in TensorBoard."""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from lightning_distill.errors import ConfigurationError
from lightning_distill.methods.base import TeacherStudentBase
from lightning_distill.methods.encoder import encoded_data

TAG = "images/student_vs_teacher"
_CELL = (96, 256)
"""Bounds of a picture's longer side in a grid, in pixels."""
_PADDING = 4


class LogImages(Callback):
    """Draws the same prompts from the same noise at each validation: a row for each number of steps, the teacher's last.

    The grid goes to TensorBoard under `images/student_vs_teacher`; other loggers are left alone. The teacher's pictures
    are drawn once. All processes draw, because sharded networks need all of them, and rank zero writes.

    Args:
        prompts: Captions of the columns. None takes the first different ones of the validation set; `ShapesData` takes
            turns through its six categories, so that 12 are two of each. With precomputed data, captions of its validation set.
        columns: Number of prompts that None takes, at least 1.
        seed: Noise seed of the first column; each column has its own.
        every_n_validations: Validations from one grid to the next.

    Raises:
        ConfigurationError: If a setting is out of its range, or the method draws no pictures.
    """

    def __init__(
        self, prompts: Sequence[str] | None = None, columns: int = 12, seed: int = 0, every_n_validations: int = 1
    ) -> None:
        if columns < 1 or (prompts is not None and not len(prompts)):
            raise ConfigurationError("LogImages needs a prompt; raise its columns to 1 or more, or list prompts")
        if every_n_validations < 1:
            raise ConfigurationError(f"LogImages.every_n_validations is {every_n_validations}; 1 is every validation")
        self.prompts = list(prompts) if prompts is not None else None
        self.columns = columns
        self.seed = seed
        self.every_n_validations = every_n_validations
        self._validations = 0
        self._teacher_row: dict[str, Tensor] | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse a method without pictures and prompts without encoders, and forget the teacher of an earlier run."""
        sampling_method(self, pl_module)
        data = encoded_data(trainer)
        if data is not None and self.prompts is not None:
            data.check_known_prompts(self.prompts)
        self._teacher_row = None

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Take the prompts from the first batch of all processes."""
        if self.prompts is None:
            pairs = zip(batch["index"].tolist(), batch["prompt"], strict=True)
            self.prompts = different_prompts(prompts_in_order(pairs), self.columns)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw and log the grid."""
        loggers = [logger for logger in trainer.loggers if isinstance(logger, TensorBoardLogger)]
        if trainer.sanity_checking or self.prompts is None:
            return
        self._validations += 1
        if not loggers or (self._validations - 1) % self.every_n_validations:
            return
        module = sampling_method(self, pl_module)
        seeds = range(self.seed, self.seed + len(self.prompts))
        with evaluating(trainer, module):
            rows = student_rows(module, self.prompts, seeds)
            if self._teacher_row is None:
                self._teacher_row = teacher_row(module, self.prompts, seeds)
        if trainer.is_global_zero:
            grid = np.asarray(image_grid(rows | self._teacher_row, self.prompts))
            step = trainer.fit_loop.epoch_loop._batches_that_stepped  # the x-axis that Lightning gives all curves
            for logger in loggers:
                logger.experiment.add_image(TAG, grid, step, dataformats="HWC")

    def state_dict(self) -> dict[str, Any]:
        """The count of validations, and the prompts, so that a resumed run goes on with the same."""
        return {"validations": self._validations, "prompts": self.prompts, "columns": self.columns}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore them; prompts that this run sets stay, and another number of them is chosen anew."""
        self._validations = state_dict["validations"]
        if self.columns == state_dict["columns"]:
            self.prompts = self.prompts or state_dict["prompts"]


def sampling_method(callback: Callback, pl_module: LightningModule) -> TeacherStudentBase:
    """The method, as one that draws pictures.

    Raises:
        ConfigurationError: If it does not.
    """
    if not isinstance(pl_module, TeacherStudentBase):
        raise ConfigurationError(
            f"{type(callback).__name__} needs a method that draws pictures, and {type(pl_module).__name__} draws none; leave "
            "the callback out"
        )
    return pl_module


@contextmanager
def evaluating(trainer: Trainer, module: TeacherStudentBase) -> Iterator[None]:
    """Evaluation mode, and the precision of validation steps, around what is drawn outside of one."""
    modes = {part: part.training for part in module.modules()}
    module.eval()
    try:
        with trainer.precision_plugin.val_step_context():
            yield
    finally:
        for part, training in modes.items():
            part.training = training


def prompts_in_order(pairs: Iterable[tuple[int, str]]) -> list[str]:
    """The prompts of all processes in the order of the data set, whose places are dealt out among them.

    Args:
        pairs: Places and captions that this process has; every process must ask.
    """
    shares: list[list[tuple[int, str]]] = [list(pairs)]
    if dist.is_available() and dist.is_initialized():
        own, shares = shares[0], [[] for _ in range(dist.get_world_size())]
        dist.all_gather_object(shares, own)
    return [prompt for _, prompt in sorted(pair for share in shares for pair in share)]


def different_prompts(prompts: Sequence[str], count: int) -> list[str]:
    """The first `count` different prompts, in their order; fewer if there are not as many."""
    return list(dict.fromkeys(prompts))[:count]


def steps_label(nfe: int) -> str:
    """Steps in words."""
    return "1 step" if nfe == 1 else f"{nfe} steps"


def student_rows(module: TeacherStudentBase, prompts: Sequence[str], seeds: Sequence[int]) -> dict[str, Tensor]:
    """Rows of the student's pictures (B, 3, H, W) in [0, 1] on the CPU, one for each validated number of steps."""
    return {steps_label(nfe): module.sample(prompts, nfe, seeds).float().cpu() for nfe in module.validation.nfe}


def teacher_row(module: TeacherStudentBase, prompts: Sequence[str], seeds: Sequence[int]) -> dict[str, Tensor]:
    """The row of the teacher's pictures (B, 3, H, W) in [0, 1] on the CPU; none where a method has no teacher."""
    if not module.has_teacher:
        return {}
    nfe = module.validation.teacher_nfe
    return {f"teacher, {steps_label(nfe)}": module.sample(prompts, nfe, seeds, "teacher").float().cpu()}


def image_grid(rows: Mapping[str, Tensor], columns: Sequence[str]) -> Image.Image:
    """A labeled grid: small pictures are enlarged without smoothing, large ones reduced.

    Args:
        rows: Pictures (B, 3, H, W) in [0, 1] by the label of their row.
        columns: B labels, wrapped to the width of a picture.
    """
    font = ImageFont.load_default(12)
    first = next(iter(rows.values()))
    width, height = _cell_size(*first.shape[-2:])
    captions = ["\n".join(_wrapped(text, font, width)) for text in columns]
    line = sum(font.getmetrics()) if isinstance(font, ImageFont.FreeTypeFont) else 12
    left = round(max(font.getlength(label) for label in rows)) + 3 * _PADDING
    top = (max(caption.count("\n") for caption in captions) + 1) * (line + _PADDING) + 2 * _PADDING
    grid = Image.new("RGB", (left + len(columns) * (width + _PADDING), top + len(rows) * (height + _PADDING)), "white")
    draw = ImageDraw.Draw(grid)
    for j, caption in enumerate(captions):
        middle = left + j * (width + _PADDING) + width / 2
        draw.multiline_text((middle, top - _PADDING), caption, "black", font, anchor="md", align="center")
    for i, (label, images) in enumerate(rows.items()):
        y = top + i * (height + _PADDING)
        draw.text((left - 2 * _PADDING, y + height / 2), label, "black", font, anchor="rm")
        for j, image in enumerate(images):
            grid.paste(_cell(image, width, height), (left + j * (width + _PADDING), y))
    return grid


def _cell_size(height: int, width: int) -> tuple[int, int]:
    smallest, largest = _CELL
    longer = max(height, width)
    # Enlarged by a whole number, so that all pixels become equally large.
    scale = math.ceil(smallest / longer) if longer < smallest else min(1.0, largest / longer)
    return round(width * scale), round(height * scale)


def _cell(image: Tensor, width: int, height: int) -> Image.Image:
    pixels = image.clamp(0, 1).mul(255).round().to(torch.uint8).permute(1, 2, 0).contiguous().numpy()
    enlarged = width >= pixels.shape[1]
    return Image.fromarray(pixels).resize((width, height), Image.Resampling.NEAREST if enlarged else Image.Resampling.BOX)


def _wrapped(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> list[str]:
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) <= width:
            lines[-1] = longer
        else:
            lines.append(word)
    return [line for line in lines if line]
