"""docs/extending.md: its examples do what they say, and fit into a copy of the project as they are shown."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from sklearn.metrics import matthews_corrcoef

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "docs" / "extending.md").read_text()
SECTIONS = dict(re.findall(r"^## (.*?)\n(.*?)(?=^## |\Z)", TEXT, re.DOTALL | re.MULTILINE))
FENCES = re.compile(r"```(\w+)\n(.*?)```", re.DOTALL)
SMALL = [
    "--config.pretrain.num_steps=1", "--config.pretrain.batch_size=4", "--config.cold_start.num_steps=1",
    "--config.cold_start.batch_size=4", "--config.num_steps=20", "--config.batch_size=4", "--config.meta_batch_size=4",
    "--config.noisy_steps.pretrain=8", "--config.noisy_steps.cold_start=8", "--config.noisy_steps.clean=8",
    "--config.noisy_steps.flipped=8", "--config.noisy_steps.always_plus=4", "--config.noisy_steps.trivial=4",
    "--config.noisy_steps.shifted=0", "--config.noisy_steps.meta_questions=4", "--config.noisy_steps.test_questions=2",
]  # fmt: skip


def fences(section, kind):
    return [body for language, body in FENCES.findall(SECTIONS[section]) if language == kind]


def shown(section, capsys):
    """What the section's example prints, and what it leaves behind."""
    (code,) = fences(section, "python")
    names = {}
    exec(compile(code, section, "exec"), names)
    return capsys.readouterr().out, names


def insert(root, code):
    """Puts an example's function into its file, before the first one there; its imports of that file itself go."""
    first, _, rest = code.partition("\n")
    name, function = first.removeprefix("# "), rest.partition("\n# Try it")[0]
    path = root / name
    if not path.exists():
        path.write_text(function)
        return
    own = name.removesuffix(".py").replace("/", ".")
    function = re.sub(rf"^from {re.escape(own)} import .*\n", "", function, flags=re.MULTILINE)
    source = path.read_text()
    place = re.search(r"^(?:def|class|@)", source, re.MULTILINE).start()
    path.write_text(source[:place] + function.strip() + "\n\n\n" + source[place:])


def apply(root, diff):
    """Makes a change: the lines that it takes for given stand in the file once."""
    first, *lines = diff.splitlines()
    path = root / first.removeprefix("# ")
    old = "".join(line[1:] + "\n" for line in lines if not line.startswith("+"))
    new = "".join(line[1:] + "\n" for line in lines if not line.startswith("-"))
    source = path.read_text()
    assert source.count(old) == 1, f"{first}: {source.count(old)} x {old!r}"
    path.write_text(source.replace(old, new))


@pytest.fixture(scope="module")
def extended(tmp_path_factory):
    """A copy of the project with every addition of the page."""
    root = tmp_path_factory.mktemp("extended")
    for name in ("configs", "dreamprm_jax"):
        shutil.copytree(ROOT / name, root / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "run.py", root)
    for section in SECTIONS:
        for code in fences(section, "python"):
            if not code.startswith("# Try it"):
                insert(root, code)
        for diff in fences(section, "diff"):
            apply(root, diff)
    return root


