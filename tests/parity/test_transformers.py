"""Live parity with transformers' own InternVL on a fresh random model, stage by stage. Nothing is downloaded."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from dreamprm_jax.models import convert, internvl  # noqa: E402 (after the skips)

IMAGE_TOKEN, VOCABULARY, NUM_TILES = 70, 96, 3
PATCHES, IMAGE_TOKENS = 16, 4  # of a tile of 56 pixels


@pytest.fixture(scope="module")
def peer():
    """A small random model with every parameter moved off its special initial value."""
    config = transformers.InternVLConfig(
        vision_config={
            "hidden_size": 48,
            "num_hidden_layers": 3,
            "num_attention_heads": 3,
            "intermediate_size": 80,
            "image_size": [56, 56],
            "patch_size": [14, 14],
            "attention_bias": True,
        },
        text_config={
            "model_type": "qwen2",
            "vocab_size": VOCABULARY,
            "hidden_size": 48,
            "num_hidden_layers": 3,
            "num_attention_heads": 6,
            "num_key_value_heads": 2,
            "intermediate_size": 72,
            "max_position_embeddings": 512,
            "tie_word_embeddings": False,
        },
        image_token_id=IMAGE_TOKEN,
        image_seq_length=IMAGE_TOKENS,
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    model = transformers.InternVLForConditionalGeneration(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


@pytest.fixture(scope="module")
def ours(peer, tmp_path_factory):
    directory = tmp_path_factory.mktemp("peer")
    peer.save_pretrained(directory)
    return convert.load_checkpoint(directory)


@pytest.fixture(scope="module")
def inputs():
    rng = np.random.default_rng(0)
    pixels = rng.normal(size=(NUM_TILES, 56, 56, 3)).astype(np.float32)
    ids = rng.integers(0, IMAGE_TOKEN, (1, 60))  # int64, as torch wants them
    ids[0, 5 : 5 + NUM_TILES * IMAGE_TOKENS] = IMAGE_TOKEN
    return pixels, ids


def close(got, expected):
    np.testing.assert_allclose(got, expected.detach().numpy(), rtol=0, atol=1e-4)


def to_torch(pixels):
    return torch.from_numpy(pixels.transpose(0, 3, 1, 2).copy())


def test_vision_tower(peer, ours, inputs):
    config, params = ours
    with torch.no_grad():
        expected = peer.model.vision_tower(to_torch(inputs[0])).last_hidden_state
    close(jax.jit(internvl.vision_states, static_argnums=0)(config, params, inputs[0]), expected)


def test_projector(peer, ours, inputs):
    config, params = ours
    with torch.no_grad():
        states = peer.model.vision_tower(to_torch(inputs[0])).last_hidden_state[:, 1:]
        shuffled = peer.model.pixel_shuffle(states.reshape(NUM_TILES, 4, 4, -1))
        expected = peer.model.multi_modal_projector(shuffled.reshape(NUM_TILES, IMAGE_TOKENS, -1))
    close(jax.jit(internvl.encode_pixels, static_argnums=0)(config, params, inputs[0]), expected)


def test_language_model(peer, ours, inputs):
    """From embeddings, so that nothing of the images is in it; rotary positions up to 300."""
    config, params = ours
    x = np.random.default_rng(1).normal(size=(2, 300, 48)).astype(np.float32)
    with torch.no_grad():
        expected = peer.model.language_model(inputs_embeds=torch.from_numpy(x)).last_hidden_state
    positions = jnp.broadcast_to(jnp.arange(300)[None], (2, 300))
    close(jax.jit(internvl.language_states, static_argnums=0)(config, params, x, positions), expected)


def logits_of(config, params, inputs):
    pixels, ids = inputs
    ids = jnp.asarray(ids)
    features = internvl.encode_pixels(config, params, pixels).reshape(1, NUM_TILES * IMAGE_TOKENS, -1)
    x = internvl.embed_tokens(config, params, ids)
    x = internvl.merge_image_features(x, internvl.image_index(ids == IMAGE_TOKEN), features)
    positions = jnp.arange(ids.shape[1])[None]
    return internvl.head(config, params, internvl.language_states(config, params, x, positions))


def test_logits(peer, ours, inputs):
    with torch.no_grad():
        expected = peer(input_ids=torch.from_numpy(inputs[1]), pixel_values=to_torch(inputs[0])).logits
    close(jax.jit(logits_of, static_argnums=0)(*ours, inputs), expected)


def test_the_peer_loads_what_we_write(peer, ours, inputs, tmp_path):
    """Our -hf export, config.json included, is the same model for transformers."""
    convert.save_checkpoint(*ours, tmp_path, layout="hf")
    config = transformers.InternVLConfig.from_pretrained(tmp_path)
    config.image_token_id = IMAGE_TOKEN  # <IMG_CONTEXT> of another tokenizer than InternVL3's
    loaded = transformers.InternVLForConditionalGeneration.from_pretrained(tmp_path, config=config).eval()
    for (name, expected), (_, got) in zip(peer.named_parameters(), loaded.named_parameters(), strict=True):
        assert torch.equal(expected, got), name
    with torch.no_grad():
        arguments = {"input_ids": torch.from_numpy(inputs[1]), "pixel_values": to_torch(inputs[0])}
        assert torch.equal(peer(**arguments).logits, loaded(**arguments).logits)
