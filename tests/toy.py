"""A bilevel problem without images or text, in the project's own types: a two-layer verifier of chains of steps."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from dreamprm_jax import bilevel, losses, optimizers, weighting
from dreamprm_jax.inner import Problem, advance
from dreamprm_jax.types import Batch, TrainState
from dreamprm_jax.weighting import Weighting

NUM_EXAMPLES, NUM_STEPS, WIDTH, HIDDEN = 6, 3, 4, 5


def batch_of(rows, mask=None) -> Batch:
    """A batch [..., B] that names rows of the toy's fixed data; the model's own fields stay empty."""
    rows = np.asarray(rows, np.int32)
    mask = np.ones(rows.shape, bool) if mask is None else np.asarray(mask)
    step_mask = np.arange(NUM_STEPS) <= (rows % NUM_STEPS)[..., None]  # chains of 1 to NUM_STEPS steps
    return Batch(*[np.zeros((*rows.shape, 1))] * 5, step_mask=step_mask, example_id=rows, example_mask=mask)


def toy_data(seed: int = 0):
    """Inputs [N, S, WIDTH] and labels [N, S], 0 for "+" and 1 for "-", of the training and of the meta set."""
    rng = np.random.default_rng(seed)
    inputs = lambda: jnp.asarray(rng.normal(size=(NUM_EXAMPLES, NUM_STEPS, WIDTH)))  # noqa: E731
    labels = lambda: jnp.asarray(rng.integers(0, 2, size=(NUM_EXAMPLES, NUM_STEPS)))  # noqa: E731
    return inputs(), labels(), inputs(), labels()


def toy_problem(inner_tx: optax.GradientTransformation, weights: Weighting, seed: int = 0, **fields) -> Problem:
    """Cross entropy below, the squared error of P(label) above; `unused` never has a gradient."""
    x, y, meta_x, meta_y = toy_data(seed)

    def forward(params, x):
        hidden = jnp.tanh(jnp.einsum("bsw,wh->bsh", x, params["kernel"]))
        return hidden, jnp.einsum("bsh,ho->bso", hidden, params["out"])

    def step_losses(params, batch):
        hidden, logits = forward(params, x[batch.example_id])
        labels = y[batch.example_id]
        outputs = {
            "label_logits": logits,
            "step_losses": -losses.label_log_probs(logits, labels),
            "label_is_plus": 1.0 * (labels == 0),
            "hidden": hidden,
        }
        return losses.example_losses(losses.label_log_probs(logits, labels), batch.step_mask, "mean"), outputs

    def meta_loss(params, batch):
        _, logits = forward(params, meta_x[batch.example_id])
        probabilities = jnp.exp(losses.label_log_probs(logits, meta_y[batch.example_id]))
        score = losses.masked_mean(probabilities, batch.step_mask)
        return jnp.mean(losses.meta_loss_mse(score)), {"meta_prediction": jnp.mean(score)}

    return Problem(step_losses, weights.apply, meta_loss, inner_tx, **fields)


def toy_params(seed: int = 0):
    """Float64; decay acts on `kernel` alone, as the project's rule goes by the name."""
    keys = jax.random.split(jax.random.key(seed), 2)
    kernel, out = jax.random.normal(keys[0], (WIDTH, HIDDEN)), jax.random.normal(keys[1], (HIDDEN, 2))
    return {"kernel": kernel, "out": out, "unused": jnp.zeros(2)}


def in_float64(weights: Weighting) -> Weighting:
    """The weighting, begun in the type that the test runs in rather than in float32."""
    init = weights.init
    return weights._replace(init=lambda: jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float64), init()))


def toy_table(minimum: float = 0.0, maximum: float = 3.0, activation: str = "projected") -> Weighting:
    """The instance table over the toy's rows."""
    return in_float64(weighting.instance_table(NUM_EXAMPLES, activation, minimum, maximum))


def _net(features, num_inputs, activation="sigmoid", steps="all"):
    """A net in the midst of training: it starts with an output layer of 0, through which nothing would be seen."""
    net = in_float64(weighting.instance_net(features, num_inputs, activation, jax.random.key(3), steps=steps))
    return net._replace(init=lambda: in_the_midst(net))


def in_the_midst(weights: Weighting):
    """Random meta_params of a weighting."""
    start = weights.init()
    return optax.tree.scale(0.3, optax.tree.random_like(jax.random.key(4), start))


