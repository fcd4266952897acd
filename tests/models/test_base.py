from __future__ import annotations

import hashlib
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDPMScheduler, StableDiffusionPipeline
from PIL import Image

from tests.models.test_unet import build
from unsee.data.dataset import load_dataset
from unsee.models import unet as unet_module
from unsee.models.base import Denoiser
from unsee.models.unet import UNetDenoiser


def bits(model: Denoiser) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.network.named_parameters()}


def unchanged(model: Denoiser, before: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(p, before[n]) for n, p in model.network.named_parameters())


# -- with blocks --------------------------------------------------------------------------------


def test_replaced_restores_every_bit(tiny_model):
    before = bits(tiny_model)
    values = {n: p.detach().double() * 1.1 + 0.01 for n, p in tiny_model.parameters.items()}
    with tiny_model.replaced(values):
        for name, parameter in tiny_model.parameters.items():
            assert torch.equal(parameter, values[name].float())
        with tiny_model.replaced({next(iter(values)): torch.zeros(())}):
            assert not next(iter(tiny_model.parameters.values())).any()
        assert torch.equal(
            next(iter(tiny_model.parameters.values())), next(iter(values.values())).float()
        )
        assert not unchanged(tiny_model, before)
    assert unchanged(tiny_model, before)


def test_replaced_restores_after_an_error(tiny_model):
    before = bits(tiny_model)
    values = {n: p.detach() * 2 for n, p in tiny_model.parameters.items()}
    with pytest.raises(KeyboardInterrupt), tiny_model.replaced(values):
        raise KeyboardInterrupt
    assert unchanged(tiny_model, before)
    values[list(values)[-1]] = torch.zeros(3, 5, 7)  # does not fit: some are replaced by then
    with pytest.raises(RuntimeError), tiny_model.replaced(values):
        pass
    assert unchanged(tiny_model, before)


def test_gradients_on_restores_what_was_there(tiny_model):
    everything = list(tiny_model.network.parameters())
    everything[0].requires_grad_(False)
    wanted = [p.requires_grad for p in everything]
    selected = {id(p) for p in tiny_model.parameters.values()}
    with pytest.raises(KeyboardInterrupt), tiny_model.gradients_on():
        assert [p.requires_grad for p in everything] == [id(p) in selected for p in everything]
        raise KeyboardInterrupt
    assert [p.requires_grad for p in everything] == wanted


def test_gradients_on_unfreezes_a_frozen_network(tiny_model):
    tiny_model.network.requires_grad_(False)
    with tiny_model.gradients_on():
        assert all(p.requires_grad for p in tiny_model.parameters.values())
    assert not any(p.requires_grad for p in tiny_model.network.parameters())


def test_the_fingerprint_follows_weights_and_schedule(tiny_model):
    first = tiny_model.fingerprint()
    assert first == tiny_model.fingerprint()
    parameter = tiny_model.network.conv_in.bias  # not a selected one
    with torch.no_grad():
        parameter[0] += 1e-3
    second = tiny_model.fingerprint()
    same_weights = UNetDenoiser(tiny_model.network, DDPMScheduler(prediction_type="v_prediction"))
    other_kind = UNetDenoiser(tiny_model.network, DDPMScheduler(prediction_type="epsilon"))
    prints = {first, second, same_weights.fingerprint(), other_kind.fingerprint()}
    assert len(prints) == 4


def test_without_adapters_the_fingerprint_is_of_weights_and_schedule_alone() -> None:
    """Caches are keyed by it: bit by bit."""
    model = build()
    digest = hashlib.sha256(f"{model.prediction_type} {model.num_train_timesteps}".encode())
    for name, tensor in model.network.state_dict().items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.numpy().tobytes())
    levels = model.schedule.alphas_cumprod.numpy().tobytes()
    expected = hashlib.sha256(digest.hexdigest()[:16].encode() + levels).hexdigest()[:16]
    assert model.fingerprint() == expected


