"""Strategies that spread networks over processes; importing this makes them known to `Trainer(strategy=...)` by name."""

from typing import Any

from lightning.pytorch.strategies import StrategyRegistry

from lightning_distill.sharding.fsdp2 import FSDP2Strategy
from lightning_distill.sharding.zero3 import ZeRO3Strategy

__all__ = ["FSDP2Strategy", "ZeRO3Strategy"]

_NAMES: dict[str, tuple[type[Any], dict[str, Any]]] = {
    "fsdp2": (FSDP2Strategy, {}),
    "fsdp2_offload": (FSDP2Strategy, {"offload": True}),
    "deepspeed_stage_3": (ZeRO3Strategy, {}),
    "deepspeed_stage_3_offload_optimizer": (ZeRO3Strategy, {"offload_optimizer": True}),
    "deepspeed_stage_3_offload": (ZeRO3Strategy, {"offload_optimizer": True, "offload_parameters": True}),
}

for _name, (_kind, _settings) in _NAMES.items():
    # Lightning has two of these names already, for strategies that derivatives do not pass.
    StrategyRegistry.register(_name, _kind, description=(_kind.__doc__ or "").splitlines()[0], override=True, **_settings)
