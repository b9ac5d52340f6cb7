"""Weights, configs, tokenizers, checkpoints of strangers: each is loaded or refused by name, in bounded memory."""

import contextlib
import copy
import json
import os
import pickle
import random
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from benchmarks.pipeline import byte_tokenizer
from dreamprm_jax import build, checkpoint, loading
from dreamprm_jax.data import noisy_steps, tokens
from dreamprm_jax.data.example import Example, Turn
from dreamprm_jax.errors import InputError
from dreamprm_jax.models import convert, hub, internvl, presets
from dreamprm_jax.types import BilevelState, TrainState

ROOT = Path(__file__).parent.parent
CONFIG = presets.tiny(vocab_size=40)
HEADER = 8  # bytes that give the length of a safetensors header
JUNK = (
    *(
        None,
        True,
        0,
        -1,
        1.5,
        2**31,
        2**63,
        2**64,
        10**400,
        1e308,
        float("inf"),
        float("nan"),
        "",
        "x",
        "\ud800",
        "\x1b",
    ),
    *([], {}, [[]], [0], [-1], [2**40, 2**40], [2**64], [0, 2**64], "I64", "F64", "F8_E4M3", "F4", "C64", "BOOL"),
)
SPACE = 1 << 30  # bytes that a damaged file may cost: a hundred times what the whole one takes


@contextlib.contextmanager
def bounded_memory():
    """No more address space than there is and SPACE: an allocation of what a file declares fails."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + SPACE, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A whole checkpoint, of random values."""
    folder = tmp_path_factory.mktemp("whole")
    rng = np.random.default_rng(0)
    flat = {path: rng.normal(size=shape).astype(np.float32) for path, shape in convert.parameter_shapes(CONFIG).items()}
    convert.save_checkpoint(CONFIG, convert._nest(flat), folder)
    return folder


@pytest.fixture
def copied(whole, tmp_path):
    return Path(shutil.copytree(whole, tmp_path / "copy"))


def mutated(value, rng):
    """The value with one node replaced, removed or put under another's name."""
    value = copy.deepcopy(value)
    node = value
    while True:
        key = rng.choice(list(node) if isinstance(node, dict) else range(len(node)))
        if isinstance(node[key], dict | list) and node[key] and rng.random() < 0.8:
            node = node[key]
            continue
        action = rng.random()
        if action < 0.2:
            del node[key]
        elif action < 0.3 and isinstance(node, dict):
            node[rng.choice([*node, "\x1b[2J", "x" * 10_000])] = node[key]
        else:
            node[key] = rng.choice(JUNK)
        return value


def written(value, rng):
    """As JSON, now and then not quite."""
    text = json.dumps(value)
    action = rng.random()
    if action < 0.05:
        text = text[: rng.randrange(len(text))]
    elif action < 0.1:  # the same key again
        text = text[:-1] + ", " + text[1:]
    elif action < 0.13:
        text = text.replace(":", ":" + "[" * 100_000, 1)
    content = bytearray(text.encode())
    if 0.13 < action < 0.2 and content:
        content[rng.randrange(len(content))] = rng.randrange(256)
    return bytes(content)


def with_header(header, data, length=None):
    return (len(header) if length is None else length).to_bytes(HEADER, "little") + header + data


