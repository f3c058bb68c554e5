"""The base of all methods: a frozen teacher, a student, sampling, validation, logging and checkpoints."""

import copy
import time
from abc import ABC, abstractmethod
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, ClassVar

import torch
from lightning import LightningModule
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.core.mixins.hparams_mixin import _given_hyperparameters
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torchmetrics import Metric

from lightning_distill.errors import ConfigurationError
from lightning_distill.methods.auxiliary import AuxiliaryLoss, AuxiliaryNetworks
from lightning_distill.methods.checkpoint_state import check_loaded_weights, saved_names, unshared
from lightning_distill.methods.encoder import Batch, BatchEncoder, encoded_data
from lightning_distill.methods.evaluation import Evaluator, Network
from lightning_distill.methods.guidance import Guidance
from lightning_distill.methods.monitors import check_monitors
from lightning_distill.methods.networks import GuidedCondition, Networks
from lightning_distill.methods.setup_checks import check_image_sizes, check_optimizer, check_precision, check_strategy
from lightning_distill.methods.time_embedder_drift import relative_change, report_drift
from lightning_distill.methods.validation import ValidationOptions
from lightning_distill.optimizers import allow_clipping, flatten_block_state, split_parameters, unflatten_block_state
from lightning_distill.sharding.ema import ShardedEMA, StudentEMA
from lightning_distill.sharding.protocols import AuxiliaryOptimizer, Sharding, StepAccounting
from lightning_distill.sharding.shared_weights import check_sharing
from lightning_distill.teachers.model_adapter import Condition, ModelAdapter
from lightning_distill.teachers.sharded_loading import check_base_sharing
from lightning_distill.teachers.smooth_time import SmoothTimeReport
from lightning_distill.teachers.student_options import StudentOptions

TIME_BINS = 4
"""Number of intervals of t whose losses are logged separately."""


