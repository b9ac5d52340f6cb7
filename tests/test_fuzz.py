"""A thousand malformed rows and images through the whole way to a batch: used as they stand, or refused with a name."""

import io
import json
import random

import numpy as np
import pytest
from PIL import Image

from benchmarks.pipeline import byte_tokenizer
from dreamprm_jax.data import batches
from dreamprm_jax.data.bad_rows import OnError
from dreamprm_jax.data.conversation import render
from dreamprm_jax.data.dataset import ImageSpec, encode_all
from dreamprm_jax.data.records import read_rows
from dreamprm_jax.errors import InputError
from tests.test_records import good_row, mutate

TOKENIZER = byte_tokenizer()
SPEC = ImageSpec(max_tiles=2, tile_size=28, tokens_per_tile=4)
FORMATS = ("PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "PPM")


def picture(rng, name):
    pixels = np.frombuffer(rng.randbytes(40 * 30 * 3), np.uint8).reshape(30, 40, 3)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, name)
    return buffer.getvalue()


def damaged(content, rng):
    """Cut, or with a few bytes replaced, taken out or doubled."""
    content = bytearray(content)
    for _ in range(rng.randint(1, 4)):
        start = rng.randrange(len(content)) if rng.random() < 0.5 else rng.randrange(min(64, len(content)))
        length = rng.choice([1, 1, 4, 200])
        content[start : start + length] = rng.choice([b"", rng.randbytes(length), bytes(length), content[:length] * 2])
        if not content:
            return b"\0"
    return bytes(content)


@pytest.fixture
def root(tmp_path):
    root = tmp_path / "images"
    root.mkdir()
    (root / "a.png").write_bytes(picture(random.Random(0), "PNG"))
    return root


def check_file(path, root, lines):
    """Reads one file of mutated rows; returns which were used, each of which is just what its line says."""
    path.write_bytes(b"\n".join(lines))
    rows = read_rows(path, root, outcome_required=False)
    assert len(rows) == len(lines)
    found = encode_all(rows, TOKENIZER, SPEC, context=2000, on_error=OnError("skip", 1.0))
    refused = set(range(len(lines))) - set(found.rows.tolist())
    assert sum(found.skipped.values()) == len(refused)
    for row in found.rows.tolist():
        example, (encoded, tiles) = found.examples[row], found.load(row)
        raw = json.loads(lines[row])
        assert [turn.text for turn in example.turns] == [turn["value"] for turn in raw["conversations"]]
        text = encoded.tokens[~encoded.image_mask]
        assert TOKENIZER.tokenizer.decode(text, skip_special_tokens=False) == render(example).text.replace(
            "<IMG_CONTEXT>", ""
        )
        labels = [turn["value"] for turn in raw["conversations"] if turn["from"] == "gpt"]
        assert [TOKENIZER.tokenizer.id_to_token(label) for label in encoded.labels] == labels
        names = raw["image"] if isinstance(raw["image"], list) else [raw["image"]] if raw["image"] else []
        assert len(example.images) == len(names)
        assert len(tiles) == encoded.num_tiles == encoded.image_mask.sum() / 4
    batches.collate(found, found.rows[:3])
    return found.rows.tolist()


def test_seven_hundred_malformed_rows(tmp_path, root):
    rng = random.Random(0)
    used = 0
    for _ in range(35):
        lines = [json.dumps(good_row())]
        for _ in range(20):
            line = json.dumps(mutate(good_row(), rng))
            lines.append(line[: rng.randrange(1, len(line))] if rng.random() < 0.1 else line)
        used += len(check_file(tmp_path / "rows.jsonl", root, [line.encode() for line in lines])) - 1
    assert 70 < used < 630


def test_three_hundred_malformed_images(tmp_path, root):
    rng = random.Random(1)
    used = 0
    whole = [picture(rng, name) for name in FORMATS]
    for _ in range(15):
        lines = [json.dumps(good_row()).encode()]
        for number in range(20):
            (root / f"{number}.img").write_bytes(damaged(rng.choice(whole), rng))
            lines.append(json.dumps(good_row(image=f"{number}.img")).encode())
        rows = check_file(tmp_path / "rows.jsonl", root, lines)
        used += len(rows) - 1
        for row in rows[1:]:  # used only where every byte of it was decoded
            with Image.open(root / f"{row - 1}.img") as image:
                image.load()
    assert 30 < used < 280


def test_each_refusal_names_file_row_and_field(tmp_path, root):
    rng = random.Random(2)
    path = tmp_path / "rows.jsonl"
    for _ in range(100):
        path.write_text(json.dumps(good_row()) + "\n" + json.dumps(mutate(good_row(), rng)))
        try:
            encode_all(read_rows(path, root, outcome_required=False), TOKENIZER, SPEC, context=2000)
        except InputError as error:
            assert str(error).startswith(f"{path} row 1: ")
            assert error.kind in ("row", "id", "image", "conversations", "true_false", "dataset"), error.kind
