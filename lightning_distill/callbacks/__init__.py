"""Callbacks: switch between solutions, reports, images, exports, checkpoints and exact resumption."""

from lightning.pytorch.callbacks import LearningRateMonitor

from lightning_distill.callbacks.checkpoint import AtomicCheckpoint
from lightning_distill.callbacks.export import ExportPipeline
from lightning_distill.callbacks.images import LogImages
from lightning_distill.callbacks.optimizer_settings import OptimizerSettings
from lightning_distill.callbacks.predictions import WritePredictions
from lightning_distill.callbacks.progress import DistillProgressBar
from lightning_distill.callbacks.random_state import RandomState
from lightning_distill.callbacks.report import FinalReport
from lightning_distill.callbacks.sanity import StopOnNonFinite
from lightning_distill.callbacks.switch import SwitchSolution
from lightning_distill.callbacks.tensorboard_layout import TensorBoardLayout
from lightning_distill.callbacks.termination import JointTermination

__all__ = [
    "AtomicCheckpoint",
    "DistillProgressBar",
    "ExportPipeline",
    "FinalReport",
    "JointTermination",
    "LearningRateMonitor",
    "LogImages",
    "OptimizerSettings",
    "RandomState",
    "StopOnNonFinite",
    "SwitchSolution",
    "TensorBoardLayout",
    "WritePredictions",
]
