"""Memory and network calls of a training step: the method's own step, executed on fake tensors."""

import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from lightning_distill.errors import ConfigurationError
from lightning_distill.flow import dual_rules
from lightning_distill.methods.base import TeacherStudentBase
from lightning_distill.optimizers import has_block_state
from lightning_distill.planning import hunyuan_image3
from lightning_distill.planning.fake_pipeline import attach_fake_pipeline
from lightning_distill.planning.memory_tracker import MemoryTracker, cuda_autocast
from lightning_distill.planning.networks import MEASURED_BLOCKS, FakeNetworks, network_names, network_size, pipeline_networks
from lightning_distill.teachers.diffusers_adapter import DiffusersAdapter
from lightning_distill.teachers.hunyuan_image3.adapter import HunyuanImage3Adapter

SHARD_COUNTS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
"""Numbers of shards of the gradients that `measure_step` covers."""


@dataclass(frozen=True)
class BatchShape:
    """Batch of one process.

    Attributes:
        samples: Number of samples.
        size: Height and width of the images in pixels.
        images: Whether the batch has images, or prompts only.
        encoded: Whether the batch contains latents and conditions in place of images and prompts.
        accumulated: Whether the gradients of several batches are accumulated.
    """

    samples: int
    size: tuple[int, int]
    images: bool = True
    encoded: bool = False
    accumulated: bool = False


@dataclass(frozen=True)
class StepCost:
    """Cost of a training step. All numbers are affine in the numbers of blocks of a network.

    Attributes:
        numbers: Counts, and sizes in bytes, by name:

            - `parameters/<network>`, `trained/<network>`: numbers of all and of trainable parameters;
            - `weights/<network>`: size of the weights that the network shares with no other;
            - `regathered/<network>`: size of the experts that checkpointed blocks gather again for their recomputation;
            - `state/student`: size of the optimizer state;
            - `optimizer_temporaries`: peak of the optimizer step beside its state;
            - `encode`: peak of encoding a batch;
            - `pass/<phase>/<shards>`: peak of activations and gradients in a forward and backward pass. Gradients are divided
              over the shards.
        calls: Numbers of calls of each network in a step, by phase: `teacher`, `student`, `student_backward` and so on.
        blocks: Sizes of the largest block of each network and of its weights outside blocks.
    """

    numbers: dict[str, float]
    calls: dict[str, dict[str, float]]
    blocks: dict[str, tuple[int, int]]

    @property
    def phases(self) -> list[str]:
        """Names of the phases."""
        return list(self.calls)


def measure_step(
    module: TeacherStudentBase,
    directory: Path,
    batch: BatchShape,
    phases: list[str],
    precision: str = "32-true",
    gpu: bool = True,
) -> StepCost:
    """Execute a method's training step on fake tensors with few blocks, and extrapolate to all blocks.

    Equal blocks have equal cost. The step is executed with two blocks per list, and, for each list, with a third one.

    Args:
        module: Method whose networks are not built. It cannot be used afterwards.
        directory: Directory with the configurations of the teacher.
        batch: Batch of one process.
        phases: Phases of the training. A trajectory alignment is active in all of them.
        precision: Setting `trainer.precision`: "bf16-mixed", "16-mixed" or "32-true".
        gpu: Whether to train on a GPU, where autocast and optimizers take more memory than on a CPU.

    Raises:
        ConfigurationError: If the precision is not supported, or the optimizer does not run on fake tensors.
    """
    dtypes = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16, "32-true": None, "32": None}
    if precision not in dtypes:
        raise ConfigurationError(
            f"trainer.precision is {precision}, which plan does not support; choose one of {', '.join(dtypes)}"
        )
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        if gpu:
            stack.enter_context(patch.object(dual_rules, "CPU_BLOCK_BYTES", dual_rules.DEVICE_BLOCK_BYTES))
        stack.enter_context(hunyuan_image3.even_routing())
        networks = _attach(module, directory, mode)
        measurement = _Measurement(module, networks, batch, mode, dtypes[precision], gpu)
        measurement.encode()
        few = dict.fromkeys(networks.depths, MEASURED_BLOCKS)
        base = measurement.step(few, phases)
        numbers = dict(base.numbers)
        for name, depth in networks.depths.items():
            more = measurement.step({**few, name: MEASURED_BLOCKS + 1}, phases)
            for key, value in base.numbers.items():
                numbers[key] += (depth - MEASURED_BLOCKS) * (more.numbers[key] - value)
    return StepCost(numbers | measurement.encoders, base.calls, base.blocks)


