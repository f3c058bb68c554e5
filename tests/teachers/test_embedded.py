from pathlib import Path

import pytest
import torch

from lightning_distill.errors import ConfigurationError
from lightning_distill.teachers.diffusers_adapter import DiffusersAdapter
from lightning_distill.teachers.embedded import EmbeddedFluxAdapter, build_tokenizer
from tests.tiny import PROMPTS, WORDS, load_adapter, noise, tiny_vae

GEOMETRY = {"num_layers": 1, "num_single_layers": 1, "num_attention_heads": 2, "text_width": 16}


@pytest.fixture
def embedded(tmp_path: Path) -> EmbeddedFluxAdapter:
    tiny_vae().save_pretrained(tmp_path / "vae")
    adapter = EmbeddedFluxAdapter(str(tmp_path / "vae"), WORDS, **GEOMETRY)
    adapter.check()
    adapter.load()
    return adapter


def test_tokenizer_appends_eos_and_pads() -> None:
    tokenizer = build_tokenizer(WORDS, 6)
    ids = tokenizer(["a red circle", "", "a purple circle"], padding="max_length", max_length=6).input_ids
    end, pad, unknown = (tokenizer.convert_tokens_to_ids(token) for token in ("</s>", "<pad>", "<unk>"))
    a, red, circle = tokenizer.convert_tokens_to_ids(["a", "red", "circle"])
    assert ids == [[a, red, circle, end, pad, pad], [end, *[pad] * 5], [a, unknown, circle, end, pad, pad]]
    assert len({end, pad, unknown, a, red, circle}) == 6


def test_pooled_embedding_is_that_of_the_eos_token(adapter: DiffusersAdapter) -> None:
    encoder, tokenizer = adapter.pipeline.text_encoder, adapter.pipeline.tokenizer
    ids = tokenizer(PROMPTS, padding="max_length", max_length=8, return_tensors="pt").input_ids
    with torch.no_grad():
        output = encoder(ids)
        ends = (ids == tokenizer.eos_token_id).int().argmax(dim=1)
        expected = output.last_hidden_state[torch.arange(3), ends]
        pooled = adapter.encode_prompt(PROMPTS)["pooled_prompt_embeds"]
    assert ends.tolist() == [3, 3, 2]
    torch.testing.assert_close(pooled, expected)


def test_both_encoders_distinguish_prompts(adapter: DiffusersAdapter) -> None:
    condition = adapter.encode_prompt(["a red circle", "a green circle"])
    for embeds in condition.values():
        assert (embeds[0] - embeds[1]).abs().max() > 1e-3


def test_pipeline_has_random_weights_and_the_trained_autoencoder(embedded: EmbeddedFluxAdapter) -> None:
    network = embedded.load_teacher()
    assert not embedded.embeds_guidance
    v = embedded.velocity(network, noise(3), torch.full((3,), 0.5), embedded.encode_prompt(PROMPTS))
    assert v.shape == (3, 16, 8, 8)
    assert v.isfinite().all()
    loaded, on_disk = embedded.pipeline.vae.state_dict(), tiny_vae().from_pretrained(embedded.pretrained).state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in on_disk.items())


def test_exported_teacher_is_a_stock_pipeline_with_equal_outputs(embedded: EmbeddedFluxAdapter, tmp_path: Path) -> None:
    network = embedded.load_teacher()
    embedded.save_teacher(network, tmp_path / "teacher")
    adapter = load_adapter(str(tmp_path / "teacher"))
    x, t = noise(3), torch.tensor([0.2, 0.6, 1.0])
    with torch.no_grad():
        before = embedded.velocity(network, x, t, embedded.encode_prompt(PROMPTS))
        after = adapter.velocity(adapter.load_teacher(), x, t, adapter.encode_prompt(PROMPTS))
    assert torch.equal(before, after)
    assert torch.equal(embedded.decode_latents(x), adapter.decode_latents(x))


def test_missing_autoencoder_raises(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"adapter\.vae is .* fit --config shapes_vae\.yaml"):
        EmbeddedFluxAdapter(str(tmp_path), WORDS).check()


def test_loading_the_teacher_before_load_raises(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="call load"):
        EmbeddedFluxAdapter(str(tmp_path), WORDS).load_teacher()


def test_precomputed_encodings_raise(embedded: EmbeddedFluxAdapter) -> None:
    for call in (embedded.encoding_settings, lambda: embedded.load(encoders=False)):
        with pytest.raises(ConfigurationError, match="text encoders get new random weights at every start"):
            call()
