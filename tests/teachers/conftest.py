"""Fixtures of tiny FLUX pipelines."""

from tests.tiny_fixtures import (  # noqa: F401  # pytest finds fixtures by their names here
    adapter,
    guided_adapter,
    guided_directory,
    teacher_directory,
)
