"""The model: shapes and counts of the family, causality, padding, differentiation, mixed precision."""

import dataclasses
import os
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params

from dreamprm_jax.errors import InputError
from dreamprm_jax.models import internvl, presets
from dreamprm_jax.models.layers import attend, with_filler
from dreamprm_jax.models.vit import pixel_shuffle
from dreamprm_jax.types import Batch

VOCABULARY = 61
CONFIG = presets.InternVLConfig(
    vision=presets.VisionConfig(
        width=16, num_layers=2, num_heads=2, mlp_width=24, patch_size=7, image_size=28, layer_scale_init=0.5
    ),
    language=presets.LanguageConfig(
        vocab_size=VOCABULARY, width=32, num_layers=2, num_heads=4, num_kv_heads=2, mlp_width=40
    ),
)
I = CONFIG.image_tokens_per_tile  # 4  # noqa: E741 (legend letter)
B, T, P, S = 3, 24, 2, 3
TILES_OF_ROW = (2, 1, 0)
LENGTH_OF_ROW = (24, 20, 17)
STEPS_OF_ROW = (3, 2, 1)

apply = jax.jit(internvl.apply, static_argnums=0)


@pytest.fixture(scope="module")
def params():
    return internvl.init(CONFIG, jax.random.key(0))


@pytest.fixture(scope="module")
def batch() -> Batch:
    """Rows with 2, 1 and 0 tiles, of different lengths and numbers of steps; padding holds arbitrary values."""
    rng = np.random.default_rng(0)
    image_mask = np.zeros((B, T), bool)
    step_positions = np.zeros((B, S), np.int32)
    for row in range(B):
        for tile in range(TILES_OF_ROW[row]):  # each image in a place of its own
            image_mask[row, 2 + 6 * tile : 2 + 6 * tile + I] = True
        num_steps = STEPS_OF_ROW[row]
        step_positions[row, :num_steps] = np.linspace(14, LENGTH_OF_ROW[row] - 2, num_steps).astype(np.int32)
    return Batch(
        tokens=rng.integers(0, VOCABULARY, (B, T)).astype(np.int32),
        image_mask=image_mask,
        tiles=rng.integers(0, 256, (B, P, 28, 28, 3)).astype(np.uint8),
        step_positions=step_positions,
        labels=np.zeros((B, S), np.int32),
        step_mask=np.arange(S)[None] < np.asarray(STEPS_OF_ROW)[:, None],
        example_id=np.arange(B, dtype=np.int32),
        example_mask=np.ones(B, bool),
    )


def total(config, params, batch):
    """A scalar of the logits at the supervised steps, of size about 1."""
    logits = internvl.apply(config, params, batch)
    wave = jnp.cos(jnp.arange(logits.shape[-1], dtype=jnp.float32))
    return jnp.where(batch.step_mask, logits @ wave, 0.0).sum()


gradient = jax.jit(jax.grad(total, argnums=1), static_argnums=0)


def batch_shapes(config, num_rows, num_tokens, num_tiles, num_steps):
    spec, side = jax.ShapeDtypeStruct, config.vision.image_size
    return Batch(
        tokens=spec((num_rows, num_tokens), jnp.int32),
        image_mask=spec((num_rows, num_tokens), bool),
        tiles=spec((num_rows, num_tiles, side, side, 3), jnp.uint8),
        step_positions=spec((num_rows, num_steps), jnp.int32),
        labels=spec((num_rows, num_steps), jnp.int32),
        step_mask=spec((num_rows, num_steps), bool),
        example_id=spec((num_rows,), jnp.int32),
        example_mask=spec((num_rows,), bool),
    )


def parameter_shapes(config):
    return jax.eval_shape(lambda key: internvl.init(config, key), jax.random.key(0))


def count(tree):
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


# ---- the family ----


def test_internvl3_1b_has_the_published_number_of_parameters():
    shapes = parameter_shapes(presets.PRESETS["internvl3_1b"])
    assert count(shapes) == 938_193_024
    assert count(shapes["vision"]) == 304_012_288
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(shapes))


@pytest.mark.parametrize("name, billions", [("internvl3_2b", 2.09), ("internvl3_8b", 7.94), ("internvl3_14b", 15.12)])
def test_larger_presets_have_their_published_size(name, billions):
    assert round(count(parameter_shapes(presets.PRESETS[name])) / 1e9, 2) == pytest.approx(billions, abs=0.011)


