"""The range of every field, and what must hold between fields: what a config is checked by."""

import math
import re

from ml_collections import config_dict

from configs.base import BUILDERS, COMPARED
from dreamprm_jax.types import SUPERVISED

PROBABILITIES = ("mean", "min", "max", "last", "product", "log_mean", "mean_log_odds")
"""Aggregations that give a probability, as a meta loss needs; others are for selection alone."""


def _one_of(*values: str | None):
    return (lambda value: value in values), "one of " + ", ".join(filter(None, values))


def _at_least(minimum: float):
    return (lambda value: value is None or minimum <= value < math.inf), f"at least {minimum}, and finite"


def _above(minimum: float):
    return (lambda value: minimum < value < math.inf), f"above {minimum}, and finite"


def _some_of(values: tuple[str, ...]):
    permitted = "one or more of " + ", ".join(values)
    return (lambda value: 0 < len(value) == len(set(value)) and set(value) <= set(values)), permitted


HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")


def _hub_id():
    return (lambda value: value is None or HUB_ID.fullmatch(value) is not None), "a Hub id, org/name"


FEATURES = ("loss", "prob", "label", "label_probs", "hidden", "relative_loss", "relative_prob")
ACTIVATIONS = {
    "table": ("projected", "clip", "softplus", "sigmoid"),
    "net": ("sigmoid", "softplus", "clip", "softmax"),
}

