"""Checkpoints as the published code saves them: what they have that ours lack, and what they lack.

Its `save_pretrained` writes InternVLChatModel as transformers 4.49 does: the original layout in bfloat16 without a
prefix, a long config.json that names remote code, that code beside it, no tokenizer, and neither table nor net.
"""

import json

import ml_dtypes
import numpy as np
import pytest
from exporting import checkpoint, export_config  # noqa: F401 - a fixture
from safetensors.numpy import load_file, save_file

from configs import score
from dreamprm_jax.errors import InputError
from dreamprm_jax.export import run_export
from dreamprm_jax.loading import load_model

REMOTE = "modeling_internvl_chat.InternVLChatModel"
ADDED = {  # to config.json
    "_commit_hash": None,
    "_name_or_path": "weights_cold_start",
    "auto_map": {
        "AutoConfig": "configuration_internvl_chat.InternVLChatConfig",
        "AutoModel": REMOTE,
        "AutoModelForCausalLM": REMOTE,
    },
    "pad2square": False,
    "hidden_size": 64,
    "pad_token_id": 0,
    "transformers_version": None,
    "use_backbone_lora": 0,
    "use_llm_lora": 0,
    "torch_dtype": "bfloat16",
}
ADDED_TO_TEXT = {
    "_attn_implementation_autoset": True,
    "_name_or_path": "./pretrained/Qwen2.5-32B-Instruct",
    "attention_dropout": 0.0,
    "moe_config": None,
    "rope_scaling": {"factor": 2.0, "rope_type": "dynamic", "type": "dynamic"},
    "sliding_window": None,
    "torch_dtype": "bfloat16",
    "use_bfloat16": True,
    "use_cache": False,
}
ADDED_TO_VISION = {
    "auto_map": {"AutoModel": "modeling_intern_vit.InternVisionModel"},
    "drop_path_rate": 0.1,
    "use_flash_attn": False,
    "qk_normalization": False,
    "torch_dtype": "bfloat16",
    "use_bfloat16": True,
}


@pytest.fixture
def published(checkpoint, tmp_path):
    directory = tmp_path / "DreamPRM-1_5-InstanceNet"
    directory.mkdir()
    config = json.loads((checkpoint / "config.json").read_text())
    config["llm_config"] |= ADDED_TO_TEXT
    config["vision_config"] |= ADDED_TO_VISION
    (directory / "config.json").write_text(json.dumps(config | ADDED, indent=2))
    tensors = load_file(checkpoint / "model.safetensors")
    tensors = {name: value.astype(ml_dtypes.bfloat16) for name, value in tensors.items()}
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    (directory / "generation_config.json").write_text('{"_from_model_config": true, "eos_token_id": [151644, 151645]}')
    for name in ("modeling_internvl_chat", "configuration_internvl_chat", "modeling_intern_vit", "conversation"):
        (directory / f"{name}.py").write_text("raise SystemExit('remote code was executed')\n")
    return directory


def loaded(directory, tokenizer):
    cfg = score.get_config()
    cfg.model.checkpoint, cfg.model.tokenizer = str(directory), tokenizer and str(tokenizer)
    return load_model(cfg.model, seed=0)


def test_a_published_checkpoint_is_taken_with_its_bases_tokenizer(published, checkpoint):
    model = loaded(published, checkpoint)
    expected = load_file(published / "model.safetensors")["language_model.lm_head.weight"]
    np.testing.assert_array_equal(model.params["language"]["lm_head"], expected.astype(np.float32))
    assert model.config.language.max_positions == 1024


def test_without_a_tokenizer_the_flag_is_named(published):
    with pytest.raises(InputError, match=r"tokenizer\.json: no such file; give a directory .*model\.tokenizer"):
        loaded(published, None)


def test_the_tokenizer_may_be_a_hub_id_of_which_nothing_else_is_downloaded(published, checkpoint, monkeypatch):
    asked = []

    def snapshot_download(repo, **options):
        asked.append((repo, options["allow_patterns"]))
        return str(checkpoint)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    loaded(published, "OpenGVLab/InternVL3-1B")
    assert asked == [("OpenGVLab/InternVL3-1B", ["tokenizer.json"])]


@pytest.mark.parametrize("layout", ["hf", "original"])
def test_it_is_exported_as_it_is(published, checkpoint, tmp_path, layout):
    """bfloat16 to bfloat16: no value changes; and the export has the tokenizer that the other lacked."""
    cfg = export_config(published, layout=layout)
    cfg.model.tokenizer = str(checkpoint)
    run_export(cfg, tmp_path / "export")
    expected, got = loaded(published, checkpoint), loaded(tmp_path / "export", None)
    for tower in ("vision", "projector", "language"):
        for (name, left), (_, right) in zip(*map(leaves, (expected.params[tower], got.params[tower])), strict=True):
            np.testing.assert_array_equal(left, right, err_msg=name)
    stored = load_file(published / "model.safetensors")
    if layout == "original":
        again = load_file(tmp_path / "export/model.safetensors")
        assert again.keys() == stored.keys()
        assert all(np.array_equal(again[name], stored[name]) for name in stored)
    assert not list((tmp_path / "export").glob("*.py"))
    assert "auto_map" not in (tmp_path / "export/config.json").read_text()


def leaves(tree, path=""):
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{path}/{name}")
        else:
            yield f"{path}/{name}", value


def test_a_net_among_the_tensors_is_named_not_taken_for_the_model(published, checkpoint):
    """The published code saves none. A file that has one is refused: what of it were ignored would be a guess."""
    tensors = load_file(published / "model.safetensors")
    net = {"instance_net.0.weight": np.zeros((10, 2), np.float32)}
    save_file(tensors | net, published / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match=r"1 unexpected: instance_net\.0\.weight"):
        loaded(published, checkpoint)
