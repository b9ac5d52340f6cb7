"""Checkpoints in safetensors to parameters and back, strictly and to the bit.

Two layouts are read and written: "original" (OpenGVLab/InternVL3-*) and "hf" (OpenGVLab/InternVL3-*-hf). The
-hf one has two spellings: on disk ("vision_tower...") and as transformers names its modules
("model.vision_tower..."); both are read, the first is written. Nothing but safetensors and JSON is ever opened,
and nothing remote is executed.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from dreamprm_jax.errors import InputError
from dreamprm_jax.models.config_json import (
    LAYOUTS,
    config_from_json,
    config_to_json,
    read_config_json,
    tie_flag,
)
from dreamprm_jax.models.hub import checkpoint_directory
from dreamprm_jax.models.presets import InternVLConfig
from dreamprm_jax.types import PyTree


class Rule(NamedTuple):
    """One parameter of ours and the tensors that hold it.

    `axes` reads "axes in the file -> our axes": letters are the legend's in lower case, those in brackets are
    merged into one axis of the file, a 1 is dropped. {i} stands for the number of a layer; we stack the layers on
    a leading axis. {qkv} stands for q, k and v: three tensors that follow each other on the file's first axis.
    """

    path: str
    axes: str
    original: str
    hf: str


# fmt: off
RULES = (
    Rule("vision/class_embedding", "1 1 d -> d",
         "vision_model.embeddings.class_embedding", "vision_tower.embeddings.cls_token"),
    Rule("vision/position_embedding", "1 t d -> t d",
         "vision_model.embeddings.position_embedding", "vision_tower.embeddings.position_embeddings"),
    Rule("vision/patch_embedding/kernel", "d c p q -> p q c d",
         "vision_model.embeddings.patch_embedding.weight",
         "vision_tower.embeddings.patch_embeddings.projection.weight"),
    Rule("vision/patch_embedding/bias", "d -> d",
         "vision_model.embeddings.patch_embedding.bias",
         "vision_tower.embeddings.patch_embeddings.projection.bias"),
    *(Rule("vision/layers/" + path, axes,
           "vision_model.encoder.layers.{i}." + original, "vision_tower.encoder.layer.{i}." + hf)
      for path, axes, original, hf in (
        ("ls1", "d -> d", "ls1", "lambda_1"),
        ("norm1/scale", "d -> d", "norm1.weight", "layernorm_before.weight"),
        ("norm1/bias", "d -> d", "norm1.bias", "layernorm_before.bias"),
        ("qkv/kernel", "(3 n h) d -> d 3 n h", "attn.qkv.weight", "attention.{qkv}_proj.weight"),
        ("qkv/bias", "(3 n h) -> 3 n h", "attn.qkv.bias", "attention.{qkv}_proj.bias"),
        ("out/kernel", "d (n h) -> n h d", "attn.proj.weight", "attention.projection_layer.weight"),
        ("out/bias", "d -> d", "attn.proj.bias", "attention.projection_layer.bias"),
        ("ls2", "d -> d", "ls2", "lambda_2"),
        ("norm2/scale", "d -> d", "norm2.weight", "layernorm_after.weight"),
        ("norm2/bias", "d -> d", "norm2.bias", "layernorm_after.bias"),
        ("fc1/kernel", "f d -> d f", "mlp.fc1.weight", "mlp.fc1.weight"),
        ("fc1/bias", "f -> f", "mlp.fc1.bias", "mlp.fc1.bias"),
        ("fc2/kernel", "d f -> f d", "mlp.fc2.weight", "mlp.fc2.weight"),
        ("fc2/bias", "d -> d", "mlp.fc2.bias", "mlp.fc2.bias"),
    )),
    *(Rule("projector/" + path, axes, "mlp1." + original, "multi_modal_projector." + hf)
      for path, axes, original, hf in (
        ("norm/scale", "s -> s", "0.weight", "layer_norm.weight"),
        ("norm/bias", "s -> s", "0.bias", "layer_norm.bias"),
        ("fc1/kernel", "d s -> s d", "1.weight", "linear_1.weight"),
        ("fc1/bias", "d -> d", "1.bias", "linear_1.bias"),
        ("fc2/kernel", "d e -> e d", "3.weight", "linear_2.weight"),
        ("fc2/bias", "d -> d", "3.bias", "linear_2.bias"),
    )),
    *(Rule("language/" + path, axes, "language_model." + name, "language_model." + name)
      for path, axes, name in (
        ("embedding", "v d -> v d", "model.embed_tokens.weight"),
        ("layers/norm1/scale", "d -> d", "model.layers.{i}.input_layernorm.weight"),
        ("layers/q/kernel", "(n h) d -> d n h", "model.layers.{i}.self_attn.q_proj.weight"),
        ("layers/q/bias", "(n h) -> n h", "model.layers.{i}.self_attn.q_proj.bias"),
        ("layers/k/kernel", "(k h) d -> d k h", "model.layers.{i}.self_attn.k_proj.weight"),
        ("layers/k/bias", "(k h) -> k h", "model.layers.{i}.self_attn.k_proj.bias"),
        ("layers/v/kernel", "(k h) d -> d k h", "model.layers.{i}.self_attn.v_proj.weight"),
        ("layers/v/bias", "(k h) -> k h", "model.layers.{i}.self_attn.v_proj.bias"),
        ("layers/out/kernel", "d (n h) -> n h d", "model.layers.{i}.self_attn.o_proj.weight"),
        ("layers/norm2/scale", "d -> d", "model.layers.{i}.post_attention_layernorm.weight"),
        ("layers/gate/kernel", "f d -> d f", "model.layers.{i}.mlp.gate_proj.weight"),
        ("layers/up/kernel", "f d -> d f", "model.layers.{i}.mlp.up_proj.weight"),
        ("layers/down/kernel", "d f -> f d", "model.layers.{i}.mlp.down_proj.weight"),
        ("norm/scale", "d -> d", "model.norm.weight"),
        ("lm_head", "v d -> v d", "lm_head.weight"),
    )),
)
# fmt: on

EMBEDDING, HEAD = "language_model.model.embed_tokens.weight", "language_model.lm_head.weight"

# The in-memory spelling of the -hf layout, and the on-disk spelling that the table uses.
HF_SPELLINGS = (
    ("model.vision_tower.", "vision_tower."),
    ("model.multi_modal_projector.", "multi_modal_projector."),
    ("model.language_model.", "language_model.model."),
    ("lm_head.", "language_model.lm_head."),
)

STORED_DTYPES = {"F32": np.float32, "BF16": ml_dtypes.bfloat16, "F16": np.float16}
WRITTEN_DTYPES = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16}
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
SHOWN = 8  # names of each kind in an error message
_MAX_NAME = 255  # characters of a file's name, and of a tensor's in a message


class Slot(NamedTuple):
    """Where the tensor of one name belongs: a layer of a rule's parameter, and a third of it for {qkv}."""

    rule: Rule
    layer: int | None
    part: int | None
    shape: tuple[int, ...]  # in the file


