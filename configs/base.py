"""Every field once: its meaning, unit and range. The other files here set values; they add no fields.

An explicit flag beats a config's arguments, the arguments beat the values below. Fields without a default
are placeholders, so that a flag can set them.
"""

from ml_collections import config_dict

from dreamprm_jax.data import noisy_steps
from dreamprm_jax.types import SUPERVISED


def get_config() -> config_dict.ConfigDict:
    """All fields of every task, at their defaults."""
    cfg = config_dict.ConfigDict()
    cfg.task = "train"  # train | score | evaluate | compare | prepare | generate | export
    cfg.recipe = "corrected"  # which reading of the method the values follow: published | paper | corrected
    cfg.seed = 0  # data order, embedded benchmark and fresh parameters

    cfg.model = config_dict.ConfigDict()
    # A directory with config.json and *.safetensors (either InternVL layout), a Hub id ("org/name" or
    # "org/name@revision"), or a workdir of ours. None: the embedded benchmark's tiny model.
    cfg.model.checkpoint = config_dict.placeholder(str)
    # A directory with tokenizer.json, or a Hub id that has one; None: beside the weights
    cfg.model.tokenizer = config_dict.placeholder(str)
    cfg.model.param_dtype = "float32"  # of the trained parameters: float32 | bfloat16; adapters are float32 either way
    # Of the inner level's moments: float32 | bfloat16 (the second one rounded at random). None: as the parameters
    cfg.model.moment_dtype = config_dict.placeholder(str)
    # What training moves: all | language (the vision tower and the projector are frozen) | adapters (low-rank additions
    # to the language model's projections, LoRA; all else is frozen). What is frozen is kept in the compute type.
    # Pretraining, the embedded benchmark's stand-in for a checkpoint, moves everything.
    cfg.model.trained = "all"
    cfg.model.lora_rank = 16  # of the adapters, >= 1
    cfg.model.lora_alpha = 32.0  # an adapter's product counts alpha / rank, > 0
    cfg.model.compute_dtype = "float32"  # of activations: float32 | bfloat16
    # auto | xla | cudnn: cudnn is fused (NVIDIA GPUs, bfloat16), and has no forward mode, which some estimators need
    # (docs/bilevel.md); auto takes it where it serves
    cfg.model.attention = "auto"
    # What the backward pass recomputes: none | full (whole layers) | dots (all but projections and fused attention)
    cfg.model.remat = "none"
    # Layers per turn of the loop over layers, >= 1: more compile longer and may run faster. None: the model's own (1)
    cfg.model.scan_unroll = config_dict.placeholder(int)
    cfg.model.matmul_precision = "default"  # default | highest (float32 parity on an accelerator)

    # Devices that share the work, data * fsdp * tensor of them (docs/distributed.md): data divides the batch; fsdp the
    # batch, and the large parameters with their moments; tensor heads and hidden widths
    cfg.mesh = config_dict.ConfigDict()
    cfg.mesh.data = 1  # >= 0; 0: as many as are left
    cfg.mesh.fsdp = 1  # >= 1
    cfg.mesh.tensor = 1  # >= 1, a divisor of the heads of both towers

    # Several processes that share the work, on one machine or many (docs/distributed.md). coordinator: HOST:PORT of the
    # first, with the other two given | auto (SLURM, Open MPI, Kubernetes, TPU pods say it all). None: one process
    cfg.distributed = config_dict.ConfigDict()
    cfg.distributed.coordinator = config_dict.placeholder(str)
    cfg.distributed.num_processes = config_dict.placeholder(int)  # >= 1
    cfg.distributed.process_id = config_dict.placeholder(int)  # of this one, from 0

    cfg.images = config_dict.ConfigDict()
    cfg.images.max_tiles = 6  # tiles per image without the thumbnail, 1 to 40
    # Tiles per row, thumbnails included, which its images share alike; None: no limit but the model's context
    cfg.images.tile_budget = config_dict.placeholder(int)

    cfg.data = config_dict.ConfigDict()
    cfg.data.source = "files"  # files (train.path, meta.path) | embedded (noisy_steps; with a path given, that file)
    # A row that cannot be used (not read, too long, no image): raise (name it and end) | skip (count, tell, go on)
    cfg.data.on_error = "raise"
    # Of a file's rows (task=prepare: of all rows, and of those whose images are looked at): more end the run, 0 to 1
    cfg.data.max_bad_share = 0.01
    # Padded shapes of the batches that feed one step, training and meta set together, >= 2. Each pair that meets (each
    # shape where there is no meta set) is a program to compile
    cfg.data.max_shapes = 11
    cfg.data.threads = 2  # that read ahead, in scoring too, >= 1
    cfg.data.workers = 0  # processes that read ahead, each with its threads; 0: threads of the run's own
    for level in ("train", "meta"):
        cfg[level] = config_dict.ConfigDict()
        cfg[level].path = config_dict.placeholder(str)  # .json, .jsonl (also .gz) or a prepared directory
        cfg[level].images = config_dict.placeholder(str)  # image root; None: the file's own directory
        cfg[level].order = config_dict.placeholder(str)  # JSON list of row numbers to replay; None: shuffle

    # Share of the meta set's questions that no step sees, in [0, 1): the loss on them at checkpoints of the weighted
    # phase tells the best one, which is kept and scores (docs/bilevel.md). 0: none, and the last one scores
    cfg.meta.held_out = 0.0

    cfg.noisy_steps = config_dict.ConfigDict(noisy_steps.Sizes()._asdict())  # the embedded benchmark: see Sizes

    # Plain supervised training before the weighting starts. pretrain: the embedded benchmark's stand-in for a
    # pretrained model, on its own dialogues (a run on files has no such phase); cold_start: on labelled chains.
    for phase in SUPERVISED:
        cfg[phase] = config_dict.ConfigDict()
        cfg[phase].num_steps = 0  # >= 0
        cfg[phase].batch_size = 1  # rows
        cfg[phase].lr = 5e-5  # peak; its course is the inner level's schedule
        cfg[phase].eps = 1e-8  # of the inner level's optimizer, > 0
        cfg[phase].weight_decay = 0.05  # per unit of learning rate
        cfg[phase].clip_norm = config_dict.placeholder(float)  # of the gradient; None: no clip

    cfg.num_steps = 0  # bilevel iterations: num_inner_steps inner steps and one outer step each, >= 0
    cfg.num_inner_steps = 1  # inner steps that each meta-gradient looks through, >= 1
    cfg.batch_size = 1  # training rows per inner step
    cfg.meta_batch_size = 1  # meta rows per iteration
    # Training rows at a time on each device, a divisor of its part of the batch, the gradient added up: saves memory.
    # None: all at once; where each row has a gradient of its own (dot, recompute, clip_place=per_example) one
    cfg.micro_batch_size = config_dict.placeholder(int)
    # Meta rows at a time on each device, in the same way. None: all at once
    cfg.meta_micro_batch_size = config_dict.placeholder(int)
    # Estimator of the meta-gradient (docs/bilevel.md): auto (the cheapest exact one) | unrolled | dot | tangent |
    # tangent_recomputed | recompute | mixed | identity | published_fd
    cfg.hypergradient = "auto"
    # Of a moving average of the parameters, which then scores; in [0, 1)
    cfg.ema_decay = config_dict.placeholder(float)
    # Train on each step's share of right continuations, where rows have it ("soft_labels"), in place of "+" or "-"
    cfg.soft_labels = False
    cfg.step_loss = "mean"  # over the steps of a chain: mean (published code) | sum (paper, Eq. 1)
    # Sum of the exponentials over the vocabulary: exact | torch_cpu (with the float32 rounding of torch's CPU kernel,
    # which recorded runs contain; on an accelerator the same as exact)
    cfg.vocabulary_sum = "exact"
    # Step scores -> response score, in the meta loss and in selection: mean | min | max | last | product | log_mean |
    # mean_log_odds (DreamPRM); for selection alone: sum_logprob | sum_logit | mean_odd
    cfg.aggregate = "mean"
    # What the meta set asks for: both (the published reading: "+" at every step of a right answer, "-" at every step of
    # a wrong one) | plus (the chain's aggregated P("+") is the probability that its answer is right).
    cfg.meta_target = "both"
    cfg.meta_loss = "mse"  # of the aggregated probability of the target label: mse | cross_entropy

    cfg.inner = config_dict.ConfigDict()
    cfg.inner.lr = 5e-5  # peak
    cfg.inner.schedule = "cosine"  # cosine | constant | published (a cosine whose first rate is 0); after the warm-up
    cfg.inner.warmup = 0.05  # linear, share of the phase's steps, in [0, 1)
    cfg.inner.optimizer = "adamw"  # adamw (meta-safe) | hf_adamw (transformers' own, as published); cold start too
    cfg.inner.eps = 1e-8  # of the optimizer, > 0
    cfg.inner.weight_decay = 0.01  # decoupled, per unit of learning rate
    cfg.inner.decay = "matrices"  # what is decayed: matrices (and embeddings) | all; hf_adamw always decays all
    cfg.inner.clip_norm = config_dict.placeholder(float)  # None: no clip
    cfg.inner.clip_place = "after"  # after (the weighted gradient) | per_example (each example's, before its weight)

    cfg.weighting = config_dict.ConfigDict()
    cfg.weighting.name = "uniform"  # uniform | domain | table | net
    # How a raw value becomes a weight. table: projected | clip | softplus | sigmoid;
    # net: sigmoid | softplus | clip | softmax (within the batch). domain: always softplus over its mean.
    cfg.weighting.activation = "projected"
    cfg.weighting.minimum = 0.0  # the table's range: projected to it after each outer step, or clipped on reading
    cfg.weighting.maximum = 3.0
    # What the net sees of each step: loss, prob (of "+" over the two labels), label, label_probs (published), hidden;
    # relative_loss and relative_prob: in standard deviations from the batch's other steps of the same label
    cfg.weighting.features = ("loss", "prob", "label")
    cfg.weighting.steps = "all"  # which steps it sees: all | up_to_first_minus
    cfg.weighting.hidden = 10  # width of the net's hidden layer, >= 1
    # The net's output layer starts at 0: equal weights; False: at random, as published
    cfg.weighting.zero_output = True
    cfg.weighting.detached = True  # False: the inner gradient flows through the net's features, as published
    cfg.weighting.init = config_dict.placeholder(str)  # safetensors file with initial meta_params

    cfg.outer = config_dict.ConfigDict()
    cfg.outer.optimizer = "per_entry"  # per_entry (RMSprop by each entry's own history) | adamw | hf_adamw (dense)
    cfg.outer.lr = 5e-3  # peak
    cfg.outer.schedule = "cosine"  # as the inner level's
    cfg.outer.warmup = 0.05
    cfg.outer.weight_decay = 1e-3  # per_entry: towards 1; the others: towards 0, as in the paper
    # Of the meta-gradient (an exact one is divided by the inner rate first); None: no clip
    cfg.outer.clip_norm = config_dict.placeholder(float)

    cfg.log_every = 1  # steps per line of metrics.jsonl, >= 1
    cfg.log_meta_grad = False  # also write each step's meta-gradient
    cfg.identity_cosine_every = 0  # iterations between cosines of the meta-gradient with `identity`; 0: never
    cfg.checkpoint_every = 1000  # steps, >= 1; the end of each phase is always saved
    cfg.checkpoints_to_keep = 2  # newest ones, >= 1
    # Steps in a row whose loss or gradient is not finite: none of them is applied, and so many end the run, >= 1
    cfg.max_skipped = 3
    # A workdir whose run had another config or other data: same (refuse, and name the difference) | force (go on from
    # its newest checkpoint all the same; config.json keeps what it was)
    cfg.resume = "same"

    # Metrics to Weights & Biases too (requirements-wandb.txt; docs/tutorial.md, Watching a run)
    cfg.wandb = config_dict.ConfigDict()
    cfg.wandb.project = config_dict.placeholder(str)  # its name there; None: off
    # online (as `wandb login` has it; a server that cannot be reached makes it offline) | offline (into WORKDIR/wandb,
    # which `wandb sync` sends later)
    cfg.wandb.mode = "online"

    cfg.input = config_dict.ConfigDict()  # task=score, task=generate
    # Chains to score (.json, .jsonl), or questions to answer (also .parquet, or a directory, prepared or not)
    cfg.input.path = config_dict.placeholder(str)
    cfg.input.images = config_dict.placeholder(str)  # image root; None: the file's own directory
    # Scores or candidates, JSON lines; None: scores.jsonl or candidates.jsonl in the workdir. task=export: the
    # directory; None: the workdir
    cfg.output = config_dict.placeholder(str)
    cfg.score = config_dict.ConfigDict()
    cfg.score.history = "plus"  # labels in the context: plus (every "+", as at selection time) | given (the file's)

    # task=evaluate: candidates to choose from (docs/evaluation.md has the forms), and chains whose steps were judged
    for name in ("candidates", "benchmark"):
        cfg[name] = config_dict.ConfigDict()
        cfg[name].path = config_dict.placeholder(str)  # candidates: None, without a benchmark: noisy_steps' test set
        cfg[name].images = config_dict.placeholder(str)  # image root; None: the file's own directory
        # Scores of each chain, JSON lines in its order ("step_scores"), in place of a model
        cfg[name].scores = config_dict.placeholder(str)
    cfg.evaluate = config_dict.ConfigDict()  # task=evaluate
    cfg.evaluate.judge = "given"  # what is right: given (the file's word) | rules (MMMU's)
    cfg.evaluate.splitter = "whole_numbers"  # of a response into steps: whole_numbers | published
    cfg.evaluate.step_score = "full"  # P("+") over the full vocabulary | two_token: over "+" and "-"
    cfg.evaluate.ties = "first"  # of equal highest scores: first | last (as published)
    cfg.evaluate.num_samples = 400  # sub-samples of the candidates for each number of them, >= 1
    # A step is right above it, in [0, 1]; None: the one of highest macro-F1 on a part of the chains that is held out
    cfg.evaluate.threshold = config_dict.placeholder(float)
    cfg.evaluate.held_out = 0.2  # that part, a share of the questions, in (0, 1)
    cfg.evaluate.questions_shown = 2000  # in the page's browser, the first ones, >= 0
    cfg.evaluate.image_side = 400  # pixels, of the pictures in the page; 0: none

    cfg.generate = config_dict.ConfigDict()  # task=generate
    cfg.generate.model = config_dict.placeholder(str)  # as the server calls it
    cfg.generate.base_url = config_dict.placeholder(str)  # such as http://localhost:8000/v1; None: OpenAI's own
    # Environment variable with the API key, which nothing else may hold; "": send none. A local server needs none.
    cfg.generate.api_key_variable = "OPENAI_API_KEY"
    cfg.generate.num_candidates = 8  # per question, >= 1; the paper: 8 at test, 4 for the meta set
    cfg.generate.temperature = config_dict.placeholder(float)  # 0 to 2; None: the server's own
    cfg.generate.top_p = config_dict.placeholder(float)  # in (0, 1]; None: the server's own
    cfg.generate.max_tokens = 4096  # per candidate, >= 1
    # What the server calls that: max_tokens | max_completion_tokens (OpenAI's reasoning models: thoughts count too)
    cfg.generate.tokens_field = "max_tokens"
    cfg.generate.seed = config_dict.placeholder(int)  # each request gets one of its own, made from it; None: send none
    cfg.generate.extra = config_dict.placeholder(str)  # further fields of each request: a JSON object
    # Prompts, as text or a text file: {question} and {options} for choices, {question} for open ones. None: our own
    cfg.generate.prompt = config_dict.placeholder(str)
    cfg.generate.prompt_open = config_dict.placeholder(str)
    cfg.generate.max_image_side = config_dict.placeholder(int)  # pixels, larger images are scaled; None: as stored
    cfg.generate.limit = config_dict.placeholder(int)  # the first so many questions; None: all
    cfg.generate.concurrency = 8  # requests at a time, >= 1
    cfg.generate.timeout = 600.0  # seconds for one request, > 0
    cfg.generate.retries = 6  # after 429, 5xx, timeouts and broken connections, >= 0
    cfg.generate.backoff = 1.0  # seconds before the first retry, doubled with each up to 60; >= 0
    cfg.generate.on_error = "stop"  # a question that the server refuses: stop | skip (and leave it out)
    cfg.generate.price_input = config_dict.placeholder(float)  # per million prompt tokens, any currency; None: no cost
    cfg.generate.price_output = config_dict.placeholder(float)  # per million tokens of the candidates

    cfg.compare = config_dict.ConfigDict()  # task=compare
    cfg.compare.seeds = (20, 21, 22, 23, 24)  # each a benchmark and a cold start of its own; 0 or above, each once
    cfg.compare.methods = COMPARED  # any of COMPARED: configs/compare.py says what each is
    cfg.compare.jobs = 0  # trainings side by side, each on one core; 0: as many as cores; an accelerator takes one
    # What is varied besides: none | corruption (of the training rows) | meta_size (questions): dreamprm_jax/sweeps.py
    cfg.compare.sweep = "none"
    cfg.compare.sweep_methods = ("uniform", "table", "net")  # in place of `methods` where something is varied

    cfg.prepare = config_dict.ConfigDict()  # task=prepare: raw files -> OUTPUT/BUILDER/VERSION
    cfg.prepare.builder = config_dict.placeholder(str)  # the config's argument: one of BUILDERS
    # Raw files: one, a directory or a pattern ("MMMU/*/validation-*.parquet"); .jsonl, .json (a list), either with .gz,
    # .parquet. mmmu_pro: its questions
    cfg.prepare.source = config_dict.placeholder(str)
    cfg.prepare.images = config_dict.placeholder(str)  # image root; None: the source, or the directory that it is in
    # mmmu_pro (needed), mmmu: candidate responses, {"id", "response", "true_false"?}; a file or a directory
    cfg.prepare.responses = config_dict.placeholder(str)
    # Questions that must not come in (the test set's): a raw file, a directory, or a prepared set of questions. Rows
    # are left out by the question's id, by its text, and by its images' pixels
    cfg.prepare.exclude = config_dict.placeholder(str)
    cfg.prepare.output = config_dict.placeholder(str)  # None: the workdir
    cfg.prepare.sample = config_dict.placeholder(int)  # rows taken, by `seed`; None: all
    # What a sample has equal shares of, as far as there are rows: none | source (the domain) | outcome (is the answer
    # right; without one, are all steps) | source_outcome
    cfg.prepare.balance = "none"
    cfg.prepare.threshold = 0.0  # visualprm400k: a step is "+" above this share of right rollouts, in [0, 1)
    cfg.prepare.soft_labels = True  # visualprm400k: also keep the share itself
    cfg.prepare.splitter = "whole_numbers"  # mmmu_pro, a response's steps: whole_numbers | published
    cfg.prepare.processes = 0  # side by side; 0: as many as cores

    cfg.export = config_dict.ConfigDict()  # task=export: model.checkpoint -> a directory that others load
    # Names of the tensors, form of config.json: hf (transformers' own InternVL) | original (OpenGVLab's)
    cfg.export.layout = "hf"
    cfg.export.dtype = "bfloat16"  # of the tensors: bfloat16 (rounded once; as the published weights) | float32
    cfg.export.max_shard_gb = 5.0  # 10^9 bytes; larger weights are several files and an index, > 0
    # What a run does not know, for the model card; None: left out. The license as the Hub spells it
    cfg.export.license = config_dict.placeholder(str)
    cfg.export.base_model = config_dict.placeholder(str)  # None: the Hub id that the run started from, if it did
    cfg.export.datasets = config_dict.placeholder(str)  # Hub ids, with commas between them
    cfg.export.repo = config_dict.placeholder(str)  # upload to this Hub repository, "org/name"; None: do not
    cfg.export.private = True  # only a private repository is uploaded to, and a new one is made so
    return cfg