def _attach(module: TeacherStudentBase, directory: Path, mode: FakeTensorMode) -> FakeNetworks:
    """Attach fake encoders to the adapter of a method; returns the networks of its teacher family."""
    adapter = module.adapter
    if isinstance(adapter, HunyuanImage3Adapter):
        hunyuan_image3.attach_fake_components(adapter, directory, mode)
        return hunyuan_image3.checkpoint_networks(directory)
    assert isinstance(adapter, DiffusersAdapter)
    networks = pipeline_networks(adapter, directory)
    attach_fake_pipeline(adapter, directory, mode)
    return networks


class _Measurement:
    """Executes steps of a method on fake tensors.

    Attributes:
        encoders: Numbers of `StepCost` that concern the text encoders and the autoencoder.
    """

    def __init__(
        self,
        module: TeacherStudentBase,
        networks: FakeNetworks,
        batch: BatchShape,
        mode: FakeTensorMode,
        dtype: torch.dtype | None,
        gpu: bool,
    ) -> None:
        self.module, self.networks, self.batch, self.mode, self.dtype, self.gpu = module, networks, batch, mode, dtype, gpu
        self.encoders: dict[str, float] = {}
        self.inputs: dict[str, Any] = {}
        self.expected = {phase: module.expected_calls(phase) for phase in module.phases}
        module.fix_random_choices()

    def cuda_functions(self) -> AbstractContextManager[Any]:
        """Context in which autocast covers the operations that it covers on the device."""
        return cuda_autocast() if self.gpu else nullcontext()

    @contextmanager
    def precision(self) -> Iterator[None]:
        """Context of the trainer's precision."""
        autocast = nullcontext() if self.dtype is None else torch.autocast("cpu", self.dtype, cache_enabled=False)
        with self.cuda_functions(), autocast:
            yield

    def encode(self) -> None:
        """Encode a batch, and measure the encoders."""
        module, samples, tracker = self.module, self.batch.samples, MemoryTracker((1,))
        adapter, prompts = module.adapter, ["a prompt"] * samples
        with self.mode:
            image = torch.empty(samples, 3, *self.batch.size)
        with tracker, self.precision(), torch.no_grad():
            null = adapter.encode_prompt([""])
            condition = adapter.encode_prompt(prompts)
            latents = adapter.encode_images(image) if self.batch.images else self._empty_latents()
        module.encoder.set_null_condition(null)
        self.inputs = {"prompt": prompts, "latents": latents.detach(), "condition": condition}
        self.encoders["encode"] = 0.0 if self.batch.encoded else tracker.peaks[1]
        parts = {"text_encoders": list(adapter.text_encoders().values()), "autoencoder": [adapter.get_submodule("vae")]}
        for name, encoders in parts.items():
            found = [] if self.batch.encoded else [network_size(encoder) for encoder in encoders]
            self.encoders[f"weights/{name}"] = sum(size.weights for size in found)
            self.encoders[f"parameters/{name}"] = sum(size.parameters for size in found)

    def _empty_latents(self) -> Tensor:
        """Latents (B, C, h, w) in place of those of images, for batches of prompts."""
        with self.mode:
            return torch.empty(self.batch.samples, *self.module.adapter.latent_shape(*self.batch.size))

    def step(self, depths: Mapping[str, int], phases: list[str]) -> StepCost:
        """Build the networks with a number of blocks per list, and execute a step in each phase."""
        module = self.module
        self.networks.build(module, depths, self.mode)
        networks = {name: module.get_submodule(path) for name, path in network_names(module).items()}
        numbers: dict[str, float] = {}
        blocks = {}
        for name, network in networks.items():
            size = network_size(network, None if name == "teacher" else module.teacher)
            numbers[f"parameters/{name}"] = size.parameters
            numbers[f"weights/{name}"] = size.weights
            numbers[f"trained/{name}"] = size.trained
            recomputed = name != "teacher" and module.student_options.gradient_checkpointing
            numbers[f"regathered/{name}"] = size.experts if recomputed else 0
            blocks[name] = size.largest_block, size.rest
        numbers["weights/ema"] = 4 * numbers["trained/student"] if module.ema_decay is not None else 0
        numbers["state/student"], numbers["optimizer_temporaries"] = self._optimizer_step()
        calls = {}
        for phase in phases:
            counter, tracker = self._pass(phase, networks)
            expected = self.expected.get(phase)
            calls[phase] = {name: float(count) for name, count in (counter if expected is None else expected).items()}
            for shards, peak in tracker.peaks.items():
                numbers[f"pass/{phase}/{shards}"] = peak
        return StepCost(numbers, calls, blocks)

    def _optimizer_step(self) -> tuple[float, float]:
        """Bytes of the optimizer's state, and of its temporaries in a step."""
        tracker = MemoryTracker((1,))
        try:
            configured = self.module.configure_optimizers()
            optimizer = configured["optimizer"] if isinstance(configured, dict) else configured
            for group in optimizer.param_groups:
                if self.gpu and group.get("foreach", False) is None and not group.get("fused"):
                    group["foreach"] = True  # torch's default on a GPU
                for parameter in group["params"]:
                    parameter.grad = torch.zeros_like(parameter)
            with _fake_state(optimizer, self.mode), tracker:
                optimizer.step()
                state = tracker.live
                tracker.peaks[1] = state
                optimizer.step()
        except RuntimeError as error:
            raise ConfigurationError(
                f"model.optimizer does not run on fake tensors ({str(error).splitlines()[0]}); plan with an optimizer of torch "
                "whose state has the same size, such as torch.optim.AdamW"
            ) from error
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad = None
        return state, tracker.peaks[1] - state

    def _pass(self, phase: str, networks: Mapping[str, nn.Module]) -> tuple[Counter[str], MemoryTracker]:
        """A forward and backward pass; returns the numbers of network calls, and the memory."""
        module, tracker, counter = self.module, MemoryTracker(SHARD_COUNTS), Counter[str]()
        module.phase = phase
        for path in module.auxiliary.paths:
            module.auxiliary.set_optimizer(path, _AuxiliaryStep(module.get_submodule(path), tracker, self.gpu))
        hooks = [network.register_forward_pre_hook(_count_calls(name, counter)) for name, network in networks.items()]
        trained = [parameter for parameter in module.student.parameters() if parameter.requires_grad]
        # The previous gradients exist until the backward pass begins, or, if accumulated, throughout.
        tracker.gradients = sum(parameter.nbytes for parameter in trained)
        hooks += tracker.track_gradients(trained, self.batch.accumulated)
        with tracker, self.precision():
            x0, condition = module.encoder.latents(self.inputs), module.encoder.condition(self.inputs)
            loss = module.evaluate_objective(x0, condition).loss.mean()
        if not self.batch.accumulated:
            tracker.gradients = 0
        with tracker, self.cuda_functions():  # recomputed blocks need the functions of the forward pass
            loss.backward()
        for hook in hooks:
            hook.remove()
        return counter, tracker


