"""What all methods share: a frozen teacher, a student, few-step sampling, validation, logging and what is saved."""

import copy
import time
from abc import abstractmethod
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from typing import Any, ClassVar

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.core.mixins.hparams_mixin import _given_hyperparameters
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim.swa_utils import get_ema_multi_avg_fn
from torchmetrics import Metric

from lightning_distill.errors import ConfigurationError
from lightning_distill.flow.path import flow_step
from lightning_distill.methods.checkpoint_state import SavedState
from lightning_distill.methods.condition import encoded_data
from lightning_distill.methods.encoder import BatchEncoding
from lightning_distill.methods.evaluation import Batch
from lightning_distill.methods.guidance import Guidance
from lightning_distill.methods.validation import ValidationOptions
from lightning_distill.optimizers import allow_clipping, split_parameters
from lightning_distill.sharding.ema import ShardedEMA
from lightning_distill.sharding.shared_weights import StudentEMA, check_sharing
from lightning_distill.teachers.model_adapter import Condition, ModelAdapter
from lightning_distill.teachers.sharded_loading import check_base_sharing
from lightning_distill.teachers.smooth_time import SmoothTimeReport
from lightning_distill.teachers.student_options import StudentOptions

TIME_BINS = 4


@dataclass(frozen=True)
class Objective:
    """What a method makes of a batch.

    Attributes:
        loss: Loss of each sample (B,), differentiable in the student.
        t: Time at which each sample was taken (B,), for the curves of loss by time.
        logs: Further scalars to log under `train/`.
    """

    loss: Tensor
    t: Tensor
    logs: dict[str, Tensor] = field(default_factory=dict)


