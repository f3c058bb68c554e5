import importlib.util

import pytest

from lightning_distill.commands.trainer_settings import check_seed, check_trainer_settings
from lightning_distill.errors import ConfigurationError

NAN = float("nan")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("accumulate_grad_batches", 0),
        ("accumulate_grad_batches", -2),
        ("log_every_n_steps", 0),
        ("max_steps", -2),
        ("check_val_every_n_epoch", 0),
        ("gradient_clip_val", -1),
        ("gradient_clip_val", NAN),
        ("gradient_clip_val", float("inf")),
        ("gradient_clip_algorithm", "nrom"),
        ("limit_val_batches", -1),
        ("limit_train_batches", 1.5),
        ("limit_test_batches", NAN),
        ("val_check_interval", 0),
        ("val_check_interval", -0.5),
        ("devices", "two"),
        ("devices", 0),
        ("devices", -2),
        ("devices", [-1]),
        ("devices", []),
        ("strategy", "fsdp3"),
        ("max_time", "3"),
        ("accelerator", "cpuu"),
    ],
)
def test_a_setting_out_of_range_is_named(name, value):
    with pytest.raises(ConfigurationError, match=rf"^trainer\.{name} is ") as raised:
        check_trainer_settings({name: value})
    assert str(value) in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("devices", [[0], "0,1", -1])
def test_devices_of_a_cpu_are_a_number_of_processes(devices):
    check_trainer_settings({"accelerator": "auto", "devices": devices})
    with pytest.raises(ConfigurationError, match=r"^trainer\.devices is .*; on a CPU"):
        check_trainer_settings({"accelerator": "cpu", "devices": devices})


def test_the_nearest_strategy_is_named():
    with pytest.raises(ConfigurationError, match=r"did you mean deepspeed_stage_3\?"):
        check_trainer_settings({"strategy": "deepspeed_stage3"})


@pytest.mark.parametrize(("given", "near"), [("fsdp3", "fsdp2"), ("fsdp_cpu_ofload", "fsdp_cpu_offload"), ("dpp", "ddp")])
def test_strategies_of_the_package_are_suggested_first(given, near):
    with pytest.raises(ConfigurationError, match=rf"did you mean {near}\?"):
        check_trainer_settings({"strategy": given})


def test_a_validation_each_share_of_an_epoch_needs_epochs():
    check_trainer_settings({"val_check_interval": 0.5, "check_val_every_n_epoch": 1})
    with pytest.raises(ConfigurationError, match=r"^trainer\.val_check_interval is 0\.5, .*check_val_every_n_epoch is null"):
        check_trainer_settings({"val_check_interval": 0.5, "check_val_every_n_epoch": None})


def test_valid_settings():
    check_trainer_settings(
        {
            "accelerator": "cpu",
            "strategy": "ddp",
            "devices": "2",
            "max_steps": -1,
            "gradient_clip_val": 0.0,
            "limit_val_batches": 0,
            "limit_train_batches": 0.5,
            "val_check_interval": 100,
            "fast_dev_run": True,
            "logger": [{"class_path": "lightning.pytorch.loggers.CSVLogger"}],
        }
    )


@pytest.mark.parametrize("listed", [False, True])
def test_a_logger_without_its_package(monkeypatch, listed):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr("lightning_distill.commands.trainer_settings.find_spec", lambda name: None)
    logger = {"class_path": "lightning.pytorch.loggers.WandbLogger"}
    with pytest.raises(ConfigurationError, match=r"trainer\.logger is WandbLogger, .* run `pip install wandb`"):
        check_trainer_settings({"logger": [logger] if listed else logger})


@pytest.mark.parametrize("seed", [-1, 2**32])
def test_a_seed_out_of_range(seed):
    with pytest.raises(ConfigurationError, match=rf"seed_everything is {seed}; set it to an integer from 0 to 4294967295"):
        check_seed(seed)


@pytest.mark.parametrize("seed", [0, 2**32 - 1, True, None])
def test_valid_seeds(seed):
    check_seed(seed)
