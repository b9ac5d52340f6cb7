"""config.json of a checkpoint: both layouts, what is not implemented, and the way back."""

import json

import pytest

from dreamprm_jax.errors import InputError
from dreamprm_jax.models import presets
from dreamprm_jax.models.config_json import LAYOUTS, config_from_json, config_to_json, tie_flag

TINY = presets.tiny(vocab_size=99)


def write(path, layout, changes):
    """A config.json of the tiny model with some fields, named with dots, changed (None: removed)."""
    root = json.loads(config_to_json(TINY, layout))
    for field, value in changes.items():
        *parents, leaf = field.split(".")
        node = root
        for parent in parents:
            node = node[parent]
        if value is None:
            del node[leaf]
        else:
            node[leaf] = value
    path.write_text(json.dumps(root))
    return path


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", presets.PRESETS)
def test_every_preset_survives_the_way_out_and_back(tmp_path, layout, name):
    (tmp_path / "config.json").write_text(config_to_json(presets.PRESETS[name], layout))
    config = config_from_json(tmp_path / "config.json")
    assert config.language == presets.PRESETS[name].language
    assert config.image_tokens_per_tile == presets.PRESETS[name].image_tokens_per_tile
    stored = presets.PRESETS[name].vision.__dict__ | {"layer_scale_init": config.vision.layer_scale_init}
    assert config.vision.__dict__ == stored


@pytest.mark.parametrize("file", ["config.json", "config_hf.json"])
def test_the_released_config_is_the_preset(shared, file):
    assert config_from_json(shared / "internvl3_1b" / file) == presets.PRESETS["internvl3_1b"]


def test_both_tiny_configs_say_the_same(shared):
    tiny = shared / "tiny_internvl"
    assert config_from_json(tiny / "tiny_config_original.json") == config_from_json(tiny / "tiny_hf" / "config.json")


@pytest.mark.parametrize(
    "layout, field, value",
    [
        ("original", "ps_version", "v1"),
        ("original", "ps_version", None),
        ("original", "select_layer", -4),
        ("original", "pad2square", True),
        ("original", "use_llm_lora", 8),
        ("original", "vision_config.qk_normalization", True),
        ("original", "vision_config.norm_type", "rms_norm"),
        ("original", "vision_config.hidden_act", "relu"),
        ("original", "vision_config.qkv_bias", False),
        ("original", "force_image_size", None),
        ("original", "force_image_size", 56),
        ("original", "llm_config.model_type", "internlm3"),
        ("original", "llm_config.use_sliding_window", True),
        ("original", "llm_config.hidden_size", "64"),
        ("original", "llm_config.num_hidden_layers", 0),
        ("original", "llm_config.rms_norm_eps", None),
        ("original", "model_type", "llava"),
        ("original", "downsample_ratio", 0.4),
        ("hf", "vision_feature_layer", -2),
        ("hf", "vision_feature_select_strategy", "full"),
        ("hf", "projector_hidden_act", "relu"),
        ("hf", "vision_config.use_qk_norm", True),
        ("hf", "vision_config.use_mean_pooling", False),
        ("hf", "vision_config.attention_bias", None),
        ("hf", "vision_config.image_size", [28, 56]),
        ("hf", "text_config.hidden_act", "gelu"),
        ("hf", "text_config.layer_types", ["full_attention", "sliding_attention"]),
        ("hf", "text_config.rope_scaling", {"type": "linear", "factor": 2.0}),
        ("hf", "text_config.rope_parameters", {"rope_type": "yarn", "rope_theta": 1e6}),
        ("hf", "text_config.head_dim", 32),
    ],
)
def test_what_is_not_implemented_is_refused_by_name(tmp_path, layout, field, value):
    path = write(tmp_path / "config.json", layout, {field: value})
    with pytest.raises(InputError) as error:
        config_from_json(path)
    assert str(path) in str(error.value)
    assert field.split(".")[-1] in str(error.value)
    if value is not None:
        assert json.dumps(value) in str(error.value)


def test_dynamic_rope_scaling_acts_only_beyond_the_context(tmp_path):
    changes = {"llm_config.rope_scaling": {"type": "dynamic", "rope_type": "dynamic", "factor": 2.0}}
    path = write(tmp_path / "config.json", "original", changes)
    assert config_from_json(path).language.max_positions == TINY.language.max_positions


def test_the_rotary_base_is_read_in_the_newer_spelling(tmp_path):
    changes = {
        "text_config.rope_theta": None,
        "text_config.rope_parameters": {"rope_type": "default", "rope_theta": 5e5},
    }
    assert config_from_json(write(tmp_path / "config.json", "hf", changes)).language.rope_theta == 5e5


def test_sizes_may_be_numbers_or_squares(tmp_path):
    path = write(tmp_path / "config.json", "hf", {"vision_config.image_size": 28})
    assert config_from_json(path).vision.image_size == 28


@pytest.mark.parametrize(
    "root, expected",
    [
        ({"llm_config": {}}, None),
        ({"tie_word_embeddings": True, "text_config": {}}, True),
        ({"text_config": {"tie_word_embeddings": False}}, False),
        ({"tie_word_embeddings": True, "text_config": {"tie_word_embeddings": False}}, None),
    ],
)
def test_the_tie_flag_is_none_where_the_file_does_not_say(root, expected):
    assert tie_flag(root) is expected


@pytest.mark.parametrize("text, message", [(None, "cannot be read"), ("{", "not JSON"), ("[]", "not a JSON object")])
def test_an_unreadable_file_is_named(tmp_path, text, message):
    path = tmp_path / "config.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(InputError, match=message) as error:
        config_from_json(path)
    assert str(path) in str(error.value)