@contextmanager
def _fake_state(optimizer: torch.optim.Optimizer, mode: FakeTensorMode) -> Iterator[None]:
    """Context in which an optimizer creates its state on fake tensors.

    Optimizers of torch create state like the weights, which are fake. Those with block-wise state create it from shapes alone.
    """
    if not has_block_state(optimizer):
        yield
        return
    with patch.object(torch, "compile", lambda function, **_: function):  # these optimizers compile their steps
        weight = nn.Parameter(torch.zeros(4096))
        weight.grad = torch.zeros_like(weight)
        kind: Any = type(optimizer)
        kind([weight]).step()  # creates the tables of quantized values, which are cached and must be real
        with mode:
            yield


def _count_calls(name: str, counter: Counter[str]) -> Callable[[nn.Module, Any], None]:
    def count(network: nn.Module, args: Any) -> None:
        counter[name] += 1
        if torch.is_grad_enabled() and any(parameter.requires_grad for parameter in network.parameters()):
            counter[f"{name}_backward"] += 1

    return count


class _AuxiliaryStep:
    """Replaces the optimizer of an auxiliary network: a backward pass and AdamW's temporaries, while the student's graph lives.

    Args:
        network: The auxiliary network.
        tracker: Tracker of the student's pass.
        gpu: Whether to train on a GPU, where AdamW has temporaries for all weights at once.
    """

    def __init__(self, network: nn.Module, tracker: MemoryTracker, gpu: bool) -> None:
        trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
        self._trained, self._tracker = trained, tracker
        self._temporaries = sum(p.nbytes for p in trained) if gpu else max(p.nbytes for p in trained)

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """AdamW of the network."""
        return torch.optim.AdamW(self._trained)

    def step(self, loss: Tensor) -> None:
        """Count the memory of an optimizer step."""
        student_gradients = self._tracker.gradients
        hooks = self._tracker.track_gradients(self._trained)
        loss.backward()
        for hook in hooks:
            hook.remove()
        self._tracker.update_peaks(self._temporaries, sharded=True)
        self._tracker.gradients = student_gradients
