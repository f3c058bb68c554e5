"""Training methods: one LightningModule each, on `TeacherStudentBase`."""

from lightning_distill.methods.alignment import TrajectoryAlignment
from lightning_distill.methods.autoencoder import Autoencoder
from lightning_distill.methods.auxiliary import AuxiliaryLoss, AuxiliaryTraining
from lightning_distill.methods.base import Objective, ObjectiveSteps, TeacherStudentBase
from lightning_distill.methods.consistency_distillation import ConsistencyDistillation
from lightning_distill.methods.dmd2 import DMD2, CriticGan
from lightning_distill.methods.encoder import Batch
from lightning_distill.methods.flow_matching import FlowMatching
from lightning_distill.methods.guidance import Guidance
from lightning_distill.methods.imm import IMM
from lightning_distill.methods.knowledge_distillation import KnowledgeDistillation
from lightning_distill.methods.ladd import LADD
from lightning_distill.methods.meanflow import MeanFlow
from lightning_distill.methods.pi_flow import PiFlow
from lightning_distill.methods.scm import SCM
from lightning_distill.methods.split_meanflow import SplitMeanFlow
from lightning_distill.methods.tdm import TDM
from lightning_distill.methods.timestep_rescaling import TimestepRescaling
from lightning_distill.methods.validation import ValidationOptions
from lightning_distill.optimizers import MuonWithAdamW, WarmupCosine

__all__ = [
    "DMD2",
    "IMM",
    "LADD",
    "SCM",
    "TDM",
    "Autoencoder",
    "AuxiliaryLoss",
    "AuxiliaryTraining",
    "Batch",
    "ConsistencyDistillation",
    "CriticGan",
    "FlowMatching",
    "Guidance",
    "KnowledgeDistillation",
    "MeanFlow",
    "MuonWithAdamW",
    "Objective",
    "ObjectiveSteps",
    "PiFlow",
    "SplitMeanFlow",
    "TeacherStudentBase",
    "TimestepRescaling",
    "TrajectoryAlignment",
    "ValidationOptions",
    "WarmupCosine",
]
