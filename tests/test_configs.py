"""Every config with every scale and recipe, and what the recipes say."""

import subprocess
import sys
from importlib import import_module
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from configs import ranges
from dreamprm_jax import losses, steps, weighting
from dreamprm_jax.hypergradient import ESTIMATORS

ROOT = Path(__file__).parent.parent
NAMES = ("cold_start", "uniform", "domain", "table", "net")
RECIPES = ("published", "paper", "corrected")


def config(name, arguments=""):
    return import_module(f"configs.{name}").get_config(arguments)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("scale", ["", "internvl3_1b,"])
@pytest.mark.parametrize("recipe", RECIPES)
def test_every_experiment_is_valid_at_every_scale_in_every_recipe(name, scale, recipe):
    cfg = config(name, scale + recipe)
    ranges.validate(cfg)
    assert cfg.recipe == recipe
    assert (cfg.model.checkpoint is None) == (scale == "")
    assert cfg.is_locked
    assert config(name, f"{recipe},{scale}".strip(",")).to_dict() == cfg.to_dict()


def test_the_default_recipe_goes_with_the_scale():
    assert config("table").recipe == "corrected"
    assert config("table", "internvl3_1b").recipe == "paper"


@pytest.mark.parametrize("scale", ["", "internvl3_1b,"])
def test_published_figures_of_the_released_code(scale):
    """REFERENCE 2 and 3: both rates, decays, the clip of both levels, batches of one."""
    table, net = config("table", scale + "published"), config("net", scale + "published")
    for cfg in (table, net):
        assert (cfg.hypergradient, cfg.batch_size, cfg.meta_batch_size) == ("published_fd", 1, 1)
        assert (cfg.inner.optimizer, cfg.inner.eps, cfg.inner.lr) == ("hf_adamw", 1e-6, 5e-5)
        assert (cfg.cold_start.eps, cfg.inner.schedule) == (1e-6, "published")
        assert (cfg.inner.clip_norm, cfg.outer.clip_norm, cfg.inner.clip_place) == (1.0, 1.0, "after")
        assert (cfg.step_loss, cfg.meta_target, cfg.meta_loss, cfg.aggregate) == ("mean", "both", "mse", "mean")
        assert (cfg.outer.optimizer, cfg.outer.weight_decay, cfg.outer.schedule) == ("hf_adamw", 1e-3, "published")
    assert (table.outer.lr, table.inner.weight_decay) == (5e-3, 0.01)
    assert (table.weighting.activation, table.weighting.minimum, table.weighting.maximum) == ("clip", -1.0, 3.0)
    assert (net.outer.lr, net.inner.weight_decay, net.weighting.hidden) == (1e-4, 0.05, 10)
    assert (net.weighting.features, net.weighting.detached, net.weighting.activation) == (
        ("label_probs",),
        False,
        "sigmoid",
    )


def test_paper_figures():
    table, net = config("table", "internvl3_1b,paper"), config("net", "internvl3_1b,paper")
    assert (table.outer.lr, net.outer.lr, net.weighting.features) == (5e-3, 5e-4, ("hidden",))
    for cfg in (table, net):
        assert (cfg.hypergradient, cfg.step_loss, cfg.inner.clip_norm, cfg.num_steps) == ("auto", "sum", None, 100_000)
        assert (cfg.inner.lr, cfg.inner.weight_decay, cfg.outer.weight_decay) == (5e-5, 1e-2, 1e-3)


def test_domain_has_dreamprms_own_meta_loss_and_five_inner_steps():
    cfg = config("domain", "internvl3_1b,published")
    assert (cfg.num_inner_steps, cfg.aggregate, cfg.meta_target) == (5, "mean_log_odds", "plus")


def test_a_meta_micro_batch_divides_the_meta_batch():
    cfg = config("table", "internvl3_1b")
    cfg.meta_batch_size, cfg.meta_micro_batch_size = 8, 4
    ranges.validate(cfg)
    cfg.meta_micro_batch_size = 3
    with pytest.raises(ValueError, match=r"--config.meta_micro_batch_size=3: must divide meta_batch_size \(8\)"):
        ranges.validate(cfg)


def test_choices_are_those_that_the_code_knows():
    assert ranges.PROBABILITIES == losses.PROBABILITIES
    for name in losses.AGGREGATIONS:
        cfg = config("evaluate")
        cfg.aggregate = name
        ranges.validate(cfg)
    assert set(ranges.FEATURES) == set(weighting.FEATURES)
    for name in weighting.STEPS:
        cfg = config("net")
        cfg.weighting.steps = name
        ranges.validate(cfg)
    for activation in ranges.ACTIVATIONS["table"]:
        weighting.instance_table(2, activation, 0.0, 3.0)
    for name in ("auto", *ESTIMATORS):
        cfg = config("table")
        cfg.hypergradient = name
        ranges.validate(cfg)


