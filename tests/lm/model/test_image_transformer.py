"""The transformer on images, against stock PixtralVisionModel and against itself, one image at a time."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from lm.config.model_settings import ModelConfig
from lm.data.patch_rows import layout_of, rows_of_images
from lm.model.image_transformer import ImageTransformer, PatchEmbedding, PixelDecoder, patches_of
from lm.model.transformer import rotary_table

CONFIG = ModelConfig(
    num_layers=2, hidden_size=48, num_heads=3, patch_size=4, image_size=16, image_channels=3, norm_epsilon=1e-5
)
STOCK = {
    "embedding.projection": "patch_conv",
    "embedding.norm": "ln_pre",
    "blocks": "transformer.layers",
    "attention.query": "attention.q_proj",
    "attention.key": "attention.k_proj",
    "attention.value": "attention.v_proj",
    "attention.output": "attention.o_proj",
    "feed_forward_norm": "ffn_norm",
    "feed_forward.gate": "feed_forward.gate_proj",
    "feed_forward.up": "feed_forward.up_proj",
    "feed_forward.down": "feed_forward.down_proj",
}


def drawn(*shapes: tuple[int, ...], seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for shape in shapes]


@pytest.fixture(scope="module")
def model() -> ImageTransformer:
    """With weights other than zero where training starts from zeros."""
    return ImageTransformer(CONFIG).initialize(0, identity=False).eval()


@pytest.mark.parametrize(("height", "width"), [(16, 16), (8, 8), (20, 20), (12, 20)])
@torch.no_grad()
def test_the_trunk_is_the_stock_vision_model_of_pixtral(model, height, width):
    from transformers import PixtralVisionConfig, PixtralVisionModel

    stock = PixtralVisionModel(
        PixtralVisionConfig(
            hidden_size=48,
            intermediate_size=CONFIG.feed_forward_width,
            num_hidden_layers=2,
            num_attention_heads=3,
            image_size=32,
            patch_size=4,
            hidden_act="silu",
            rope_theta=CONFIG.rope_theta,
        )
    ).eval()
    state = {}
    for name, weight in model.state_dict().items():
        for ours, theirs in STOCK.items():
            name = name.replace(ours, theirs)
        state[name] = weight.view(48, 3, 4, 4) if name.startswith("patch_conv") else weight
    stock.load_state_dict(state)
    (images,) = drawn((2, 3, height, width))
    sizes = torch.tensor([(height, width)] * 2)
    expected = stock(images, image_sizes=sizes).last_hidden_state.reshape(2, -1, 48)
    torch.testing.assert_close(model([images], layout_of([images], 4)), expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_crops_of_two_sizes_in_one_pass_are_as_each_alone(model):
    crops = drawn((2, 3, 16, 16), (8, 3, 8, 8))
    layout = layout_of(crops, 4)
    assert layout.lo.shape == (4, 16)  # two rows of a large crop, two of four small ones: nothing is padded
    together = model(crops, layout)
    alone = [model([crop[None]], layout_of([crop[None]], 4)).flatten(0, 1) for size in crops for crop in size]
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-5, atol=1e-5)


def test_the_gradient_of_a_shared_row_is_that_of_its_images_alone(model):
    crops = drawn((1, 3, 16, 16), (3, 3, 8, 8), (1, 3, 8, 12))
    weight = drawn((16 + 3 * 4 + 6, 48), seed=1)[0]

    def gradients(found: torch.Tensor) -> list[torch.Tensor]:
        model.zero_grad()
        (found * weight).sum().backward()
        return [parameter.grad.clone() for parameter in model.parameters()]

    together = gradients(model(crops, layout_of(crops, 4)))
    alone = gradients(torch.cat([model([each], layout_of([each], 4)).flatten(0, 1) for each in crops]))
    for a, b in zip(together, alone, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_kept_patches_are_read_as_if_the_others_were_not_there(model):
    """As by an encoder that gathers the embedded patches and their positions, without key intervals."""
    (images,) = drawn((3, 3, 16, 16))
    kept = torch.tensor([[0, 3, 9, 15], [1, 2, 4, 8], [5, 6, 7, 10]])
    found = model([images], rows_of_images(3, 4, 4, kept), kept)
    x = model.embedding(patches_of(images, 4).gather(1, kept[..., None].expand(-1, -1, 48)))
    cos, sin = (part.transpose(1, 2) for part in rotary_table(torch.stack([kept // 4, kept % 4], dim=-1), 16, 1e4))
    for block in model.blocks:
        normed = block.attention_norm(x)
        q, k, v = (
            part(normed).unflatten(-1, (3, 16)).transpose(1, 2)
            for part in (block.attention.query, block.attention.key, block.attention.value)
        )
        q, k = (
            torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)
            for a, b in (part.chunk(2, dim=-1) for part in (q, k))
        )
        x = x + block.attention.output(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        x = x + block.feed_forward(block.feed_forward_norm(x))
    torch.testing.assert_close(found, x, rtol=1e-5, atol=1e-5)


def test_patches_are_cut_as_a_convolution_reads_them():
    (images,) = drawn((2, 3, 8, 12))
    (weight,) = drawn((5, 3, 4, 4), seed=1)
    expected = F.conv2d(images, weight, stride=4).flatten(2).mT
    torch.testing.assert_close(patches_of(images, 4) @ weight.flatten(1).T, expected)


@pytest.mark.parametrize(("patch_size", "convolutions"), [(4, 2), (8, 3)])
def test_a_convolutional_stem_makes_as_many_patches_and_sees_beyond_them(patch_size, convolutions):
    stem = PatchEmbedding(replace(CONFIG, stem="convolutional", patch_size=patch_size))
    (images,) = drawn((2, 3, 32, 32))
    assert sum(isinstance(layer, torch.nn.Conv2d) for layer in stem.convolutions) == convolutions
    patches = stem.cut(images)
    assert patches.shape[:2] == (2, (32 // patch_size) ** 2)
    assert stem(patches).shape == (2, patches.shape[1], 48)
    images[0, :, 0, patch_size] += 1  # the first pixel of the second patch
    assert not torch.equal(stem.cut(images)[0, 0], patches[0, 0])
    assert torch.equal(stem.cut(images)[1], patches[1])  # and not beyond the image


def test_the_decoder_puts_each_visible_patch_in_its_place():
    decoder = PixelDecoder(replace(CONFIG, num_layers=1, hidden_size=32, num_heads=1), 48, 48)
    (visible,) = drawn((2, 3, 48))
    kept, layout = torch.tensor([[0, 5, 7], [1, 2, 15]]), rows_of_images(2, 4, 4)
    with torch.no_grad():
        for parameter in decoder.blocks.parameters():
            parameter.zero_()  # every block is the identity
    pixels = decoder(visible, kept, layout)
    assert pixels.shape == (2, 16, 48)
    expected = decoder.pixels(decoder.output_norm(decoder.embedding(decoder.norm(visible))))
    torch.testing.assert_close(pixels.gather(1, kept[..., None].expand(-1, -1, 48)), expected)
    hidden = decoder.pixels(decoder.output_norm(decoder.mask))[0]
    torch.testing.assert_close(pixels[0, 1], hidden)
    torch.testing.assert_close(pixels[1, 0], hidden)


def test_weights_are_the_same_for_the_same_seed_and_blocks_start_as_the_identity():
    one, same, other = (ImageTransformer(CONFIG).initialize(seed) for seed in (0, 0, 1))
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), same.parameters(), strict=True))
    assert not torch.equal(one.embedding.projection.weight, other.embedding.projection.weight)
    (images,) = drawn((1, 3, 16, 16))
    assert torch.equal(one([images], layout_of([images], 4)), one.embedding(one.embedding.cut(images)))


def test_the_description_counts_parameters_and_patches():
    model = ImageTransformer(CONFIG)
    total = sum(parameter.numel() for parameter in model.parameters())
    assert model.parameter_counts()["total"] == total
    assert model.describe().startswith(f"{total / 1e6:.2f}M parameters")
    assert "16 patches of 4 x 4 pixels" in model.describe()
