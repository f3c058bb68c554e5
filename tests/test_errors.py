import pytest
from torch.utils.data import DataLoader, Dataset

from lightning_distill.data.image_files import UnreadableImageError
from lightning_distill.errors import ConfigurationError, DamagedFileError, find_configuration_error, first_and_count


class Failing(Dataset[int]):
    """Every sample raises an error."""

    def __init__(self, kind: type[ConfigurationError]) -> None:
        self.kind = kind

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> int:
        raise self.kind("data.source is 'x': not an error: of the loader; set another one")


@pytest.mark.parametrize("kind", [ConfigurationError, DamagedFileError, UnreadableImageError])
def test_messages_of_workers_are_one_line(kind: type[ConfigurationError]) -> None:
    with pytest.raises(kind) as caught:
        next(iter(DataLoader(Failing(kind), num_workers=1)))
    assert str(caught.value) == "data.source is 'x': not an error: of the loader; set another one"


def test_further_names_are_counted_if_there_are_any() -> None:
    assert first_and_count(["a"]) == "'a'"
    assert first_and_count(["a", "b", "c"]) == "'a' and 2 more"


def test_a_configuration_error_is_found_among_causes() -> None:
    cause = ConfigurationError("a")
    error = ValueError("b")
    error.__cause__ = cause
    assert find_configuration_error(error) is cause
    assert find_configuration_error(ValueError("b")) is None