@pytest.mark.parametrize("num_tiles", [7, 0])
def test_internvl3_1b_gives_logits_at_the_steps(num_tiles):
    config = presets.PRESETS["internvl3_1b"]
    out = jax.eval_shape(
        lambda params, batch: internvl.apply(config, params, batch),
        parameter_shapes(config),
        batch_shapes(config, 2, 2300, num_tiles, 5),
    )
    assert (out.shape, out.dtype) == ((2, 5, 151_674), jnp.float32)


def test_logits_of_the_whole_sequence_are_never_formed(params, batch):
    text = str(jax.make_jaxpr(lambda params: total(CONFIG, params, batch))(params))
    assert f"{B},{S},{VOCABULARY}]" in text
    assert f"{T},{VOCABULARY}]" not in text


# ---- pieces ----


def test_pixel_shuffle_gathers_squares_row_by_row():
    side, factor, width = 4, 2, 3
    x = np.arange(side * side * width).reshape(1, side, side, width)
    got = pixel_shuffle(jnp.asarray(x.reshape(1, side * side, width)), factor)
    for row in range(side // factor):
        for column in range(side // factor):
            square = x[0, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2]
            np.testing.assert_array_equal(got[0, row * 2 + column], square.reshape(-1))


def test_image_features_go_to_the_image_tokens_in_order():
    rng = np.random.default_rng(1)
    embeddings, features = rng.normal(size=(2, 9, 3)), rng.normal(size=(2, 4, 3))
    mask = np.array([[0, 1, 1, 0, 0, 1, 0, 1, 0], [0, 0, 0, 1, 0, 0, 0, 0, 1]], bool)
    expected = embeddings.copy()
    for row in range(2):
        for nth, position in enumerate(np.flatnonzero(mask[row])):
            expected[row, position] = features[row, nth]
    got = internvl.merge_image_features(
        jnp.asarray(embeddings), internvl.image_index(jnp.asarray(mask)), jnp.asarray(features)
    )
    np.testing.assert_allclose(got, expected, rtol=1e-6)


@pytest.mark.parametrize("num_features", [2, 0])
def test_an_image_token_without_a_feature_is_nan(num_features):
    mask = jnp.array([[True, True, False, True]])
    got = internvl.merge_image_features(jnp.ones((1, 4, 3)), internvl.image_index(mask), jnp.ones((1, num_features, 3)))
    assert np.isnan(got[0, 3]).all()
    assert np.isfinite(got[0, 2]).all()


def test_bytes_are_normalised_in_float32():
    tiles = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1).repeat(3, axis=3)
    expected = (tiles / 255 - np.array(presets.IMAGENET_MEAN)) / np.array(presets.IMAGENET_STD)
    got = internvl.normalise(jnp.asarray(tiles))
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, expected, atol=1e-6)


def test_every_layer_begins_with_values_of_its_own(params):
    for tower in ("vision", "language"):
        for path, leaf in jax.tree_util.tree_leaves_with_path(params[tower]["layers"]):
            if "kernel" in jax.tree_util.keystr(path):
                assert not np.array_equal(leaf[0], leaf[1]), path


def test_a_tied_head_reads_the_embedding(params, batch):
    language = dataclasses.replace(CONFIG.language, tie_embeddings=True)
    tied = dataclasses.replace(CONFIG, language=language)
    without_head = {name: value for name, value in params["language"].items() if name != "lm_head"}
    shapes = parameter_shapes(tied)
    assert jax.tree.structure(shapes["language"]) == jax.tree.structure(without_head)
    head_is_embedding = params["language"] | {"lm_head": params["language"]["embedding"]}
    np.testing.assert_array_equal(
        apply(tied, params | {"language": without_head}, batch),
        apply(CONFIG, params | {"language": head_is_embedding}, batch),
    )


# ---- what can influence what ----


