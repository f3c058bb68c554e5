"""`lightning-distill export`: the student of a checkpoint in the formats of other tools."""

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_info

from lightning_distill.callbacks.report import read_report
from lightning_distill.commands.checkpoint_path import check_exists, find_checkpoint
from lightning_distill.commands.options_cli import OptionsCLI
from lightning_distill.commands.trained_settings import card_fields, check_trained_settings
from lightning_distill.export.checkpoint import CheckpointExport, export_checkpoint, local_checkpoint
from lightning_distill.export.directory import check_export_directory
from lightning_distill.export.hub import check_push, push
from lightning_distill.sharding.checkpoint_files import read_checkpoint

LISTS = ("--format", "--nfe")
"""Options whose values are several words."""


class ExportCLI(OptionsCLI):
    """`export`, in one process on the CPU; of the trainer's settings it uses only the directories of checkpoints."""

    options_class = CheckpointExport
    description = "Export the student of a checkpoint, a file or a sharded directory, in one format or several."

    def __init__(self, arguments: Sequence[str], name: str) -> None:
        super().__init__(join_lists(arguments), name)

    def execute(self, options: CheckpointExport) -> None:
        """Export the student, with the settings that the checkpoint was trained with."""
        check_export_directory(options.directory)
        if options.push_to_hub is not None:
            check_push(options.push_to_hub)
        self.check_teacher()
        if options.ckpt_path in ("last", "best", "hpc"):
            options = replace(options, ckpt_path=find_checkpoint(options.ckpt_path, self._searched(), resumes=False))
        path = local_checkpoint(options.ckpt_path)
        check_exists(str(path), resumes=False)
        content = read_checkpoint(path, mmap=True)
        check_trained_settings(self.config_dump, content, options.ckpt_path)
        directory = export_checkpoint(
            self.model, options, card_fields(content) | _report(path, content["global_step"], options)
        )
        if options.push_to_hub is not None:
            url = push(directory, options.push_to_hub, options.public)
            rank_zero_info(f"Pushed {directory} to {url}")

    def _searched(self) -> Trainer:
        """A trainer with the directories of checkpoints of the settings, on the CPU of any machine."""
        listed = self.trainer.callbacks or []
        listed = listed if isinstance(listed, list) else [listed]
        callbacks: list[Callback] = [each for each in listed if isinstance(each, ModelCheckpoint)]
        return Trainer(
            accelerator="cpu",
            devices=1,
            logger=False,
            callbacks=callbacks,
            default_root_dir=self.trainer.default_root_dir,
            enable_progress_bar=False,
            enable_model_summary=False,
        )


def join_lists(arguments: Sequence[str]) -> list[str]:
    """Arguments in which the words after an option of `LISTS` are one list, as in `--nfe=[1, 2, 4]` for `--nfe 1 2 4`."""
    joined: list[str] = []
    remaining = list(arguments)
    while remaining:
        argument = remaining.pop(0)
        option, _, value = argument.partition("=")
        if option in LISTS and value and value[0] not in "[{":
            argument = f"{option}=[{value}]"
        words: list[str] = []
        while argument in LISTS and remaining and not remaining[0].startswith(("-", "[")):
            words.append(remaining.pop(0))
        joined.append(f"{argument}=[{', '.join(words)}]" if words else argument)
    return joined


def _report(checkpoint: Path, steps: int, options: CheckpointExport) -> dict[str, Any]:
    """Fields of the model card from the report of the checkpoint's run, if it is of the same weights."""
    if options.weights == "last":
        return {}  # reports measure the EMA
    for directory in (checkpoint.absolute().parent.parent, checkpoint.absolute().parent):
        if report := read_report(directory, steps):
            summary, images = report
            figures = {name: value for name, value in summary.figures().items() if math.isfinite(value)}
            return {"figures": figures, "minutes": summary.minutes, "images": images}
    return {}


def main(arguments: Sequence[str], name: str) -> None:
    """Run `export` with the arguments after its name."""
    ExportCLI(arguments, name)
