"""Every field once: its meaning, unit and range. The other files here set values; they add no fields.

An explicit flag beats a config's arguments, the arguments beat the values below. Fields without a default
are placeholders, so that a flag can set them.
"""

from ml_collections import config_dict

from dreamprm_jax.data import noisy_steps


def get_config() -> config_dict.ConfigDict:
    """All fields of every task, at their defaults."""
    cfg = config_dict.ConfigDict()
    cfg.task = "train"  # train | score
    cfg.recipe = "corrected"  # which reading of the paper the values follow: paper | corrected
    cfg.seed = 0  # data order, embedded benchmark and fresh parameters

    cfg.model = config_dict.ConfigDict()
    # A directory with config.json and *.safetensors (either InternVL layout), a Hub id ("org/name" or
    # "org/name@revision"), or a workdir of ours. None: the embedded benchmark's tiny model.
    cfg.model.checkpoint = config_dict.placeholder(str)
    cfg.model.tokenizer = config_dict.placeholder(str)  # directory with tokenizer.json; None: beside the weights
    cfg.model.param_dtype = "float32"  # of parameters and moments: float32 | bfloat16
    cfg.model.compute_dtype = "float32"  # of activations: float32 | bfloat16
    cfg.model.remat = "none"  # what the backward pass recomputes: none | dots (all but products) | full
    cfg.model.matmul_precision = "default"  # default | highest (float32 parity on an accelerator)

    cfg.images = config_dict.ConfigDict()
    cfg.images.max_tiles = 6  # tiles per image without the thumbnail, 1 to 40

    for level in ("train", "meta"):
        cfg[level] = config_dict.ConfigDict()
        cfg[level].path = config_dict.placeholder(str)  # .json or .jsonl; None: the embedded benchmark
        cfg[level].images = config_dict.placeholder(str)  # image root; None: the file's own directory
        cfg[level].order = config_dict.placeholder(str)  # JSON list of row numbers to replay; None: shuffle

    cfg.noisy_steps = config_dict.ConfigDict(noisy_steps.Sizes()._asdict())  # the embedded benchmark: see Sizes

    cfg.cold_start = config_dict.ConfigDict()
    cfg.cold_start.num_steps = 0  # plain supervised steps before the weighting starts, >= 0
    cfg.cold_start.batch_size = 1  # rows
    cfg.cold_start.lr = 5e-5  # peak of the warmed-up cosine
    cfg.cold_start.weight_decay = 0.05  # per unit of learning rate

    cfg.num_steps = 0  # bilevel iterations: one inner and one outer step each, >= 0
    cfg.batch_size = 1  # training rows per iteration
    cfg.meta_batch_size = 1  # meta rows per iteration
    cfg.hypergradient = "unrolled"  # estimator of the meta-gradient
    cfg.step_loss = "mean"  # over the steps of a chain: mean (published code) | sum (paper, Eq. 1)
    cfg.aggregate = "mean"  # step scores -> response score, in the meta loss and in selection
    # What the meta set asks for: both (the published reading: "+" at every step of a right answer, "-" at every step of
    # a wrong one) | plus (the chain's aggregated P("+") is the probability that its answer is right).
    cfg.meta_target = "both"
    cfg.meta_loss = "mse"  # of the aggregated probability of the target label: mse | cross_entropy

    cfg.inner = config_dict.ConfigDict()
    cfg.inner.lr = 5e-5  # peak of the warmed-up cosine
    cfg.inner.weight_decay = 0.01  # decoupled, on matrices and embeddings
    cfg.inner.clip_norm = config_dict.placeholder(float)  # of the weighted gradient; None: no clip

    cfg.weighting = config_dict.ConfigDict()
    cfg.weighting.name = "uniform"  # uniform | table
    cfg.weighting.minimum = 0.0  # the table is projected to [minimum, maximum] after each outer step
    cfg.weighting.maximum = 3.0
    cfg.weighting.init = config_dict.placeholder(str)  # safetensors file with initial meta_params

    cfg.outer = config_dict.ConfigDict()
    cfg.outer.optimizer = "per_entry"  # per_entry (RMSprop by each entry's own history) | adamw (dense)
    cfg.outer.lr = 5e-3  # peak of the warmed-up cosine
    cfg.outer.weight_decay = 1e-3  # per_entry: towards 1; adamw: towards 0, as in the paper
    cfg.outer.clip_norm = config_dict.placeholder(float)  # of the meta-gradient over the inner rate; None: no clip

    cfg.log_every = 1  # steps per line of metrics.jsonl, >= 1
    cfg.log_meta_grad = False  # also write each step's meta-gradient
    cfg.checkpoint_every = 1000  # steps, >= 1; the end of each phase is always saved
    cfg.checkpoints_to_keep = 2  # newest ones, >= 1

    cfg.input = config_dict.ConfigDict()  # task=score
    cfg.input.path = config_dict.placeholder(str)  # chains to score, .json or .jsonl
    cfg.input.images = config_dict.placeholder(str)  # image root; None: the file's own directory
    cfg.output = config_dict.placeholder(str)  # scores, JSON lines; None: scores.jsonl in the workdir
    cfg.score = config_dict.ConfigDict()
    cfg.score.history = "plus"  # labels in the context: plus (every "+", as at selection time) | given (the file's)
    return cfg


