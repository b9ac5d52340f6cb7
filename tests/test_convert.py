"""Checkpoints: recorded names, recorded numbers, round trips to the bit, and every way to be wrong."""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from dreamprm_jax.errors import InputError
from dreamprm_jax.models import convert, internvl, presets
from dreamprm_jax.models.config_json import LAYOUTS

CONFIG = presets.tiny(vocab_size=40)
IMAGE_TOKEN = 100  # of the recorded tiny model


@pytest.fixture(scope="module")
def params():
    """Random values everywhere, biases and scales too, so that no two tensors can be swapped unnoticed."""
    shapes = jax.eval_shape(lambda: internvl.init(CONFIG, jax.random.key(0)))
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(np.float32), shapes)


@pytest.fixture
def saved(tmp_path, params):
    """A checkpoint in the original layout, and a way to change its tensors."""
    convert.save_checkpoint(CONFIG, params, tmp_path)
    return tmp_path


def rewrite(directory, change):
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors")


def set_config(directory, **fields):
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def assert_same(left, right):
    assert jax.tree.structure(left) == jax.tree.structure(right)
    for a, b in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        np.testing.assert_array_equal(a, b)


def error_of(source):
    with pytest.raises(InputError) as error:
        convert.load_checkpoint(source)
    return str(error.value)


# ---- the table ----


def in_memory(name):
    """The -hf name that transformers gives a tensor in memory, from the one on disk."""
    for memory, disk in convert.HF_SPELLINGS:
        if name.startswith(disk):
            return memory + name.removeprefix(disk)
    raise AssertionError(name)


@pytest.mark.parametrize("spelling", ["original", "hf_ondisk", "hf_inmemory"])
def test_the_table_gives_every_recorded_name_and_shape(shared, spelling):
    recorded = json.loads((shared / "internvl3_1b" / f"internvl3_1b_{spelling}_names_shapes.json").read_text())
    layout = "original" if spelling == "original" else "hf"
    slots = convert.expected_tensors(presets.PRESETS["internvl3_1b"], layout)
    spell = in_memory if spelling == "hf_inmemory" else str
    assert {spell(name): list(slot.shape) for name, slot in slots.items()} == recorded
    if spelling == "hf_inmemory":
        assert {convert._table_name(name) for name in recorded} == slots.keys()


def test_the_table_maps_as_recorded(shared):
    recorded = json.loads((shared / "internvl3_1b" / "original_to_hf_ondisk_map.json").read_text())
    config = presets.PRESETS["internvl3_1b"]
    by_place = {}
    for name, slot in convert.expected_tensors(config, "hf").items():
        by_place.setdefault((slot.rule.path, slot.layer), []).append(name)
    original = convert.expected_tensors(config, "original")
    assert {name: by_place[slot.rule.path, slot.layer] for name, slot in original.items()} == recorded


def test_the_table_covers_the_model_exactly():
    for config in presets.PRESETS.values():
        shapes = jax.eval_shape(lambda config=config: internvl.init(config, jax.random.key(0)))
        leaves = jax.tree_util.tree_leaves_with_path(shapes)
        paths = {"/".join(key.key for key in path): leaf.shape for path, leaf in leaves}
        assert convert.parameter_shapes(config) == paths


# ---- recorded numbers ----


def tiny_directory(shared, tmp_path, layout):
    tiny = shared / "tiny_internvl"
    if layout == "hf":
        return tiny / "tiny_hf"
    shutil.copy(tiny / "tiny_config_original.json", tmp_path / "config.json")
    shutil.copy(tiny / "tiny_original_layout.safetensors", tmp_path / "model.safetensors")
    return tmp_path