@dataclass(frozen=True)
class Objective:
    """Loss of a batch.

    Attributes:
        loss: Loss of each sample (B,), differentiable in the student.
        t: Time of each sample (B,), for the curves of loss by time.
        logs: Further scalars to log under `train/`.

    Raises:
        ConfigurationError: If `loss` and `t` are not both of shape (B,).
    """

    loss: Tensor
    t: Tensor
    logs: dict[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.loss.ndim != 1 or self.loss.shape != self.t.shape:
            raise ConfigurationError(
                f"Objective has a loss of shape {tuple(self.loss.shape)} and t of shape {tuple(self.t.shape)}; give the loss "
                "and the time of each sample, both (B,)"
            )


ObjectiveSteps = Generator[AuxiliaryLoss, None, Objective]
"""An objective that trains auxiliary networks: it yields their losses in turn, and returns the student's objective."""


class TeacherStudentBase(LightningModule, ABC):
    """Distillation of a frozen teacher into a few-step student.

    A method implements `objective`. The base holds its parts. `networks` are teacher, student, EMA and their velocities.
    `encoder` encodes batches, `evaluator` samples and measures, and `auxiliary` trains networks beside the student. Checkpoints
    hold the trained weights and their EMA, with LoRA without the shared base weights.

    Args:
        adapter: Teacher family and location of its weights.
        student: How the student is built from the teacher.
        guidance: Guidance of the teacher that is distilled into the student.
        caption_dropout: Share of captions replaced by the empty prompt in training, in [0, 1); guidance of kind "improved"
            needs it.
        optimizer: Callable from parameter groups to an optimizer.
        lr_scheduler: Callable from the optimizer to a scheduler that steps once a batch, or None for a constant rate.
        ema_decay: Decay of the student's EMA, in (0, 1), or None for no EMA. Where there is one, it is validated and exported.
        validation: Settings of validation.
        metric: Metric of generated images against their prompts, or None. `update(images, prompts)` takes images (B, 3, H, W)
            in [0, 1]. `compute()` returns a number, or several by name with one named `overall`.
        cache_latents: Whether to cache the latents of each training image in memory. Large data sets do not fit; use
            `precompute` for them.

    Raises:
        ConfigurationError: If a setting is out of its range.
    """

    has_teacher: ClassVar[bool] = True
    """Whether the method distils a teacher; flow matching trains a network without one."""
    stochastic_sampling: ClassVar[bool] = False
    """Whether the student's sampling step predicts x0 and re-noises it (arXiv 2303.01469, Algorithm 1), with r = 0 only."""
    learns_velocity: ClassVar[bool] = True
    """Whether the student trains at r = t, where guidance of kind "improved" evaluates it."""
    learns_rescaled_time: ClassVar[bool] = False
    """Whether the method trains a student of rescaled times from a teacher of the original ones."""
    phases: ClassVar[tuple[str, ...]] = ("training",)
    """Names of the phases that training can be in."""

    def __init__(
        self,
        adapter: ModelAdapter,
        *,
        student: StudentOptions = StudentOptions(),
        guidance: Guidance = Guidance(),
        caption_dropout: float = 0.0,
        optimizer: OptimizerCallable = torch.optim.AdamW,
        lr_scheduler: LRSchedulerCallable | None = None,
        ema_decay: float | None = None,
        validation: ValidationOptions = ValidationOptions(),
        metric: Metric | None = None,
        cache_latents: bool = False,
    ) -> None:
        super().__init__()
        if not isinstance(adapter, ModelAdapter):
            raise ConfigurationError(
                f"model.adapter is {adapter!r}, which is not a ModelAdapter; set it to one, such as DiffusersAdapter"
            )
        if _given_hyperparameters.get() is not None:
            # Settings of the command line are plain values; arguments given from Python are objects, which would be pickled.
            self.save_hyperparameters(logger=False)
        if ema_decay is not None and not 0 < ema_decay < 1:
            raise ConfigurationError(f"model.ema_decay is {ema_decay}; choose a value between 0 and 1, or null for no EMA")
        if not 0 <= caption_dropout < 1:
            raise ConfigurationError(f"model.caption_dropout is {caption_dropout}; choose a share in [0, 1), 0.1 is usual")
        if guidance.kind == "improved" and not self.learns_velocity:
            raise ConfigurationError(
                f"guidance.kind is improved, which evaluates the student at r = t, and {type(self).__name__} does not train it "
                "there; choose embedded or two_branch"
            )
        if guidance.kind == "improved" and caption_dropout == 0:
            raise ConfigurationError(
                "guidance.kind is improved, which evaluates the student without a prompt, and model.caption_dropout 0 never "
                "trains it so; set caption_dropout to 0.1"
            )
        if student.interval_embedding == "none" and not self.stochastic_sampling:
            raise ConfigurationError(
                f"student.interval_embedding is none, but {type(self).__name__} trains its student for steps that end above "
                "r = 0; choose zero or clone"
            )
        self.student_options = student
        self.guidance = guidance
        self.optimizer = optimizer
        self.lr_scheduler = lr_scheduler
        self.ema_decay = ema_decay
        self.validation = validation
        self.smooth_time_report: SmoothTimeReport | None = None
        self.strict_loading = False  # checkpoints leave the frozen networks out
        adapter.stochastic_sampling = self.stochastic_sampling
        self.encoder = BatchEncoder(
            adapter, self._current_device, cache_latents, lambda flag, device: self.networks.any_process(flag, device)
        )
        self.networks = Networks(adapter, guidance, self.encoder.null_condition, caption_dropout, self.stochastic_sampling)
        self.metrics = nn.ModuleDict({str(nfe): copy.deepcopy(metric) for nfe in validation.nfe} if metric else {})
        self.evaluator = Evaluator(
            adapter, self.encoder, self.sampling_velocity, self.stochastic_sampling, validation, self.metrics
        )
        self.auxiliary = AuxiliaryNetworks(self.get_submodule)
        self._clock = (0.0, 0)

    @abstractmethod
    def objective(self, x0: Tensor, condition: Condition) -> Objective | ObjectiveSteps:
        """Loss of the method, a function of the batch and the networks.

        A method with auxiliary networks returns a generator. It yields an `AuxiliaryLoss` wherever an auxiliary network takes
        an optimizer step, and returns the student's `Objective`.

        Args:
            x0: Latents of the batch's images (B, C, h, w).
            condition: Conditions of the batch's prompts.
        """

    @property
    def needs_images(self) -> bool:
        """Whether `objective` reads the latents of images; otherwise prompts suffice."""
        return True

    # Parts

    @property
    def adapter(self) -> ModelAdapter:
        """The teacher family."""
        return self.networks.adapter

    @property
    def teacher(self) -> nn.Module:
        """The frozen teacher."""
        return self.networks.teacher

    @property
    def student(self) -> nn.Module:
        """The network that trains."""
        return self.networks.student

    @property
    def ema(self) -> StudentEMA | ShardedEMA | None:
        """The student's EMA, or None."""
        return self.networks.ema

    def __setattr__(self, name: str, value: Any) -> None:
        """Replace a network in `networks`: torch would register a second one beside it."""
        if name == "adapter":
            raise AttributeError("the adapter of a method cannot be replaced: encoder and evaluator use it as well")
        if name in ("teacher", "student", "ema"):
            setattr(self.networks, name, value)
        else:
            super().__setattr__(name, value)

    @property
    def sharding(self) -> Sharding | None:
        """The trainer's strategy, if it shards networks."""
        strategy = None if self._trainer is None else self._trainer.strategy
        return strategy if isinstance(strategy, Sharding) else None

    def trained_networks(self) -> dict[str, nn.Module]:
        """The networks that the trainer's optimizer updates, by their paths within the method."""
        return {"networks.student": self.student}

    def auxiliary_students(self) -> dict[str, StudentOptions]:
        """Options of the auxiliary networks that are built like students, such as critics, by their paths within the method."""
        return {}

    # Interface to callbacks and the planner

    def snapshot_networks(self) -> dict[str, nn.Module]:
        """The networks whose weights a rollback restores, by their paths within the method: the student and its EMA."""
        networks = {"networks.student": self.student}
        return networks if self.ema is None else {**networks, "networks.ema": self.ema}

    @property
    def phase(self) -> str:
        """The phase of the training, one of `phases`."""
        return self.phases[0]

    @phase.setter
    def phase(self, phase: str) -> None:
        if phase not in self.phases:
            raise ConfigurationError(f"phase is {phase!r}; {type(self).__name__} has {', '.join(self.phases)}")

    def expect_phase(self, phase: str) -> None:
        """Prepare for a phase that a callback may switch to."""

    def fix_random_choices(self) -> None:
        """Fix the number of network calls that a step samples at random: fewest calls, all samples in one part of the batch.

        For the planner, which measures one step. `expected_calls` accounts for the other calls.
        """

    def expected_calls(self, phase: str) -> Mapping[str, float] | None:
        """Mean number of calls of each network in a step of a phase.

        Keys are `teacher`, `student` and the last names of `auxiliary_students` paths, each also with `_backward` for calls
        with gradients. None if the number is the same in every step: the planner then counts them in the step it measures.
        """
        return None

    @property
    def validation_metrics(self) -> tuple[str, ...]:
        """Names of the metrics that validation logs, which callbacks can monitor; methods with metrics of their own extend it.

        A metric of several values logs its overall value under its name, and the others as `name/value`.
        """
        error = ("val/average_velocity_error",) if self.has_teacher and self.validation.average_velocity else ()
        return (*error, *(f"val/{name}" for name in self.evaluator.metric_names()))

    # Set-up

    def prepare_data(self) -> None:
        """Look for the teacher's weights before the data is set up: they are missing most often."""
        self.adapter.check()

    def setup(self, stage: str) -> None:
        """Check the settings before anything large is loaded.

        Raises:
            ConfigurationError: If settings cannot work together.
        """
        if stage == "fit":
            check_optimizer(self.optimizer, self.lr_scheduler)
            check_monitors(self.validation_metrics, self._trainer)
        self.encoder.reset()
        self.evaluator.reset()
        self.adapter.check()
        if stage == "fit":
            self.adapter.check_teacher()
        self.check_student(self.student_options)
        for options in self.auxiliary_students().values():
            self.check_student(options)
        self.guidance.check(self.adapter.embeds_guidance)
        strategy = None if self._trainer is None else self._trainer.strategy
        check_strategy(type(self).__name__, strategy, self.encoder, self.auxiliary.feature_readers)
        if stage == "fit":
            check_precision(getattr(self._trainer, "precision", None), self.auxiliary.paths)
        self.encoder.use_encoded_data(encoded_data(self._trainer))
        if self.has_teacher and self.validation.average_velocity and not self.evaluator.measured_intervals:
            raise ConfigurationError(
                f"validation.intervals has no interval with r = 0, and {type(self).__name__} evaluates its student there "
                "only; add one, such as [0, 1], or set validation.average_velocity to false"
            )
        data = getattr(self._trainer, "datamodule", None)
        check_image_sizes(self.adapter, self.validation, data)
        if stage == "fit" and self.needs_images and not getattr(data, "has_images", True):
            raise ConfigurationError(
                f"data is {type(data).__name__}, which has no images, and {type(self).__name__} trains on them; choose data "
                "with images, set model.trajectory_fraction to 1 if the method has it, or choose KnowledgeDistillation"
            )

    def check_student(self, options: StudentOptions) -> None:
        """Check that the adapter can build a student of these options and the strategy can place it.

        Raises:
            ConfigurationError: If not.
        """
        self.adapter.check_student(options)
        if options.time_embedding == "rescaled" and options.pretrained is None and not self.learns_rescaled_time:
            raise ConfigurationError(
                "student.time_embedding is rescaled, and the teacher's weights were trained for other times; train a student "
                "by TimestepRescaling first and name its export in student.pretrained"
            )
        if options.lora is not None:
            check_base_sharing(self.sharding)

    def configure_model(self) -> None:
        """Load the teacher, and build the student, its EMA and the auxiliary networks."""
        if self.networks.built:
            return
        self.adapter.sharding = self.networks.sharding = self.sharding
        self.adapter.load(encoders=self.encoder.encoded is None)
        self.build_networks()
        # Auxiliary optimizers average the gradients of their networks themselves.
        self._ddp_params_and_buffers_to_ignore = [
            f"{path}.{name}"
            for path in self.auxiliary.paths
            for name, parameter in self.get_submodule(path).named_parameters()
            if parameter.requires_grad
        ]
        if self.ema_decay is not None:
            self.networks.build_ema(self.ema_decay, self.build_student)

    def build_networks(self) -> None:
        """Load the teacher and build the student and the auxiliary students; methods with other networks extend this."""
        self.networks.teacher = self.adapter.load_teacher()
        self.networks.student, self.smooth_time_report = self.adapter.build_student(self.teacher, self.student_options)
        for path, options in self.auxiliary_students().items():
            self.set_submodule(path, self.adapter.build_student(self.teacher, options)[0])

    def build_student(self) -> nn.Module:
        """Another network like the student at its start."""
        return self.adapter.build_student(self.teacher, self.student_options)[0]

    def configure_optimizers(self) -> Any:
        """The student's optimizer, with its scheduler stepping once a batch."""
        networks = self.trained_networks().values()
        optimizer = self.optimizer(split_parameters(chain.from_iterable(each.named_parameters() for each in networks)))
        if (trainer := self._trainer) is not None:
            allow_clipping(optimizer, getattr(trainer.precision_plugin, "scaler", None) is not None, trainer.gradient_clip_val)
        if self.lr_scheduler is None:
            return optimizer
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": self.lr_scheduler(optimizer), "interval": "step"}}

    # Training

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Mean loss of a batch, after the steps of the auxiliary networks; logs its curves."""
        if self.needs_images:
            x0 = self.encoder.latents(batch, training=True)
        else:
            x0 = self.encoder.no_latents(batch, self.evaluator.latent_shape)
        objective = self.evaluate_objective(x0, self.encoder.condition(batch))
        loss = objective.loss.mean()
        self.log("train/loss", loss, prog_bar=True)
        self.log_dict({f"train/{name}": value for name, value in objective.logs.items()})
        bins = (objective.t * TIME_BINS).long().clamp(max=TIME_BINS - 1)
        for i in range(TIME_BINS):
            if (inside := bins == i).any():
                self.log(f"train/loss_t{i}", objective.loss.detach()[inside].mean())
        return loss

    def evaluate_objective(self, x0: Tensor, condition: Condition) -> Objective:
        """The student's objective of a batch; each auxiliary network takes an optimizer step on every loss of its own.

        Args:
            x0: Latents of the batch's images (B, C, h, w).
            condition: Conditions of the batch's prompts.

        Raises:
            ConfigurationError: If `objective` returns something else.
        """
        objective = self.objective(x0, condition)
        while isinstance(objective, Generator):
            try:
                auxiliary = next(objective)
            except StopIteration as finished:
                objective = finished.value
                break
            self.auxiliary.step(auxiliary, self.sharding)
        if not isinstance(objective, Objective):
            raise ConfigurationError(
                f"{type(self).__name__}.objective returns a {type(objective).__name__}; return Objective(loss, t), with "
                "the loss and the time of each sample, both (B,)"
            )
        return objective

    def on_fit_start(self) -> None:
        """Check that shared weights are still shared, and, in a new run, what the refit of the time embedder changed.

        Raises:
            ConfigurationError: If set-up copied shared weights, or the refit changes the teacher's velocities too much.
        """
        networks = {"networks.student": self.student_options, **self.auxiliary_students()}
        for path, options in networks.items():
            if options.lora is not None:
                check_sharing(self.get_submodule(path), self.teacher)
        if self.smooth_time_report is not None and self.trainer.ckpt_path is None:
            drift = relative_change(self.networks, self.evaluator.latent_shape, self.device)
            report_drift(self.smooth_time_report, drift, self.student_options, self.loggers)

    def on_train_start(self) -> None:
        """Give each process a seed of its own, apply the settings of auxiliary optimizers, and start the throughput clock."""
        if self.global_rank > 0:  # one seed for all processes gave the networks equal weights; times and noise must differ
            torch.manual_seed((torch.initial_seed() + self.global_rank) % 2**63)
        self.auxiliary_optimizers()  # with the state of the checkpoint
        if changes := self.auxiliary.apply_settings():
            rank_zero_warn(f"training continues with changed settings: {', '.join(changes)}")
        self._clock = (time.perf_counter(), 0)

    @property
    def _logs_now(self) -> bool:
        every: int = self.trainer.log_every_n_steps  # type: ignore[attr-defined]  # set by a helper of Trainer's constructor
        return self.trainer.global_step % every == 0

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Log the norm of the gradients, before clipping."""
        parameters = chain.from_iterable(network.parameters() for network in self.trained_networks().values())
        gradients = [p.grad for p in parameters if p.grad is not None]
        if gradients:
            norm = torch.nn.utils.get_total_norm(gradients)
            self.log("train/grad_norm", norm.full_tensor() if isinstance(norm, DTensor) else norm)

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Take an optimizer step, then update the EMA: before checkpoints of this step are written."""
        strategy = self.trainer.strategy
        accounting = strategy if isinstance(strategy, StepAccounting) else None
        taken = None if accounting is None else accounting.steps_taken
        super().optimizer_step(*args, **kwargs)
        if accounting is not None:
            if accounting.steps_taken == taken:
                return  # DeepSpeed accumulated gradients
            if (norm := accounting.gradient_norm()) is not None:
                self.log("train/grad_norm", norm)
        if self.ema is not None:
            self.ema.update_parameters(self.student)

    def on_train_batch_end(self, outputs: Any, batch: Batch, batch_idx: int) -> None:
        """Log the throughput."""
        start, samples = self._clock
        samples += len(batch["prompt"]) * self.trainer.world_size
        self._clock = (start, samples)
        if self._logs_now:
            elapsed = time.perf_counter() - start
            self.log("perf/samples_per_second", samples / elapsed, prog_bar=True)
            self._clock = (time.perf_counter(), 0)

    # Sampling and validation

    def sampling_velocity(
        self, x: Tensor, r: Tensor, t: Tensor, condition: Condition, null: Condition, network: Network
    ) -> Tensor:
        """Velocity (B, C, h, w) of a sampling step from t down to r, of the student or of the guided teacher."""
        if network == "student":
            return self.adapter.average_velocity(self.networks.sampling_student, x, r, t, condition, self.guidance.scale)
        guided = GuidedCondition(condition, null, self.guidance.scale)
        return self.networks.teacher_velocity(x, t, guided, student_mix=False)

    def sample(
        self,
        prompts: Sequence[str],
        nfe: int,
        seeds: Sequence[int] | None = None,
        network: Network = "student",
        batch_size: int = 64,
    ) -> Tensor:
        """Images (B, 3, H, W) in [0, 1] of B prompts; see `Evaluator.sample`."""
        return self.evaluator.sample(prompts, nfe, seeds, network, batch_size)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Measure the student's average velocity on the first batch, and its images on all."""
        if self.has_teacher and batch_idx == 0 and self.validation.average_velocity:
            error = self.evaluator.average_velocity_error(batch)
            self.log("val/average_velocity_error", error, prog_bar=True, sync_dist=True, batch_size=len(batch["prompt"]))
        self.evaluator.update_metrics(batch)

    def on_validation_epoch_end(self) -> None:
        """Log the metrics of the images for each number of steps."""
        self._log_metrics("val", prog_bar=True)

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """Measure the student's images of the test prompts."""
        self.evaluator.update_metrics(batch)

    def on_test_epoch_end(self) -> None:
        """Log the metrics of the images for each number of steps."""
        self._log_metrics("test", prog_bar=False)

    def on_predict_start(self) -> None:
        """Check that processes of a sharded run have equal numbers of prompts: each needs the others for every forward.

        Raises:
            ConfigurationError: If they have not.
        """
        if self.sharding is None:
            return
        processes, loader = self.trainer.world_size, self.trainer.predict_dataloaders
        assert loader is not None
        if (prompts := len(loader.dataset)) % processes:
            raise ConfigurationError(
                f"{prompts} prompts do not divide evenly among {processes} processes, which trainer.strategy needs; give a "
                "multiple, or sample with an export"
            )

    def predict_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Images (B, 3, H, W) in [0, 1] at the largest validated number of steps."""
        return self.sample(batch["prompt"], max(self.validation.nfe), self.evaluator.seeds(batch))

    def _log_metrics(self, stage: str, prog_bar: bool) -> None:
        for name, value, overall in self.evaluator.compute_metrics():
            # torchmetrics has synchronized the value; the flag silences Lightning's warning.
            self.log(f"{stage}/{name}", value, prog_bar=overall and prog_bar, sync_dist=True)

    # Checkpoints

    def saved_names(self) -> set[str]:
        """Names of the weights that checkpoints hold."""
        trained = tuple(f"{path}." for path in self.trained_networks())
        names = saved_names(self.state_dict(), ("networks.teacher.", "networks.adapter.", "metrics."), trained)
        return set(unshared(names, self, self.teacher if self.has_teacher else None))

    @property
    def auxiliary_paths(self) -> tuple[str, ...]:
        """Paths of the auxiliary networks within the method."""
        return self.auxiliary.paths

    def auxiliary_optimizers(self) -> dict[str, AuxiliaryOptimizer]:
        """Optimizers of the auxiliary networks by path."""
        return self.auxiliary.optimizers(self.sharding)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Leave the frozen networks out, and add the auxiliary optimizers; block-wise optimizer state becomes plain tensors."""
        names = self.saved_names()
        checkpoint["state_dict"] = {name: value for name, value in checkpoint["state_dict"].items() if name in names}
        checkpoint["optimizer_states"] = flatten_block_state(checkpoint.get("optimizer_states", []))
        states = self.auxiliary.state_dict() if self.sharding is None else {}  # a sharding strategy saves its own
        checkpoint["auxiliary_optimizers"] = flatten_block_state(states)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Check the weights of the checkpoint, and load the states of the auxiliary optimizers.

        Raises:
            ConfigurationError: If the checkpoint is that of another student.
        """
        self.auxiliary.load_state_dict(unflatten_block_state(checkpoint.get("auxiliary_optimizers", {})))
        if self.sharding is not None:  # which has checked its weights
            return
        checkpoint["optimizer_states"] = unflatten_block_state(checkpoint.get("optimizer_states", []))
        names = self.saved_names()
        expected = {name: value for name, value in self.state_dict().items() if name in names}
        path = None if self._trainer is None else self._trainer.ckpt_path
        name = "the checkpoint" if path is None else f"ckpt_path {str(path)!r}"
        check_loaded_weights(checkpoint["state_dict"], expected, ("networks.student.", "networks.adapter."), name)

    def _current_device(self) -> torch.device:
        return self.device