CHECKS = {
    "task": _one_of("train", "score", "evaluate", "compare", "prepare", "generate", "export"),
    "seed": _at_least(0),
    "data.source": _one_of("files", "embedded"),
    "data.on_error": _one_of("raise", "skip"),
    "data.max_bad_share": ((lambda value: 0 <= value <= 1), "from 0 to 1"),
    "data.max_shapes": _at_least(2),
    "data.threads": _at_least(1),
    "data.workers": _at_least(0),
    "model.param_dtype": _one_of("float32", "bfloat16"),
    "model.moment_dtype": _one_of(None, "float32", "bfloat16"),
    "model.trained": _one_of("all", "language", "adapters"),
    "model.lora_rank": _at_least(1),
    "model.lora_alpha": _above(0),
    "model.compute_dtype": _one_of("float32", "bfloat16"),
    "model.attention": _one_of("auto", "xla", "cudnn"),
    "model.remat": _one_of("none", "dots", "full"),
    "model.scan_unroll": _at_least(1),
    "model.matmul_precision": _one_of("default", "highest"),
    "distributed.num_processes": _at_least(1),
    "distributed.process_id": _at_least(0),
    "mesh.data": _at_least(0),
    "mesh.fsdp": _at_least(1),
    "mesh.tensor": _at_least(1),
    "images.tile_budget": _at_least(1),
    "images.max_tiles": ((lambda value: 1 <= value <= 40), "from 1 to 40"),
    "meta.held_out": ((lambda value: 0 <= value < 1), "at least 0 and below 1"),
    **{
        f"{phase}.{field}": _at_least(minimum)
        for phase in SUPERVISED
        for field, minimum in (("num_steps", 0), ("batch_size", 1), ("lr", 0), ("weight_decay", 0), ("clip_norm", 0))
    },
    "num_steps": _at_least(0),
    "batch_size": _at_least(1),
    "meta_batch_size": _at_least(1),
    "micro_batch_size": _at_least(1),
    "meta_micro_batch_size": _at_least(1),
    "num_inner_steps": _at_least(1),
    "hypergradient": _one_of(
        "auto", "unrolled", "dot", "tangent", "tangent_recomputed", "recompute", "mixed", "identity", "published_fd"
    ),
    "vocabulary_sum": _one_of("exact", "torch_cpu"),
    "ema_decay": ((lambda value: value is None or 0 <= value < 1), "at least 0 and below 1"),
    "step_loss": _one_of("mean", "sum"),
    "aggregate": _one_of(*PROBABILITIES, "sum_logprob", "sum_logit", "mean_odd"),
    "evaluate.judge": _one_of("given", "rules"),
    "evaluate.splitter": _one_of("whole_numbers", "published"),
    "evaluate.step_score": _one_of("full", "two_token"),
    "evaluate.ties": _one_of("first", "last"),
    "evaluate.num_samples": _at_least(1),
    "evaluate.threshold": ((lambda value: value is None or 0 <= value <= 1), "from 0 to 1"),
    "evaluate.held_out": ((lambda value: 0 < value < 1), "between 0 and 1"),
    "evaluate.questions_shown": _at_least(0),
    "evaluate.image_side": _at_least(0),
    "meta_target": _one_of("both", "plus"),
    "meta_loss": _one_of("mse", "cross_entropy"),
    "inner.lr": _at_least(0),
    "inner.weight_decay": _at_least(0),
    "inner.optimizer": _one_of("adamw", "hf_adamw"),
    **{f"{phase}.eps": _above(0) for phase in (*SUPERVISED, "inner")},
    "inner.decay": _one_of("matrices", "all"),
    "inner.clip_norm": _at_least(0),
    "inner.clip_place": _one_of("after", "per_example"),
    "weighting.name": _one_of("uniform", "domain", "table", "net"),
    "weighting.features": _some_of(FEATURES),
    "weighting.steps": _one_of("all", "up_to_first_minus"),
    "weighting.hidden": _at_least(1),
    **{f"{level}.schedule": _one_of("cosine", "constant", "published") for level in ("inner", "outer")},
    **{f"{level}.warmup": ((lambda value: 0 <= value < 1), "at least 0 and below 1") for level in ("inner", "outer")},
    "outer.optimizer": _one_of("per_entry", "adamw", "hf_adamw"),
    "outer.lr": _at_least(0),
    "outer.weight_decay": _at_least(0),
    "outer.clip_norm": _at_least(0),
    "identity_cosine_every": _at_least(0),
    "log_every": _at_least(1),
    "checkpoint_every": _at_least(1),
    "checkpoints_to_keep": _at_least(1),
    "max_skipped": _at_least(1),
    "resume": _one_of("same", "force"),
    "wandb.project": (
        lambda value: value is None or re.fullmatch(r"[^/\\#?%:\s]{1,128}", value) is not None,
        "a name of 1 to 128 characters without white space, / \\ # ? % and :",
    ),
    "wandb.mode": _one_of("online", "offline"),
    "score.history": _one_of("plus", "given"),
    "generate.base_url": (
        lambda value: value is None or re.fullmatch(r"https?://[^@?#\s]+", value) is not None,
        "an http:// or https:// address without user, password and query",
    ),
    "generate.temperature": ((lambda value: value is None or 0 <= value <= 2), "from 0 to 2"),
    "generate.top_p": ((lambda value: value is None or 0 < value <= 1), "above 0 and at most 1"),
    "generate.tokens_field": _one_of("max_tokens", "max_completion_tokens"),
    "generate.on_error": _one_of("stop", "skip"),
    "generate.timeout": _above(0),
    **{f"generate.{field}": _at_least(0) for field in ("seed", "retries", "backoff", "price_input", "price_output")},
    **{
        f"generate.{field}": _at_least(1)
        for field in ("num_candidates", "max_tokens", "max_image_side", "limit", "concurrency")
    },
    "compare.seeds": (
        lambda value: 0 < len(value) == len(set(value)) and all(type(seed) is int and seed >= 0 for seed in value),
        "one or more whole numbers from 0, each once, such as 0,1,2",
    ),
    "compare.methods": _some_of(COMPARED),
    "compare.jobs": _at_least(0),
    "compare.sweep": _one_of("none", "corruption", "meta_size"),
    "compare.sweep_methods": _some_of(COMPARED),
    "prepare.builder": ((lambda value: value is None or value in BUILDERS), "one of " + ", ".join(BUILDERS)),
    "prepare.sample": _at_least(1),
    "prepare.balance": _one_of("none", "source", "outcome", "source_outcome"),
    "prepare.threshold": ((lambda value: 0 <= value < 1), "at least 0 and below 1"),
    "prepare.splitter": _one_of("whole_numbers", "published"),
    "prepare.processes": _at_least(0),
    "export.layout": _one_of("hf", "original"),
    "export.dtype": _one_of("bfloat16", "float32"),
    "export.max_shard_gb": _above(0),
    **{f"export.{field}": _hub_id() for field in ("base_model", "repo")},
    "export.datasets": (
        lambda value: value is None or all(HUB_ID.fullmatch(name) for name in value.split(",")),
        "Hub ids, org/name, with commas between them",
    ),
    "export.license": (
        lambda value: value is None or re.fullmatch(r"[a-z0-9][a-z0-9.+-]*", value) is not None,
        "as the Hub spells it, such as apache-2.0",
    ),
}