@pytest.mark.parametrize("layout", LAYOUTS)
def test_recorded_model_gives_the_recorded_numbers(shared, tmp_path, layout):
    config, params = convert.load_checkpoint(tiny_directory(shared, tmp_path, layout))
    recorded = np.load(shared / "tiny_internvl" / "tiny_io.npz")
    pixels = jnp.asarray(recorded["pixel_values"].transpose(0, 2, 3, 1))
    ids = jnp.asarray(recorded["input_ids"])

    @jax.jit
    def stages(params):
        states = internvl.vision_states(config, params, pixels)
        features = internvl.encode_pixels(config, params, pixels)
        x = internvl.embed_tokens(config, params, ids)
        x = internvl.merge_image_features(
            x, internvl.image_index(ids == IMAGE_TOKEN), features.reshape(1, -1, features.shape[-1])
        )
        hidden = internvl.language_states(config, params, x, jnp.arange(ids.shape[1])[None])
        return states, features, internvl.head(config, params, hidden)

    states, features, logits = stages(params)
    np.testing.assert_allclose(states, recorded["vit_last_hidden"], rtol=0, atol=1e-5)
    np.testing.assert_allclose(features, recorded["image_features"], rtol=0, atol=1e-5)
    np.testing.assert_allclose(logits, recorded["logits"], rtol=0, atol=1e-5)
    np.testing.assert_allclose(logits, recorded["logits_hf"], rtol=0, atol=1e-5)


def test_both_recorded_layouts_are_one_model(shared, tmp_path):
    config, params = convert.load_checkpoint(tiny_directory(shared, tmp_path, "original"))
    config_hf, params_hf = convert.load_checkpoint(tiny_directory(shared, tmp_path, "hf"))
    assert config == config_hf
    assert_same(params, params_hf)
    for layout, file in (("original", "tiny_original_layout"), ("hf", "tiny_hf/model")):
        stored = load_file(shared / "tiny_internvl" / f"{file}.safetensors")
        written = convert.to_tensors(config, params, layout)
        assert written.keys() == stored.keys()
        for name, value in stored.items():
            np.testing.assert_array_equal(written[name], value)


# ---- there and back ----


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("max_shard_bytes", [10**9, 100_000])
def test_round_trip_is_equal_to_the_bit(tmp_path, params, layout, max_shard_bytes):
    convert.save_checkpoint(CONFIG, params, tmp_path, layout, max_shard_bytes=max_shard_bytes)
    assert (tmp_path / convert.INDEX).exists() == (max_shard_bytes == 100_000)
    config, loaded = convert.load_checkpoint(tmp_path)
    assert config.language == CONFIG.language
    assert_same(loaded, params)


def test_the_in_memory_spelling_is_read_too(tmp_path, params):
    convert.save_checkpoint(CONFIG, params, tmp_path, "hf")
    tensors = load_file(tmp_path / "model.safetensors")
    save_file({in_memory(name): value for name, value in tensors.items()}, tmp_path / "model.safetensors")
    assert_same(convert.load_checkpoint(tmp_path)[1], params)


def test_parameters_on_the_device_are_written_like_those_on_the_host(params):
    on_device = jax.tree.map(jnp.asarray, params)
    for layout in LAYOUTS:
        tensors = convert.to_tensors(CONFIG, on_device, layout)
        for name, value in convert.to_tensors(CONFIG, params, layout).items():
            assert tensors[name].flags.c_contiguous
            np.testing.assert_array_equal(tensors[name], value)


@pytest.mark.parametrize("stored", [ml_dtypes.bfloat16, np.float16])
def test_half_precision_is_widened_exactly(saved, params, stored):
    rewrite(saved, lambda tensors: tensors.update({k: v.astype(stored) for k, v in tensors.items()}))
    expected = jax.tree.map(lambda leaf: leaf.astype(stored).astype(np.float32), params)
    assert_same(convert.load_checkpoint(saved)[1], expected)


def test_a_bfloat16_checkpoint_survives_a_round_trip(tmp_path, params):
    convert.save_checkpoint(CONFIG, params, tmp_path / "first", dtype="bfloat16")
    config, loaded = convert.load_checkpoint(tmp_path / "first")
    convert.save_checkpoint(config, loaded, tmp_path / "second", dtype="bfloat16")
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("first", "second")]
    assert files[0] == files[1]


