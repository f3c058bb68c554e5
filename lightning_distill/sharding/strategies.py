"""The strategies that shard networks; importing this module registers their names for `Trainer(strategy=...)`."""

from typing import Any

from lightning.pytorch.strategies import StrategyRegistry

from lightning_distill.sharding.fsdp2 import FSDP2Strategy
from lightning_distill.sharding.zero3 import ZeRO3Strategy

__all__ = ["STRATEGIES", "FSDP2Strategy", "ZeRO3Strategy"]

STRATEGIES: dict[str, tuple[type[Any], dict[str, Any]]] = {
    "fsdp2": (FSDP2Strategy, {}),
    "fsdp2_offload": (FSDP2Strategy, {"offload": True}),
    "deepspeed_stage_3": (ZeRO3Strategy, {}),
    "deepspeed_stage_3_offload_optimizer": (ZeRO3Strategy, {"offload_optimizer": True}),
    "deepspeed_stage_3_offload": (ZeRO3Strategy, {"offload_optimizer": True, "offload_parameters": True}),
}
"""Class and settings of each name."""

for _name, (_strategy, _settings) in STRATEGIES.items():
    # Lightning registers two of these names itself, for strategies without forward-mode derivatives.
    StrategyRegistry.register(
        _name, _strategy, description=(_strategy.__doc__ or "").splitlines()[0], override=True, **_settings
    )
