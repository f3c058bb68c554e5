from lightning.pytorch.callbacks import EarlyStopping
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_distill.callbacks import AtomicCheckpoint
from lightning_distill.commands.instantiation import constructor_error
from lightning_distill.methods import TrajectoryAlignment


def wrapped(build) -> Exception:
    """The error of a constructor as the cause of another."""
    try:
        build()
    except Exception as error:
        wrapper = ValueError("wrapped")
        wrapper.__cause__ = error
        return wrapper
    raise AssertionError("nothing was raised")


def test_a_constructor_of_another_package():
    error = wrapped(lambda: EarlyStopping("loss", mode="x"))
    assert (
        constructor_error(error) == "EarlyStopping does not accept its settings (`mode` can be min, max, got x); correct them"
    )


def test_settings_that_lightning_refuses():
    message = constructor_error(wrapped(lambda: AtomicCheckpoint(save_top_k=-5)))
    assert message is not None
    assert message.startswith("AtomicCheckpoint does not accept its settings (Invalid value for save_top_k=-5")


def test_a_missing_package():
    def build():
        raise ModuleNotFoundError("No module named 'nowhere'", name="nowhere")

    assert constructor_error(wrapped(build)) == (
        "the settings need the package nowhere, which is not installed; run `pip install nowhere`"
    )


def test_errors_of_this_package_are_bugs():
    assert constructor_error(wrapped(lambda: TrajectoryAlignment(nfe=3))) is None
    assert constructor_error(MisconfigurationException("elsewhere")) is None
    assert constructor_error(None) is None
