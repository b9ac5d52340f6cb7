"""Candidates for best-of-N: N responses per question from an OpenAI-compatible server (vLLM, hosted).

    python run.py --config=configs/generate.py --config.input.path=questions.jsonl --config.input.images=DIR \\
        --config.generate.base_url=http://localhost:8000/v1 --config.generate.model=NAME --workdir=runs/candidates

A hosted server's API key comes from the environment (OPENAI_API_KEY). A killed run goes on with the same command, and
a larger --config.generate.num_candidates asks for the difference. The best-of-N file is WORKDIR/candidates.jsonl.
"""

from configs import base


def get_config(arguments: str = ""):
    """The record of the task; takes no arguments."""
    base.split_arguments(arguments, {})
    cfg = base.get_config()
    cfg.task = "generate"
    return cfg.lock()