class TeacherStudentBase(BatchEncoding, SavedState):
    """Distillation of a frozen teacher into a student of few steps.

    A method implements `objective`; everything else is here. The teacher, the text encoders and the autoencoder are never
    saved, only the student, its average and the optimizer's state; with LoRA, only what trains of the student and its average.

    Args:
        adapter: The teacher's family and where its weights are.
        student: How the student's time inputs are built.
        guidance: The guidance that the student learns to do without, and under which the teacher is sampled.
        caption_dropout: Share of captions replaced by the empty prompt in training, in [0, 1); guidance of kind "improved"
            needs it.
        optimizer: Callable from parameter groups to an optimizer.
        lr_scheduler: Callable from the optimizer to a scheduler that steps once a batch, or None for a constant rate.
        ema_decay: Decay of the exponential moving average of the student, in (0, 1), or None for no average. Where there
            is one, it is validated and exported.
        validation: What validation measures.
        metric: Measure of generated pictures against their prompts, or None: `update(images, prompts)` takes pictures
            (B, 3, H, W) in [0, 1], and `compute()` gives a number, or several by name of which one is `overall`.
        cache_latents: Whether to keep each training picture's latents in memory after its first visit; they do not fit
            for large data sets, which `precompute` is for.

    Raises:
        ConfigurationError: If a setting is out of its range.
    """

    learns_velocity: ClassVar[bool] = True
    """Whether the student trains at r = t, where guidance of kind "improved" asks it."""
    learns_rescaled_time: ClassVar[bool] = False
    """Whether it teaches a student whose times are rescaled what they mean."""

    student: nn.Module

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
        super().__init__(cache_latents)
        if _given_hyperparameters.get() is not None:
            # The command line's settings are plain values; arguments given from Python are objects, which would be pickled.
            self.save_hyperparameters(logger=False)
        if ema_decay is not None and not 0 < ema_decay < 1:
            raise ConfigurationError(f"model.ema_decay is {ema_decay}; choose a value between 0 and 1, or null for none")
        if not 0 <= caption_dropout < 1:
            raise ConfigurationError(f"model.caption_dropout is {caption_dropout}; choose a share in [0, 1), 0.1 is usual")
        if guidance.kind == "improved" and not self.learns_velocity:
            raise ConfigurationError(
                f"guidance.kind improved mixes in the student at r = t, where {type(self).__name__} does not train it; choose "
                "embedded or two_branch"
            )
        if guidance.kind == "improved" and caption_dropout == 0:
            raise ConfigurationError(
                "guidance.kind improved mixes in the student without a prompt, which model.caption_dropout 0 never trains; "
                "set caption_dropout to 0.1"
            )
        adapter.stochastic_sampling = self.stochastic_sampling
        self.adapter = adapter
        self.student_options = student
        self.guidance = guidance
        self.caption_dropout = caption_dropout
        self.optimizer = optimizer
        self.lr_scheduler = lr_scheduler
        self.ema_decay = ema_decay
        self.validation = validation
        self.metrics = nn.ModuleDict({str(nfe): copy.deepcopy(metric) for nfe in validation.nfe} if metric else {})
        self.strict_loading = False  # checkpoints leave the frozen parts out
        self.ema: StudentEMA | ShardedEMA | None = None
        self.smooth_time_report: SmoothTimeReport | None = None
        self._reference = None
        self._clock = (0.0, 0)

    @abstractmethod
    def objective(self, x0: Tensor, condition: Condition) -> Objective:
        """The method's loss.

        Args:
            x0: Latents of the batch's pictures (B, C, h, w).
            condition: Of the batch's prompts.
        """

    @property
    def needs_images(self) -> bool:
        """Whether `objective` looks at the latents of pictures; where it does not, prompts alone will do."""
        return True

    # Set-up

    def prepare_data(self) -> None:
        """Look for the weights before the data is set up: they are what is missing most often."""
        self.adapter.check()

    def setup(self, stage: str) -> None:
        """Refuse settings that cannot work, before anything large is loaded."""
        if stage == "fit":
            self.check_optimizer()
        self.reset_data()
        self.adapter.check()
        self.check_student(self.student_options)
        self.guidance.check(self.adapter.embeds_guidance)
        self.check_strategy(None if self.train_text_encoders else self.adapter)
        if stage == "fit":
            self.check_precision()
        self.use_encoded_data(encoded_data(self._trainer))
        if self.has_teacher and self.validation.average_velocity and not self.measured_intervals:
            raise ConfigurationError(
                f"validation.intervals has none that ends at 0, where {type(self).__name__} jumps to; add one, such as [0, 1], "
                "or set validation.average_velocity to false"
            )
        data = getattr(self._trainer, "datamodule", None)
        if stage == "fit" and self.needs_images and not getattr(data, "has_images", True):
            raise ConfigurationError(
                f"data is {type(data).__name__}, which has no pictures, and {type(self).__name__} trains on them; give data "
                "that has, or model.trajectory_fraction 1 to a method that takes it, or choose KnowledgeDistillation"
            )

    def check_student(self, options: StudentOptions) -> None:
        """Refuse a network of these options that the adapter cannot build or the trainer cannot place."""
        if options.policy_points < 1:
            raise ConfigurationError(f"student.policy_points is {options.policy_points}; set it to 1 for none, or above")
        self.adapter.check_student(options)
        if options.time_embedding == "rescaled" and options.pretrained is None and not self.learns_rescaled_time:
            raise ConfigurationError(
                "student.time_embedding is rescaled, and the teacher's weights were trained for other times; train a student "
                "by TimestepRescaling first and name its export in student.pretrained"
            )
        if options.lora is not None:
            check_base_sharing(self.sharding)

    def configure_model(self) -> None:
        """Load the teacher and build the student."""
        if hasattr(self, "student"):
            return
        self.adapter.sharding = self.sharding
        self.adapter.load(encoders=self._encoded is None)
        self.build_networks()
        # Networks of the side have optimizers of their own, which average their gradients.
        self._ddp_params_and_buffers_to_ignore = [
            f"{path}.{name}"
            for path in self.auxiliary_networks
            for name, parameter in self.get_submodule(path).named_parameters()
            if parameter.requires_grad
        ]
        if self.ema_decay is not None:
            self.ema = self.build_ema(self.ema_decay)
            self.ema.requires_grad_(False)

    def build_ema(self, decay: float) -> StudentEMA | ShardedEMA:
        """The average of what is trained, which starts like it."""
        if self.sharding is None:
            return StudentEMA(self.trained, get_ema_multi_avg_fn(decay))
        average = ShardedEMA(self.build_trained(), decay)
        average.start_from(self.trained)
        return average

    def build_trained(self) -> nn.Module:
        """A network like `trained` at its start."""
        return self.adapter.build_student(self.teacher, self.student_options)[0]

    def build_networks(self) -> None:
        """Load the teacher and build the student; a method that needs other networks extends this."""
        self.teacher = self.adapter.load_teacher()
        self.student, self.smooth_time_report = self.adapter.build_student(self.teacher, self.student_options)

    @property
    def trained(self) -> nn.Module:
        """What the optimizer trains and the average follows."""
        return self.student

    @property
    def sampling_student(self) -> nn.Module:
        """The student that is validated and exported: the average where there is one."""
        return self.trained if self.ema is None else self.ema.module

    def check_optimizer(self) -> None:
        """Refuse settings of the optimizer and its scheduler: they would say so only after all has loaded.

        Raises:
            ConfigurationError: If they do not take their settings.
        """
        stand_ins = {"blocks.weight": nn.Parameter(torch.zeros(2, 2)), "bias": nn.Parameter(torch.zeros(2))}
        setting = "model.optimizer"
        try:
            optimizer = self.optimizer(split_parameters(stand_ins.items()))
            setting = "model.lr_scheduler"
            if self.lr_scheduler is not None:
                self.lr_scheduler(optimizer)
        except ConfigurationError:
            raise
        except (ValueError, TypeError) as error:
            reason = " ".join(str(error).split())
            raise ConfigurationError(f"{setting} does not take its settings ({reason}); correct its init_args") from error

    def configure_optimizers(self) -> Any:
        """The student's optimizer, with its scheduler stepping once a batch."""
        optimizer = self.optimizer(split_parameters(self.trained.named_parameters()))
        if (trainer := self._trainer) is not None:
            allow_clipping(optimizer, getattr(trainer.precision_plugin, "scaler", None) is not None, trainer.gradient_clip_val)
        if self.lr_scheduler is None:
            return optimizer
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": self.lr_scheduler(optimizer), "interval": "step"}}

    # Training

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """The mean of the method's loss, and its curves."""
        x0 = self.latents(batch) if self.needs_images else self.no_latents(batch)
        objective = self.objective(x0, self.condition(batch))
        loss = objective.loss.mean()
        self.log("train/loss", loss, prog_bar=True)
        self.log_dict({f"train/{name}": value for name, value in objective.logs.items()})
        bins = (objective.t * TIME_BINS).long().clamp(max=TIME_BINS - 1)
        for i in range(TIME_BINS):
            if (inside := bins == i).any():
                self.log(f"train/loss_t{i}", objective.loss.detach()[inside].mean())
        return loss

    def on_fit_start(self) -> None:
        """Check that weights are still shared where they are meant to be, and what the time embedder's refit has changed.

        Of a fresh run only: the velocities of the teacher must be what they were.
        """
        if self.student_options.lora is not None:
            check_sharing(self.trained, self.teacher)
        report = self.smooth_time_report
        if report is None or self.trainer.ckpt_path is not None:
            return
        drift = self.time_embedder_drift()
        rank_zero_info(
            f"Smooth time: largest |de/dt| {report.derivative_before:.1f} before and {report.derivative_after:.1f} after, "
            f"fit error {report.fit_error:.3f}, drift of the velocities {drift:.3f}"
        )
        for logger in self.loggers:
            logger.log_metrics({f"smooth_time/{k}": v for k, v in {**asdict(report), "drift": drift}.items()}, step=0)
        cloned = self.student_options.interval_embedding == "clone"  # which is no teacher at its start, whatever the refit does
        if drift > self.student_options.max_drift and not cloned:
            raise ConfigurationError(
                f"the refitted time embedder changes the teacher's velocities by {drift:.3f}, more than student.max_drift "
                f"{self.student_options.max_drift}; raise student.frequency_bound or set student.time_embedding to original"
            )

    @torch.no_grad()
    def time_embedder_drift(self, steps: int = 8, samples: int = 8) -> float:
        """Relative change of the velocities along the teacher's own trajectories, by refitting the time embedder.

        Meaningful at the start only, and exactly 0 there for a student with the teacher's own embedder.
        """
        noise = torch.stack(
            [torch.randn(self.latent_shape, generator=torch.Generator().manual_seed(i)) for i in range(samples)]
        )
        x, null = noise.to(self.device), self.null_condition(samples)
        change = size = 0.0
        for t, r in pairwise(self.adapter.time_grid(steps, self.latent_shape).to(self.device)):
            times, ends = t.expand(samples), r.expand(samples)
            v = self.adapter.velocity(self.teacher, x, times, null, self.guidance.scale)
            u = self.adapter.average_velocity(self.student, x, times, times, null, self.guidance.scale)
            change += (u - v).square().sum().item()
            size += v.square().sum().item()
            x = flow_step(x, v, ends, times)
        return float((change / size) ** 0.5)

    def on_train_start(self) -> None:
        """Give each process draws of its own, and start the clock of the throughput."""
        if self.global_rank > 0:  # all were seeded alike, which the networks' first weights need and times and noise must not
            torch.manual_seed((torch.initial_seed() + self.global_rank) % 2**63)
        self.apply_auxiliary_settings()
        self._clock = (time.perf_counter(), 0)

    @property
    def _logs_now(self) -> bool:
        every: int = self.trainer.log_every_n_steps  # type: ignore[attr-defined]  # set by a helper of Trainer's constructor
        return self.trainer.global_step % every == 0

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Log the norm of the gradients, before clipping."""
        gradients = [p.grad for p in self.trained.parameters() if p.grad is not None]
        if gradients and self._logs_now:
            norm = torch.nn.utils.get_total_norm(gradients)
            self.log("train/grad_norm", norm.full_tensor() if isinstance(norm, DTensor) else norm)

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Step, then move the average: before checkpoints of this step are written."""
        taken = getattr(self.trainer.strategy, "steps_taken", None)
        super().optimizer_step(*args, **kwargs)
        if taken is not None and self.trainer.strategy.steps_taken == taken:  # type: ignore[attr-defined]
            return  # DeepSpeed has accumulated gradients
        if self._logs_now and (norm := getattr(self.trainer.strategy, "gradient_norm", lambda: None)()) is not None:
            self.log("train/grad_norm", norm)  # where gradients are out of sight, as in DeepSpeed
        if self.ema is not None:
            self.ema.update_parameters(self.trained)

    def on_train_batch_end(self, outputs: Any, batch: Batch, batch_idx: int) -> None:
        """Log the throughput."""
        start, samples = self._clock
        samples += len(batch["prompt"]) * self.trainer.world_size
        self._clock = (start, samples)
        if self._logs_now:
            elapsed = time.perf_counter() - start
            self.log("perf/samples_per_second", samples / elapsed, prog_bar=True)
            self._clock = (time.perf_counter(), 0)