@pytest.mark.parametrize("phase", ["inner", "cold_start", "pretrain"])
def test_each_phase_has_an_eps_and_a_decay_of_its_own(phase):
    """Adam's first step from a gradient of 1 is rate / (1 + eps), and decay pulls beside it."""
    cfg = config("table")
    cfg[phase].eps, cfg[phase].weight_decay = 1.0, 0.5
    params = {"kernel": jnp.full((1,), 2.0)}
    moved = {}
    for name in ("inner", "cold_start", "pretrain"):
        tx = steps.inner_optimizer(cfg.inner, cfg[name], lambda count: 0.1, None)
        moved[name] = float(tx.update({"kernel": jnp.ones(1)}, tx.init(params), params)[0]["kernel"][0])
    assert moved.pop(phase) == pytest.approx(-0.1 * (1 / 2 + 0.5 * 2.0), rel=1e-5)
    assert all(other < -0.099 and other > -0.103 for other in moved.values())


def test_each_level_has_a_schedule_of_its_own():
    cfg = config("table")
    cfg.num_steps, cfg.num_inner_steps = 10, 2
    cfg.inner.lr, cfg.inner.schedule, cfg.inner.warmup = 2.0, "constant", 0.5
    cfg.outer.lr, cfg.outer.schedule, cfg.outer.warmup = 3.0, "cosine", 0.0
    rates = steps.levels(cfg)
    np.testing.assert_allclose([rates.inner_rate(step) for step in (0, 9, 19)], [0.2, 2.0, 2.0], rtol=1e-6)
    assert float(rates.meta_rate(0)) == 3.0
    assert 0 < float(rates.meta_rate(9)) < 0.2


def test_relative_features_need_a_batch_to_compare_with():
    cfg = config("net")
    cfg.batch_size = 1
    with pytest.raises(ValueError, match="batch_size=1: weighting.features has relative_loss"):
        ranges.validate(cfg)
    cfg.weighting.features = ("loss",)
    ranges.validate(cfg)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--config.inner.lr=inf",), "--config.inner.lr=inf: must be at least 0, and finite"),
        (
            ("--config.num_steps=0", "--config.cold_start.num_steps=0", "--config.pretrain.num_steps=0"),
            "nothing to train",
        ),
        (("--config.weighting.activation=softmax",), "must be one of projected, clip, softplus, sigmoid"),
        (("--config.ema_decay=1.0",), "--config.ema_decay=1.0: must be at least 0 and below 1"),
        (("--config.hypergradient=darts",), "must be one of auto, unrolled"),
        (("--config.outer.schedule=linear",), "must be one of cosine, constant, published"),
        (("--config.inner.warmup=1.0",), "--config.inner.warmup=1.0: must be at least 0 and below 1"),
        (("--config.cold_start.eps=0.0",), "--config.cold_start.eps=0.0: must be above 0"),
        (
            ("--config.hypergradient=dot", "--config.num_inner_steps=2", "--config.noisy_steps.pretrain=10"),
            "dot looks through one inner step, not 2",
        ),
    ],
)
def test_values_that_cannot_be_are_one_line(flags, message):
    command = [sys.executable, "run.py", "--config=configs/table.py", *flags]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("field", "value"),
    [("judge", "me"), ("splitter", "none"), ("step_score", "both"), ("ties", "middle"), ("num_samples", 0),
     ("threshold", 1.5), ("held_out", 1.0), ("questions_shown", -1), ("image_side", -1)],
)  # fmt: skip
def test_an_evaluation_has_its_ranges(field, value):
    cfg = config("evaluate")
    cfg.evaluate[field] = value
    with pytest.raises(ValueError, match=f"--config.evaluate.{field}={value}: must be"):
        ranges.validate(cfg)


def test_only_selection_takes_aggregations_that_are_no_probabilities():
    for name in ("table", "compare"):
        cfg = config(name)
        cfg.aggregate = "sum_logit"
        with pytest.raises(ValueError, match="--config.aggregate=sum_logit: a meta loss needs a probability"):
            ranges.validate(cfg)


@pytest.mark.parametrize(
    ("field", "value"), [("trained", "vision"), ("lora_rank", 0), ("lora_alpha", 0.0), ("moment_dtype", "float16")]
)
def test_what_is_trained_has_its_ranges(field, value):
    cfg = config("table")
    cfg.model[field] = value
    with pytest.raises(ValueError, match=f"--config.model.{field}={value}: must be"):
        ranges.validate(cfg)


@pytest.mark.parametrize(
    ("coordinator", "num_processes", "process_id", "message"),
    [
        (None, 2, None, "coordinator is missing"),
        (None, None, 1, "coordinator is missing"),
        ("host:1", None, 0, "give --config.distributed.num_processes and"),
        ("host:1", 2, None, "give --config.distributed.num_processes and"),
        ("host:1", 2, 2, "process_id=2: must be below num_processes"),
    ],
)
def test_processes_that_share_a_run_are_named_in_full(coordinator, num_processes, process_id, message):
    cfg = config("table")
    cfg.distributed.update(coordinator=coordinator, num_processes=num_processes, process_id=process_id)
    with pytest.raises(ValueError, match=message):
        ranges.validate(cfg)


@pytest.mark.parametrize(("coordinator", "num_processes", "process_id"), [("auto", None, None), ("host:1", 2, 1)])
def test_processes_that_are_named_in_full_may_share_a_run(coordinator, num_processes, process_id):
    cfg = config("table")
    cfg.distributed.update(coordinator=coordinator, num_processes=num_processes, process_id=process_id)
    ranges.validate(cfg)