def launch(root, *arguments):
    done = subprocess.run([sys.executable, *arguments], cwd=root, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_weights_by_length_tell_the_wrong_ones(capsys):
    _, names = shown("A weighting", capsys)
    one, two, three, four = np.asarray(names["state"].meta_params["lengths"]).tolist()
    assert three < 0.7 and min(one, two) > 1.2 and four == 1.0


def test_forward_mode_is_the_derivative_and_the_check_would_say_otherwise(capsys):
    _, names = shown("An estimator", capsys)
    assert names["check"].against_unrolled < 1e-12 and names["check"].against_differences < 1e-8
    assert names["check"].norm > 1e-6
    (code,) = fences("An estimator", "python")
    wrong = code.replace(
        "    return meta_grad, new_state, aux", "    return {'raw': 1.01 * meta_grad['raw']}, new_state, aux"
    )
    with pytest.raises(ValueError, match="off by more than 1e-08"):
        exec(compile(wrong, "wrong", "exec"), {})


def test_half_of_the_model_has_half_of_its_layers(capsys):
    printed, names = shown("A model size", capsys)
    assert names["size"] == 938_193_024 - 12 * 14_912_384  # a layer of Qwen2.5-0.5B
    assert names["logits"].shape == (2, 5, 151_674) and f"{names['size']:,} parameters" in printed


def test_a_row_of_processbench_is_a_chain(capsys):
    printed, _ = shown("A data set", capsys)
    assert printed.splitlines() == ["['+', '-']", 'gsm8k.json row 1: "label" is 2; it must be -1, or from 0 to 1']


def test_matthews_is_scikit_learns(capsys):
    printed, names = shown("A figure in a report", capsys)
    assert float(printed) == pytest.approx(matthews_corrcoef([1, 1, 0, 1, 0], [1, 0, 0, 1, 1]))
    steps = names["steps_of"]([[1, 1]], [[0.9, 0.1]], ["s"], ["q"])
    assert names["matthews"](steps, 0.5) == 0.0


def test_a_run_trains_with_the_weighting(extended):
    launch(extended, "run.py", "--config=configs/table.py", "--config.weighting.name=lengths", "--workdir=run", *SMALL)
    lines = [json.loads(line) for line in (extended / "run" / "metrics.jsonl").read_text().splitlines()]
    assert len({weight for line in lines[2:] for weight in line["instance_weights"]}) > 2
    weights = [json.loads(line) for line in (extended / "run" / "instance_weights.jsonl").read_text().splitlines()]
    assert len(weights) == 24 and all(0 <= row["weight"] <= 3 for row in weights)


def test_the_data_set_is_prepared(extended, tmp_path):
    rows = [
        {"id": "a", "problem": "What is 2 + 3 + 4?", "steps": ["2 + 3 = 5.", "5 + 4 = 8."], "label": 1},
        {"id": "b", "problem": "What is 2 + 3?", "steps": ["5."], "label": -1},
        {"id": "c", "problem": "What is 2 + 3?", "steps": ["5."], "label": 7},
    ]
    (tmp_path / "gsm8k.json").write_text(json.dumps(rows))
    paths = [f"--config.prepare.source={tmp_path}/gsm8k.json", f"--config.prepare.output={tmp_path}/DATA"]
    flags = ["--config=configs/prepare.py:processbench", "--config.data.max_bad_share=0.5", "--workdir=prepared"]
    launch(extended, "run.py", *flags, *paths)
    code = (
        "import sys; from dreamprm_jax.data.prepared import PreparedExamples\n"
        "rows = PreparedExamples(sys.argv[1]); print(sorted((row.id, row.turns[-1].text) for row in rows))"
    )
    assert launch(extended, "-c", code, f"{tmp_path}/DATA/processbench/1.0.0") == "[('a', '-'), ('b', '+')]\n"


def test_what_else_is_added_is_where_it_is_asked_for(extended):
    code = """
from configs import ranges, table
from dreamprm_jax import evaluation, evaluation_report, hypergradient, step_benchmark
from dreamprm_jax.models import PRESETS
cfg = table.get_config()
cfg.hypergradient = "forward"
ranges.validate(cfg)
steps = step_benchmark.steps_of([[1, -1]], [[0.9, 0.2]], ["s"], ["q"])
found = evaluation.step_results(steps, 0.5)
table = evaluation_report._steps(found)
print("forward" in hypergradient.EXACT, "internvl3_1b_half" in PRESETS, table.head[5], table.rows[0][5])
"""
    assert launch(extended, "-c", code) == "True True Matthews' correlation 1.0000\n"


def test_the_files_that_the_page_names_are_there():
    made = {"dreamprm_jax/data/formats/processbench.py", "models/presets.py"}
    for name in set(re.findall(r"[\w/]+/\w+\.py\b", TEXT)) - made:
        assert (ROOT / name).is_file(), name
