"""Memory per GPU of a training step under a strategy, and the smallest sufficient machine."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from lightning_distill.planning.step import SHARD_COUNTS, StepCost

FLOAT32 = 4
"""Bytes of a float32 number."""
GPU_COUNTS = (1, 2, 4, 8, 16, 32, 64)
"""GPU counts of the machines in the search for the smallest."""


@dataclass(frozen=True)
class Strategy:
    """How a strategy places networks on GPUs.

    Attributes:
        name: Name in `trainer.strategy`.
        kind: "single", "ddp", "fsdp2" or "zero3".
        offloads_weights: Whether weights are offloaded to the CPU.
        offloads_optimizer: Whether optimizer state and gradients are offloaded to the CPU.
        reduce_bucket_size: ZeRO-3's maximum number of elements in its buffer of gradients. The buffer is never larger than the
            gradients.
        max_live_parameters: ZeRO-3's maximum number of gathered parameters.
    """

    name: str
    kind: str
    offloads_weights: bool = False
    offloads_optimizer: bool = False
    reduce_bucket_size: int = 200_000_000
    max_live_parameters: int = 1_000_000_000

    @property
    def shards(self) -> bool:
        """Whether the strategy shards the networks over the GPUs."""
        return self.kind in ("fsdp2", "zero3")


STRATEGIES = {
    strategy.name: strategy
    for strategy in (
        Strategy("auto", "single"),
        Strategy("ddp", "ddp"),
        Strategy("fsdp2", "fsdp2"),
        Strategy("fsdp2_offload", "fsdp2", offloads_weights=True, offloads_optimizer=True),
        Strategy("deepspeed_stage_3", "zero3"),
        Strategy("deepspeed_stage_3_offload_optimizer", "zero3", offloads_optimizer=True),
        Strategy("deepspeed_stage_3_offload", "zero3", offloads_weights=True, offloads_optimizer=True),
    )
}
"""Supported strategies by name."""


@dataclass(frozen=True)
class Machine:
    """GPUs of a training run.

    Attributes:
        gpus: Number of GPUs per node.
        nodes: Number of nodes.
        gpu_memory: Memory of a GPU in GiB.
        reserve: Memory of a GPU in GiB that is left free for CUDA's context, libraries and fragmentation.
    """

    gpus: int = 8
    nodes: int = 1
    gpu_memory: float = 80.0
    reserve: float = 4.0

    @property
    def processes(self) -> int:
        """Number of processes, one per GPU."""
        return self.gpus * self.nodes

    def fits(self, size: float) -> bool:
        """Whether a number of bytes fits on a GPU beside the reserve."""
        return size <= (self.gpu_memory - self.reserve) * 2**30


@dataclass(frozen=True)
class Plan:
    """Estimated cost of a training run.

    Attributes:
        strategy: Name of the strategy.
        processes: Number of processes.
        parameters: Numbers of all and of trainable parameters, by network.
        gpu: Bytes per GPU by purpose; their sum is the peak.
        cpu: Bytes of CPU memory per process by purpose.
        communication: Bytes that each GPU receives in an optimizer step, by phase.
        calls: Numbers of forward and backward passes of networks in a batch, by phase.
    """

    strategy: str
    processes: int
    parameters: dict[str, tuple[int, int]]
    gpu: dict[str, float]
    cpu: dict[str, float]
    communication: dict[str, float]
    calls: dict[str, dict[str, float]] = field(default_factory=dict)

    @property
    def peak(self) -> float:
        """Peak memory of a GPU in bytes."""
        return sum(self.gpu.values())


def plan_for(cost: StepCost, strategy: Strategy, processes: int, accumulate: int = 1, rollback: bool = False) -> Plan:
    """Estimate the memory and communication per GPU of a training step.

    Sharded weights are divided over the processes. FSDP2 has one unsharded block in use, prefetches the next one, and has a
    buffer for the gather. In the backward pass it also has the gradients of a block and the buffer that reduces them. ZeRO-3
    has up to its limit of gathered parameters, a buffer that reduces gradients, and a copy of this buffer during the reduction.

    Args:
        cost: Result of `measure_step`.
        strategy: Placement of the networks.
        processes: Number of GPUs, one process each.
        accumulate: Number of batches per optimizer step.
        rollback: Whether the CPU has a snapshot of the trained weights for a rollback after the switch of phases.
    """
    numbers, shards = cost.numbers, processes if strategy.shards else 1
    trained = {name: numbers.get(f"trained/{name}", 0) for name in ("student", "critic")}
    gradients = FLOAT32 * trained["student"] / shards
    weights = {
        name: numbers.get(f"weights/{name}", 0) / (1 if name == "autoencoder" else shards)
        for name in ("teacher", "student", "ema", "critic", "text_encoders", "autoencoder")
    }
    optimizer = {"optimizer": numbers["state/student"] / shards, "critic optimizer": 2 * FLOAT32 * trained["critic"] / shards}
    if strategy.kind == "zero3":
        optimizer["float32 copies of ZeRO-3"] = FLOAT32 * sum(trained.values()) / shards
        optimizer["critic gradients"] = FLOAT32 * trained["critic"] / shards
    buffers = _communication_buffers(cost, strategy, processes)
    passes = max(numbers[f"pass/{phase}/{_measured_shards(shards)}"] for phase in cost.phases)
    # The optimizer step has temporaries, but no activations.
    step = gradients + numbers["optimizer_temporaries"] / shards + (gradients if strategy.kind == "zero3" else 0)
    encoding = numbers["encode"] + (numbers["weights/text_encoders"] if strategy.shards else 0)
    temporary = max(passes + buffers, step, encoding)
    gpu = {_weights_label(name): value for name, value in weights.items()} | optimizer | {"gradients": gradients}
    cpu: dict[str, float] = {}
    if strategy.offloads_weights:
        cpu |= {name: gpu.pop(name) for name in list(gpu) if name.startswith("weights:") and "autoencoder" not in name}
    if strategy.offloads_optimizer:
        cpu |= {name: gpu.pop(name) for name in (*optimizer, "gradients")}
        if strategy.kind == "zero3":
            cpu["gradients"] *= 2  # one copy as received, one for the optimizer
        gpu["activations"] = max(passes - gradients + buffers, encoding)
    else:
        gpu["activations"] = temporary - gradients
    if rollback:
        cpu["rollback snapshot"] = (FLOAT32 * trained["student"] + numbers["weights/ema"]) / shards
    if strategy.kind == "ddp":
        gpu["buffers of DDP"] = FLOAT32 * trained["student"]
    if strategy.kind == "zero3":
        gpu["buffers of ZeRO-3"] = sum(_reduce_bucket(strategy, count) for count in trained.values())
    return Plan(
        strategy.name,
        processes,
        _parameters(numbers),
        {name: value for name, value in gpu.items() if value},
        {name: value for name, value in cpu.items() if value},
        {phase: _communication(cost, phase, strategy, processes, accumulate) for phase in cost.phases},
        cost.calls,
    )


def _weights_label(name: str) -> str:
    return f"weights: {'EMA' if name == 'ema' else name.replace('_', ' ')}"


def _measured_shards(shards: int) -> int:
    """The number of shards, or the nearest smaller one that `measure_step` covers."""
    return max(count for count in SHARD_COUNTS if count <= shards)


def _parameters(numbers: Mapping[str, float]) -> dict[str, tuple[int, int]]:
    names = [name.partition("/")[2] for name in numbers if name.startswith("parameters/")]
    return {name: (round(numbers[f"parameters/{name}"]), round(numbers.get(f"trained/{name}", 0))) for name in names}


def _communication_buffers(cost: StepCost, strategy: Strategy, processes: int) -> float:
    """Bytes of gathered weights and of buffers that reduce gradients, at the peak."""
    numbers = cost.numbers
    if strategy.kind == "fsdp2":
        found = []
        for name, (block, rest) in cost.blocks.items():
            backward = 2 * block * numbers.get(f"trained/{name}", 0) / numbers[f"parameters/{name}"]
            found.append(rest + 3 * block + backward)
        return max(found)
    if strategy.kind == "zero3":
        # A critic trains in another engine, with a limit of its own. The reduction copies its bucket into another order.
        main = sum(numbers[f"weights/{name}"] for name in cost.blocks if name != "critic")
        parts = (main, numbers.get("weights/critic", 0))
        gathered = sum(min(part, FLOAT32 * strategy.max_live_parameters) for part in parts)
        return gathered + _reduce_bucket(strategy, max(numbers.get(f"trained/{name}", 0) for name in ("student", "critic")))
    if strategy.kind == "ddp" and processes > 1 and "critic" in cost.blocks:
        return 2 * FLOAT32 * numbers["trained/critic"]  # one message of all gradients, and their mean
    return 0


def _reduce_bucket(strategy: Strategy, trained: float) -> float:
    """Bytes of ZeRO-3's buffer that reduces the gradients of a number of trained weights."""
    return FLOAT32 * min(strategy.reduce_bucket_size, trained)