def test_attention_is_causal(params):
    """Over text and image tokens alike: the hidden state at t depends on 0..t, on all of it, and on nothing else."""
    position, length = 5, 9
    x = np.random.default_rng(1).normal(size=(1, length, CONFIG.language.width)).astype(np.float32)

    def state(x):
        return internvl.language_states(CONFIG, params, x, jnp.array([[position]]))[0, 0, 0]

    influence = np.abs(jax.jit(jax.grad(state))(x)[0]).sum(-1)
    assert (influence[: position + 1] > 0).all()
    assert (influence[position + 1 :] == 0).all()


def test_padding_influences_nothing_to_the_bit(params, batch):
    """Other ids after a row's end, other padding tiles, other masked steps: the same logits."""
    rng = np.random.default_rng(7)
    after_end = np.arange(T)[None] >= np.asarray(LENGTH_OF_ROW)[:, None]
    padding_tile = np.arange(P)[None] >= np.asarray(TILES_OF_ROW)[:, None]
    changed = batch._replace(
        tokens=np.where(after_end, rng.integers(0, VOCABULARY, (B, T)), batch.tokens).astype(np.int32),
        tiles=np.where(padding_tile[:, :, None, None, None], 255 - batch.tiles, batch.tiles),
        step_positions=np.where(batch.step_mask, batch.step_positions, T - 1).astype(np.int32),
    )
    assert not np.array_equal(changed.tokens, batch.tokens)
    assert not np.array_equal(changed.tiles, batch.tiles)
    before, after = apply(CONFIG, params, batch), apply(CONFIG, params, changed)
    np.testing.assert_array_equal(before[batch.step_mask], after[batch.step_mask])
    assert not np.array_equal(before, after)  # the masked steps themselves did change


def test_no_gradient_reaches_padding(params, batch):
    """Exactly zero at padding tiles and at embeddings after a row's end; not zero elsewhere."""

    def by_tiles(tiles):
        return total(CONFIG, params, batch._replace(tiles=tiles))

    per_tile = np.abs(jax.jit(jax.grad(by_tiles))(batch.tiles.astype(np.float32))).sum((2, 3, 4))  # [B, P]
    real_tile = np.arange(P)[None] < np.asarray(TILES_OF_ROW)[:, None]
    assert (per_tile[~real_tile] == 0).all()
    assert (per_tile[real_tile] > 0).all()

    def by_embeddings(x):
        states = internvl.language_states(CONFIG, params, x, batch.step_positions)
        return jnp.where(batch.step_mask[:, :, None], states, 0.0).sum()

    embeddings = jax.jit(internvl.embed_batch, static_argnums=0)(CONFIG, params, batch)
    per_token = np.abs(jax.jit(jax.grad(by_embeddings))(embeddings)).sum(-1)  # [B, T]
    last_step = np.where(batch.step_mask, batch.step_positions, 0).max(1)
    used = np.arange(T)[None] <= last_step[:, None]
    assert (per_token[~used] == 0).all()
    assert (per_token[used] > 0).all()


def test_a_row_alone_gives_what_it_gives_in_a_batch(params, batch):
    """Each row with its own number of tiles and tokens, no padding at all (the last one: no image at all)."""
    together = apply(CONFIG, params, batch)
    for row in range(B):
        alone = jax.tree.map(lambda leaf, row=row: leaf[row : row + 1], batch)
        alone = alone._replace(
            tokens=alone.tokens[:, : LENGTH_OF_ROW[row]],
            image_mask=alone.image_mask[:, : LENGTH_OF_ROW[row]],
            tiles=alone.tiles[:, : TILES_OF_ROW[row]],
            step_positions=alone.step_positions[:, : STEPS_OF_ROW[row]],
        )
        np.testing.assert_allclose(apply(CONFIG, params, alone)[0], together[row, : STEPS_OF_ROW[row]], atol=1e-5)


# ---- derivatives ----


def test_forward_mode_passes_and_agrees_with_reverse_mode(params, batch):
    rng = np.random.default_rng(3)
    direction = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(np.float32), params)
    config = dataclasses.replace(CONFIG, remat="full")
    _, forward = jax.jit(lambda p, v: jax.jvp(lambda p: total(config, p, batch), (p,), (v,)))(params, direction)
    products = jax.tree.map(np.vdot, gradient(CONFIG, params, batch), direction)
    assert forward == pytest.approx(float(sum(jax.tree.leaves(products))), rel=1e-4)


