import pytest
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from lightning_distill.commands.interpolations import interpolation_error


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (
            "${trainer.max_stepz}",
            "model.lr refers to ${trainer.max_stepz}, which is not a setting; did you mean ${trainer.max_steps}?",
        ),
        ("${nowhere}", "model.lr refers to ${nowhere}, which is not a setting; correct the name"),
        (
            "${oc.env:NO_SUCH_VARIABLE}",
            "the environment variable NO_SUCH_VARIABLE, which is not set; set it, or give a default",
        ),
        ("${nosuch:1}", "model.lr uses the resolver 'nosuch', which does not exist"),
        ("${model.init_args.lr}", "model.lr refers to itself through its interpolations"),
        ("${trainer", "model.lr has an interpolation that cannot be read ("),
        ("${oc.decode:'[1'}", "model.lr has an interpolation that cannot be resolved ("),
    ],
)
def test_messages_are_one_line_with_the_setting(value, message):
    settings = {"model": {"init_args": {"lr": value}}, "trainer": {"max_steps": 3}}
    with pytest.raises(OmegaConfBaseException) as raised:
        OmegaConf.to_container(OmegaConf.create(settings), resolve=True)
    text = interpolation_error(raised.value, ["trainer.max_epochs", "model"], settings)
    assert message in text
    assert "\n" not in text


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("${trainer.default_root_dir}", "trainer.default_root_dir refers to itself"),
        ("${oc.env:NO_SUCH_VARIABLE}", "trainer.default_root_dir refers to the environment variable NO_SUCH_VARIABLE"),
        (
            "${data.init_args.seize}",
            "trainer.default_root_dir refers to ${data.init_args.seize}, which is not a setting; did you",
        ),
    ],
)
def test_the_cause_is_named_and_not_what_refers_to_it(value, message):
    callbacks = [{"init_args": {"dirpath": "${trainer.default_root_dir}/checkpoints"}}]
    settings = {"data": {"init_args": {"size": 3}}, "trainer": {"callbacks": callbacks, "default_root_dir": value}}
    with pytest.raises(OmegaConfBaseException) as raised:
        OmegaConf.to_container(OmegaConf.create(settings), resolve=True)
    assert interpolation_error(raised.value, [], settings).startswith(message)


def test_an_item_of_a_list_has_an_index():
    settings = {"trainer": {"callbacks": [{"init_args": {"dirpath": "${nowhere}"}}]}}
    with pytest.raises(OmegaConfBaseException) as raised:
        OmegaConf.to_container(OmegaConf.create(settings), resolve=True)
    assert interpolation_error(raised.value, [], settings).startswith("trainer.callbacks[0].dirpath refers to ${nowhere}, ")
