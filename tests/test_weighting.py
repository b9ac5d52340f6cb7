"""Weightings: which row gets which weight, and who gets a gradient."""

import jax
import numpy as np
from toy import batch_of

from dreamprm_jax.weighting import instance_table, uniform


def test_table_gives_each_row_its_own_entry():
    table = instance_table(4, 0.0, 3.0)
    meta_params = {"table": np.arange(4.0, dtype=np.float32)}
    np.testing.assert_array_equal(table.apply(meta_params, batch_of([2, 0, 2]), None), [2.0, 0.0, 2.0])


def test_a_row_drawn_twice_collects_both_gradients():
    table = instance_table(4, 0.0, 3.0)
    grad = jax.grad(lambda meta: table.apply(meta, batch_of([2, 0, 2]), None).sum())(table.init())
    np.testing.assert_array_equal(grad["table"], [1.0, 0.0, 2.0, 0.0])


def test_projection_keeps_the_range_and_leaves_the_inside_alone():
    table = instance_table(3, -1.0, 2.0)
    projected = table.project({"table": np.array([-5.0, 0.3, 2.5], np.float32)})
    np.testing.assert_allclose(projected["table"], [-1.0, 0.3, 2.0])


def test_uniform_is_one_and_has_nothing_to_learn():
    weighting = uniform()
    assert weighting.init() == {}
    np.testing.assert_array_equal(weighting.apply({}, batch_of([3, 1]), None), [1.0, 1.0])