def damaged_weights(content, rng):
    """A safetensors file with something wrong with its bytes, its header or what that says."""
    end = HEADER + int.from_bytes(content[:HEADER], "little")
    header, data = json.loads(content[HEADER:end]), content[end:]
    kind = rng.randrange(5)
    if kind == 0:
        return content[: rng.randrange(len(content))]
    if kind == 1:
        flipped = bytearray(content)
        for _ in range(rng.randint(1, 6)):
            flipped[rng.randrange(end)] ^= 1 << rng.randrange(8)
        return bytes(flipped)
    if kind == 2:
        lengths = (0, 1, end, len(content), 2**27, 2**31, 2**32, 2**62, 2**63, 2**64 - 1)
        return with_header(content[HEADER:end], data, rng.choice(lengths))
    if kind == 3:
        tensor = header[rng.choice([name for name in header if name != "__metadata__"])]
        start, stop = tensor["data_offsets"]
        moved = rng.choice([(stop, start), (start + 4, stop + 4), (0, 2**63), (-4, 4), (start, len(data) + 8), (0, 0)])
        tensor["data_offsets"] = list(moved)
        if rng.random() < 0.3:
            tensor["shape"] = [2**32, 2**32]
        return with_header(json.dumps(header).encode(), data)
    return with_header(written(mutated(header, rng), rng), data)


def is_loaded(load, place):
    """Whether a file is taken; any other error than the user's own ends the test."""
    try:
        with bounded_memory():
            load()
    except InputError as error:
        assert place in str(error) and str(error).isprintable() and len(str(error)) < 10_000
        return False
    return True


def test_a_thousand_damaged_weight_files(whole, copied):
    rng = random.Random(0)
    path = copied / convert.SINGLE
    content = path.read_bytes()
    loaded = 0
    for _ in range(1000):
        path.write_bytes(damaged_weights(content, rng))
        loaded += is_loaded(lambda: convert.load_checkpoint(copied), str(copied))
    assert 0 < loaded < 100  # what changes the metadata alone, or only the order of the header, harms nobody


def test_damaged_configs_and_indices(copied):
    rng = random.Random(1)
    for name, layouts in (("config.json", (None,)), (convert.INDEX, (None,))):
        del layouts
        index = {"metadata": {}, "weight_map": {convert.HEAD: convert.SINGLE, convert.EMBEDDING: convert.SINGLE}}
        root = json.loads((copied / "config.json").read_text()) if name == "config.json" else index
        loaded = 0
        for _ in range(400):
            (copied / name).write_bytes(written(mutated(root, rng), rng))
            loaded += is_loaded(lambda: convert.load_checkpoint(copied), str(copied))
        assert 20 < loaded < 380
        (copied / name).write_text(json.dumps(root))


@pytest.mark.parametrize("layout", ["original", "hf"])
@pytest.mark.parametrize("value", [10**9, 10**400, 1e300, 1e-300, float("inf"), float("nan"), True, [[448], [448]], {}])
def test_absurd_numbers_of_a_config_are_refused(copied, layout, value):
    root = json.loads(convert.config_to_json(CONFIG, layout))
    text = "llm_config" if layout == "original" else "text_config"
    for part, field in (
        *((text, field) for field in ("num_hidden_layers", "rms_norm_eps", "vocab_size", "rope_scaling")),
        *(("vision_config", field) for field in ("num_hidden_layers", "layer_norm_eps", "patch_size", "image_size")),
        *((None, field) for field in ("downsample_ratio", "tie_word_embeddings", text, "vision_config")),
    ):
        changed = copy.deepcopy(root)
        (changed if part is None else changed[part])[field] = value
        (copied / "config.json").write_text(json.dumps(changed))
        is_loaded(lambda: convert.load_checkpoint(copied), str(copied))


@pytest.mark.parametrize("name", ["../{}", "/etc/passwd", "sub/../{}", "a\0b", "x" * 100_000, "..", ".", "", "pipe"])
def test_an_index_names_files_of_its_directory_alone(copied, name):
    (copied.parent / convert.SINGLE).write_bytes((copied / convert.SINGLE).read_bytes())
    (copied / convert.SINGLE).unlink()
    os.mkfifo(copied / "pipe")
    (copied / convert.INDEX).write_text(json.dumps({"weight_map": {convert.HEAD: name.format(convert.SINGLE)}}))
    with pytest.raises(InputError, match='"weight_map" names the file'):
        convert.load_checkpoint(copied)