def by_position() -> Weighting:
    """A weight for each place in a batch of 4, whatever row stands there."""
    return Weighting(
        lambda: {"place": jnp.ones(4, jnp.float64)}, lambda meta_params, batch, outputs: meta_params["place"]
    )


WEIGHTINGS: dict[str, tuple[Weighting, bool]] = {
    "table": (toy_table(), True),
    "table, clip": (toy_table(activation="clip"), True),
    "table, softplus": (toy_table(activation="softplus"), True),
    "table, sigmoid": (toy_table(activation="sigmoid"), True),
    "domain": (in_float64(weighting.domain_table([0, 1, 2, 0, 1, 1], 3)), True),
    "net": (_net(("relative_loss", "relative_prob", "label"), 3, steps="up_to_first_minus"), True),
    "net, hidden": (_net(("loss", "prob", "hidden"), 2 + HIDDEN), True),
    "net, softmax": (_net(("loss", "label"), 2, "softmax"), True),
    "net, published": (_net(("label_probs",), 2), False),
    "by position": (by_position(), True),
    "net, attached, softmax": (_net(("relative_loss", "hidden"), 1 + HIDDEN, "softmax"), False),
}
"""name -> (weighting, whether its weights are detached from the model)."""

ADAMW = optimizers.adamw(lambda count: 0.05, weight_decay=0.1)
# A large eps, since at the usual one a cold step's derivative is almost 0 and would compare nothing.
SMOOTH_ADAMW = optimizers.adamw(lambda count: 0.05, weight_decay=0.1, eps=0.01)
CHAINS: dict[str, optax.GradientTransformation] = {
    "sgd": optax.sgd(0.1),
    "momentum": optax.sgd(0.1, momentum=0.9),
    "adamw": ADAMW,
    "adamw, clip": optax.chain(optimizers.clip_by_global_norm(0.05), SMOOTH_ADAMW),
    "hf_adamw": optimizers.hf_adamw(lambda count: 0.05, weight_decay=0.1),
}


def cold_state(inner_tx: optax.GradientTransformation, seed: int = 0) -> TrainState:
    """The first step: empty moments."""
    return bilevel.init_train_state(inner_tx, toy_params(seed))


def warm_state(inner_tx: optax.GradientTransformation, seed: int = 0, steps: int = 3) -> TrainState:
    """Moments that have seen a few gradients of the toy's losses."""
    state = cold_state(inner_tx, seed)
    problem = toy_problem(inner_tx, weighting.uniform())
    for k in range(steps):
        _, state = advance(problem, state, _plain_gradient(state.params, batch_of([k, 1, 4, 5])))
    return state


@jax.jit
def _plain_gradient(params, batch):
    losses_of = toy_problem(optax.identity(), weighting.uniform()).losses
    return jax.grad(lambda params: jnp.mean(losses_of(params, batch)[0]))(params)


def small_problem(inner_tx: optax.GradientTransformation, weights: Weighting, width=3, height=2, dtype=None, **fields):
    """(problem, its params): one tanh layer on vectors, quick to compile and of any size; table weightings only.

    dtype: of the products, the parameters' own by default.
    """
    keys = jax.random.split(jax.random.key(1), 5)
    x, meta_x = (jax.random.normal(key, (NUM_EXAMPLES, width)) for key in keys[:2])
    y, meta_y = (jax.random.normal(key, (NUM_EXAMPLES, height)) for key in keys[2:4])

    def losses_of(params, x, y):
        kernel = params["kernel"].astype(dtype or x.dtype)
        scores = jnp.tanh(jnp.einsum("bw,wh->bh", x.astype(kernel.dtype), kernel)).astype(x.dtype)
        return jnp.mean(jnp.square(scores - y), axis=1)

    def step_losses(params, batch):
        return losses_of(params, x[batch.example_id], y[batch.example_id]), None

    def meta_loss(params, batch):
        return jnp.mean(losses_of(params, meta_x[batch.example_id], meta_y[batch.example_id])), {}

    params = {"kernel": jax.random.normal(keys[4], (width, height)) / width**0.5}
    return Problem(step_losses, weights.apply, meta_loss, inner_tx, **fields), params


def distance(one, other) -> float:
    """The norm of the difference of two trees."""
    return float(optax.tree.norm(jax.tree.map(jnp.subtract, one, other)))