def test_the_fingerprint_follows_the_scale_of_adapters() -> None:
    """Neither alpha nor an adapter's weight is in the state dict."""
    peft = pytest.importorskip("peft")

    def adapted(alpha: int) -> UNetDenoiser:
        model = build()
        torch.manual_seed(3)
        config = peft.LoraConfig(
            r=2, lora_alpha=alpha, target_modules=["attn2.to_k"], init_lora_weights=False
        )
        model.network.add_adapter(config)
        return model

    model = adapted(2)
    network: Any = model.network
    prints = [model.fingerprint()]
    assert adapted(2).fingerprint() == prints[0]
    prints.append(adapted(1).fingerprint())
    network.set_adapters(["default"], weights=[0.25])
    prints.append(model.fingerprint())
    network.set_adapters(["default"], weights=[1.0])
    assert model.fingerprint() == prints[0]
    network.disable_adapters()
    prints.append(model.fingerprint())
    assert len(set(prints)) == 4


def test_encoders_have_fingerprints_of_their_own(tiny_pipeline_dir: Path) -> None:
    def load(name: str = "", change: Any = None) -> Denoiser:
        pipeline = StableDiffusionPipeline.from_pretrained(tiny_pipeline_dir)
        if change is not None:
            change(getattr(pipeline, name))
        return Denoiser.from_pipeline(pipeline)

    def nudge(weights: Any) -> None:
        with torch.no_grad():
            weights.view(-1)[0] += 1e-3

    plain = load().encoder_fingerprints()
    assert list(plain) == ["vae", "text_encoder", "tokenizer"]
    changes: list[tuple[str, Any]] = [
        ("vae", lambda vae: nudge(vae.encoder.conv_in.weight)),
        ("vae", lambda vae: vae.register_to_config(scaling_factor=0.5)),
        ("vae", lambda vae: vae.half()),
        ("text_encoder", lambda text: nudge(text.get_input_embeddings().weight)),
        ("text_encoder", lambda text: setattr(text.config, "hidden_act", "relu")),
        ("tokenizer", lambda tokenizer: tokenizer.add_tokens(["sks"])),
        ("tokenizer", lambda tokenizer: setattr(tokenizer, "model_max_length", 11)),
    ]
    for name, change in changes:
        other = load(name, change).encoder_fingerprints()
        assert [part for part in plain if plain[part] != other[part]] == [name]
    # Neither the decoder nor the network has a part in latents and texts.
    assert load("vae", lambda v: nudge(v.decoder.conv_in.weight)).encoder_fingerprints() == plain
    assert load("unet", lambda unet: nudge(unet.conv_in.weight)).encoder_fingerprints() == plain


def test_a_bare_network_has_no_encoders() -> None:
    assert build().encoder_fingerprints() == {}


# -- encoding -----------------------------------------------------------------------------------


@pytest.fixture
def pictures(image_folder: Path) -> list[Image.Image]:
    return [e.image for e in load_dataset("imagefolder", data_dir=image_folder)]


def vae_input(picture: Image.Image) -> torch.Tensor:
    values = torch.tensor([[picture.getpixel((x, y)) for x in range(64)] for y in range(64)])
    return values.permute(2, 0, 1)[None].float() / 255 * 2 - 1


def test_latents_are_the_scaled_mode(tiny_model, pictures):
    """The published benchmark forgot the scale for its queries: a factor of 5.5."""
    vae = tiny_model.pipeline.vae
    with torch.no_grad():
        expected = vae.encode(vae_input(pictures[4])).latent_dist.mode() * vae.config.scaling_factor
    assert vae.config.scaling_factor == 0.7
    found = tiny_model.encode_images([pictures[4]])
    assert found.dtype == torch.float32 and found.shape == (1, 4, 8, 8)
    # pixels are scaled in one operation here, in two there: 1e-7 on the way in
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_large_pictures_are_encoded_a_few_at_a_time(tiny_model, pictures, monkeypatch):
    whole = tiny_model.encode_images(pictures[:5])
    vae, sizes = tiny_model.pipeline.vae, []
    encode = vae.encode
    monkeypatch.setattr(vae, "encode", lambda pixels: sizes.append(len(pixels)) or encode(pixels))
    monkeypatch.setattr(unet_module, "PIXELS_AT_ONCE", 2 * 64 * 64 + 1)
    # convolutions of other batch sizes round otherwise
    torch.testing.assert_close(tiny_model.encode_images(pictures[:5]), whole, rtol=1e-5, atol=1e-6)
    monkeypatch.setattr(unet_module, "PIXELS_AT_ONCE", 1)
    tiny_model.encode_images(pictures[:2])
    assert sizes == [2, 2, 1, 1, 1]