BUILDERS = ("visualprm400k", "mmmu_pro", "mmmu", "visualprocessbench")
COMPARED = ("uniform", "domain", "table", "net", "table_identity", "net_identity", "clean")


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
            if not known:
                raise ValueError(f"config argument {argument!r}: this config takes none")
            raise ValueError(f"config argument {argument!r} is not known; choose from {known}")
        if group in chosen:
            raise ValueError(f"config arguments {chosen[group]!r} and {argument!r} are both a {group}; give one")
        chosen[group] = argument
    return chosen


TRAINING_ARGUMENTS = {"scale": ("internvl3_1b",), "recipe": ("published", "paper", "corrected")}


def training_config(arguments: str) -> tuple[config_dict.ConfigDict, bool]:
    """The config of a training experiment, and whether it is the embedded one; not yet locked.

    The scale says where model and data come from and how long to train; the recipe says what the method does. Without
    a scale the default recipe is `corrected`, at `internvl3_1b` it is `paper`.
    """
    chosen = split_arguments(arguments, TRAINING_ARGUMENTS)
    cfg, embedded = get_config(), "scale" not in chosen
    recipe = chosen.get("recipe", "corrected" if embedded else "paper")
    cfg.recipe = recipe
    {"published": published, "paper": paper, "corrected": corrected}[recipe](cfg)
    (embedded_scale if embedded else paper_scale)(cfg)
    return cfg, embedded