def test_parameters_of_another_size_are_refused(params):
    other = presets.tiny(vocab_size=41)
    with pytest.raises(ValueError, match=r"language/embedding has shape \(40, 64\)"):
        convert.to_tensors(other, params)


def test_weights_that_would_be_duplicates_are_not_written_beside(saved, params):
    with pytest.raises(InputError, match=r"already holds model.safetensors"):
        convert.save_checkpoint(CONFIG, params, saved, max_shard_bytes=100_000)
    convert.save_checkpoint(CONFIG, params, saved)  # over itself


# ---- the head ----


@pytest.mark.parametrize("flag", [None, True])
def test_a_missing_head_is_the_embedding(saved, flag):
    rewrite(saved, lambda tensors: tensors.pop(convert.HEAD))
    root = json.loads((saved / "config.json").read_text())
    del root["tie_word_embeddings"], root["llm_config"]["tie_word_embeddings"]
    (saved / "config.json").write_text(json.dumps(root | ({} if flag is None else {"tie_word_embeddings": flag})))
    config, params = convert.load_checkpoint(saved)
    assert config.language.tie_embeddings
    assert "lm_head" not in params["language"]
    shutil.rmtree(saved)
    convert.save_checkpoint(config, params, saved)
    assert convert.load_checkpoint(saved)[0].language.tie_embeddings


def test_a_missing_head_is_an_error_where_the_config_wants_one(saved):
    rewrite(saved, lambda tensors: tensors.pop(convert.HEAD))
    assert f"1 missing: {convert.HEAD}" in error_of(saved)


def test_a_stored_head_under_a_tied_flag_must_equal_the_embedding(saved):
    tied = json.loads((saved / "config.json").read_text())["llm_config"] | {"tie_word_embeddings": True}
    set_config(saved, tie_word_embeddings=True, llm_config=tied)
    message = error_of(saved)
    assert "model.safetensors" in message and convert.HEAD in message and "tie_word_embeddings" in message
    rewrite(saved, lambda tensors: tensors.update({convert.HEAD: tensors[convert.EMBEDDING]}))
    config, params = convert.load_checkpoint(saved)
    assert config.language.tie_embeddings and "lm_head" not in params["language"]


# ---- wrong in every way ----


def test_all_that_is_wrong_with_the_tensors_is_in_one_message(tmp_path, params):
    convert.save_checkpoint(CONFIG, params, tmp_path, "hf")

    def break_it(tensors):
        del tensors["multi_modal_projector.linear_1.bias"]
        tensors["vision_tower.extra.weight"] = np.zeros(3, np.float32)
        tensors["model.vision_tower.embeddings.cls_token"] = tensors["vision_tower.embeddings.cls_token"]
        tensors["language_model.model.norm.weight"] = np.zeros(63, np.float32)
        tensors["multi_modal_projector.linear_2.bias"] = np.zeros(64, np.int8)

    rewrite(tmp_path, break_it)
    message = error_of(tmp_path)
    assert message.startswith(f"{tmp_path}: ")
    for part in (
        "hf layout",
        "1 missing: multi_modal_projector.linear_1.bias;",
        "1 unexpected: vision_tower.extra.weight;",
        "1 duplicate: ",
        "model.vision_tower.embeddings.cls_token (model.safetensors)",
        "1 mis-shaped: language_model.model.norm.weight is [63] and should be [64];",
        "multi_modal_projector.linear_2.bias is I8 and should be one of F32, BF16, F16",
    ):
        assert part in message


def test_a_tensor_in_two_files_is_a_duplicate(tmp_path, params):
    convert.save_checkpoint(CONFIG, params, tmp_path, max_shard_bytes=100_000)
    first = sorted(tmp_path.glob("model-*.safetensors"))[0]
    shutil.copy(first, tmp_path / "model.safetensors")
    message = error_of(tmp_path)
    assert f"{len(load_file(first))} duplicate: " in message
    assert "(model.safetensors)" in message and f"({first.name})" in message
    assert "more" in message  # the list of names is cut