@pytest.mark.parametrize("change", [{"remat": "full"}, {"remat": "dots", "scan_unroll": 2}])
def test_how_it_is_computed_does_not_change_the_gradient(params, batch, change):
    other = dataclasses.replace(CONFIG, **change)
    expected, got = gradient(CONFIG, params, batch), gradient(other, params, batch)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), expected, got)


@pytest.mark.parametrize(("scan_unroll", "held_apart"), [(1, False), (2, True)])
def test_an_unrolled_loop_recomputes_too(params, batch, scan_unroll, held_apart):
    """Without a loop XLA would merge what is computed again with the forward pass (seen on a GPU: all is kept)."""
    config = dataclasses.replace(CONFIG, remat="full", scan_unroll=scan_unroll)
    program = jax.jit(jax.grad(lambda params: total(config, params, batch))).lower(params).as_text()
    assert ("optimization_barrier" in program) == held_apart


def test_remat_keeps_less_for_the_backward_pass(params, batch, monkeypatch):
    """Bytes that `jax.vjp` keeps, read off the shapes: without this, a policy that is ignored would go unnoticed."""
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")  # a CPU's attention forms its logits again in any case

    def kept(remat):
        config = dataclasses.replace(CONFIG, remat=remat)
        backward = jax.eval_shape(
            lambda params: jax.vjp(lambda params: total(config, params, batch), params)[1], params
        )
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(backward))

    assert kept("full") < 0.6 * kept("dots")
    assert kept("dots") < 0.5 * kept("none")


def test_bfloat16_stays_close_and_gives_float32_logits_and_gradients(params, batch):
    config = dataclasses.replace(CONFIG, compute_dtype="bfloat16")
    logits, expected = apply(config, params, batch), apply(CONFIG, params, batch)
    assert logits.dtype == jnp.float32
    error = np.abs(logits - expected).max()
    assert 0 < error < 0.03 * np.abs(expected).max()
    grads = jax.eval_shape(lambda params: jax.grad(total, argnums=1)(config, params, batch), params)
    assert {leaf.dtype for leaf in jax.tree.leaves(grads)} == {jnp.dtype("float32")}


def test_the_embedded_model_learns_from_scratch():
    """The label is the colour of the image: 60 steps of plain Adam from `init` must bring the loss near zero."""
    config = presets.tiny(vocab_size=32)
    num_rows, rng = 16, np.random.default_rng(0)
    label = rng.integers(0, 2, num_rows)
    tiles = rng.integers(0, 100, (num_rows, 1, 28, 28, 3)) + 150 * label[:, None, None, None, None]
    mask = np.zeros((num_rows, 12), bool)
    mask[:, 2 : 2 + config.image_tokens_per_tile] = True
    batch = Batch(
        tokens=rng.integers(0, 32, (num_rows, 12)).astype(np.int32),
        image_mask=mask,
        tiles=tiles.astype(np.uint8),
        step_positions=np.full((num_rows, 1), 10, np.int32),
        labels=label[:, None].astype(np.int32),
        step_mask=np.ones((num_rows, 1), bool),
        example_id=np.arange(num_rows),
        example_mask=np.ones(num_rows, bool),
    )

    def loss(params):
        log_p = jax.nn.log_softmax(internvl.apply(config, params, batch))
        return -jnp.take_along_axis(log_p, jnp.asarray(batch.labels)[:, :, None], axis=-1).mean()

    @jax.jit
    def step(params, first, second, count):
        value, grads = jax.value_and_grad(loss)(params)
        first = jax.tree.map(lambda m, g: 0.9 * m + 0.1 * g, first, grads)
        second = jax.tree.map(lambda v, g: 0.99 * v + 0.01 * g * g, second, grads)
        size = 2e-3 * jnp.sqrt(1 - 0.99**count) / (1 - 0.9**count)
        params = jax.tree.map(lambda p, m, v: p - size * m / (jnp.sqrt(v) + 1e-8), params, first, second)
        return params, first, second, value

    params = internvl.init(config, jax.random.key(0))
    first = second = jax.tree.map(np.zeros_like, params)
    losses = []
    for count in range(1, 61):
        params, first, second, value = step(params, first, second, count)
        losses.append(float(value))
    assert losses[0] == pytest.approx(np.log(32), rel=0.3)  # logits of variance about 1 at the start
    assert losses[-1] < 0.1


