from pathlib import Path

import pytest
from jsonargparse import Namespace

from lightning_distill.commands.config_paths import expand_paths
from lightning_distill.errors import ConfigurationError


def settings() -> Namespace:
    callback = Namespace(class_path="AtomicCheckpoint", init_args=Namespace(dirpath="~/run/checkpoints", filename="~"))
    return Namespace(
        ckpt_path="~/last.ckpt",
        out=Path("~/latents"),
        data=Namespace(class_path="ImageText", init_args=Namespace(source=["~/a.tar", "$DATA/b.tar"], caption_column="~/no")),
        trainer=Namespace(callbacks=[callback], default_root_dir=None, logger={"init_args": {"save_dir": "~/logs"}}),
        model=Namespace(init_args=Namespace(adapter=Namespace(init_args=Namespace(pretrained="${DATA}/model")))),
    )


def test_all_paths_are_expanded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/ada")
    monkeypatch.setenv("DATA", "/data")
    expanded = settings()
    expand_paths(expanded)
    assert expanded.ckpt_path == "/home/ada/last.ckpt"
    assert expanded.out == Path("/home/ada/latents")
    assert expanded.data.init_args == Namespace(source=["/home/ada/a.tar", "/data/b.tar"], caption_column="~/no")
    assert expanded.trainer.callbacks[0].init_args == Namespace(dirpath="/home/ada/run/checkpoints", filename="~")
    assert expanded.trainer.callbacks[0].class_path == "AtomicCheckpoint"
    assert expanded.trainer.default_root_dir is None
    assert expanded.trainer.logger == {"init_args": {"save_dir": "/home/ada/logs"}}
    assert expanded.model.init_args.adapter.init_args.pretrained == "/data/model"


def test_unknown_variables_raise_with_the_dotted_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DATA", raising=False)
    with pytest.raises(ConfigurationError, match=r"^data\.source is '\$DATA/b\.tar', but the environment variable DATA is not"):
        expand_paths(settings())


@pytest.mark.parametrize("path", ["$NO_SUCH_VARIABLE/x", "~no_such_user/x"])
def test_the_setting_that_others_refer_to_is_named(path: str) -> None:
    callback = Namespace(class_path="AtomicCheckpoint", init_args=Namespace(dirpath=f"{path}/checkpoints"))
    trainer = Namespace(callbacks=[callback], default_root_dir=path)
    with pytest.raises(ConfigurationError, match=r"^trainer\.default_root_dir is "):
        expand_paths(Namespace(trainer=trainer))
