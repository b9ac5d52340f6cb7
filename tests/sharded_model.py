"""Run by test_sharding.py on eight forced devices: a divided InternVL gives the meta-gradient that one device gives.

In float32, after real steps, so that Adam's moments are warm and the model has learnt something: of a fresh one another
order of rows alone changes the meta-gradient by 1e-5. The bar is 1e-6 of its norm. A machine that rounds otherwise may
miss it on one device as well: where a mesh does, twice the distance between two orders of one device's own sums counts.
Cases on the command line: WEIGHTING:ESTIMATORS:LAYOUTS, such as `net:dot,tangent:8,1,1/2,2,2`; `scores::8,1,1` compares
step scores. Before them, `localhost:PORT` and 0 or 1: in two processes, each with its own device to compare with.
"""

import dataclasses
import functools
import math
import os
import sys
import traceback

import jax
import numpy as np
import optax
from jax.sharding import AxisType
from test_training import small_config

from configs import domain, net, table
from dreamprm_jax import bilevel, build, inner, sharding, steps
from dreamprm_jax.data import batches
from dreamprm_jax.hypergradient import ESTIMATORS
from dreamprm_jax.loading import load_model
from dreamprm_jax.scoring import score_dataset

CONFIGS = {"table": table.get_config, "net": net.get_config, "domain": domain.get_config}
TOLERANCE = 1e-6  # of the meta-gradient's norm
WARM_STEPS = 8


def config_of(weighting, num_inner_steps):
    cfg = small_config(CONFIGS[weighting])
    cfg.batch_size = cfg.meta_batch_size = 8
    cfg.num_inner_steps, cfg.num_steps = num_inner_steps, WARM_STEPS + 1
    cfg.inner.clip_norm, cfg.weighting.init = None, None
    cfg.inner.schedule, cfg.inner.warmup, cfg.inner.lr = "constant", 0.0, 4e-3
    return cfg


class Case:
    """A weighting with K inner steps: its problem on any mesh, a warm state, and a batch of each level."""

    def __init__(self, weighting, num_inner_steps):
        self.cfg = config_of(weighting, num_inner_steps)
        self.model = load_model(self.cfg.model, 0)
        data = build.training_data(self.cfg, self.model)
        self.weights, self.levels = (
            build.instance_weighting(self.cfg, data.train, self.model), steps.levels(self.cfg)
        )  # fmt: skip
        meta_params = jax.tree.map(lambda leaf: leaf + 0.1, self.weights.init())  # no layer of the net is 0
        problem = self.problem(None)
        warm = jax.jit(lambda state, batch: inner.inner_steps(problem, state, meta_params, batch)[0])
        state = bilevel.init_train_state(self.levels.inner_tx, self.model.params)
        plan = build.plan_of(self.cfg, "train", data.train)
        stream = batches.training_batches(data.train, plan, num_inner_steps=num_inner_steps)
        for _ in range(WARM_STEPS):
            state = warm(state, next(stream))
        (meta_batch, *_) = batches.training_batches(data.meta, build.plan_of(self.cfg, "meta", data.meta))
        self.batches = (next(stream), meta_batch)
        self.start = jax.device_get((state, meta_params))

    def problem(self, mesh):
        model = self.model._replace(config=dataclasses.replace(self.model.config, mesh=mesh))
        return build.prm_problem(self.cfg, model, self.weights.apply, self.levels.inner_tx)

    def meta_gradient(self, estimator, mesh):
        """The meta-gradient, and the inner level after the step."""
        problem = self.problem(mesh)

        @jax.jit
        def step(state, meta_params, batch, meta_batch):
            meta_grad, state, _ = ESTIMATORS[estimator](problem, state, meta_params, batch, meta_batch)
            return sharding.settle(mesh, state, meta_grad)

        rows = [self.placed(batch, mesh) for batch in self.batches]
        state, meta_grad = step(*sharding.place(mesh, self.start), *rows)
        if mesh is not None:
            check_places(mesh, state)
        return sharding.fetch(mesh, (meta_grad, state.params))

    def placed(self, batch, mesh):
        """The batch on the mesh, this process's rows from this process."""
        axis = batch.example_id.ndim - 1
        own = sharding.share_of_process(mesh).of(range(batch.example_id.shape[axis]))
        return sharding.place_rows(mesh, jax.tree.map(lambda leaf: np.take(leaf, own, axis), batch), axis)