# ---- the table, applied ----


def expected_tensors(config: InternVLConfig, layout: str) -> dict[str, Slot]:
    """Every tensor of a checkpoint in a layout ("hf": the on-disk spelling), by name."""
    sizes = {tower: _axis_sizes(config, tower) for tower in ("vision", "projector", "language")}
    slots = {}
    for rule in _rules(config):
        tower = rule.path.split("/")[0]
        name = rule.original if layout == "original" else rule.hf
        shape = tuple(math.prod(sizes[tower][axis] for axis in group) for group in _parse(rule.axes)[0])
        for layer in range(sizes[tower]["L"]) if "{i}" in name else (None,):
            here = name.replace("{i}", str(layer))
            if "{qkv}" not in here:
                slots[here] = Slot(rule, layer, None, shape)
                continue
            for part, letter in enumerate("qkv"):
                slots[here.replace("{qkv}", letter)] = Slot(rule, layer, part, (shape[0] // 3, *shape[1:]))
    return slots


def parameter_shapes(config: InternVLConfig) -> dict[str, tuple[int, ...]]:
    """The shape of every parameter of ours, by its path ("vision/layers/ls1")."""
    shapes = {}
    for rule in _rules(config):
        sizes = _axis_sizes(config, rule.path.split("/")[0])
        stacked = (sizes["L"],) if "{i}" in rule.original else ()
        shapes[rule.path] = stacked + tuple(sizes[axis] for axis in _parse(rule.axes)[1])
    return shapes


def _rules(config: InternVLConfig) -> list[Rule]:
    return [rule for rule in RULES if not (rule.path == "language/lm_head" and config.language.tie_embeddings)]


def _axis_sizes(config: InternVLConfig, tower: str) -> dict[str, int]:
    """The letters of the table, for one of the three parts of the model."""
    vision, language = config.vision, config.language
    if tower == "projector":
        return {
            "s": config.shuffle_factor**2 * vision.width,
            "d": language.width,
            "e": language.width,
            "L": 0,
        }
    part = vision if tower == "vision" else language
    sizes = {"1": 1, "3": 3, "d": part.width, "n": part.num_heads, "f": part.mlp_width, "L": part.num_layers}
    sizes |= {"h": part.width // part.num_heads, "k": language.num_kv_heads, "v": language.vocab_size}
    return sizes | {"c": 3, "p": vision.patch_size, "q": vision.patch_size, "t": 1 + vision.grid**2}


def _parse(axes: str) -> tuple[list[list[str]], list[str]]:
    """ "(3 n h) d -> d 3 n h" to [[3, n, h], [d]] and [d, 3, n, h]."""
    theirs, ours = axes.split(" -> ")
    return [group.strip("()").split() for group in re.findall(r"\([^)]*\)|\S+", theirs)], ours.split()


def _window(parameter: np.ndarray, slot: Slot) -> np.ndarray:
    """The view of our array that a tensor fills, its axes in the file's order, merged axes still apart."""
    groups, ours = _parse(slot.rule.axes)
    theirs = [axis for group in groups for axis in group if axis in ours]
    layer = parameter if slot.layer is None else parameter[slot.layer]
    view = layer.transpose([ours.index(axis) for axis in theirs])
    return view if slot.part is None else view[slot.part]


# ---- reading ----


def load_checkpoint(source: str | Path) -> tuple[InternVLConfig, PyTree]:
    """Read a checkpoint: its config, and its parameters as a nested dict of float32 numpy arrays.

    Tensors are read one by one into their place, so the peak of memory is the parameters and one tensor.

    Args:
      source: a directory with config.json and model.safetensors (or shards and model.safetensors.index.json),
        or a Hub id, "org/name" or "org/name@revision".

    Raises:
      InputError: nothing there, not safetensors, a config that is not implemented, or tensors that are
        missing, unexpected, given twice or of a wrong shape or type: all of them in one message.
    """
    directory = checkpoint_directory(source)
    config = config_from_json(directory / "config.json")
    stored = _read_headers(_weight_files(directory))
    layout = max(LAYOUTS, key=lambda layout: _count_known(config, stored, layout))
    by_name = _by_table_name(stored, layout)
    config = _settle_tied_head(config, tie_flag(read_config_json(directory / "config.json")), HEAD in by_name)
    slots = expected_tensors(config, layout)
    redundant_head = config.language.tie_embeddings and HEAD in by_name
    _check_tensors(directory, layout, slots | ({HEAD: slots[EMBEDDING]} if redundant_head else {}), by_name)
    params = {path: np.empty(shape, np.float32) for path, shape in parameter_shapes(config).items()}
    if redundant_head:
        (head,) = by_name.pop(HEAD)
        _fill(params, slots, by_name)
        _check_redundant_head(head, params["language/embedding"])
    else:
        _fill(params, slots, by_name)
    return config, _nest(params)


def fingerprint(source: str | Path) -> str:
    """What a run keeps to know its weights again: a hash of the names and sha256 of config.json and all weight files.

    Raises:
      InputError: as `load_checkpoint`, of the files that are missing.
    """
    directory, hashes = checkpoint_directory(source), {}
    for file in (directory / "config.json", *_weight_files(directory)):
        with file.open("rb") as content:
            hashes[file.name] = hashlib.file_digest(content, "sha256").hexdigest()
    return hashlib.sha256(json.dumps(hashes).encode()).hexdigest()


def _settle_tied_head(config: InternVLConfig, flag: bool | None, head_present: bool) -> InternVLConfig:
    """Tied as config.json says; where it says nothing, tied when the checkpoint has no head."""
    tied = not head_present if flag is None else flag
    return dataclasses.replace(config, language=dataclasses.replace(config.language, tie_embeddings=tied))


class _Stored(NamedTuple):
    file: Path
    name: str
    shape: tuple[int, ...]
    dtype: str


def _weight_files(directory: Path) -> list[Path]:
    """The safetensors files of a checkpoint: model.safetensors and those that the index names."""
    index = directory / INDEX
    single = directory / SINGLE
    files = [single] if single.is_file() else []  # no pipe, which would be waited for
    if index.exists():
        weight_map = read_config_json(index).get("weight_map")
        if not isinstance(weight_map, dict):
            raise InputError(f'{index}: "weight_map" is missing; it must give the file of every tensor')
        for name in sorted(set(map(str, weight_map.values()))):
            if len(name) > _MAX_NAME or "\0" in name or Path(name).name != name or not (directory / name).is_file():
                raise InputError(
                    f'{index}: "weight_map" names the file {name[:_MAX_NAME]!r}, which is not in {directory}'
                )
            files.append(directory / name)
    if not files:
        pickles = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in directory.glob(pattern))
        why = f"; {pickles[0]} is a pickle, which can run code and is never read: convert it" if pickles else ""
        raise InputError(f"{directory}: no {SINGLE} and no {INDEX}{why}")
    return list(dict.fromkeys(files))


def _open(file: Path) -> Any:
    import safetensors  # here, because a machine that only trains need not have it

    if file.exists() and not file.is_file():
        raise InputError(f"{file}: not a readable safetensors file (not a regular file); give another")
    try:
        return safetensors.safe_open(file, framework="numpy")
    except (safetensors.SafetensorError, OSError) as error:
        said = str(error)[:_MAX_NAME]  # it quotes the header
        raise InputError(f"{file}: not a readable safetensors file ({said}); copy or download it again") from error


def _read_headers(files: list[Path]) -> list[_Stored]:
    stored = []
    for file in files:
        with _open(file) as tensors:
            for name in tensors.keys():  # noqa: SIM118 (not a dict)
                header = tensors.get_slice(name)
                stored.append(_Stored(file, name, tuple(header.get_shape()), header.get_dtype()))
    return stored


def read_tensors(file: Path, wanted: dict[str, tuple[int, ...]], why: str) -> dict[str, np.ndarray]:
    """The tensors of a small file, each of a type that is read (`STORED_DTYPES`, or float64).

    Args:
      file: safetensors.
      wanted: all names and shapes that it is to hold.
      why: ends messages.

    Raises:
      InputError: not a safetensors file, or one of other tensors.
    """
    stored = _read_headers([file])
    found = {tensor.name: tensor.shape for tensor in stored}
    if found != wanted:
        raise InputError(f"{file}: holds {_some(found)}, but {_some(wanted)} is needed {why}")
    for tensor in stored:
        if tensor.dtype not in (*STORED_DTYPES, "F64"):
            raise InputError(f"{file}: {tensor.name} is {tensor.dtype}; store it as F32 {why}")
    with _open(file) as tensors:
        return {name: tensors.get_tensor(name) for name in wanted}


def _some(shapes: dict[str, tuple[int, ...]]) -> str:
    text = str(shapes)
    return text if len(text) <= 2 * _MAX_NAME else f"{text[: 2 * _MAX_NAME]}..."


def _count_known(config: InternVLConfig, stored: list[_Stored], layout: str) -> int:
    return len(expected_tensors(config, layout).keys() & _by_table_name(stored, layout).keys())


def _by_table_name(stored: list[_Stored], layout: str) -> dict[str, list[_Stored]]:
    """The stored tensors by the name that the table has for them; two under one name are duplicates."""
    by_name: dict[str, list[_Stored]] = {}
    for tensor in stored:
        by_name.setdefault(_table_name(tensor.name) if layout == "hf" else tensor.name, []).append(tensor)
    return by_name


def _table_name(name: str) -> str:
    for in_memory, on_disk in HF_SPELLINGS:
        if name.startswith(in_memory):
            return on_disk + name.removeprefix(in_memory)
    return name


def _check_tensors(directory: Path, layout: str, slots: dict[str, Slot], by_name: dict[str, list[_Stored]]) -> None:
    """Raise one InputError that lists everything wrong with the tensors of a checkpoint."""
    known = {name: found for name, found in by_name.items() if name in slots}
    each = [(tensor, slots[name].shape) for name, found in known.items() for tensor in found]
    problems = {
        "missing": [name for name in slots if name not in by_name],
        "unexpected": [found[0].name for name, found in by_name.items() if name not in slots],
        "duplicate": [
            " and ".join(f"{tensor.name} ({tensor.file.name})" for tensor in found)
            for found in known.values()
            if len(found) > 1
        ],
        "mis-shaped": [
            f"{tensor.name} is {list(tensor.shape)} and should be {list(shape)}"
            for tensor, shape in each
            if tensor.shape != shape
        ],
        "of a type that is not read": [
            f"{tensor.name} is {tensor.dtype} and should be one of {', '.join(STORED_DTYPES)}"
            for tensor, _ in each
            if tensor.dtype not in STORED_DTYPES
        ],
    }
    lines = [_list(kind, names) for kind, names in problems.items() if names]
    if lines:
        raise InputError(f"{directory}: not the tensors of its config.json ({layout} layout): {'; '.join(lines)}")


def _list(kind: str, names: list[str]) -> str:
    more = f", and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    shown = [name if len(name) <= 2 * _MAX_NAME else f"{name[: 2 * _MAX_NAME]}..." for name in names[:SHOWN]]
    return f"{len(names)} {kind}: {', '.join(shown)}{more}"


def _fill(params: dict[str, np.ndarray], slots: dict[str, Slot], by_name: dict[str, list[_Stored]]) -> None:
    """Copy every stored tensor into its window of our arrays, file by file."""
    for file in {tensor.file for (tensor,) in by_name.values()}:
        with _open(file) as tensors:
            for name, (tensor,) in by_name.items():
                if tensor.file == file:
                    window = _window(params[slots[name].rule.path], slots[name])
                    window[...] = tensors.get_tensor(tensor.name).reshape(window.shape)


def _check_redundant_head(head: _Stored, embedding: np.ndarray) -> None:
    with _open(head.file) as tensors:
        if not np.array_equal(tensors.get_tensor(head.name).astype(np.float32), embedding):
            raise InputError(
                f'{head.file}: {head.name} differs from the embedding, but config.json says "tie_word_embeddings": '
                "true; set it to false to use this head"
            )


def _nest(params: dict[str, np.ndarray]) -> PyTree:
    tree: dict[str, Any] = {}
    for path, value in params.items():
        *parents, leaf = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[leaf] = value
    return tree


# ---- writing ----


def to_tensors(config: InternVLConfig, params: PyTree, layout: str = "original") -> dict[str, np.ndarray]:
    """Parameters as the named, C-contiguous tensors of a layout: "original" or "hf" (on-disk spelling).

    Raises ValueError when the parameters are not those of `config`.
    """
    return dict(_each_tensor(_flatten(config, params), expected_tensors(config, layout)))


def _flatten(config: InternVLConfig, params: PyTree) -> dict[str, np.ndarray]:
    """The tree's arrays on the host, by path; the inverse of `_nest`."""
    flat = {}
    for path, shape in parameter_shapes(config).items():
        value: Any = params
        for part in path.split("/"):
            value = value[part]
        if value.shape != shape:
            raise ValueError(f"parameter {path} has shape {value.shape}; the config asks for {shape}")
        flat[path] = np.asarray(value)
    return flat


def _each_tensor(params: dict[str, np.ndarray], slots: dict[str, Slot]) -> Iterator[tuple[str, np.ndarray]]:
    for name, slot in slots.items():
        # Contiguous, because safetensors writes the memory of a transposed view in the wrong order, silently.
        yield name, np.ascontiguousarray(_window(params[slot.rule.path], slot)).reshape(slot.shape)


def save_checkpoint(
    config: InternVLConfig,
    params: PyTree,
    directory: str | Path,
    layout: str = "original",
    dtype: str = "float32",
    max_shard_bytes: int = 5_000_000_000,
    image_token_id: int = 151_667,
) -> None:
    """Write config.json and model.safetensors, or shards with an index above `max_shard_bytes`.

    What `load_checkpoint` gives back is equal to the bit for float32, and rounded once for bfloat16.
    `image_token_id`: of `<IMG_CONTEXT>` in the model's tokenizer.

    Raises:
      InputError: the directory holds weights that this would not overwrite, and that would be read as duplicates.
    """
    from safetensors.numpy import save_file  # here, because a machine that only trains need not have it

    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    stored_type = np.dtype(WRITTEN_DTYPES[dtype])
    slots = expected_tensors(config, layout)
    sizes = {name: math.prod(slot.shape) * stored_type.itemsize for name, slot in slots.items()}
    shards = _plan_shards(sizes, max_shard_bytes)
    written = set(shards) | ({INDEX} if len(shards) > 1 else set())
    others = sorted({path.name for path in directory.glob("model*.safetensors*")} - written)
    if others:
        raise InputError(f"{directory}: already holds {others[0]}; give an empty directory")
    flat = _flatten(config, params)
    for file, names in shards.items():
        tensors = _each_tensor(flat, {name: slots[name] for name in names})
        values = {name: value.astype(stored_type, copy=False) for name, value in tensors}
        save_file(values, directory / file, {"format": "pt"})
    if len(shards) > 1:
        weight_map = {name: file for file, names in shards.items() for name in names}
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
        (directory / INDEX).write_text(json.dumps(index, indent=2) + "\n")
    (directory / "config.json").write_text(config_to_json(config, layout, dtype, image_token_id))


def _plan_shards(sizes: dict[str, int], limit: int) -> dict[str, list[str]]:
    """File names and the tensors in each, in order, none above `limit` bytes unless one tensor is."""
    groups: list[list[str]] = [[]]
    filled = 0
    for name, size in sizes.items():
        if groups[-1] and filled + size > limit:
            groups.append([])
            filled = 0
        groups[-1].append(name)
        filled += size
    if len(groups) == 1:
        return {SINGLE: groups[0]}
    return {f"model-{n:05d}-of-{len(groups):05d}.safetensors": names for n, names in enumerate(groups, 1)}
