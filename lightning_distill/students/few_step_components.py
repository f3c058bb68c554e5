"""What a student's pipeline is made from: its teacher's components, but for the transformer and the scheduler.

This file imports torch, diffusers and siblings that travel with it: it is part of every student that is exported without its
base, and must run without this package.
"""

import copy
from typing import Any

from diffusers import DiffusionPipeline

from .average_velocity_scheduler import AverageVelocityScheduler
from .few_step import FewStepPipeline, tokenizer_within
from .two_time import TwoTimeModel

SHIFT_SETTINGS = ("shift", "use_dynamic_shifting", "base_shift", "max_shift", "base_image_seq_len", "max_image_seq_len")


def pipeline_arguments(pipeline: DiffusionPipeline) -> dict[str, Any]:
    """What a pipeline is made from: components and settings."""
    _, optional = pipeline._get_signature_keys(pipeline)
    settings = {name: pipeline.config[name] for name in optional if name not in pipeline.components}
    return {**pipeline.components, **settings}


def student_pipeline(
    family: type[FewStepPipeline],
    teacher: DiffusionPipeline,
    student: TwoTimeModel,
    max_sequence_length: int,
    stochastic_sampling: bool,
) -> FewStepPipeline:
    """A student's pipeline, with the components of its teacher's.

    Args:
        family: Of the pipeline.
        teacher: The teacher's pipeline, stock or few-step, of which everything but the transformer and the scheduler is kept.
        student: A network of the family's `network_class`.
        max_sequence_length: Tokens that the student's prompts were padded to; becomes the tokenizer's own length.
        stochastic_sampling: Whether its steps go to data and back by fresh noise.
    """
    tokenizer = copy.deepcopy(getattr(teacher, family.prompt_tokenizer))
    tokenizer_within(tokenizer).model_max_length = max_sequence_length
    known = teacher.scheduler.config
    shift = {name: known[name] for name in SHIFT_SETTINGS if name in known}
    scheduler = AverageVelocityScheduler(**shift, stochastic_sampling=stochastic_sampling)
    replaced = {"transformer": student, family.prompt_tokenizer: tokenizer, "scheduler": scheduler}
    return family(**{**pipeline_arguments(teacher), **replaced})