# ---- a user's mistakes ----


def test_tiles_of_another_size_are_refused(params, batch):
    with pytest.raises(InputError, match=r"\(14, 14, 3\).*takes \(28, 28, 3\)"):
        internvl.apply(CONFIG, params, batch._replace(tiles=batch.tiles[:, :, ::2, ::2]))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"remat": "some"}, "remat is 'some'; choose one of none, full, dots"),
        ({"compute_dtype": "float16"}, "compute_dtype is 'float16'"),
        ({"attention": "flash"}, "attention is 'flash'"),
        ({"downsample_ratio": 0.3}, "downsample_ratio is 0.3"),
        ({"vision": presets.VisionConfig(image_size=450)}, "450 is not a multiple of 14"),
        ({"language": presets.LanguageConfig(num_kv_heads=3)}, "14 is not a multiple of 3"),
    ],
)
def test_a_config_that_cannot_be_computed_is_refused(change, message):
    with pytest.raises(InputError, match=message):
        presets.InternVLConfig(**change)


# ---- the real weights ----


def test_real_weights_give_the_published_logits():
    """OpenGVLab/InternVL3-1B-hf on COCO val2017 000000039769.jpg: transformers' own integration test (float16).

    The picture is prepared as one tile of 448 pixels: the 12-tile preprocessing is another room's business.
    """
    checkpoint = os.environ.get("DREAMPRM_INTERNVL3_1B_HF")
    picture = os.environ.get("DREAMPRM_COCO_39769")
    if not (checkpoint and picture):
        pytest.skip("set DREAMPRM_INTERNVL3_1B_HF (directory) and DREAMPRM_COCO_39769 (000000039769.jpg)")
    from PIL import Image
    from tokenizers import Tokenizer

    from dreamprm_jax.models.convert import load_checkpoint

    config, params = load_checkpoint(checkpoint)
    tokenizer = Tokenizer.from_file(str(Path(checkpoint) / "tokenizer.json"))
    prompt = (
        f"<|im_start|>user\n{'<IMG_CONTEXT>' * config.image_tokens_per_tile}\n"
        "Please describe the image explicitly.<|im_end|>\n<|im_start|>assistant\n"
    )
    tokens = np.asarray(tokenizer.encode(prompt, add_special_tokens=False).ids, np.int32)[None]
    side = config.vision.image_size
    tile = Image.open(picture).convert("RGB").resize((side, side), Image.Resampling.BICUBIC)
    one = np.zeros((1, 1), np.int32)
    batch = Batch(
        tokens=tokens,
        image_mask=tokens == tokenizer.token_to_id("<IMG_CONTEXT>"),
        tiles=np.asarray(tile)[None, None],
        step_positions=one + tokens.shape[1] - 1,
        labels=one,
        step_mask=one == 0,
        example_id=one[0],
        example_mask=one[0] == 0,
    )
    logits = apply(config, params, batch)[0, 0, :5]
    np.testing.assert_allclose(logits, [11.9609, 14.7188, 14.2734, 10.6484, 6.9141], atol=0.1)


@pytest.fixture
def with_cudnn(monkeypatch):
    """As if cuDNN were here: enough to trace what would run, and nothing is run."""
    fused = pytest.importorskip("jax._src.cudnn.fused_attention_stablehlo")
    monkeypatch.setattr(fused, "check_cudnn_version", lambda: 91_200)
    monkeypatch.setattr(fused, "check_compute_capability", lambda capability: True)


@pytest.mark.parametrize(("remat", "forward_passes"), [("none", 1), ("dots", 1), ("full", 2)])
def test_fused_attention_serves_both_towers(with_cudnn, batch, remat, forward_passes):
    """Also numbers of positions that are no multiple of 8: 17 in the vision tower, 23 tokens.

    Remat "dots" keeps what the kernel hands to its gradient, so that it runs forward once.
    """
    config = dataclasses.replace(CONFIG, attention="cudnn", compute_dtype="bfloat16", remat=remat)
    params = jax.eval_shape(lambda: internvl.init(config, jax.random.key(0)))  # in float32, which it does not take
    batch = batch._replace(tokens=batch.tokens[:, :23], image_mask=batch.image_mask[:, :23])
    program = str(jax.make_jaxpr(jax.grad(total, argnums=1), static_argnums=0)(config, params, batch))
    assert program.count("dot_product_attention_fwd_wrapper[") == 2 * forward_passes
    assert program.count("dot_product_attention_bwd_wrapper[") == 2
    assert "bf16[6,24,2,8]" in program and "bf16[3,24,4,8]" in program  # of all tiles, of all rows
    assert jax.eval_shape(partial(internvl.apply, config), params, batch).shape == (B, S, VOCABULARY)


