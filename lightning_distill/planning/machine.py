"""What a training step takes of each GPU under a strategy, and which machine is large enough."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from lightning_distill.planning.step import SHARES, StepCost

FLOAT32 = 4
COUNTS = (1, 2, 4, 8, 16, 32, 64)
"""GPUs of the machines that are looked through for the smallest."""
FROZEN = ("teacher", "text_encoders", "autoencoder")


@dataclass(frozen=True)
class Strategy:
    """How networks lie on GPUs.

    Attributes:
        name: As of `trainer.strategy`.
        kind: "single", "ddp", "fsdp2" or "zero3".
        offloads_weights: Whether they stay in the memory of the CPU.
        offloads_optimizer: Whether its state, and gradients, do.
        bucket: Numbers in ZeRO-3's buffer of gradients at the most; it has no more than there are gradients.
        live: Weights that ZeRO-3 keeps gathered at the most.
    """

    name: str
    kind: str
    offloads_weights: bool = False
    offloads_optimizer: bool = False
    bucket: int = 200_000_000
    live: int = 1_000_000_000

    @property
    def shards(self) -> bool:
        """Whether no GPU has a whole network."""
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
"""Those that training knows by name."""


@dataclass(frozen=True)
class Machine:
    """GPUs that train together.

    Attributes:
        gpus: Of a node.
        nodes: Number of nodes.
        gpu_memory: GiB of a GPU.
        reserve: GiB of it that are left to what no arithmetic knows: CUDA's context, libraries, fragmentation.
    """

    gpus: int = 8
    nodes: int = 1
    gpu_memory: float = 80.0
    reserve: float = 4.0

    @property
    def processes(self) -> int:
        """One a GPU."""
        return self.gpus * self.nodes

    def holds(self, needed: float) -> bool:
        """Whether so many bytes fit on a GPU."""
        return needed <= (self.gpu_memory - self.reserve) * 2**30


@dataclass(frozen=True)
class Plan:
    """What a training takes.

    Attributes:
        strategy: Name of the strategy.
        processes: Number of them.
        parameters: Number of parameters by network, and how many of them train.
        gpu: Bytes of a GPU, by what they are for; their sum is the peak.
        cpu: Bytes of the CPU's memory, a process.
        communication: Bytes that each GPU receives in a step, by phase.
        calls: Forward and backward passes of networks in a step, by phase.
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
        """Bytes of a GPU."""
        return sum(self.gpu.values())


def plan_for(cost: StepCost, strategy: Strategy, processes: int, accumulate: int = 1, guard: bool = False) -> Plan:
    """What a step takes on each of some GPUs.

    Sharded weights are divided among the processes. FSDP2 holds the block that computes whole, the next one that it fetches,
    and the buffer that it fetches into, and in the backward pass the gradients of a block and the buffer that they leave from;
    ZeRO-3 holds as much as it may keep gathered, and the buffer that gradients leave from, with a copy of it as they leave.

    Args:
        cost: Of `measure_step`.
        strategy: How networks lie on the GPUs.
        processes: Number of GPUs, one process each.
        accumulate: Passes a step.
        guard: Whether a copy of what trains is kept on the CPU after the switch of solutions.
    """
    numbers, share = cost.numbers, processes if strategy.shards else 1
    trained = {name: numbers.get(f"trained/{name}", 0) for name in ("student", "critic")}
    gradients = FLOAT32 * trained["student"] / share
    weights = {
        name: numbers.get(f"weights/{name}", 0) / (1 if name == "autoencoder" else share)
        for name in ("teacher", "student", "average", "critic", "text_encoders", "autoencoder")
    }
    optimizer = {"optimizer": numbers["state/student"] / share, "critic's optimizer": 2 * FLOAT32 * trained["critic"] / share}
    if strategy.kind == "zero3":
        optimizer["float32 copies of ZeRO-3"] = FLOAT32 * sum(trained.values()) / share
        optimizer["critic's gradients"] = FLOAT32 * trained["critic"] / share
    exchange = _exchange(cost, strategy, processes)
    passes = max(numbers[f"pass/{phase}/{_known(share)}"] for phase in cost.phases)
    # At the end of a step there are no activations, and the optimizer has temporaries.
    step = gradients + numbers["step"] / share + (gradients if strategy.kind == "zero3" else 0)
    encoding = numbers["encode"] + (numbers["weights/text_encoders"] if strategy.shards else 0)
    beyond = max(passes + exchange, step, encoding)
    names = {name: f"weights: {name.replace('_', ' ')}" for name in weights}
    gpu = {names[name]: value for name, value in weights.items()} | optimizer | {"gradients": gradients}
    cpu: dict[str, float] = {}
    if strategy.offloads_weights:
        cpu |= {name: gpu.pop(name) for name in list(gpu) if name.startswith("weights:") and "autoencoder" not in name}
    if strategy.offloads_optimizer:
        cpu |= {name: gpu.pop(name) for name in (*optimizer, "gradients")}
        if strategy.kind == "zero3":
            cpu["gradients"] *= 2  # as they arrive, and as the optimizer sees them
        gpu["activations"] = max(passes - gradients + exchange, encoding)
    else:
        gpu["activations"] = beyond - gradients
    if guard:
        cpu["guard of the switch"] = (FLOAT32 * trained["student"] + numbers["weights/average"]) / share
    if strategy.kind == "ddp":
        gpu["buffers of DDP"] = FLOAT32 * trained["student"]
    if strategy.kind == "zero3":
        gpu["buffers of ZeRO-3"] = sum(_leaving(strategy, count) for count in trained.values())
    return Plan(
        strategy.name,
        processes,
        _parameters(numbers),
        {name: value for name, value in gpu.items() if value},
        {name: value for name, value in cpu.items() if value},
        {phase: _communication(cost, phase, strategy, processes, accumulate) for phase in cost.phases},
        cost.calls,
    )