def check_places(mesh, state):
    """Every array is where the table of partitions puts it; a large kernel and its moments in parts."""
    for leaf, wanted in zip(jax.tree.leaves(state), jax.tree.leaves(sharding.shardings(mesh, state)), strict=True):
        if not leaf.sharding.is_equivalent_to(wanted, leaf.ndim):
            raise SystemExit(f"an array of {leaf.shape} is at {leaf.sharding}, not at {wanted}")
    parts = mesh.shape["fsdp"] * mesh.shape["tensor"]
    gates = [
        leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(state)
        if "gate" in jax.tree_util.keystr(path)
    ]  # fmt: skip
    if len(gates) != 3 or any(gate.addressable_shards[0].data.size * parts != gate.size for gate in gates):
        raise SystemExit(f"a kernel or a moment of it is not divided by {parts}")


def rounding(case, estimator, alone):
    """How far apart one device's meta-gradient is with attention in blocks and in one piece."""
    return float(optax.tree.norm(jax.tree.map(np.subtract, case.meta_gradient(estimator, None)[0], alone)))


def mesh_of(sizes):
    axis_types = (AxisType.Auto,) * len(sizes)
    devices = jax.local_devices() if math.prod(sizes) == 1 else jax.devices()
    return jax.make_mesh(sizes, sharding.AXES, axis_types=axis_types, devices=devices[: math.prod(sizes)])


def check_scores(layouts):
    """Step scores of the test set's chains: what they share once, divided, against one device."""
    case = _case("table", 1)
    dataset = build.training_data(case.cfg, case.model).test

    def scores(mesh):
        config = dataclasses.replace(case.model.config, mesh=mesh)
        model = case.model._replace(config=config, params=sharding.place(mesh, jax.device_get(case.model.params)))
        return score_dataset(model, dataset, batch_size=8, aggregate="mean", progress=False)

    alone = scores(None)
    for layout in layouts:
        for one, other in zip(alone, scores(mesh_of(layout)), strict=True):
            np.testing.assert_allclose(one.full, other.full, rtol=1e-5)
            np.testing.assert_allclose(one.two_token, other.two_token, rtol=1e-5)
        print(f"scores {layout}: {len(alone)} chains", flush=True)


def main() -> None:
    arguments = sys.argv[1:]
    if arguments[0].startswith("localhost:"):  # one of two processes, and its number
        sharding.join(arguments[0], 2, int(arguments[1]))
        arguments = arguments[2:]
    for argument in arguments:
        weighting, estimators, layouts = argument.split(":")
        layouts = [tuple(map(int, layout.split(","))) for layout in layouts.split("/")]
        if weighting == "scores":
            check_scores(layouts)
            continue
        for estimator in estimators.split(","):
            num_inner_steps = 2 if estimator in ("mixed", "unrolled") else 1
            case = _case(weighting, num_inner_steps)
            alone, params = case.meta_gradient(estimator, mesh_of((1, 1, 1)))
            size = float(optax.tree.norm(alone))
            if not size > 0:
                raise SystemExit(f"{argument}: nothing to compare")
            for layout in layouts:
                shared, moved = case.meta_gradient(estimator, mesh_of(layout))
                error = float(optax.tree.norm(jax.tree.map(np.subtract, shared, alone))) / size
                print(f"{weighting} {estimator} {layout}: {error:.1e} of the norm {size:.2e}", flush=True)
                if not error <= TOLERANCE and not error <= 2 * rounding(case, estimator, alone) / size:
                    raise SystemExit(f"{argument}: the meta-gradient is off by {error:.1e} of its norm")
                jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), moved, params)


_case = functools.lru_cache(maxsize=1)(Case)

if __name__ == "__main__":
    try:
        main()
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)  # one of two processes would otherwise wait for the other, which waits for it