@pytest.mark.parametrize("name", ["config.json", convert.SINGLE, "tokenizer.json"])
def test_a_pipe_in_the_place_of_a_file_is_not_waited_for(copied, name):
    (copied / name).unlink(missing_ok=True)
    os.mkfifo(copied / name)
    load = tokens.load_tokenizer if name == "tokenizer.json" else convert.load_checkpoint
    with pytest.raises(InputError, match=str(copied)):
        load(copied)


def test_names_of_tensors_cannot_write_to_the_terminal(copied):
    save_file({"\x1b]0;owned\x07\n": np.zeros(1, np.float32)}, copied / convert.SINGLE)
    with pytest.raises(InputError) as error:
        convert.load_checkpoint(copied)
    assert str(error.value).isprintable() and r"\x1b]0;owned\x07\n" in str(error.value)


def test_damaged_initial_weights(tmp_path):
    """`weighting.init`."""
    rng = random.Random(2)
    path = tmp_path / "init.safetensors"
    save_file({"table": np.linspace(0, 1, 6, dtype=np.float32)}, path)
    content, shapes = path.read_bytes(), {"table": np.zeros(6, np.float32)}
    build.read_meta_params(str(path), shapes)  # whose first call starts the devices' threads
    assert is_loaded(lambda: build.read_meta_params(str(path), shapes), str(path))
    for _ in range(300):
        path.write_bytes(damaged_weights(content, rng))
        is_loaded(lambda: build.read_meta_params(str(path), shapes), str(path))
    for dtype in (np.int64, np.bool_, np.complex64):
        save_file({"table": np.zeros(6, dtype)}, path)
        with pytest.raises(InputError, match="table is .*; store it as F32"):
            build.read_meta_params(str(path), shapes)


# ---- tokenizers ----


@pytest.mark.parametrize("make", [lambda: byte_tokenizer().tokenizer, noisy_steps.tokenizer], ids=["BPE", "WordLevel"])
def test_damaged_tokenizers(tmp_path, make):
    rng = random.Random(3)
    root = json.loads(make().to_str())
    text = " ".join(list(root["model"]["vocab"])[-9:-6])
    row = Example(0, "x", (Turn("human", text), Turn("gpt", "+")), (), None, None, place=f"{tmp_path} row 0")
    (tmp_path / "tokenizer.json").write_text(json.dumps(root))
    tokens.encode(tokens.load_tokenizer(tmp_path), row, [], 4)
    loaded = 0

    def load():
        tokens.encode(tokens.load_tokenizer(tmp_path), row, [], 4)

    for _ in range(300):
        (tmp_path / "tokenizer.json").write_bytes(written(mutated(root, rng), rng))
        loaded += is_loaded(load, str(tmp_path))
    assert 0 < loaded < 200


@pytest.mark.parametrize(
    "field, part",
    [
        ("pre_tokenizer", {"type": "Split", "pattern": {"Regex": "(a|aa)+$"}, "behavior": "Isolated", "invert": False}),
        ("pre_tokenizer", {"type": "Sequence", "pretokenizers": [{"type": "Punctuation", "behavior": "Isolated"}]}),
        ("normalizer", {"type": "Replace", "pattern": {"Regex": "(a|aa)+$"}, "content": "b"}),
        ("decoder", {"type": "Replace", "pattern": {"Regex": "(a|aa)+$"}, "content": "b"}),
        ("model", {"type": "Unigram", "unk_id": 0, "vocab": [["a", 0.0]]}),
    ],
)
def test_a_tokenizer_is_made_of_known_parts(tmp_path, field, part):
    root = json.loads(byte_tokenizer().tokenizer.to_str())
    if (part.get("pretokenizers") or [part])[0]["type"] == "Split":
        part = {"type": "Sequence", "pretokenizers": [part]}
    (tmp_path / "tokenizer.json").write_text(json.dumps({**root, field: part}))
    with pytest.raises(InputError, match=f'"{field}" (is|splits by) '):
        tokens.load_tokenizer(tmp_path)


