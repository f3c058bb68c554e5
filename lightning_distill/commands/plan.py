"""`lightning-distill plan`: estimate the GPU memory of a training run."""

from collections.abc import Sequence

from lightning_distill.commands.options_cli import OptionsCLI
from lightning_distill.planning import PlanOptions, plan


class PlanCLI(OptionsCLI):
    """`plan`, on any machine: the settings of the trainer describe the machine of the training run."""

    options_class = PlanOptions
    description = "Estimate the memory of a training run per GPU, and the smallest sufficient machine; no weights are loaded."

    def execute(self, options: PlanOptions) -> None:
        """Print the estimate."""
        plan(self.model, self.datamodule, self.trainer, options)


def main(arguments: Sequence[str], name: str) -> None:
    """Run `plan` with the arguments after its name."""
    PlanCLI(arguments, name)