def test_a_shift_is_subtracted_before_scaling(tiny_model, pictures):
    plain = tiny_model.encode_images([pictures[4]])
    tiny_model.pipeline.vae.register_to_config(shift_factor=0.25)
    torch.testing.assert_close(
        tiny_model.encode_images([pictures[4]]), plain - 0.25 * 0.7, rtol=1e-5, atol=1e-6
    )
    decoded = tiny_model.decode(plain - 0.25 * 0.7)[0]
    tiny_model.pipeline.vae.register_to_config(shift_factor=None)
    # one grey level of rounding
    a, b = vae_input(decoded), vae_input(tiny_model.decode(plain)[0])
    assert (a - b).abs().max() <= 2 / 255 + 1e-6


def test_query_and_training_latents_are_the_same(tiny_model, pictures):
    query = tiny_model.query(pictures[4], "a green circle")
    assert torch.equal(query.latents, tiny_model.encode_images([pictures[4]])[0])
    assert torch.equal(query.text, tiny_model.encode_prompts(["a green circle"])[0])
    assert query.prompt == "a green circle" and query.mask is None
    assert query.image.size == (64, 64)


def test_large_and_oblong_pictures_are_cropped_and_resized(tiny_model, pictures):
    wide = Image.new("RGB", (100 + 64 + 31, 64), "black")
    wide.paste(pictures[4], ((wide.width - 64) // 2, 0))
    assert torch.equal(tiny_model.encode_images([wide]), tiny_model.encode_images([pictures[4]]))
    tall = Image.new("RGB", (64, 200), "black")
    tall.paste(pictures[4], (0, 68))
    assert tiny_model.crop_box(tall.size) == (0, 68, 64, 132)
    assert torch.equal(tiny_model.encode_images([tall]), tiny_model.encode_images([pictures[4]]))
    small = pictures[4].resize((32, 32))
    assert tiny_model.encode_images([small]).shape == (1, 4, 8, 8)


def test_a_box_means_the_same_pixels_whatever_the_margins(tiny_model, pictures):
    plain = tiny_model.query(pictures[4], "a", box=(8, 0, 40, 32))
    wide = Image.new("RGB", (164, 64), "black")
    wide.paste(pictures[4], (50, 0))
    query = tiny_model.query(wide, "a", box=(58, 0, 90, 32))
    assert torch.equal(query.mask, plain.mask) and plain.mask.sum() == 16
    assert query.box == plain.box == (8, 0, 40, 32)
    assert query.image.size == (64, 64)
    # a box that sticks out of what the model sees is cut, one that misses it is refused
    assert tiny_model.query(wide, "a", box=(0, 0, 90, 32)).box == (0, 0, 40, 32)
    with pytest.raises(ValueError, match=r"box 0,0,50,64 lies outside 50,0,114,64"):
        tiny_model.query(wide, "a", box=(0, 0, 50, 64))
    with pytest.raises(ValueError, match="does not lie in the picture, which is 164x64"):
        tiny_model.query(wide, "a", box=(0, 0, 165, 64))


def test_transparent_query_pictures_stand_on_white(tiny_model):
    clear = Image.new("RGBA", (64, 64), (0, 0, 0, 0))
    white = Image.new("RGB", (64, 64), "white")
    assert torch.equal(tiny_model.query(clear, "a").latents, tiny_model.query(white, "a").latents)


def test_text_states_are_what_the_pipeline_feeds_the_network(tiny_model, monkeypatch):
    """Padding, mask and truncation included."""
    seen = []
    forward = tiny_model.network.forward

    def spy(*args, encoder_hidden_states, **keywords):
        seen.append(encoder_hidden_states)
        return forward(*args, encoder_hidden_states=encoder_hidden_states, **keywords)

    monkeypatch.setattr(tiny_model.network, "forward", spy)
    tiny_model.pipeline("a red square", num_inference_steps=1, guidance_scale=1.0)
    states = tiny_model.encode_prompts(["a red square"])
    assert states.shape == (1, 12, 16) and states.dtype == torch.float32
    assert torch.equal(states, seen[0])


def test_a_prompt_that_is_too_long_is_cut_with_a_warning(tiny_model, caplog, capfd):
    """Twelve tokens with start and end: ten words fit."""
    words = "a red square and a blue circle and a green"
    with caplog.at_level(logging.WARNING):
        fits = tiny_model.encode_prompts([words])
    assert not caplog.records
    with caplog.at_level(logging.WARNING):
        cut = tiny_model.encode_prompts([f"{words} triangle on the moon"])
    assert torch.equal(fits, cut)
    (record,) = caplog.records
    assert record.getMessage() == (
        "the prompt has 16 tokens, the text encoder takes 12: cut 'triangle on the moon'"
    )
    assert "truncated" not in capfd.readouterr().err  # the libraries' own words are silenced


def test_a_tokenizer_without_a_limit_is_refused(tiny_model):
    tiny_model.pipeline.tokenizer.model_max_length = int(1e30)
    with pytest.raises(ValueError, match="the tokenizer has no model_max_length"):
        tiny_model.encode_prompts(["a red square"])


# -- generation ---------------------------------------------------------------------------------


def test_generation_is_reproducible_and_keeps_the_final_latent(tiny_model):
    query = tiny_model.generate("a red square", seed=3, steps=3)
    again = tiny_model.generate("a red square", seed=3, steps=3)
    other = tiny_model.generate("a red square", seed=4, steps=3)
    assert torch.equal(query.latents, again.latents)
    assert not torch.equal(query.latents, other.latents)
    assert query.id == again.id != other.id
    expected = tiny_model.pipeline(
        "a red square", num_inference_steps=3, guidance_scale=7.5, output_type="latent",
        generator=torch.Generator().manual_seed(3),
    ).images  # fmt: skip
    assert torch.equal(query.latents, expected[0])  # not the re-encoded picture
    picture = tiny_model.pipeline(
        "a red square", num_inference_steps=3, generator=torch.Generator().manual_seed(3)
    ).images[0]
    assert query.image.tobytes() == picture.tobytes()
    assert query.provenance["seed"] == 3 and query.provenance["steps"] == 3
    assert torch.equal(query.text, tiny_model.encode_prompts(["a red square"])[0])


def test_wrapping_a_pipeline_changes_nothing_of_it(tiny_pipeline_dir):
    pipeline = StableDiffusionPipeline.from_pretrained(tiny_pipeline_dir)
    pipeline.set_progress_bar_config(disable=True)

    def draw():
        generator = torch.Generator().manual_seed(0)
        return pipeline(
            "a cat", num_inference_steps=2, generator=generator, output_type="np"
        ).images

    before, config = draw(), dict(pipeline.scheduler.config)
    flags = [p.requires_grad for p in pipeline.unet.parameters()]
    model = Denoiser.from_pipeline(pipeline, "attn")
    model.query(Image.new("RGB", (64, 64)), "a cat")
    with model.gradients_on():
        latents, t = torch.zeros(1, 4, 8, 8), torch.tensor([[5, 6]])
        noise = torch.ones(1, 2, 4, 8, 8)
        model.loss(latents, model.encode_prompts(["a"]), t, noise).mean()
    assert (draw() == before).all()
    assert dict(pipeline.scheduler.config) == config
    assert [p.requires_grad for p in pipeline.unet.parameters()] == flags


def test_two_text_encoders_are_refused(tiny_pipeline):
    tiny_pipeline.text_encoder_2 = tiny_pipeline.text_encoder
    with pytest.raises(ValueError, match="two text encoders"):
        Denoiser.from_pipeline(tiny_pipeline)


def test_two_pictures_of_one_prompt_are_two_queries(tiny_model: Denoiser) -> None:
    red, blue = (Image.new("RGB", tiny_model.resolution, c) for c in ("red", "blue"))
    first, second = (tiny_model.query(p, "a shape") for p in (red, blue))
    assert first.id != second.id
    assert tiny_model.query(red.copy(), "a shape").id == first.id
