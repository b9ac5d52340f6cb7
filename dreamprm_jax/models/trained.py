"""What of a model is trained: a parameter tree parted into what a run moves and what it only reads, and put together.

    all       everything
    language  the language model; the vision tower and the projector are frozen
    adapters  low-rank additions to the language model's projections (LoRA, arXiv 2106.09685); all else is frozen

The trained part alone has gradients, moments and a moving average, and a bilevel step sees nothing else.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from dreamprm_jax.types import PyTree

TRAINED = ("all", "language", "adapters")

# The language model's projections: how many axes of a kernel, after L, are summed over. The rest are the output's.
_INPUT_AXES = {"q": 1, "k": 1, "v": 1, "out": 2, "gate": 1, "up": 1, "down": 1}


class Choice(NamedTuple):
    """What is trained. `rank` and `alpha` are of the adapters: an addition is (alpha / rank) a b."""

    what: str = "all"  # one of TRAINED
    rank: int = 16  # r
    alpha: float = 32.0


def part(params: PyTree, choice: Choice, compute_dtype: str, key: jax.Array) -> tuple[PyTree, PyTree]:
    """A whole tree -> (trained, frozen): new adapters start at b = 0, where the model is what it was.

    The frozen part is kept as `as_kept` has it; {} where everything is trained. `key`: of the adapters' a.
    """
    if choice.what == "all":
        return params, {}
    params = as_kept(params, choice.what, compute_dtype)
    if choice.what == "language":
        return {"language": params["language"]}, {name: params[name] for name in ("vision", "projector")}
    layers = params["language"]["layers"]
    keys = dict(zip(_INPUT_AXES, jax.random.split(key, len(_INPUT_AXES)), strict=True))
    adapters = {name: _fresh_adapter(layers[name]["kernel"], name, choice.rank, keys[name]) for name in _INPUT_AXES}
    num_layers = len(layers["q"]["kernel"])
    scales = {name: {"lora_scale": jnp.full((num_layers,), choice.alpha / choice.rank)} for name in _INPUT_AXES}
    return {"language": {"layers": adapters}}, merge({"language": {"layers": scales}}, params)


def _fresh_adapter(kernel: jax.Array, name: str, rank: int, key: jax.Array) -> PyTree:
    """a [L, inputs, r], uniform with variance 1 / (3 inputs) as is usual; b [L, r, outputs], 0. Float32 at least."""
    num_layers, inputs = kernel.shape[0], kernel.shape[1 : 1 + _INPUT_AXES[name]]
    dtype = jnp.promote_types(kernel.dtype, jnp.float32)
    bound = math.prod(inputs) ** -0.5
    a = jax.random.uniform(key, (num_layers, *inputs, rank), dtype, -bound, bound)
    return {"lora_a": a, "lora_b": jnp.zeros((num_layers, rank, *kernel.shape[1 + len(inputs) :]), dtype)}


def as_kept(params: PyTree, what: str, compute_dtype: str) -> PyTree:
    """A whole tree with what will be frozen in the type that it is kept in: that of the products.

    Exact to the forward pass, which casts there in any case; norms, which compute in float32, stay as they are. A
    frozen parameter needs no float32 master, as no small change is ever added to it.
    """
    if what == "all":
        return params

    def keep(path: tuple, leaf: jax.Array) -> jax.Array:
        names = [key.key for key in path]
        is_trained = what == "language" and names[0] == "language"
        is_norm = any(name.startswith("norm") for name in names)
        is_wider = leaf.dtype.itemsize > jnp.dtype(compute_dtype).itemsize
        return leaf.astype(compute_dtype) if is_wider and not (is_trained or is_norm) else leaf

    return jax.tree_util.tree_map_with_path(keep, params)


def merge(trained: PyTree, frozen: PyTree) -> PyTree:
    """The one place that puts a parameter tree together: both trees' leaves, adapters beside their kernels."""
    if not frozen:
        return trained
    shared = {name: merge(trained[name], frozen[name]) for name in trained.keys() & frozen.keys()}
    return {**frozen, **trained, **shared}


def whole(trained: PyTree, frozen: PyTree) -> PyTree:
    """An ordinary tree, to score with and to start from: merged, and each adapter added to its kernel.

    The sum is taken in float32 and rounded once to the kernel's type, which a forward pass would round it to.
    """
    params = merge(trained, frozen)
    layers = params["language"]["layers"]
    if "lora_a" not in layers["q"]:
        return params
    folded = {name: _folded(leaves) if name in _INPUT_AXES else leaves for name, leaves in layers.items()}
    return {**params, "language": {**params["language"], "layers": folded}}


def _folded(leaves: PyTree) -> PyTree:
    """A projection's leaves with the adapter's product in the kernel."""
    others = {name: leaf for name, leaf in leaves.items() if not name.startswith("lora_")}
    return {**others, "kernel": _fold(leaves["kernel"], leaves["lora_a"], leaves["lora_b"], leaves["lora_scale"])}


@jax.jit
def _fold(kernel: jax.Array, a: jax.Array, b: jax.Array, scale: jax.Array) -> jax.Array:
    """kernel [L, inputs, outputs] + scale [L] a [L, inputs, r] b [L, r, outputs]."""
    num_layers, rank = len(kernel), a.shape[-1]
    flat_a = a.reshape(num_layers, -1, rank) * scale[:, None, None].astype(a.dtype)
    added = jnp.einsum("lir,lro->lio", flat_a, b.reshape(num_layers, rank, -1), precision="highest")
    return (kernel + added.reshape(kernel.shape)).astype(kernel.dtype)