def _known(share: int) -> int:
    """The number of processes, or the nearest below it, that the step was measured for."""
    return max(known for known in SHARES if known <= share)


def _parameters(numbers: Mapping[str, float]) -> dict[str, tuple[int, int]]:
    names = [name.partition("/")[2] for name in numbers if name.startswith("parameters/")]
    return {name: (round(numbers[f"parameters/{name}"]), round(numbers.get(f"trained/{name}", 0))) for name in names}


def _exchange(cost: StepCost, strategy: Strategy, processes: int) -> float:
    """Bytes of what is gathered at a time, and of buffers that gradients leave from."""
    numbers = cost.numbers
    if strategy.kind == "fsdp2":
        found = []
        for name, (block, rest) in cost.blocks.items():
            backward = 2 * block * numbers.get(f"trained/{name}", 0) / numbers[f"parameters/{name}"]
            found.append(rest + 3 * block + backward)
        return max(found)
    if strategy.kind == "zero3":
        # A critic trains apart from the others. What leaves is put together once more, in another order.
        main = sum(numbers[f"weights/{name}"] for name in cost.blocks if name != "critic")
        gathered = sum(min(part, FLOAT32 * strategy.live) for part in (main, numbers.get("weights/critic", 0)))
        return gathered + _leaving(strategy, max(numbers.get(f"trained/{name}", 0) for name in ("student", "critic")))
    if strategy.kind == "ddp" and processes > 1 and "critic" in cost.blocks:
        return 2 * FLOAT32 * numbers["trained/critic"]  # one message, and its mean
    return 0


def _leaving(strategy: Strategy, trained: float) -> float:
    """Bytes of the buffer from which the gradients of so many weights leave under ZeRO-3."""
    return FLOAT32 * min(strategy.bucket, trained)


def _communication(cost: StepCost, phase: str, strategy: Strategy, processes: int, accumulate: int) -> float:
    numbers, calls, others = cost.numbers, cost.calls[phase], (processes - 1) / processes
    trained = {name: FLOAT32 * numbers.get(f"trained/{name}", 0) for name in ("student", "critic")}
    if not strategy.shards:
        # Rings pass each part around twice. The critic updates at each pass.
        critic = trained["critic"] * calls.get("critic_backward", 0) * accumulate
        return 2 * others * (trained["student"] + critic)
    total = numbers["weights/text_encoders"]
    for name in cost.blocks:
        weights, backward = numbers[f"weights/{name}"], calls.get(f"{name}_backward", 0)
        if 0 < numbers.get(f"trained/{name}", 0) < numbers[f"parameters/{name}"]:
            weights += numbers["weights/teacher"]  # with LoRA, it computes with these
        total += weights * (calls.get(name, 0) + backward) + trained.get(name, 0) * backward
        total += numbers.get(f"regathered/{name}", 0) * backward
    return others * total * accumulate


def smallest(fits: Callable[[int], bool]) -> int | None:
    """The smallest number of GPUs that is enough, of those that are looked through."""
    return next((count for count in COUNTS if fits(count)), None)
