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
    text = interpolation_error(raised.value, ["trainer.max_steps", "model"])
    assert message in text
    assert "\n" not in text
