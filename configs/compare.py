"""The embedded experiment: every method from the same cold start, by seeds, with intervals.

    python run.py --config=configs/compare.py
    python run.py --config=configs/compare.py --config.compare.seeds=20 --config.compare.methods="('uniform','table')"
    python run.py --config=configs/compare.py --config.compare.sweep=corruption     and meta_size

A method is its own config file (configs/table.py, ...), from the seed's cold start (configs/cold_start.py).
"identity" is the published formula in place of the exact meta-gradient, at the same rates: both outer optimizers divide
by the gradient's own size. "clean" is uniform training without the corrupted rows, the upper reference. A flag that
sets another field sets it for all parts.
Takes no arguments: paper-scale data has no truth to compare with.
"""

from configs import base, cold_start, domain, net, ranges, table, uniform
from dreamprm_jax.errors import InputError

_TRAINED = {"uniform": uniform, "domain": domain, "table": table, "net": net}

# What makes a part what it is; the flag to use instead.
_OWN_FIELDS = {
    "seed": "--config.compare.seeds",
    "weighting.name": "--config.compare.methods",
    "hypergradient": "--config.compare.methods",
    "noisy_steps.drop_corrupted": "--config.compare.methods",
    "model.checkpoint": "configs/table.py and its neighbours",
    "data": "configs/table.py and its neighbours",
    "train.path": "configs/table.py and its neighbours",
    "meta.path": "configs/table.py and its neighbours",
}


def get_config(arguments: str = ""):
    """The record of the experiment; see the module's docstring."""
    base.split_arguments(arguments, {})
    cfg, _ = base.training_config("")
    cfg.task = "compare"
    return cfg.lock()


def part_configs(cfg, given=()) -> dict:
    """The config of "cold_start" and of every method of `base.COMPARED`, but for seed and checkpoint.

    Args:
      cfg: a config of this file; what differs from `get_config()` is carried over to every part. `num_steps` counts
        inner steps, as in configs/domain.py, so that every method has the same budget.
      given: dotted fields that are carried over at any value: a flag may say what is the default here, and another
        value in a method's own file.

    Raises:
      InputError: a field that a part must not take over, or cannot.
    """
    changes = _changes(cfg, given)
    for field, instead in _OWN_FIELDS.items():
        if field in changes:
            raise InputError(f"--config.{field}: the comparison sets it for each part; leave it out, or use {instead}")
    parts = {"cold_start": cold_start.get_config(), **{name: _method(name) for name in base.COMPARED}}
    for name, part in parts.items():
        part.update_from_flattened_dict(changes)
        if name == "cold_start":
            part.num_steps = 0
        else:
            if "num_steps" in changes:
                part.num_steps = max(1, part.num_steps // part.num_inner_steps)
            _start_from_checkpoint(part)
        try:
            ranges.validate(part)
        except ValueError as error:
            raise InputError(f"{error} (in the part {name})") from error
    return parts


def _changes(cfg, given) -> dict:
    """The fields that a flag has set, dotted; those of `compare` are not the parts' own."""
    default = _flat(get_config())
    return {
        field: value
        for field, value in _flat(cfg).items()
        if (value != default[field] or field in given) and not field.startswith("compare.")
    }


def _flat(cfg, prefix: str = "") -> dict:
    found = {}
    for key, value in cfg.items():
        found |= _flat(value, f"{prefix}{key}.") if hasattr(value, "lock") else {prefix + key: value}
    return found


def _method(name: str):
    if name == "clean":
        cfg = uniform.get_config()
        cfg.noisy_steps.drop_corrupted = True
        return cfg
    weighting, _, estimator = name.partition("_")
    cfg = _TRAINED[weighting].get_config()
    if estimator:
        cfg.hypergradient = estimator
    return cfg


def _start_from_checkpoint(cfg) -> None:
    """No cold start of its own, nor the rows of one: the other splits are the same without them."""
    cfg.pretrain.num_steps = cfg.cold_start.num_steps = 0
    cfg.noisy_steps.pretrain, cfg.noisy_steps.cold_start = 0, 1
