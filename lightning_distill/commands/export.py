"""`lightning-distill export`: convert a checkpoint to a pipeline directory."""

from collections.abc import Sequence

from lightning_distill.commands.options_cli import OptionsCLI
from lightning_distill.export.checkpoint import CheckpointExport, export_checkpoint


class ExportCLI(OptionsCLI):
    """`export`, in one process on the CPU; it ignores the settings of the trainer."""

    options_class = CheckpointExport
    description = "Convert the student of a checkpoint, a file or a sharded directory, to a pipeline directory."

    def execute(self, options: CheckpointExport) -> None:
        """Export the student."""
        export_checkpoint(self.model, options)


def main(arguments: Sequence[str], name: str) -> None:
    """Run `export` with the arguments after its name."""
    ExportCLI(arguments, name)
