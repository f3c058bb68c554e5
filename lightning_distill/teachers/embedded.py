"""A laptop-sized FLUX pipeline with random weights."""

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, PreTrainedTokenizerFast, T5Config, T5EncoderModel

from lightning_distill.errors import ConfigurationError
from lightning_distill.paths import expand_path
from lightning_distill.students.few_step import FewStepPipeline
from lightning_distill.students.two_time_flux import TwoTimeFluxPipeline, TwoTimeFluxTransformer2DModel
from lightning_distill.teachers.component_files import check_component
from lightning_distill.teachers.diffusers_adapter import DiffusersAdapter
from lightning_distill.teachers.model_adapter import ModelAdapter
from lightning_distill.teachers.pipeline_source import PipelineSource
from lightning_distill.teachers.student_options import StudentOptions

PAD, EOS, UNKNOWN = "<pad>", "</s>", "<unk>"


def build_tokenizer(words: Iterable[str], max_length: int) -> PreTrainedTokenizerFast:
    """A word-level tokenizer that appends an end-of-sequence token to every prompt.

    Args:
        words: The vocabulary.
        max_length: Largest number of tokens of a prompt, including the end-of-sequence token.
    """
    vocabulary = {word: i for i, word in enumerate([PAD, UNKNOWN, EOS, *words])}
    # Ids 0 to 2 are special tokens. CLIP treats an eos id of 2 as a legacy marker, so eos is last in the vocabulary.
    vocabulary[EOS] = len(vocabulary)
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.post_processor = TemplateProcessing(single=f"$A {EOS}", special_tokens=[(EOS, vocabulary[EOS])])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, model_max_length=max_length, pad_token=PAD, eos_token=EOS, unk_token=UNKNOWN
    )


def build_flux_pipeline(
    vae: AutoencoderKL,
    words: Iterable[str],
    *,
    max_length: int = 8,
    num_layers: int = 2,
    num_single_layers: int = 2,
    num_attention_heads: int = 4,
    attention_head_dim: int = 32,
    axes_dims_rope: tuple[int, int, int] = (8, 12, 12),
    text_width: int = 64,
    shift: float = 1.0,
) -> FluxPipeline:
    """A FLUX pipeline with random weights and the architecture of FLUX.1: both text encoders, 2 x 2 packing, both block types.

    Args:
        vae: The autoencoder; its latent channels determine the width of the image tokens.
        words: Vocabulary of the prompts.
        max_length: Number of tokens to which prompts are padded.
        num_layers: Number of joint blocks.
        num_single_layers: Number of single blocks.
        num_attention_heads: Number of attention heads per block.
        attention_head_dim: Width of an attention head.
        axes_dims_rope: Split of the head width over (text, row, column) positions.
        text_width: Width of both text encoders.
        shift: Shift of the scheduler's time grid; 1 is uniform.
    """
    tokenizer = build_tokenizer(words, max_length)
    eos = tokenizer.convert_tokens_to_ids(EOS)
    size = eos + 1
    clip = CLIPTextConfig(
        vocab_size=size,
        hidden_size=text_width,
        intermediate_size=2 * text_width,
        projection_dim=text_width,
        num_hidden_layers=1,
        num_attention_heads=4,
        max_position_embeddings=max_length,
        eos_token_id=eos,
        bos_token_id=None,
        pad_token_id=0,
    )
    t5 = T5Config(
        vocab_size=size,
        d_model=text_width,
        d_kv=text_width // 4,
        d_ff=2 * text_width,
        num_layers=2,
        num_heads=4,
        feed_forward_proj="gated-gelu",
        dropout_rate=0.0,
        eos_token_id=eos,
        pad_token_id=0,
    )
    transformer = FluxTransformer2DModel(
        in_channels=4 * vae.config.latent_channels,
        num_layers=num_layers,
        num_single_layers=num_single_layers,
        attention_head_dim=attention_head_dim,
        num_attention_heads=num_attention_heads,
        joint_attention_dim=text_width,
        pooled_projection_dim=text_width,
        axes_dims_rope=axes_dims_rope,
    )
    encoder = T5EncoderModel(t5)
    bias_heads_to_neighbours(encoder)
    return FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=shift),
        vae=vae,
        text_encoder=CLIPTextModel(clip),
        tokenizer=tokenizer,
        text_encoder_2=encoder,
        tokenizer_2=build_tokenizer(words, max_length),
        transformer=transformer,
    )


