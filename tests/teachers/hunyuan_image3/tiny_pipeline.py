"""Write directories of the HunyuanImage 3.0 stand-in model in the published layout: code, tokenizer, settings and weights."""

import shutil
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from torch import nn
from transformers import GenerationConfig, PreTrainedTokenizerFast

from tests.teachers.hunyuan_image3 import stand_in
from tests.teachers.hunyuan_image3.stand_in import hunyuan, modeling_hunyuan_image_3
from tests.teachers.hunyuan_image3.stand_in.configuration_hunyuan_image_3 import HunyuanImage3Config
from tests.tiny import WORDS

FORMS = {
    "older": ("hunyuan", {}),
    "newer": ("modeling_hunyuan_image_3", {}),
    "newer_guided": ("modeling_hunyuan_image_3", {"cfg_distilled": True}),
    "newer_distilled": ("modeling_hunyuan_image_3", {"cfg_distilled": True, "use_meanflow": True}),
}
"""Module and configuration flags of each version of the model."""
QUICK = ("older", "newer_distilled")
"""Versions that together have all features; tests of the other versions are slow."""
SPECIAL = ["<pad>", "<bos>", "<eos>", "<boi>", "<eoi>", "<img>", "<cfg>", "<timestep>", "<timestep_r>", "<guidance>"]
SPECIAL += ["<img_size_32>", *(f"<img_ratio_{i}>" for i in range(3)), "<answer>", "</answer>"]


def build_tokenizer() -> PreTrainedTokenizerFast:
    words = ["<unk>", *WORDS, "User", "Assistant", ":", "draw"]
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate([*SPECIAL, *words])}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.add_special_tokens(SPECIAL)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>")


def save_stand_in(form: str, directory: Path, sequence_template: str = "pretrain", **settings: Any) -> str:
    """Write a model of a version, with additional model settings, and return its directory."""
    module, flags = FORMS[form]
    kind = {"hunyuan": hunyuan, "modeling_hunyuan_image_3": modeling_hunyuan_image_3}[module].HunyuanImage3ForCausalMM
    torch.manual_seed(0)
    model = kind(HunyuanImage3Config(**flags, **settings))
    randomize_weights(model)
    model.config.auto_map = {
        "AutoConfig": "configuration_hunyuan_image_3.HunyuanImage3Config",
        "AutoModelForCausalLM": f"{module}.HunyuanImage3ForCausalMM",
    }
    model.generation_config = GenerationConfig(
        flow_shift=3.0, diff_guidance_scale=2.5, diff_infer_steps=50, sequence_template=sequence_template
    )
    model.save_pretrained(directory, max_shard_size="100KB")  # several files, as in the published model
    build_tokenizer().save_pretrained(directory)
    other = {"hunyuan": "modeling_hunyuan_image_3", "modeling_hunyuan_image_3": "hunyuan"}[module]
    for file in Path(stand_in.__file__).parent.glob("*.py"):
        if file.stem not in (other, "__init__"):
            shutil.copyfile(file, directory / file.name)
    (directory / "LICENSE.txt").write_text("License of the stand-in model.\n")
    return str(directory)


@torch.no_grad()
def randomize_weights(model: nn.Module) -> None:
    """Sample weights that are large enough for tokens to differ and to be routed to different experts."""
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1:
            fan_in = parameter[0].numel() if "wte" not in name else 1
            parameter.normal_(std=fan_in**-0.5)
        elif name.endswith("bias"):
            parameter.normal_(std=0.1)
