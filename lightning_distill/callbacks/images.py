"""Grids of the student's and the teacher's images in TensorBoard."""

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
"""Bounds of the longer side of an image in a grid, in pixels."""
_PADDING = 4


class LogImages(Callback):
    """Samples fixed prompts from fixed noise at each validation: a row for each number of steps, the teacher's row last.

    The grid goes to TensorBoard under `images/student_vs_teacher`; other loggers are ignored. The teacher's images are sampled
    once. All processes sample, because sharded networks need all of them, and rank zero writes.

    Args:
        prompts: Captions of the columns. None: the first different prompts of the validation set. `ShapesData` alternates its
            six categories, so that 12 prompts are two of each. With precomputed data, captions of its validation set.
        columns: Number of prompts if `prompts` is None, at least 1.
        seed: Noise seed of the first column; the seeds of the columns are consecutive.
        every_n_validations: Interval between two grids, in validations.

    Raises:
        ConfigurationError: If a setting is out of its range.
    """

    def __init__(
        self, prompts: Sequence[str] | None = None, columns: int = 12, seed: int = 0, every_n_validations: int = 1
    ) -> None:
        if columns < 1 or (prompts is not None and not len(prompts)):
            raise ConfigurationError(
                f"LogImages.columns is {columns} and LogImages.prompts is {prompts}; set columns to at least 1, and prompts to "
                "null or at least one prompt"
            )
        if every_n_validations < 1:
            raise ConfigurationError(
                f"LogImages.every_n_validations is {every_n_validations}; set it to at least 1, which is every validation"
            )
        self.prompts = list(prompts) if prompts is not None else None
        self.columns = columns
        self.seed = seed
        self.every_n_validations = every_n_validations
        self._validations = 0
        self._teacher_row: dict[str, Tensor] | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check method and prompts, and drop the teacher's images of an earlier run.

        Raises:
            ConfigurationError: If the method samples no images, or precomputed data do not have the condition of a prompt.
        """
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
            self.prompts = unique_prompts(gather_prompts(pairs), self.columns)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Sample and log the grid."""
        loggers = [logger for logger in trainer.loggers if isinstance(logger, TensorBoardLogger)]
        if trainer.sanity_checking or self.prompts is None:
            return
        self._validations += 1
        if not loggers or (self._validations - 1) % self.every_n_validations:
            return
        module = sampling_method(self, pl_module)
        seeds = range(self.seed, self.seed + len(self.prompts))
        with evaluation_mode(trainer, module):
            rows = student_rows(module, self.prompts, seeds)
            if self._teacher_row is None:
                self._teacher_row = teacher_row(module, self.prompts, seeds)
        if trainer.is_global_zero:
            grid = np.asarray(image_grid(rows | self._teacher_row, self.prompts))
            step = trainer.fit_loop.epoch_loop._batches_that_stepped  # x-axis of all curves of Lightning
            for logger in loggers:
                logger.experiment.add_image(TAG, grid, step, dataformats="HWC")

    def state_dict(self) -> dict[str, Any]:
        """Number of validations, and the prompts, so that a resumed run continues with the same prompts."""
        return {"validations": self._validations, "prompts": self.prompts, "columns": self.columns}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the state, except prompts that this run sets itself, and prompts of another number of columns."""
        self._validations = state_dict["validations"]
        if self.columns == state_dict["columns"]:
            self.prompts = self.prompts or state_dict["prompts"]


def sampling_method(callback: Callback, pl_module: LightningModule) -> TeacherStudentBase:
    """The module as a method that samples images.

    Raises:
        ConfigurationError: If the module is not a `TeacherStudentBase`.
    """
    if not isinstance(pl_module, TeacherStudentBase):
        raise ConfigurationError(
            f"{type(callback).__name__} needs a method that samples images, but {type(pl_module).__name__} samples none; "
            "remove the callback from trainer.callbacks"
        )
    return pl_module


@contextmanager
def evaluation_mode(trainer: Trainer, module: TeacherStudentBase) -> Iterator[None]:
    """Context with evaluation mode and the precision of validation steps, for sampling outside of them."""
    modes = {part: part.training for part in module.modules()}
    module.eval()
    try:
        with trainer.precision_plugin.val_step_context():
            yield
    finally:
        for part, training in modes.items():
            part.training = training


def gather_prompts(pairs: Iterable[tuple[int, str]]) -> list[str]:
    """The prompts of all processes, in the order of the data set, whose samples are distributed among the processes.

    All processes must call this function.

    Args:
        pairs: Indices and captions of this process.
    """
    shares: list[list[tuple[int, str]]] = [list(pairs)]
    if dist.is_available() and dist.is_initialized():
        own, shares = shares[0], [[] for _ in range(dist.get_world_size())]
        dist.all_gather_object(shares, own)
    return [prompt for _, prompt in sorted(pair for share in shares for pair in share)]


def unique_prompts(prompts: Sequence[str], count: int) -> list[str]:
    """The first `count` different prompts in their order, or all of them if there are fewer."""
    return list(dict.fromkeys(prompts))[:count]


def steps_label(nfe: int) -> str:
    """Row label of a number of steps."""
    return "1 step" if nfe == 1 else f"{nfe} steps"


def student_rows(module: TeacherStudentBase, prompts: Sequence[str], seeds: Sequence[int]) -> dict[str, Tensor]:
    """Rows of the student's images (B, 3, H, W) in [0, 1] on the CPU, one for each validated number of steps."""
    return {steps_label(nfe): module.sample(prompts, nfe, seeds).float().cpu() for nfe in module.validation.nfe}


def teacher_row(module: TeacherStudentBase, prompts: Sequence[str], seeds: Sequence[int]) -> dict[str, Tensor]:
    """The row of the teacher's images (B, 3, H, W) in [0, 1] on the CPU; empty if the method has no teacher."""
    if not module.has_teacher:
        return {}
    nfe = module.validation.teacher_nfe
    return {f"teacher, {steps_label(nfe)}": module.sample(prompts, nfe, seeds, "teacher").float().cpu()}


def image_grid(rows: Mapping[str, Tensor], columns: Sequence[str]) -> Image.Image:
    """A labeled grid; small images are enlarged by nearest neighbor, large images are reduced by a box filter.

    Args:
        rows: Images (B, 3, H, W) in [0, 1] by the label of their row.
        columns: B labels, wrapped to the width of an image.
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
    # Enlarged by an integer factor, so that all pixels have equal size.
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