def published(cfg: config_dict.ConfigDict) -> None:
    """What the released code does (REFERENCE 3), finite difference included."""
    cfg.hypergradient = "published_fd"
    cfg.inner.schedule = cfg.outer.schedule = "published"
    cfg.vocabulary_sum = "torch_cpu"
    cfg.batch_size = cfg.meta_batch_size = 1
    cfg.inner.optimizer = "hf_adamw"
    cfg.inner.eps = cfg.cold_start.eps = 1e-6
    cfg.inner.clip_norm = cfg.outer.clip_norm = cfg.cold_start.clip_norm = 1.0
    cfg.outer.optimizer = "hf_adamw"
    cfg.weighting.activation = "clip"
    cfg.weighting.minimum, cfg.weighting.maximum = -1.0, 3.0


def paper(cfg: config_dict.ConfigDict) -> None:
    """The text, with the exact meta-gradient."""
    cfg.step_loss = "sum"  # Eq. 1
    cfg.batch_size = cfg.meta_batch_size = 1
    cfg.inner.decay = "all"
    cfg.outer.optimizer = "adamw"
    cfg.weighting.minimum, cfg.weighting.maximum = -1.0, 3.0


def corrected(cfg: config_dict.ConfigDict) -> None:
    """Our best: docs/bilevel.md says for each point what was chosen and what it is worth."""
    cfg.batch_size = cfg.meta_batch_size = 8
    cfg.aggregate = "product"  # a chain is right when every step is
    cfg.meta_target = "plus"
    # A start that is still unsure says little about single rows, a fitted model most: late steps count as well.
    cfg.outer.schedule, cfg.outer.warmup = "constant", 0.25


