"""Run by test_sharding.py on eight forced devices: a divided batch reads and moves the table as one device does.

Float64, every estimator and kind of weighting, and a table that is itself divided.
"""

import jax
import numpy as np
from toy import WEIGHTINGS, batch_of, in_float64, toy_params, toy_problem

from dreamprm_jax import bilevel, optimizers, sharding, weighting
from dreamprm_jax.hypergradient import ESTIMATORS, check_estimator

BATCHES = [
    [0, 5, 2, 3, 0, 1, 4, 5],
    [1, 1, 1, 1, 4, 3, 2, 0],
    [5, 4, 3, 2, 1, 0, 5, 4],
]  # rows met twice, on two devices
KINDS = {"table": 16, "domain": 0, "net": 0, "net, softmax": 0, "net, published": 0}  # entries of a table


def run(name, kind, mesh, micro_batch_size, example_clip_norm):
    """(state, metrics) after three steps; None where the estimator cannot serve."""
    weights, detached = WEIGHTINGS[kind]
    if KINDS[kind]:
        weights = in_float64(weighting.instance_table(KINDS[kind], "projected", 0.0, 3.0))
    inner_tx = optimizers.adamw(lambda count: 0.05, weight_decay=0.1, eps=0.01)
    meta_tx = optimizers.per_entry_rmsprop(lambda count: 0.1) if KINDS[kind] else optimizers.hf_adamw(
        lambda count: 0.1, weight_decay=0.0
    )  # fmt: skip
    problem = toy_problem(
        inner_tx,
        weights,
        detached=detached,
        mesh=mesh,
        micro_batch_size=micro_batch_size,
        example_clip_norm=example_clip_norm,
    )
    try:
        check_estimator(problem, name)
    except ValueError:
        return None

    @jax.jit
    def step(state, batch, meta_batch):
        stepped = bilevel.bilevel_step(problem, ESTIMATORS[name], meta_tx, weights, state, batch, meta_batch)
        return sharding.settle(mesh, *stepped)

    state = sharding.place(mesh, bilevel.init_state(inner_tx, meta_tx, weights, toy_params(), KINDS[kind]))
    for rows in BATCHES:
        state, metrics = step(state, *sharding.place_rows(mesh, (batch_of(rows), batch_of(rows[::-1]))))
    return state, metrics


def main() -> None:
    jax.config.update("jax_enable_x64", True)
    sharding.LARGE = 16
    mesh = sharding.make_mesh(sharding.Layout(data=4, fsdp=2))
    cases = [(name, "table", None, None) for name in ESTIMATORS]
    cases += [("tangent", kind, None, None) for kind in KINDS]
    cases += [("dot", "net", 1, None), ("dot", "table", None, 0.3), ("mixed", "net", 1, 0.3), ("mixed", "net", 1, None)]
    for case in cases:
        alone, shared = run(*case[:2], None, *case[2:]), run(*case[:2], mesh, *case[2:])
        if alone is None:
            continue
        for one, other in zip(jax.tree.leaves(alone), jax.tree.leaves(shared), strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-9, atol=1e-12, err_msg=str(case))
        table = shared[0].meta_params.get("table")
        if KINDS[case[1]]:
            if (
                table.addressable_shards[0].data.shape != (2,)
                or shared[0].last_weights["rows"].sharding != table.sharding
            ):
                raise SystemExit("the table is not divided among all devices")
            if np.ptp(table[:6]) < 0.1:
                raise SystemExit("the table did not move, so nothing was compared")
    print(f"{len(cases)} cases")


if __name__ == "__main__":
    main()
