"""Pieces that both towers are made of: GELU, biases, norms, attention, and which attention serves."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dreamprm_jax.models import internvl, presets
from dreamprm_jax.models.layers import Linear, attend_in_blocks, choose_attention, gelu, spread


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 3e-7), ("bfloat16", 2**-8)])
def test_gelu_is_exact_and_so_are_its_derivatives(dtype, tolerance):
    x = np.linspace(-3, 6, 3001).astype(dtype)
    with jax.enable_x64(True):
        exact = partial(jax.nn.gelu, approximate=False)
        slope = jax.vmap(jax.grad(exact))
        wanted = [np.asarray(f(jnp.asarray(x, "float64"))) for f in (exact, slope, jax.vmap(jax.grad(jax.grad(exact))))]
    found = [gelu, jax.vmap(jax.grad(gelu)), jax.vmap(jax.grad(jax.grad(gelu)))]
    for name, function, truth in zip(("value", "slope", "curvature"), found, wanted, strict=True):
        np.testing.assert_allclose(np.float64(function(x)), truth, rtol=tolerance, atol=tolerance, err_msg=name)
    forward = jax.jvp(gelu, (x,), (np.ones_like(x),))[1]
    np.testing.assert_allclose(np.float64(forward), wanted[1], rtol=tolerance, atol=tolerance)
    # Where it is small, too: erfc in bfloat16 has lost all but five bits at -3.
    np.testing.assert_allclose(np.float64(gelu(x)), wanted[0], rtol=max(tolerance, 1e-4))
    if dtype == "bfloat16":
        library = np.float64(jax.nn.gelu(x, approximate=False))
        assert np.max(np.abs(library - wanted[0]) / np.maximum(np.abs(wanted[0]), 1e-3)) > 0.02  # or ours can go


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])  # of the parameters
def test_a_parameter_of_many_rows_has_its_gradient_added_up_in_float32(dtype):
    """Activations are bfloat16, and 7,182 of them added up in it are up to 1.6% off."""
    x, cotangent = (jax.random.uniform(jax.random.key(seed), (7182, 16), jnp.bfloat16) for seed in range(2))
    layer = Linear("rd,df->rf", (16, 16))
    params = jax.tree.map(lambda leaf: leaf.astype(dtype), layer.init(jax.random.key(2), x)["params"])
    scale = jnp.ones(16, dtype)

    @jax.jit
    def slopes(params, scale):
        scaled = jax.vjp(lambda scale: x * spread(scale, x), scale)[1](cotangent)[0]
        return jax.vjp(lambda params: layer.apply({"params": params}, x), params)[1](cotangent)[0]["bias"], scaled

    wanted = np.float64(cotangent).sum(0), np.float64(cotangent * x).sum(0)
    tolerance = 1e-4 if dtype == "float32" else 2**-8
    for found, truth in zip(slopes(params, scale), wanted, strict=True):
        assert found.dtype == dtype
        np.testing.assert_allclose(np.float64(found), truth, rtol=tolerance)


@pytest.mark.parametrize(("remat", "forward_passes"), [("none", 1), ("dots", 1), ("full", 2)])
def test_remat_dots_takes_means_and_variances_of_layer_norms_once(remat, forward_passes):
    config = dataclasses.replace(presets.tiny(vocab_size=32), remat=remat)
    params = jax.eval_shape(lambda: internvl.init(config, jax.random.key(0)))
    pixels = np.zeros((1, config.vision.image_size, config.vision.image_size, 3), np.float32)
    slope = jax.grad(lambda params: jnp.sum(internvl.vision_states(config, params, pixels)))
    program = str(jax.make_jaxpr(slope)(params))
    assert program.count("name=statistic") == 2 * 2 * forward_passes  # of two norms, in the loop over layers


@pytest.mark.parametrize("num_tokens", [1, 7, 300, 2100])  # one block, one block, two blocks, eight blocks
@pytest.mark.parametrize("causal", [True, False])
def test_attention_in_blocks_is_the_attention_of_an_accelerator(num_tokens, causal):
    keys = jax.random.split(jax.random.key(num_tokens), 4)
    shapes = ((2, num_tokens, 4, 6), (2, num_tokens, 2, 6), (2, num_tokens, 2, 6), (2, num_tokens, 4, 6))
    q, k, v, cotangent = (jax.random.normal(key, shape) for key, shape in zip(keys, shapes, strict=True))
    reference = partial(jax.nn.dot_product_attention, is_causal=causal, implementation="xla")

    @jax.jit
    def both(q, k, v):
        results = [jax.vjp(function, q, k, v) for function in (partial(attend_in_blocks, causal=causal), reference)]
        return [(value, pull(cotangent)) for value, pull in results]

    ours, expected = both(q, k, v)
    for one, other in zip(jax.tree.leaves(ours), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, other, atol=3e-6 * max(1.0, float(jnp.abs(other).max())))


@pytest.mark.parametrize(
    ("capability", "dtype", "forward_mode", "expected"),
    [
        ("9.0", "bfloat16", False, "cudnn"),
        ("8.0", "bfloat16", False, "cudnn"),
        ("7.5", "bfloat16", False, "xla"),
        ("9.0", "float32", False, "xla"),
        ("9.0", "bfloat16", True, "xla"),
        ("gfx942", "bfloat16", False, "xla"),
        (None, "bfloat16", False, "xla"),
    ],
)
def test_attention_is_fused_where_it_serves(monkeypatch, capability, dtype, forward_mode, expected):
    device = type("Device", (), {} if capability is None else {"compute_capability": capability})()
    monkeypatch.setattr(jax, "devices", lambda: [device])
    assert choose_attention(dtype, forward_mode) == expected
