"""The memory and the forwards of a training step: the method's own step, run on tensors that have no memory."""

import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
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
from lightning_distill.planning.description import attach_description
from lightning_distill.planning.ledger import Ledger, cuda_autocast
from lightning_distill.planning.networks import FEW, Stacks, build_networks, network_names, sizes, stacks
from lightning_distill.teachers.diffusers_adapter import DiffusersAdapter
from lightning_distill.teachers.hunyuan_image3.adapter import HunyuanImage3Adapter
from lightning_distill.teachers.model_adapter import ModelAdapter

SHARES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
"""Numbers of processes that a step is measured for."""


Found = Stacks | hunyuan_image3.HunyuanImage3Stacks


@dataclass(frozen=True)
class Batch:
    """What a process trains on at a time.

    Attributes:
        samples: Number of them.
        size: Height and width of pictures in pixels.
        images: Whether there are pictures.
        encoded: Whether latents and conditions come encoded.
        accumulated: Whether gradients of several passes are added up.
    """

    samples: int
    size: tuple[int, int]
    images: bool = True
    encoded: bool = False
    accumulated: bool = False


@dataclass(frozen=True)
class StepCost:
    """What a training takes, as numbers that are affine in the numbers of a network's blocks.

    Attributes:
        numbers: Bytes and counts by name: `weights/student`, `regathered/student` of what a checkpointed block gathers for
            its second run, `trained/student`, `state/student` of the optimizer, `step` of its
            temporaries, `encode` of encoding, `pass/<phase>/<share>`, the most of activations and gradients of a forward and
            backward pass in a phase, where gradients are divided among so many processes.
        calls: Of networks in a step, by phase and `teacher`, `student`, `student_backward` and so on.
        blocks: Bytes of the largest block of a network and of what is outside its blocks, by network.
    """

    numbers: dict[str, float]
    calls: dict[str, dict[str, float]]
    blocks: dict[str, tuple[int, int]]

    @property
    def phases(self) -> list[str]:
        """Names of the phases."""
        return list(self.calls)


def measure_step(
    module: TeacherStudentBase, directory: Path, batch: Batch, phases: list[str], precision: str = "32-true", gpu: bool = True
) -> StepCost:
    """Run a method's training step without memory, at a few blocks of each kind, and conclude from there.

    Equal blocks add equally, so a step is run with two blocks of each list, and once more for each list with three.

    Args:
        module: A method whose networks are not built; it is not to be used afterwards.
        directory: Of the pipeline's configurations.
        batch: What a process trains on at a time.
        phases: Solutions that training goes through; those of MeanFlow with an alignment are measured with it.
        precision: Of the trainer: "bf16-mixed", "16-mixed" or "32-true".
        gpu: Whether training is on a GPU, whose autocast and optimizers take more memory than those of a CPU.

    Raises:
        ConfigurationError: If the precision is another, or the optimizer cannot be run so.
    """
    dtypes = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16, "32-true": None, "32": None}
    if precision not in dtypes:
        raise ConfigurationError(
            f"trainer.precision is {precision}, which plan does not know; choose one of {', '.join(dtypes)}"
        )
    adapter = module.adapter
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    found = _stacks(adapter, directory)
    few = dict.fromkeys(found.depths, FEW)
    with ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        if gpu:
            stack.enter_context(patch.object(dual_rules, "CPU_BLOCK_BYTES", dual_rules.DEVICE_BLOCK_BYTES))
        stack.enter_context(hunyuan_image3.even_routing())
        if isinstance(adapter, HunyuanImage3Adapter):
            hunyuan_image3.attach(adapter, directory, mode)
        else:
            assert isinstance(adapter, DiffusersAdapter)
            attach_description(adapter, directory, mode)
        run = _Run(module, batch, mode, dtypes[precision], gpu)
        run.encode()
        base = run.measure(found, few, phases)
        numbers = dict(base.numbers)
        for name, depth in found.depths.items():
            more = run.measure(found, {**few, name: FEW + 1}, phases)
            for key, value in base.numbers.items():
                numbers[key] += (depth - FEW) * (more.numbers[key] - value)
    return StepCost(numbers | run.encoders, base.calls, base.blocks)