def test_an_id_beyond_the_models_rows_is_seen():
    tokenizer = noisy_steps.tokenizer()
    root = json.loads(tokenizer.to_str())
    root["model"]["vocab"]["far"] = 10**6
    assert tokens.wrap(tokenizer.from_str(json.dumps(root))).vocab_size == 10**6 + 1


def test_a_text_that_would_stop_the_tokenizer_never_reaches_it():
    row = Example(7, "x", (Turn("human", " " * 10**7 + "b"), Turn("gpt", "+")), (), None, None, place="x.json row 7")
    tokenizer = byte_tokenizer()
    with pytest.raises(InputError, match='x.json row 7: "conversations" has 100000.. characters'):
        tokens.encode(tokenizer, row, [], 4)
    good = row._replace(turns=(Turn("human", "b"), Turn("gpt", "+")))
    found = tokens.encode_many(tokenizer, [good, row], [[], []], 4)
    assert isinstance(found[1], InputError) and len(found[0].labels) == 1


# ---- our own checkpoints, from somebody else ----


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """A workdir with one checkpoint."""
    folder = tmp_path_factory.mktemp("work")
    tokenizer = tokens.wrap(noisy_steps.tokenizer())
    config = presets.tiny(tokenizer.vocab_size)
    params = internvl.init(config, jax.random.key(0, impl="rbg"))
    loading.save_model_card(folder, config, tokenizer)
    fields = {name: {} for name in BilevelState._fields}
    train = TrainState(**{**{name: {} for name in TrainState._fields}, "params": params})
    saved = checkpoint.Checkpoints(folder, keep=1)
    saved.save(3, checkpoint.Snapshot(BilevelState(**{**fields, "train": train}), {"phase": "x", "next_step": 3}))
    saved.close()
    return folder


LOAD_EACH = """
import json, sys
from pathlib import Path
from dreamprm_jax import loading
from dreamprm_jax.errors import InputError
found = []
for folder in sys.argv[1:]:
    try:
        loading.load_workdir(Path(folder))
        found.append(None)
    except InputError as error:
        found.append(str(error))
print(json.dumps(found))
"""


