"""`lightning-distill precompute`: encode the images and prompts of a data set once, before training."""

from collections.abc import Sequence
from typing import Any

from lightning.fabric import Fabric
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_distill.commands.encode_dataset import PrecomputeOptions, encode_dataset
from lightning_distill.commands.options_cli import OptionsCLI
from lightning_distill.commands.training import trainer_error


class PrecomputeCLI(OptionsCLI):
    """`precompute`; of the trainer's settings it uses `accelerator`, `devices`, `num_nodes` and `precision`."""

    options_class = PrecomputeOptions
    description = "Encode images and prompts once and write them to shards; an interrupted run resumes."

    def instantiate_trainer(self, **kwargs: Any) -> Any:
        """Fabric with the devices and the precision of the trainer."""
        config = self._get(self.config_init, "trainer")
        settings = {name: config[name] for name in ("accelerator", "devices", "num_nodes", "precision")}
        try:
            return Fabric(**settings)
        except (RuntimeError, MisconfigurationException) as error:
            raise trainer_error(error, settings) from error

    def execute(self, options: PrecomputeOptions) -> None:
        """Encode the data set."""
        encode_dataset(self.model, self.datamodule, options, self.trainer)


def main(arguments: Sequence[str], name: str) -> None:
    """Run `precompute` with the arguments after its name."""
    PrecomputeCLI(arguments, name)
