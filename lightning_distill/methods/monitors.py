"""Check of the metrics that callbacks monitor."""

from collections.abc import Sequence
from typing import Any

from lightning.pytorch import Callback

from lightning_distill.errors import ConfigurationError
from lightning_distill.suggestions import nearest, suggestion

UNCHECKED = ("train/", "perf/", "lr-")
"""Beginnings of metrics that training logs; their names are known only after the first step."""
COUNTERS = ("epoch", "step")
"""Names that `ModelCheckpoint` accepts besides metrics."""
KNOWN_PACKAGES = ("lightning", "lightning_distill", "pytorch_lightning")
"""Packages whose callbacks log no metrics of validation."""


def check_monitors(metrics: Sequence[str], trainer: Any) -> None:
    """Check that validation logs the metrics that callbacks such as `SwitchSolution` and `EarlyStopping` monitor.

    Only a name similar to one of `metrics` is an error if a callback of another package, which may log a metric of its own, is
    among the callbacks, or if the monitoring callback has an attribute `requires_metric` that is False.

    Args:
        metrics: Names of the metrics of validation. Further values of a metric are `name/value`.
        trainer: The trainer with the callbacks, or None.

    Raises:
        ConfigurationError: If a callback monitors another metric.
    """
    callbacks: list[Callback] = [] if trainer is None else trainer.callbacks
    others = any(type(callback).__module__.partition(".")[0] not in KNOWN_PACKAGES for callback in callbacks)
    for callback in callbacks:
        monitor = getattr(callback, "monitor", None)
        if not isinstance(monitor, str) or monitor in COUNTERS or monitor.startswith(UNCHECKED):
            continue
        if monitor in metrics or monitor.startswith(tuple(f"{name}/" for name in metrics)):
            continue
        required = getattr(callback, "requires_metric", True) and not others
        if required or nearest(monitor, metrics) is not None:
            raise ConfigurationError(
                f"{type(callback).__name__}.monitor is {monitor!r}, which validation does not log; "
                f"{suggestion(monitor, metrics)}"
            )