def test_a_damaged_checkpoint_of_ours_is_refused(workdir, tmp_path):
    """In a process of its own: Orbax leaves the other reads alone where one fails, and Python tells so at its end."""
    rng = random.Random(4)
    files = sorted(path.relative_to(workdir) for path in workdir.rglob("*") if path.is_file())
    folders = [str(shutil.copytree(workdir, tmp_path / str(number))) for number in range(40)]
    for folder in folders[1:]:
        path = Path(folder) / rng.choice(files)
        content = bytearray(path.read_bytes())
        if rng.random() < 0.3:
            path.unlink()
        elif rng.random() < 0.5:
            path.write_bytes(content[: len(content) // 2])
        else:
            for _ in range(4):
                content[rng.randrange(len(content))] ^= 0xFF
            path.write_bytes(content)
    done = subprocess.run([sys.executable, "-c", LOAD_EACH, *folders], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    whole, *damaged = json.loads(done.stdout.splitlines()[-1])
    assert whole is None
    refused = [(folder, said) for folder, said in zip(folders[1:], damaged, strict=True) if said is not None]
    assert len(refused) > 10
    for folder, said in refused:
        assert folder in said and said.isprintable() and len(said) < 1000


RUNS_CODE = ("pickle.find_class", "marshal.loads", "subprocess.Popen", "os.system", "os.exec", "os.posix_spawn")
seen = None  # events of the interpreter while it is a list: an audit hook cannot be taken away


@sys.addaudithook
def _remember(event, arguments):
    if seen is not None and (event in RUNS_CODE or event == "socket.connect"):
        seen.append(event)


def test_restoring_unpickles_nothing_starts_nothing_and_asks_nobody(workdir, whole, monkeypatch):
    """The interpreter itself says what it does while everything is loaded that can be a stranger's."""
    loading.load_workdir(workdir)  # once before: what is imported on the way is compiled code of ours
    monkeypatch.setattr(sys.modules[__name__], "seen", [])
    loading.load_workdir(workdir)
    tokens.load_tokenizer(workdir / loading.MODEL)
    convert.load_checkpoint(whole)
    assert seen == []
    pickle.loads(pickle.dumps(CONFIG))
    assert set(seen) == {"pickle.find_class"}


def test_arrays_that_are_declared_but_not_stored_take_no_memory(workdir, tmp_path):
    folder = tmp_path / "step"
    folder.mkdir()
    (folder / "stored").write_bytes(b"x" * 1000)
    huge = presets.tiny(vocab_size=10**8)
    shapes = convert.parameter_shapes(huge)
    declared = convert._nest({name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes.items()})
    with pytest.raises(InputError, match="declares parameters of .* bytes, but has files of 1000"):
        loading._check_stored(folder, huge, (declared, {}))
    with pytest.raises(InputError, match="language/embedding is not as model/config.json has it"):
        loading._check_stored(folder, CONFIG, (declared, {}))


# ---- the Hub, and what a run remembers of its weights ----


@pytest.fixture
def downloads(monkeypatch, whole, tmp_path):
    """A Hub that gives one commit, `downloads["commit"]`; what was asked of it is in `downloads["asked"]`."""
    huggingface_hub = pytest.importorskip("huggingface_hub")
    given = {"commit": "0" * 39 + "1", "asked": []}

    def snapshot_download(repo_id, **options):
        given["asked"].append((repo_id, options))
        if "error" in given:
            raise ConnectionError(given["error"])
        folder = tmp_path / "snapshots" / given["commit"]
        return str(folder if folder.is_dir() else shutil.copytree(whole, folder))

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    hub._download.cache_clear()
    yield given
    hub._download.cache_clear()


def test_the_commit_of_a_download_is_told_and_stays_the_same(downloads, capsys):
    first = hub.checkpoint_directory("org/name")
    assert f"org/name: commit {'0' * 39}1; org/name@{'0' * 39}1 asks for this one again" in capsys.readouterr().err
    downloads["commit"] = "2" * 40  # the branch moves
    assert hub.checkpoint_directory("org/name") == first
    assert downloads["asked"] == [
        ("org/name", {"revision": None, "allow_patterns": ["*.json", "*.safetensors"]}),
    ]
    hub.checkpoint_directory(f"org/name@{'2' * 40}")
    assert capsys.readouterr().err == f"org/name@{'2' * 40}: commit {'2' * 40}\n"


def test_a_token_is_in_no_error(downloads, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret0123456789")
    downloads["error"] = "401 for Bearer hf_secret0123456789"
    with pytest.raises(InputError, match=r"401 for Bearer \[token\]") as caught:
        hub.checkpoint_directory("org/name")
    assert caught.value.__context__ is None


def test_a_run_knows_its_weights_again(copied, downloads):
    before = convert.fingerprint(copied)
    assert convert.fingerprint("org/name") == before  # the bytes count, not where they lie
    path = copied / convert.SINGLE
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    assert convert.fingerprint(copied) != before
    assert loading.fingerprint_of_model(str(copied)) == convert.fingerprint(copied)


def test_a_run_knows_the_workdir_it_began_from_again(workdir, tmp_path):
    folder = Path(shutil.copytree(workdir, tmp_path / "work"))
    assert loading.fingerprint_of_model(str(folder)) == loading.fingerprint_of_model(str(workdir))
    largest = max((folder / checkpoint.CHECKPOINTS).rglob("*"), key=lambda path: path.stat().st_size)
    largest.write_bytes(largest.read_bytes() + b"x")
    assert loading.fingerprint_of_model(str(folder)) != loading.fingerprint_of_model(str(workdir))