def paper_scale(cfg: config_dict.ConfigDict) -> None:
    """The paper's scale: InternVL3-1B from a checkpoint, real files, bfloat16 compute on float32 masters."""
    cfg.model.checkpoint = "OpenGVLab/InternVL3-1B"
    cfg.model.compute_dtype = "bfloat16"
    cfg.model.param_dtype = "bfloat16" if cfg.recipe == "published" else "float32"
    cfg.model.remat = "dots"  # full: on a card of 40 GB or less, or with an estimator that needs forward mode
    if cfg.meta_batch_size > 1:
        cfg.meta_micro_batch_size = 1  # one row fills the chip
    cfg.num_steps = 100_000 // cfg.batch_size  # the same number of examples


def embedded_scale(cfg: config_dict.ConfigDict) -> None:
    """noisy_steps on a tiny InternVL: two CPU cores, minutes, nothing downloaded. One cold start for all methods."""
    cfg.data.source = "embedded"
    cfg.images.max_tiles = 1
    for phase in (cfg.pretrain, cfg.cold_start):
        phase.batch_size, phase.weight_decay, phase.clip_norm = 64, 0.01, None
    cfg.pretrain.num_steps, cfg.pretrain.lr = 2000, 4e-3
    cfg.cold_start.num_steps, cfg.cold_start.lr = 300, 1e-3
    cfg.checkpoint_every = 200
    if cfg.recipe == "corrected":
        cfg.num_steps = 450
        cfg.batch_size = 128
        cfg.meta_batch_size = 384  # nearly the whole meta set: its sampling noise is what blurs a row's slope most
        # Adam with a small eps follows a gradient of any size: once the rows of high weight are learned, it learns the
        # others by heart, however little they weigh.
        cfg.inner.lr, cfg.inner.eps = 3e-4, 2e-3
        cfg.outer.lr = 0.15
        cfg.outer.weight_decay = 0.0
    else:  # their own rates and batches of one
        cfg.num_steps = 10_000
        cfg.checkpoint_every = 2000
