"""How much each training instance counts: (init, apply, project) triples of plain functions.

`step_mask` says what is supervised; a weight says how much it counts. The two never mix.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from dreamprm_jax.types import Batch, PyTree


class Weighting(NamedTuple):
    """A family of instance weights.

    init: () -> meta_params.
    apply: (meta_params, batch, outputs) -> instance_weights [B]; `outputs` is what `Problem.losses` returned
      beside the losses, for weightings that look at the model.
    project: meta_params -> meta_params inside the permitted set; applied after every outer step.
    """

    init: Callable[[], PyTree]
    apply: Callable[[PyTree, Batch, Any], jax.Array]
    project: Callable[[PyTree], PyTree]


def uniform() -> Weighting:
    """Weight 1 for every instance, nothing to learn: "No Selection" in the paper's Table 1."""

    def apply(meta_params: PyTree, batch: Batch, outputs: Any) -> jax.Array:
        return jnp.ones(batch.example_id.shape, jnp.float32)

    return Weighting(init=dict, apply=apply, project=lambda meta_params: meta_params)


def instance_table(num_examples: int, minimum: float, maximum: float) -> Weighting:
    """One free weight per training instance (DreamPRM-1.5's Instance Table), `{"table": [num_examples]}`.

    Starts at 1. The range is kept by projecting after each outer step, not by clipping when reading: a clip
    has derivative 0 outside its range (and 0.5 on its bounds in JAX), so an entry that left it would never
    come back, while its raw value went on drifting.
    """

    def init() -> PyTree:
        return {"table": jnp.ones((num_examples,), jnp.float32)}

    def apply(meta_params: PyTree, batch: Batch, outputs: Any) -> jax.Array:
        return meta_params["table"][batch.example_id]

    def project(meta_params: PyTree) -> PyTree:
        return {"table": jnp.clip(meta_params["table"], minimum, maximum)}

    return Weighting(init, apply, project)