def _stacks(adapter: ModelAdapter, directory: Path) -> Found:
    if isinstance(adapter, HunyuanImage3Adapter):
        return hunyuan_image3.stacks(directory, FEW)
    assert isinstance(adapter, DiffusersAdapter)
    return stacks(adapter, directory)


class _Run:
    def __init__(
        self, module: TeacherStudentBase, batch: Batch, mode: FakeTensorMode, dtype: torch.dtype | None, gpu: bool
    ) -> None:
        self.module, self.batch, self.mode, self.dtype, self.gpu = module, batch, mode, dtype, gpu
        self.encoders: dict[str, float] = {}
        self.inputs: dict[str, Any] = {}
        self.expected = {phase: module.expected_calls(phase) for phase in module.phases}
        module.fix_random_choices()

    def device(self) -> AbstractContextManager[Any]:
        """What a GPU does beyond a CPU."""
        return cuda_autocast() if self.gpu else nullcontext()

    @contextmanager
    def precision(self) -> Iterator[None]:
        """As the trainer's."""
        autocast = nullcontext() if self.dtype is None else torch.autocast("cpu", self.dtype, cache_enabled=False)
        with self.device(), autocast:
            yield

    def encode(self) -> None:
        """Latents and conditions of a batch, and what making them takes."""
        module, samples, ledger = self.module, self.batch.samples, Ledger((1,))
        prompts = ["a picture"] * samples
        with self.mode:
            image = torch.empty(samples, 3, *self.batch.size)
        with ledger, self.precision(), torch.no_grad():
            null = module.adapter.encode_prompt([""])
            condition = module.adapter.encode_prompt(prompts)
            latents = module.adapter.encode_images(image) if self.batch.images else self._empty_latents()
        module.encoder.set_null_condition(null)
        self.inputs = {"prompt": prompts, "latents": latents.detach(), "condition": condition}
        adapter: Any = module.adapter
        self.encoders["encode"] = 0.0 if self.batch.encoded else ledger.peaks[1]
        parts: dict[str, list[nn.Module]] = {
            "text_encoders": list(adapter.text_encoders().values()),
            "autoencoder": [adapter.vae],
        }
        for name, modules in parts.items():
            kept = not self.batch.encoded
            self.encoders[f"weights/{name}"] = sum(sizes(part).weights for part in modules) if kept else 0
            self.encoders[f"parameters/{name}"] = sum(sizes(part).parameters for part in modules) if kept else 0

    def _empty_latents(self) -> Tensor:
        """Of prompts alone."""
        with self.mode:
            return torch.empty(self.batch.samples, *self.module.adapter.latent_shape(*self.batch.size))

    def measure(self, found: Found, depths: Mapping[str, int], phases: list[str]) -> StepCost:
        """With so many blocks."""
        module = self.module
        if isinstance(found, Stacks):
            build_networks(module, found, depths, self.mode)
        else:
            found.build(module, depths, self.mode)
        networks = {name: module.get_submodule(path) for name, path in network_names(module).items()}
        numbers: dict[str, float] = {}
        blocks = {}
        for name, network in networks.items():
            found_sizes = sizes(network, None if name == "teacher" else module.teacher)
            numbers[f"parameters/{name}"] = found_sizes.parameters
            numbers[f"weights/{name}"] = found_sizes.weights
            numbers[f"trained/{name}"] = found_sizes.trained
            again = name != "teacher" and module.student_options.gradient_checkpointing
            numbers[f"regathered/{name}"] = found_sizes.experts if again else 0
            blocks[name] = found_sizes.largest_block, found_sizes.rest
        numbers["weights/average"] = 4 * numbers["trained/student"] if module.ema_decay is not None else 0
        numbers["state/student"], numbers["step"] = self._optimizer()
        calls = {}
        for phase in phases:
            counter, ledger = self._pass(phase, networks)
            expected = self.expected.get(phase)
            calls[phase] = {name: float(count) for name, count in (counter if expected is None else expected).items()}
            for share, peak in ledger.peaks.items():
                numbers[f"pass/{phase}/{share}"] = peak
        return StepCost(numbers, calls, blocks)

    def _optimizer(self) -> tuple[float, float]:
        """Bytes of what the optimizer keeps, and of what it needs for a step besides."""
        ledger = Ledger((1,))
        try:
            configured = self.module.configure_optimizers()
            optimizer = configured["optimizer"] if isinstance(configured, dict) else configured
            for group in optimizer.param_groups:
                if self.gpu and group.get("foreach", False) is None and not group.get("fused"):
                    group["foreach"] = True  # torch's own choice there
                for parameter in group["params"]:
                    parameter.grad = torch.zeros_like(parameter)
            with _fake_state(optimizer, self.mode), ledger:
                optimizer.step()
                kept = ledger.live
                ledger.peaks[1] = kept
                optimizer.step()
        except RuntimeError as error:
            raise ConfigurationError(
                f"model.optimizer cannot be run on tensors without memory ({str(error).splitlines()[0]}); plan with an "
                "optimizer of torch that keeps as much, such as torch.optim.AdamW"
            ) from error
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad = None
        return kept, ledger.peaks[1] - kept

    def _pass(self, phase: str, networks: Mapping[str, nn.Module]) -> tuple[Counter[str], Ledger]:
        """A forward and backward pass."""
        module, ledger, counter = self.module, Ledger(SHARES), Counter[str]()
        module.phase = phase
        for path in module.auxiliary.paths:
            module.auxiliary.set_optimizer(path, _AuxiliaryStep(module.get_submodule(path), ledger, self.gpu))
        handles = [network.register_forward_pre_hook(_counting(name, counter)) for name, network in networks.items()]
        trained = [parameter for parameter in module.student.parameters() if parameter.requires_grad]
        # Those of the step before are there until the backward pass begins, or are added to.
        ledger.gradients = sum(parameter.nbytes for parameter in trained)
        ledger.take_gradients(trained, self.batch.accumulated)
        with ledger, self.precision():
            x0, condition = module.encoder.latents(self.inputs), module.encoder.condition(self.inputs)
            loss = module.evaluate_objective(x0, condition).loss.mean()
        if not self.batch.accumulated:
            ledger.gradients = 0
        with ledger, self.device():  # blocks that are run again must do so as before
            loss.backward()
        for handle in handles:
            handle.remove()
        for parameter in trained:
            parameter._post_accumulate_grad_hooks = None  # type: ignore[assignment]
        return counter, ledger


