"""Assembly of a student's pipeline: the components of its teacher, except for the transformer and the scheduler.

Every student that is exported without its base contains a copy of this file. It imports only torch, diffusers and sibling
files, and runs without this package.
"""

import copy
from typing import Any

from diffusers import DiffusionPipeline

from .average_velocity_scheduler import AverageVelocityScheduler
from .few_step import FewStepPipeline, unwrap_tokenizer
from .two_time import TwoTimeModel

SHIFT_SETTINGS = ("shift", "use_dynamic_shifting", "base_shift", "max_shift", "base_image_seq_len", "max_image_seq_len")


def pipeline_arguments(pipeline: DiffusionPipeline) -> dict[str, Any]:
    """Constructor arguments of a pipeline: components and settings."""
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
    """Build a student's pipeline from the components of its teacher's.

    Args:
        family: Class of the student's pipeline.
        teacher: Pipeline of the teacher, stock or few-step. Its transformer and scheduler are replaced.
        student: Network of the class `family.network_class`.
        max_sequence_length: Number of tokens that the student's prompts were padded to; becomes the tokenizer's maximum length,
            if the pipeline has the tokenizer.
        stochastic_sampling: Whether steps predict x0 and re-noise it.
    """
    tokenizer = copy.deepcopy(getattr(teacher, family.prompt_tokenizer))
    if tokenizer is not None:
        unwrap_tokenizer(tokenizer).model_max_length = max_sequence_length
    config = teacher.scheduler.config
    shift = {name: config[name] for name in SHIFT_SETTINGS if name in config}
    scheduler = AverageVelocityScheduler(**shift, stochastic_sampling=stochastic_sampling)
    replaced = {"transformer": student, family.prompt_tokenizer: tokenizer, "scheduler": scheduler}
    return family(**{**pipeline_arguments(teacher), **replaced})
