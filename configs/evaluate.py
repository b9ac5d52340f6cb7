"""Best of N by a process reward model beside its baselines, and how well it judges steps: a table, plots, a page.

    python run.py --config=configs/evaluate.py --config.model.checkpoint=runs/table         # noisy_steps' test set
    python run.py --config=configs/evaluate.py:published --config.model.checkpoint=CHECKPOINT \\
        --config.candidates.path=candidates.jsonl --config.candidates.images=DIR --workdir=runs/mmmu
    python run.py --config=configs/evaluate.py --config.model.checkpoint=CHECKPOINT \\
        --config.benchmark.path=VisualProcessBench/test.jsonl --workdir=runs/visualprocessbench
    python run.py --config=configs/evaluate.py --config.candidates.path=DIR     # no model: the baselines alone

The argument is a recipe. `published`: mean of P("+") over the full vocabulary, the last of equals, the published
splitter. `paper`: the first of equals, whole numbers. `corrected`, the default: product of P("+") over the two labels.
12 tiles at most, as at test time in the published code. The paper reports 84.6 (table) and 83.6 (net) on MMMU's
validation split, eight GPT-5-mini candidates a question; here that was not measured (docs/reproduction.md).
"""

from configs import base

ARGUMENTS = {"recipe": base.TRAINING_ARGUMENTS["recipe"]}


def get_config(arguments: str = ""):
    """The record of the task; `arguments`: a recipe."""
    recipe = base.split_arguments(arguments, ARGUMENTS).get("recipe", "corrected")
    cfg = base.get_config()
    cfg.task, cfg.recipe = "evaluate", recipe
    cfg.images.max_tiles = 12
    cfg.batch_size = 16
    if recipe == "corrected":
        cfg.aggregate, cfg.evaluate.step_score = "product", "two_token"
    if recipe == "published":
        cfg.evaluate.splitter, cfg.evaluate.ties = "published", "last"
    return cfg.lock()
