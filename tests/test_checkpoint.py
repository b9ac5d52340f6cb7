"""A workdir belongs to one run: what is refused, and how it is said."""

import json

import pytest

from dreamprm_jax.errors import InputError
from dreamprm_jax.workdir import claim_workdir

RECORD = {"config": {"task": "train", "seed": 0}, "data": {"train.json": "abc"}}


@pytest.mark.parametrize("resumes", [True, False])
@pytest.mark.parametrize(
    "content",
    [b"", b"{cut", b"[1]", b"\xff\xfe", b'{"config": null}', b'{"model_type": "internvl_chat"}'],
    ids=["empty", "cut", "list", "not text", "null", "a checkpoint's"],
)
def test_a_directory_whose_config_is_not_a_runs_is_left_alone(tmp_path, content, resumes):
    """Such as a checkpoint's own directory: its config.json must not be overwritten."""
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(InputError, match=r"config\.json: .*; give another --workdir") as error:
        claim_workdir(tmp_path, RECORD, resumes=resumes)
    assert "\n" not in str(error.value)
    assert (tmp_path / "config.json").read_bytes() == content


def test_a_run_claims_its_own_workdir_again_and_no_other_does(tmp_path):
    claim_workdir(tmp_path / "run", RECORD)
    claim_workdir(tmp_path / "run", json.loads(json.dumps(RECORD)))
    for changed, name in (
        ({**RECORD, "data": {"train.json": "xyz"}}, "data.train.json=abc, now data.train.json=xyz"),
        ({**RECORD, "config": {"task": "train", "seed": 1}}, "config.seed=0, now config.seed=1"),
    ):
        with pytest.raises(InputError, match=f"was begun with {name}"):
            claim_workdir(tmp_path / "run", changed)
