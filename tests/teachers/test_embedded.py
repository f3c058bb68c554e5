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


def test_tokenizer_ends_and_pads_prompts() -> None:
    tokenizer = build_tokenizer(WORDS, 6)
    ids = tokenizer(["a red circle", "", "a purple circle"], padding="max_length", max_length=6).input_ids
    end, pad, unknown = (tokenizer.convert_tokens_to_ids(token) for token in ("</s>", "<pad>", "<unk>"))
    a, red, circle = tokenizer.convert_tokens_to_ids(["a", "red", "circle"])
    assert ids == [[a, red, circle, end, pad, pad], [end, *[pad] * 5], [a, unknown, circle, end, pad, pad]]
    assert len({end, pad, unknown, a, red, circle}) == 6


def test_pooled_prompt_is_read_at_the_end_of_the_prompt(adapter: DiffusersAdapter) -> None:
    encoder, tokenizer = adapter.pipeline.text_encoder, adapter.pipeline.tokenizer
    ids = tokenizer(PROMPTS, padding="max_length", max_length=8, return_tensors="pt").input_ids
    with torch.no_grad():
        output = encoder(ids)
        ends = (ids == tokenizer.eos_token_id).int().argmax(dim=1)
        expected = output.last_hidden_state[torch.arange(3), ends]
        pooled = adapter.encode_prompt(PROMPTS)["pooled_prompt_embeds"]
    assert ends.tolist() == [3, 3, 2]
    torch.testing.assert_close(pooled, expected)


def test_both_encoders_tell_prompts_apart(adapter: DiffusersAdapter) -> None:
    condition = adapter.encode_prompt(["a red circle", "a green circle"])
    for embeds in condition.values():
        assert (embeds[0] - embeds[1]).abs().max() > 1e-3


def test_it_starts_from_random_weights_around_the_autoencoder(embedded: EmbeddedFluxAdapter) -> None:
    network = embedded.load_teacher()
    assert not embedded.embeds_guidance
    v = embedded.velocity(network, noise(3), torch.full((3,), 0.5), embedded.encode_prompt(PROMPTS))
    assert v.shape == (3, 16, 8, 8)
    assert v.isfinite().all()
    loaded, on_disk = embedded.pipeline.vae.state_dict(), tiny_vae().from_pretrained(embedded.pretrained).state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in on_disk.items())


def test_what_it_writes_is_a_stock_pipeline_of_the_same_function(embedded: EmbeddedFluxAdapter, tmp_path: Path) -> None:
    network = embedded.load_teacher()
    embedded.save_teacher(network, tmp_path / "teacher")
    adapter = load_adapter(str(tmp_path / "teacher"))
    x, t = noise(3), torch.tensor([0.2, 0.6, 1.0])
    with torch.no_grad():
        before = embedded.velocity(network, x, t, embedded.encode_prompt(PROMPTS))
        after = adapter.velocity(adapter.load_teacher(), x, t, adapter.encode_prompt(PROMPTS))
    assert torch.equal(before, after)
    assert torch.equal(embedded.decode_latents(x), adapter.decode_latents(x))


def test_a_missing_autoencoder_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"adapter\.vae is .* fit --config shapes_vae\.yaml"):
        EmbeddedFluxAdapter(str(tmp_path), WORDS).check()


def test_there_is_no_network_before_load(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="call load"):
        EmbeddedFluxAdapter(str(tmp_path), WORDS).load_teacher()


def test_it_has_nothing_that_could_be_encoded_beforehand(embedded: EmbeddedFluxAdapter) -> None:
    for ask in (embedded.encoding_settings, lambda: embedded.load(encoders=False)):
        with pytest.raises(ConfigurationError, match="draws its text encoders anew at every start"):
            ask()