@torch.no_grad()
def bias_heads_to_neighbours(encoder: T5EncoderModel, strength: float = 3.0) -> None:
    """Initialise three T5 heads to attend to the previous word, the next word, and the word two positions back.

    FLUX gives all text tokens the same position, so word order reaches the transformer only through these relative position
    biases. A short training from T5's default initialisation does not learn them: "a red circle and a blue square" remains
    a bag of words.

    Args:
        encoder: An encoder with at least 3 heads; other heads do not change.
        strength: Attention logit of the chosen word relative to all others.
    """
    bias = encoder.get_submodule("encoder.block.0.layer.0.SelfAttention.relative_attention_bias").weight
    ahead = len(bias) // 2  # buckets from here on are keys after the query
    for head, bucket in enumerate((1, ahead + 1, 2)):
        bias[:, head] = 0.0
        bias[bucket, head] = strength


class EmbeddedFluxAdapter(DiffusersAdapter):
    """Adapter for a laptop-sized FLUX with random weights and a trained autoencoder, for training a teacher from scratch.

    Args:
        vae: Directory of the trained `AutoencoderKL`.
        words: Vocabulary of the prompts.
        max_length: Number of tokens to which prompts are padded.
        num_layers: Number of joint blocks.
        num_single_layers: Number of single blocks.
        num_attention_heads: Number of attention heads per block, each of width 32.
        text_width: Width of both text encoders.
        shift: Shift of the scheduler's time grid; 1 is uniform.
        attention_backend: Name of a diffusers attention backend. None: diffusers' default.
    """

    def __init__(
        self,
        vae: str,
        words: list[str],
        max_length: int = 8,
        num_layers: int = 2,
        num_single_layers: int = 2,
        num_attention_heads: int = 4,
        text_width: int = 64,
        shift: float = 1.0,
        attention_backend: str | None = None,
    ) -> None:
        super().__init__(pretrained=expand_path(vae, "adapter.vae"), attention_backend=attention_backend)
        counts = {
            "max_length": max_length,
            "num_layers": num_layers,
            "num_single_layers": num_single_layers,
            "num_attention_heads": num_attention_heads,
            "text_width": text_width,
        }
        for name, count in counts.items():
            if count < 1:
                raise ConfigurationError(f"adapter.{name} is {count}; set it to at least 1")
        if not 0 < shift < math.inf:
            raise ConfigurationError(f"adapter.shift is {shift}; set it above 0, 1 is uniform")
        self.words = words
        self.geometry: dict[str, Any] = counts
        self.shift = shift
        self._transformer: nn.Module | None = None

    def check(self, weights: bool = True) -> None:
        """Check the settings and, unless `weights` is false, the files of the autoencoder before anything is loaded.

        Raises:
            ConfigurationError: If the directory has no complete autoencoder, or diffusers has no such attention backend.
        """
        self.check_attention_backend()
        if not (Path(self.pretrained) / "config.json").is_file():
            raise ConfigurationError(
                f"adapter.vae is {self.pretrained!r}, which has no autoencoder; train one with fit --config shapes_vae.yaml"
            )
        if weights:
            check_component(Path(self.pretrained), ".", AutoencoderKL, PipelineSource("adapter.vae", self.pretrained))

    def meta_vae(self) -> nn.Module:
        """The autoencoder, with parameters on the meta device."""
        with torch.device("meta"):
            vae: nn.Module = AutoencoderKL.from_config(AutoencoderKL.load_config(self.pretrained))
        return vae

    @property
    def family(self) -> type[FewStepPipeline]:
        """Few-step pipeline class of FLUX."""
        return TwoTimeFluxPipeline

    def check_student(self, options: StudentOptions) -> None:
        """Check the options of a student: the teacher has random weights, so it cannot be a base for the options.

        Raises:
            ConfigurationError: If LoRA, a policy, rescaled times or a pretrained student are set.
        """
        ModelAdapter.check_student(self, options)

    def encoding_settings(self) -> dict[str, Any]:
        """Not available: every start initialises the text encoders randomly, so encodings are not reproducible.

        Raises:
            ConfigurationError: Always.
        """
        raise ConfigurationError(
            "adapter is EmbeddedFluxAdapter, whose text encoders get new random weights at every start, so precomputed "
            "encodings do not fit; train from images, or set adapter to DiffusersAdapter"
        )

    def load(self, encoders: bool = True) -> None:
        """Build the pipeline around the autoencoder, with random weights from torch's global generator."""
        if not encoders:
            self.encoding_settings()
        vae = AutoencoderKL.from_pretrained(self.pretrained)
        pipeline = build_flux_pipeline(vae, self.words, shift=self.shift, **self.geometry)
        self._transformer = TwoTimeFluxTransformer2DModel.from_config(pipeline.transformer.config)
        self.attach(TwoTimeFluxPipeline(**{**pipeline.components, "transformer": None}))

    def load_teacher(self) -> nn.Module:
        """The transformer with random weights, frozen and in evaluation mode."""
        if self._transformer is None:
            raise RuntimeError("the adapter is not loaded yet; call load() first")
        return self.prepare_teacher(self._transformer)