def split_arguments(arguments: str, allowed: dict[str, tuple[str, ...]]) -> dict[str, str]:
    """`"internvl3_1b,paper"` -> `{"scale": "internvl3_1b", "recipe": "paper"}`, in any order.

    Raises:
      ValueError: an argument that no group of `allowed` has, or two of one group.
    """
    chosen: dict[str, str] = {}
    for argument in filter(None, arguments.split(",")):
        group = next((name for name, values in allowed.items() if argument in values), None)
        if group is None:
            known = ", ".join(value for values in allowed.values() for value in values)
            raise ValueError(f"config argument {argument!r} is not known; choose from {known}")
        if group in chosen:
            raise ValueError(f"config arguments {chosen[group]!r} and {argument!r} are both a {group}; give one")
        chosen[group] = argument
    return chosen


TRAINING_ARGUMENTS = {"scale": ("internvl3_1b",), "recipe": ("paper", "corrected")}


def paper_scale(cfg: config_dict.ConfigDict, recipe: str) -> None:
    """The paper's scale: InternVL3-1B from a checkpoint, real files, bfloat16 compute on float32 masters."""
    cfg.recipe = recipe
    cfg.model.checkpoint = "OpenGVLab/InternVL3-1B"
    cfg.model.compute_dtype = "bfloat16"
    cfg.model.remat = "full"
    cfg.inner.lr, cfg.inner.weight_decay = 5e-5, 0.01  # REFERENCE: paper, section "implementation details"
    cfg.outer.lr, cfg.outer.weight_decay = 5e-3, 1e-3
    cfg.num_steps = 100_000
    if recipe == "paper":
        cfg.batch_size = cfg.meta_batch_size = 1
        cfg.step_loss = "sum"
        cfg.outer.optimizer = "adamw"
        cfg.weighting.minimum = -1.0
    else:
        cfg.batch_size = cfg.meta_batch_size = 8
        cfg.num_steps = 12_500  # the same number of examples


def embedded_scale(cfg: config_dict.ConfigDict, recipe: str) -> None:
    """noisy_steps on a tiny InternVL: two CPU cores, minutes, nothing downloaded."""
    cfg.recipe = recipe
    cfg.images.max_tiles = 1
    cfg.cold_start.num_steps = 1000
    cfg.cold_start.batch_size = 64
    cfg.cold_start.lr = 4e-3
    cfg.cold_start.weight_decay = 0.01
    cfg.num_steps = 800
    cfg.batch_size = 64
    cfg.meta_batch_size = 128
    cfg.aggregate = "product"  # a chain is right when every step is
    cfg.meta_target = "plus"
    cfg.inner.lr = 2e-4
    cfg.outer.lr = 0.2
    cfg.outer.weight_decay = 0.0
    cfg.checkpoint_every = 200


def _one_of(*values: str):
    return (lambda value: value in values), "one of " + ", ".join(values)


def _at_least(minimum: float):
    return (lambda value: value is None or value >= minimum), f"at least {minimum}"


CHECKS = {
    "task": _one_of("train", "score"),
    "seed": _at_least(0),
    "model.param_dtype": _one_of("float32", "bfloat16"),
    "model.compute_dtype": _one_of("float32", "bfloat16"),
    "model.remat": _one_of("none", "dots", "full"),
    "model.matmul_precision": _one_of("default", "highest"),
    "images.max_tiles": ((lambda value: 1 <= value <= 40), "from 1 to 40"),
    "cold_start.num_steps": _at_least(0),
    "cold_start.batch_size": _at_least(1),
    "cold_start.lr": _at_least(0),
    "cold_start.weight_decay": _at_least(0),
    "num_steps": _at_least(0),
    "batch_size": _at_least(1),
    "meta_batch_size": _at_least(1),
    "hypergradient": _one_of("unrolled"),
    "step_loss": _one_of("mean", "sum"),
    "aggregate": _one_of("mean", "min", "max", "last", "product", "log_mean"),
    "meta_target": _one_of("both", "plus"),
    "meta_loss": _one_of("mse", "cross_entropy"),
    "inner.lr": _at_least(0),
    "inner.weight_decay": _at_least(0),
    "inner.clip_norm": _at_least(0),
    "weighting.name": _one_of("uniform", "table"),
    "outer.optimizer": _one_of("per_entry", "adamw"),
    "outer.lr": _at_least(0),
    "outer.weight_decay": _at_least(0),
    "outer.clip_norm": _at_least(0),
    "log_every": _at_least(1),
    "checkpoint_every": _at_least(1),
    "checkpoints_to_keep": _at_least(1),
    "score.history": _one_of("plus", "given"),
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
            raise ValueError(f"--config.{field}={value}: must be {permitted}")
    if cfg.weighting.minimum > cfg.weighting.maximum:
        raise ValueError(
            f"--config.weighting.minimum={cfg.weighting.minimum} is above weighting.maximum={cfg.weighting.maximum}"
        )