@contextmanager
def _fake_state(optimizer: torch.optim.Optimizer, mode: FakeTensorMode) -> Iterator[None]:
    """So that an optimizer's state takes none: torch's own make it like the weights, and those of blocks from shapes alone."""
    if not has_block_state(optimizer):
        yield
        return
    with patch.object(torch, "compile", lambda function, **_: function):  # their steps are compiled
        weight = nn.Parameter(torch.zeros(4096))
        weight.grad = torch.zeros_like(weight)
        kind: Any = type(optimizer)
        kind([weight]).step()  # makes the tables that numbers are rounded to, which are kept and must be real
        with mode:
            yield


def _counting(name: str, counter: Counter[str]) -> Any:
    def count(network: nn.Module, args: Any) -> None:
        counter[name] += 1
        if torch.is_grad_enabled() and any(parameter.requires_grad for parameter in network.parameters()):
            counter[f"{name}_backward"] += 1

    return count


class _AuxiliaryStep:
    """In the place of the optimizer of a network beside the student: its backward pass and AdamW's step, the graph alive."""

    def __init__(self, network: nn.Module, ledger: Ledger, gpu: bool) -> None:
        trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
        self._trained, self._ledger = trained, ledger
        self._temporaries = sum(p.nbytes for p in trained) if gpu else max(p.nbytes for p in trained)

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """AdamW of the network."""
        return torch.optim.AdamW(self._trained)

    def step(self, loss: Tensor) -> None:
        """The bytes of a step."""
        before = self._ledger.gradients
        for parameter in self._trained:
            parameter._post_accumulate_grad_hooks = None  # type: ignore[assignment]
        self._ledger.take_gradients(self._trained)
        loss.backward()
        self._ledger.note(self._temporaries, divided=True)
        self._ledger.gradients = before
