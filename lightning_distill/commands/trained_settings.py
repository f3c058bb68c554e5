"""Settings of a model that uses a checkpoint without training, against those that the checkpoint was trained with."""

import re
from collections.abc import Mapping
from typing import Any

from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from lightning_distill.commands.resume_report import SETTINGS, UNSET, Change, changed_settings, named_values
from lightning_distill.errors import ConfigurationError

TEACHER = "model.adapter.pretrained"
LOCATIONS = (TEACHER, "model.adapter.lora", "model.student.pretrained")
"""Settings with paths, which may differ on another machine."""
_FOLDERS = re.compile(r"[^\s'\"]*/(?=[^\s'\"/])")

NETWORK = ("model.adapter", "model.student", "model.guidance.kind")
"""Settings that define teacher and student, besides the class of the method; weights of other ones mean other networks."""
APPROXIMATE = ("model.adapter.torch_dtype", "model.adapter.variant", "model.student.derivative_penalty")
"""Those of `NETWORK` that change the precision of networks, or their start alone."""
WITHOUT_EFFECT = (
    "model.adapter.attention_backend",
    "model.adapter.trust_remote_code",
    "model.cache_latents",
    "model.lr_scheduler",
    "model.metric",
    "model.optimizer",
    "model.student.gradient_checkpointing",
    "model.student.max_drift",
    "model.validation",
)
"""Settings of a model that change nothing of its networks, or training alone."""

CARD = {
    "guidance_scale": "model.guidance.scale",
    "nfe": "model.validation.nfe",
    "height": "model.validation.height",
    "width": "model.validation.width",
}
"""Settings of the training that a model card states, by the names of its fields."""


def check_trained_settings(settings: Mapping[str, Any], checkpoint: Mapping[str, Any], path: str) -> None:
    """Compare the settings of the model with those that a checkpoint was trained with, and warn of others that differ.

    A teacher or student with the same last name in another place is taken for the same one, with a warning.

    Args:
        settings: Settings of this command.
        checkpoint: The checkpoint; one that the command line has not written has no settings, and is not compared.
        path: Its path, for messages.

    Raises:
        ConfigurationError: If a setting that defines the networks differs.
    """
    warned = []
    changes = changed_settings(settings, checkpoint, groups=("model",))
    for change in changes:
        if _is_among(change.name, WITHOUT_EFFECT):
            continue
        if _defines_networks(change, {each.name for each in changes}):
            remedy = "remove it" if change.saved == UNSET else f"set it to {change.saved}"
            raise ConfigurationError(
                f"{change.name} is {change.value}, and ckpt_path {path!r} was trained with {change.saved}; {remedy}"
            )
        warned.append(f"{change.name} {change.value} (checkpoint: {change.saved})")
    if warned:
        rank_zero_warn(f"checkpoint {path} was trained with other settings of the model: {', '.join(warned)}")


def card_fields(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of a model card that state what a checkpoint was trained with; none if it has no settings."""
    values = named_values(checkpoint.get(SETTINGS, {}), groups=("model",))
    return {field: values[name] for field, name in CARD.items() if name in values}


def _defines_networks(change: Change, changed: set[str]) -> bool:
    if change.name == "model":
        return True
    if not _is_among(change.name, NETWORK) or _is_among(change.name, APPROXIMATE):
        return False
    if change.name == "model.adapter.revision":
        return TEACHER not in changed  # a copy in a directory has no revision
    value, saved = (_FOLDERS.sub("", text.rstrip("/")) for text in (change.value, change.saved))
    return not (_is_among(change.name, LOCATIONS) and value == saved)


def _is_among(name: str, settings: tuple[str, ...]) -> bool:
    return any(name == each or name.startswith(f"{each}.") for each in settings)