def validate(cfg: config_dict.ConfigDict) -> None:
    """Checks every field's range.

    Raises:
      ValueError: names the flag, its value and the permitted range.
    """
    for field, (is_valid, permitted) in CHECKS.items():
        value = cfg
        for part in field.split("."):
            value = value[part]
        if not is_valid(value):
            raise ValueError(f"--config.{field}={_without_secrets(value)}: must be {permitted}")
    if cfg.task == "train" and not cfg.num_steps + cfg.cold_start.num_steps + cfg.pretrain.num_steps:
        raise ValueError(
            "--config.num_steps, --config.cold_start.num_steps and --config.pretrain.num_steps are all 0: there is "
            "nothing to train"
        )
    if cfg.task in ("train", "compare") and cfg.aggregate not in PROBABILITIES:
        raise ValueError(
            f"--config.aggregate={cfg.aggregate}: a meta loss needs a probability: {', '.join(PROBABILITIES)}"
        )
    if cfg.wandb.project and cfg.task not in ("train", "compare"):
        raise ValueError(f"--config.wandb.project={cfg.wandb.project}: task={cfg.task} trains nothing; leave it out")
    if cfg.distributed.coordinator and cfg.task not in ("train", "score", "evaluate"):
        raise ValueError(
            f"--config.distributed.coordinator={cfg.distributed.coordinator}: task={cfg.task} is for one process; "
            "several share training, scores and evaluations"
        )
    _validate_processes(cfg.distributed)
    _validate_held_out(cfg)
    if cfg.prepare.balance != "none" and cfg.prepare.sample is None:
        raise ValueError(
            f"--config.prepare.balance={cfg.prepare.balance}: where all rows are taken there is nothing to balance; "
            "set --config.prepare.sample"
        )
    for whole in ("batch_size", "meta_batch_size"):
        part = whole.replace("batch", "micro_batch")
        if cfg[part] and cfg[whole] % cfg[part]:
            raise ValueError(f"--config.{part}={cfg[part]}: must divide {whole} ({cfg[whole]})")
    for name in (f"{phase}.batch_size" for phase in SUPERVISED if cfg[phase].num_steps and cfg.micro_batch_size):
        size = cfg[name.partition(".")[0]].batch_size
        if size > cfg.micro_batch_size and size % cfg.micro_batch_size:
            raise ValueError(f"--config.micro_batch_size={cfg.micro_batch_size}: must divide {name} ({size}) as well")
    _validate_weighting(cfg)


def _validate_weighting(cfg: config_dict.ConfigDict) -> None:
    relative = [feature for feature in cfg.weighting.features if feature.startswith("relative_")]
    if cfg.weighting.name == "net" and relative and cfg.batch_size == 1:
        raise ValueError(
            f"--config.batch_size=1: weighting.features has {relative[0]}, which compares the rows of a batch; take 2 "
            "or more rows, or other features"
        )
    if cfg.weighting.name == "uniform" and cfg.weighting.init is not None:
        raise ValueError("--config.weighting.init: weighting.name=uniform has nothing to start from; leave it out")
    if cfg.weighting.maximum <= 0:
        raise ValueError(f"--config.weighting.maximum={cfg.weighting.maximum}: must be above 0")
    if cfg.weighting.minimum > cfg.weighting.maximum:
        raise ValueError(
            f"--config.weighting.minimum={cfg.weighting.minimum} is above weighting.maximum={cfg.weighting.maximum}"
        )
    permitted = ACTIVATIONS.get(cfg.weighting.name, (cfg.weighting.activation,))
    if cfg.weighting.activation not in permitted:
        raise ValueError(
            f"--config.weighting.activation={cfg.weighting.activation}: must be one of {', '.join(permitted)} for "
            f"weighting.name={cfg.weighting.name}"
        )


def _without_secrets(value):
    """A value for a message: of an address without what may be a password or a key in it."""
    return re.sub(r"(?<=//)[^/]*@|[?#].*", "[hidden]", value) if isinstance(value, str) else value


def _validate_held_out(cfg: config_dict.ConfigDict) -> None:
    flag = f"--config.meta.held_out={cfg.meta.held_out}"
    if cfg.meta.held_out and cfg.recipe == "published":
        raise ValueError(f"{flag}: the published code holds nothing out; leave it at 0, or take another recipe")
    if cfg.meta.held_out and cfg.meta.order is not None:
        raise ValueError(f"{flag}: meta.order replays rows exactly, whichever they are; give one of the two")


def _validate_processes(given: config_dict.ConfigDict) -> None:
    """A process that is alone without knowing would write the files that others write too."""
    count, number = given.num_processes, given.process_id
    if not given.coordinator and (count is not None or number is not None):
        raise ValueError(
            "--config.distributed.coordinator is missing: num_processes and process_id are of processes that share a "
            "run; give HOST:PORT of the first, or auto"
        )
    if given.coordinator not in (None, "auto") and (count is None or number is None):
        raise ValueError(
            f"--config.distributed.coordinator={given.coordinator}: give --config.distributed.num_processes and "
            "--config.distributed.process_id too"
        )
    if count is not None and number is not None and number >= count:
        raise ValueError(
            f"--config.distributed.process_id={number}: must be below num_processes ({count}), as processes are "
            "numbered from 0"
        )