def _communication(cost: StepCost, phase: str, strategy: Strategy, processes: int, accumulate: int) -> float:
    numbers, calls, others = cost.numbers, cost.calls[phase], (processes - 1) / processes
    trained = {name: FLOAT32 * numbers.get(f"trained/{name}", 0) for name in ("student", "critic")}
    if not strategy.shards:
        # A ring all-reduce sends each gradient around twice. The critic is updated in every batch.
        critic = trained["critic"] * calls.get("critic_backward", 0) * accumulate
        return 2 * others * (trained["student"] + critic)
    total = numbers["weights/text_encoders"]
    for name in cost.blocks:
        weights, backward = numbers[f"weights/{name}"], calls.get(f"{name}_backward", 0)
        if 0 < numbers.get(f"trained/{name}", 0) < numbers[f"parameters/{name}"]:
            weights += numbers["weights/teacher"]  # LoRA computes with the teacher's weights
        total += weights * (calls.get(name, 0) + backward) + trained.get(name, 0) * backward
        total += numbers.get(f"regathered/{name}", 0) * backward
    return others * total * accumulate


def smallest_gpu_count(fits: Callable[[int], bool]) -> int | None:
    """The smallest sufficient number of GPUs in `GPU_COUNTS`, or None."""
    return next((count for count in GPU_COUNTS if fits(count)), None)
