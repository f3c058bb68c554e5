"""A FLUX pipeline small enough for a laptop, built from nothing."""

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
from lightning_distill.students.two_time_flux import TwoTimeFluxPipeline, TwoTimeFluxTransformer2DModel
from lightning_distill.teachers.diffusers_adapter import DiffusersAdapter
from lightning_distill.teachers.model_adapter import ModelAdapter
from lightning_distill.teachers.student_options import StudentOptions

PAD, EOS, UNKNOWN = "<pad>", "</s>", "<unk>"


def build_tokenizer(words: Iterable[str], max_length: int) -> PreTrainedTokenizerFast:
    """A tokenizer of whole words that ends every prompt with an end-of-sequence token.

    Args:
        words: The vocabulary.
        max_length: Longest prompt in tokens, its end included.
    """
    vocabulary = {word: i for i, word in enumerate([PAD, UNKNOWN, EOS, *words])}
    # Ids 0 to 2 are special; CLIP treats an eos id of 2 as a legacy mark, so eos goes to the end of the vocabulary.
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
    """A FLUX pipeline with random weights and the real one's geometry: both text encoders, 2 x 2 packing, both block kinds.

    Args:
        vae: The autoencoder; its latent channels set the width of the image tokens.
        words: Vocabulary of the prompts.
        max_length: Tokens a prompt is padded to.
        num_layers: Joint blocks.
        num_single_layers: Single blocks.
        num_attention_heads: Heads of a block.
        attention_head_dim: Width of a head.
        axes_dims_rope: How the head's width is split over (text, row, column) positions.
        text_width: Width of both text encoders.
        shift: Shift of the scheduler's grid of times; 1 is uniform.
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
    look_at_neighbours(encoder)
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
def look_at_neighbours(encoder: T5EncoderModel, strength: float = 3.0) -> None:
    """Let one head of a T5 encoder start out looking a word back, one a word ahead, and one two words back.

    FLUX gives all text tokens one position, so the order of words reaches the transformer through these biases alone. From
    T5's own initialisation a short training does not find them, and "a red circle and a blue square" stays a bag of words.

    Args:
        encoder: Of at least 3 heads; its other heads stay as they are.
        strength: Logit that the chosen word gains over all others.
    """
    bias = encoder.get_submodule("encoder.block.0.layer.0.SelfAttention.relative_attention_bias").weight
    ahead = len(bias) // 2  # buckets from here on are words after the one that looks
    for head, bucket in enumerate((1, ahead + 1, 2)):
        bias[:, head] = 0.0
        bias[bucket, head] = strength


class EmbeddedFluxAdapter(DiffusersAdapter):
    """A FLUX of laptop size with random weights, around a trained autoencoder: where training a teacher starts.

    Args:
        vae: Directory of the trained `AutoencoderKL`.
        words: Vocabulary of the prompts.
        max_length: Tokens a prompt is padded to.
        num_layers: Joint blocks.
        num_single_layers: Single blocks.
        num_attention_heads: Heads of a block, each of width 32.
        text_width: Width of both text encoders.
        shift: Shift of the scheduler's grid of times; 1 is uniform.
        attention_backend: Name of a diffusers attention backend, or None for diffusers' choice.
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
        super().__init__(pretrained=vae, attention_backend=attention_backend)
        self.words = words
        self.geometry: dict[str, Any] = {
            "max_length": max_length,
            "num_layers": num_layers,
            "num_single_layers": num_single_layers,
            "num_attention_heads": num_attention_heads,
            "text_width": text_width,
        }
        self.shift = shift
        self._transformer: nn.Module | None = None

    def check(self) -> None:
        """Raise `ConfigurationError` where there is no autoencoder, or the settings cannot work."""
        self._check_attention_backend()
        if not (Path(self.pretrained) / "config.json").is_file():
            raise ConfigurationError(
                f"adapter.vae is {self.pretrained!r}, which holds no autoencoder; train one with fit --config shapes_vae.yaml"
            )

    def check_student(self, options: StudentOptions) -> None:
        """Refuse LoRA, other times, and students to start from: there are no weights to keep."""
        ModelAdapter.check_student(self, options)

    def encoding_settings(self) -> dict[str, Any]:
        """There are none: text encoders that are drawn at every start encode nothing twice.

        Raises:
            ConfigurationError: Always.
        """
        raise ConfigurationError(
            "adapter is EmbeddedFluxAdapter, which draws its text encoders anew at every start, so that nothing encoded before "
            "fits them; train from pictures, or take DiffusersAdapter"
        )

    def load(self, encoders: bool = True) -> None:
        """Build the pipeline around the autoencoder, with weights drawn from torch's global generator."""
        if not encoders:
            self.encoding_settings()
        vae = AutoencoderKL.from_pretrained(self.pretrained)
        pipeline = build_flux_pipeline(vae, self.words, shift=self.shift, **self.geometry)
        self._transformer = TwoTimeFluxTransformer2DModel.from_config(pipeline.transformer.config)
        self.attach(TwoTimeFluxPipeline(**{**pipeline.components, "transformer": None}))

    def load_teacher(self) -> nn.Module:
        """The transformer with random weights."""
        if self._transformer is None:
            raise RuntimeError("the adapter is not loaded yet; call load() first")
        return self.adopt(self._transformer)
