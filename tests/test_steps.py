"""From a config to a step: which estimator and which attention a run takes."""

from functools import partial

import numpy as np
import optax
import pytest
from jax.sharding import AbstractMesh

from configs import net, ranges, table, uniform
from dreamprm_jax import bilevel, hypergradient, sharding, steps
from dreamprm_jax.errors import InputError
from dreamprm_jax.inner import Problem
from dreamprm_jax.loading import load_model
from dreamprm_jax.weighting import uniform as equal_weights
from tests.toy import batch_of, toy_params, toy_problem

PROBLEM = Problem(None, None, None, optax.sgd(0.1))
SEVERAL = {"num_inner_steps": 3}
ATTACHED = {"detached": False}


@pytest.mark.parametrize(
    ("fields", "batch_size", "given", "expected"),
    [
        ({}, 1, {}, "dot"),
        ({}, 1, {"forward_mode": False}, "dot"),
        ({}, 2, {}, "tangent"),
        ({}, 8, {"gradients_that_fit": 8}, "dot"),
        ({}, 9, {"gradients_that_fit": 8}, "tangent"),
        ({}, 8, {"remat": True}, "tangent_recomputed"),
        ({"example_clip_norm": 1.0}, 8, {}, "tangent_recomputed"),
        ({}, 8, {"forward_mode": False}, "recompute"),
        ({}, 8, {"forward_mode": False, "gradients_that_fit": 8}, "dot"),
        (ATTACHED, 1, {"gradients_that_fit": 8}, "tangent"),
        (SEVERAL, 1, {"gradients_that_fit": 8}, "mixed"),
    ],
)
def test_auto_is_the_cheapest_exact_estimator_that_serves(fields, batch_size, given, expected):
    problem = PROBLEM._replace(**fields)
    name = hypergradient.choose(problem, batch_size, **given)
    assert name == expected
    assert name in hypergradient.EXACT
    hypergradient.check_estimator(problem, name)
    assert given.get("forward_mode", True) or name in hypergradient.REVERSE_ONLY


@pytest.mark.parametrize("fields", [ATTACHED, SEVERAL])
def test_without_forward_mode_some_problems_have_no_exact_estimator(fields):
    with pytest.raises(ValueError, match=r"use model\.attention=xla"):
        hypergradient.choose(PROBLEM._replace(**fields), 1, forward_mode=False)


@pytest.mark.parametrize(
    ("module", "values", "expected"),
    [
        (table, {}, False),
        (table, {"hypergradient": "dot"}, False),
        (table, {"hypergradient": "recompute"}, False),
        (table, {"hypergradient": "published_fd"}, False),
        (table, {"hypergradient": "tangent"}, True),
        (table, {"hypergradient": "identity"}, True),
        (table, {"hypergradient": "unrolled"}, True),
        (table, {"identity_cosine_every": 10}, True),
        (table, {"hypergradient": "dot", "identity_cosine_every": 10}, True),
        (table, {"num_inner_steps": 2}, True),
        (net, {}, False),
        (net, {"weighting.detached": False}, True),
        (net, {"weighting.detached": False, "num_steps": 0}, False),
        (uniform, {"num_inner_steps": 2, "hypergradient": "mixed"}, False),
    ],
)
def test_a_run_needs_forward_mode_where_its_estimator_does(module, values, expected):
    cfg = module.get_config()
    cfg.update_from_flattened_dict(values)
    assert steps.needs_forward_mode(cfg) is expected


@pytest.mark.parametrize(
    ("memory", "expected"),
    [(17 * 400, 9), (7 * 400, 1), (10**9, 16), (0, 1)],
)
def test_dot_keeps_as_many_gradients_as_fit(memory, expected):
    params = {"kernel": np.zeros((9, 10), np.float32), "bias": np.zeros(10, np.float32)}  # 400 bytes
    fit = partial(steps.gradients_that_fit, PROBLEM)
    assert fit(params, {}, None, memory) == expected
    kept = {"tower": np.zeros(100, np.float32)}  # another 400: a gradient less
    assert fit(params, kept, None, memory) == (max(1, expected - 1) if expected < 16 else 16)
    narrow = PROBLEM._replace(cast_to_compute=lambda params: {**params, "kernel": params["kernel"].astype("bfloat16")})
    memory_of_five = 8 * 400 + 5 * 220
    assert [steps.gradients_that_fit(given, params, {}, None, memory_of_five) for given in (PROBLEM, narrow)] == [2, 5]


def test_devices_keep_a_gradient_for_each_row_of_theirs():
    """Two of four devices divide the parameters, all four the rows; a row's gradient is whole where the row is."""
    mesh = AbstractMesh((2, 2, 1), sharding.AXES)
    params = {"layers": {"gate": {"kernel": np.zeros((1, 10, 10), np.float32)}}}  # 400 bytes, 200 on a device
    assert steps.gradients_that_fit(PROBLEM, params, {}, mesh, 8 * 200 + 3 * 400) == 4 * 3
    assert steps.gradients_that_fit(PROBLEM, params, {}, mesh, 0) == 4


def test_fused_attention_is_refused_where_it_cannot_serve():
    cfg = table.get_config().model.copy_and_resolve_references()
    cfg.attention = "cudnn"
    with pytest.raises(InputError, match="--config.model.attention=cudnn: needs an NVIDIA GPU"):
        load_model(cfg, seed=0)
    cfg.attention = "xla"
    assert load_model(cfg, seed=0).config.attention == "xla"


def test_a_phase_of_fewer_rows_than_a_micro_batch_takes_them_at_once():
    cfg = table.get_config()
    cfg.batch_size = cfg.meta_batch_size = cfg.micro_batch_size = 8
    cfg.cold_start.batch_size, cfg.inner.decay = 6, "all"
    problem = toy_problem(optax.sgd(0.1), equal_weights(), micro_batch_size=cfg.micro_batch_size)
    step, tx = steps.supervised(cfg, cfg.cold_start, lambda frozen: problem, None)
    state = bilevel.init_state(tx, optax.sgd(0.1), equal_weights(), toy_params())
    _, metrics = step(state, batch_of([0, 1, 2, 3, 4, 5]))
    assert np.isfinite(metrics["inner_loss"])


def test_a_micro_batch_divides_the_batches_of_every_phase():
    cfg = table.get_config()
    cfg.batch_size, cfg.micro_batch_size, cfg.cold_start.batch_size = 9, 3, 9
    with pytest.raises(ValueError, match=r"micro_batch_size=3: must divide pretrain.batch_size \(64\) as well"):
        ranges.validate(cfg)
    cfg.pretrain.batch_size = 2
    ranges.validate(cfg)