def test_filler_is_seen_by_no_other_position(with_cudnn, monkeypatch):
    config = dataclasses.replace(CONFIG, attention="cudnn")
    x = with_filler(jnp.ones((1, 5, 4)), config)
    assert x.shape == (1, 8, 4) and not x[:, 5:].any()
    assert with_filler(x, config).shape == x.shape and with_filler(x[:, :5], CONFIG).shape == (1, 5, 4)
    taken = []
    monkeypatch.setattr(jax.nn, "dot_product_attention", lambda *arrays, **given: taken.append(given))
    with jax.enable_x64(True):  # where a bool times 0 is int64
        for num_filler in (1, 0):
            attend(*[jnp.full((3, 6, 2, 16), jnp.nan, "bfloat16")] * 3, config, causal=False, num_filler=num_filler)
    lengths = [taken[0][name] for name in ("query_seq_lengths", "key_value_seq_lengths")]
    assert [(list(length), length.dtype) for length in lengths] == [([6] * 3, "int32"), ([5] * 3, "int32")]
    assert taken[1] == {"is_causal": False, "implementation": "cudnn"}


def test_fused_attention_takes_rows_at_a_time_with_filler(with_cudnn):
    """The rows of `dot`, mapped: its batching rule has its own idea of the lengths."""
    config = dataclasses.replace(CONFIG, attention="cudnn")
    q = jax.ShapeDtypeStruct((4, 3, 6, 2, 16), jnp.bfloat16)

    def total(q):
        return jnp.square(attend(q, q, q, config, causal=False, num_filler=1).astype(jnp.float32)).sum()

    program = str(jax.make_jaxpr(jax.vmap(jax.grad(total)))(q))
    assert program.count("dot_product_attention_fwd_wrapper[") == program.count("attention_bwd_wrapper[") == 1


def test_a_cast_before_the_loop_over_layers_changes_no_bit(params, batch, monkeypatch):
    """Kernels and a head cast once and their gradients, in the compute type, are those of the casts in every layer."""
    config = dataclasses.replace(CONFIG, compute_dtype="bfloat16")
    narrow = internvl.cast_to_compute(config, params)
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(narrow)} == {"bfloat16", "float32"}
    grads = [jax.jit(jax.grad(partial(total, config)))(tree, batch) for tree in (params, narrow)]
    monkeypatch.setattr(internvl, "cast_to_compute", lambda config, params: params)  # each layer casts its own
    grads.append(jax.jit(jax.grad(partial(total, config)))(params, batch))
    for (path, once), (_, kept), (_, leaf) in zip(*map(jax.tree_util.tree_leaves_with_path, grads), strict=True):
        narrow_dtype = "bfloat16" if path[-1].key in ("kernel", "lm_head") else "float32"
        assert [leaf.dtype, once.dtype, kept.dtype] == ["float32", "float32", narrow_dtype]
        np.testing.assert_array_equal([once, kept.astype(jnp.float32)], [leaf, leaf], err_msg=str(path))


def added_up(program):
    """Types of what a program adds up over a leading axis, in its loops too."""
    for equation in program.eqns:
        if equation.primitive.name == "reduce_sum" and 0 in equation.params["axes"]:
            yield str(equation.invars[0].aval.dtype)
        for inner in jaxprs_in_params(equation.params):
            yield from added_up(inner)


def test_no_gradient_is_added_up_over_rows_in_bfloat16(params, batch):
    """Of biases, layer scales and position embeddings; kernels' are products, which add up in float32 by themselves."""
    config = dataclasses.replace(CONFIG, compute_dtype="bfloat16")
    program = jax.make_jaxpr(jax.grad(partial(total, config)))(params, batch)
    assert set(added_up(program.jaxpr)) == {"float32"}