def test_another_size_of_model_is_mis_shaped_not_loaded(saved):
    vision = json.loads((saved / "config.json").read_text())["vision_config"]
    set_config(saved, vision_config=vision | {"intermediate_size": 72})
    assert "3 mis-shaped" in error_of(saved)


def test_missing_layers_are_listed(saved):
    text = json.loads((saved / "config.json").read_text())["llm_config"]
    set_config(saved, llm_config=text | {"num_hidden_layers": 3})
    assert "12 missing: language_model.model.layers.2.input_layernorm.weight" in error_of(saved)


def test_a_shard_that_is_not_there_is_named(tmp_path, params):
    convert.save_checkpoint(CONFIG, params, tmp_path, max_shard_bytes=100_000)
    shard = sorted(tmp_path.glob("model-*.safetensors"))[-1]
    shard.unlink()
    assert shard.name in error_of(tmp_path)


def test_an_index_cannot_point_outside_the_directory(tmp_path, params):
    convert.save_checkpoint(CONFIG, params, tmp_path / "other")
    convert.save_checkpoint(CONFIG, params, tmp_path / "here")
    (tmp_path / "here" / convert.SINGLE).unlink()
    index = {"weight_map": {convert.HEAD: "../other/model.safetensors"}}
    (tmp_path / "here" / convert.INDEX).write_text(json.dumps(index))
    assert "../other/model.safetensors" in error_of(tmp_path / "here")


def test_a_corrupt_file_is_named(saved):
    (saved / "model.safetensors").write_bytes(b"\x10 this is not a header")
    assert str(saved / "model.safetensors") in error_of(saved)
    (saved / "model.safetensors").write_bytes(b"")
    assert str(saved / "model.safetensors") in error_of(saved)


def test_a_truncated_file_is_named(saved):
    path = saved / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    assert str(path) in error_of(saved)


def test_a_pickle_is_never_read(saved):
    (saved / "model.safetensors").rename(saved / "pytorch_model.bin")
    message = error_of(saved)
    assert "pytorch_model.bin is a pickle" in message and str(saved) in message


def test_a_directory_without_config_is_named(tmp_path):
    assert str(tmp_path / "config.json") in error_of(tmp_path)


# ---- the Hub ----


@pytest.mark.parametrize("source", ["/nowhere/at/all", "name", "../org/name/more", "a/b@"])
def test_what_is_neither_a_directory_nor_a_hub_id_is_refused(source):
    assert "not a directory, and not a Hub id" in error_of(source)


def test_a_hub_id_fetches_safetensors_and_json_only(monkeypatch, saved):
    huggingface_hub = pytest.importorskip("huggingface_hub")
    calls = []

    def snapshot_download(repo_id, **options):
        calls.append((repo_id, options))
        return str(saved)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    convert.load_checkpoint("org/name@v1.0")
    convert.load_checkpoint("org/na.me-2")
    patterns = {"allow_patterns": ["*.json", "*.safetensors"]}
    assert calls == [
        ("org/name", {"revision": "v1.0"} | patterns),
        ("org/na.me-2", {"revision": None} | patterns),
    ]


def test_an_unreachable_hub_says_what_to_do(monkeypatch):
    huggingface_hub = pytest.importorskip("huggingface_hub")

    def snapshot_download(repo_id, **options):
        raise ConnectionError("no route to host\nand more")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    message = error_of("org/name")
    assert "ConnectionError: no route to host)" in message and "give its directory" in message
    assert "\n" not in message


def test_how_to_compute_is_left_to_the_user(saved):
    config, _ = convert.load_checkpoint(saved)
    assert dataclasses.replace(config, remat="full").remat == "full"
    assert (config.remat, config.compute_dtype) == ("none", "float32")
