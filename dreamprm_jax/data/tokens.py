"""Tokenizer and the ids looked up in it by their text; an `Example` becomes an `Encoded`."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tokenizers import Encoding, Tokenizer

from dreamprm_jax.data.conversation import (
    END_OF_TEXT,
    IMAGE_CONTEXT,
    IMAGE_END,
    IMAGE_START,
    TURN_END,
    TURN_START,
    Rendered,
    render,
)
from dreamprm_jax.data.example import MINUS, PLUS, Encoded, Example
from dreamprm_jax.data.fields import field_error, shown
from dreamprm_jax.documents import read_bytes
from dreamprm_jax.errors import InputError

_KINDS = {
    "model": ("BPE", "WordLevel"),
    "normalizer": (None, "NFC"),
    "pre_tokenizer": (None, "ByteLevel", "Sequence", "Split", "Whitespace", "WhitespaceSplit"),
    "post_processor": (None, "ByteLevel"),
    "decoder": (None, "ByteLevel"),
}
"""What a tokenizer may be made of: Qwen2's parts, and those of our own. Others are not needed, and a damaged part or a
regular expression of another's choice can stop the process from inside the library."""

_REGEX = (
    "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}| ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*|\\s*[\\r\\n]+"
    "|\\s+(?!\\S)|\\s+"
)
"""Qwen2's, as in InternVL3's tokenizer.json."""

MAX_CHARACTERS = 4_000_000
"""Of a row's text: a hundred a token of the longest context. The library stops the process at a run of ten million
spaces."""

_SHOWN = 200  # characters of what the library says of a damaged file


class PRMTokenizer(NamedTuple):
    """A tokenizer with the ids that a process reward model needs. Can be pickled, for Grain's workers."""

    tokenizer: Tokenizer
    plus_id: int
    minus_id: int
    image_context_id: int
    pad_id: int
    vocab_size: int  # V of the tokenizer, its highest id and one; a model's embedding may have more rows


def load_tokenizer(directory: str | Path) -> PRMTokenizer:
    """Loads `tokenizer.json` of a directory.

    Raises:
      InputError: no such file, a damaged one, one of parts that are not read, or a token that is missing.
    """
    path = Path(directory) / "tokenizer.json"
    if not path.is_file():
        raise InputError(f"{path}: no such file; give a directory with a tokenizer.json (model.tokenizer)")
    try:
        content = read_bytes(path).decode()
        _check_parts(json.loads(content), str(path))
        tokenizer = Tokenizer.from_str(content)
    except InputError:
        raise
    except Exception as error:  # the library raises a bare Exception
        reason = "nested too deeply" if isinstance(error, RecursionError) else str(error)[:_SHOWN]
        raise InputError(f"{path}: not a readable tokenizer.json ({reason}); download it again") from error
    return wrap(tokenizer, str(path))


def _check_parts(root: Any, name: str) -> None:
    """Looks at what a tokenizer is made of, before the library does.

    Raises:
      InputError: a part that is not read.
    """

    def refused(field: str, why: str) -> InputError:
        advice = "take an InternVL checkpoint's tokenizer"
        return InputError(f'{name}: not a readable tokenizer.json ("{field}" {why}); {advice}')

    for field, kinds in _KINDS.items():
        whole = root.get(field)
        for part in (whole, *((whole or {}).get("pretokenizers") or ())):
            kind = part and part["type"]
            if kind not in kinds or (kind == "Sequence" and part is not whole):
                raise refused(field, f"is {shown(kind)}, not one of {', '.join(filter(None, kinds))}")
            regex = ((part or {}).get("pattern") or {}).get("Regex", _REGEX)
            if regex != _REGEX:
                raise refused(field, f"splits by {shown(regex)}, not by Qwen2's expression")


def wrap(tokenizer: Tokenizer, name: str = "tokenizer") -> PRMTokenizer:
    """Looks up the ids in a tokenizer, and switches its truncation and padding off.

    Args:
      tokenizer: as read from a file, or built in memory.
      name: begins error messages.

    Raises:
      InputError: a label, image or turn token that is not exactly one token of its own.
    """
    tokenizer.no_truncation()
    tokenizer.no_padding()
    for text in (TURN_START, TURN_END, IMAGE_START, IMAGE_END):
        _single_id(tokenizer, text, name)
    has_end_of_text = tokenizer.token_to_id(END_OF_TEXT) is not None
    return PRMTokenizer(
        tokenizer=tokenizer,
        plus_id=_single_id(tokenizer, PLUS, name),
        minus_id=_single_id(tokenizer, MINUS, name),
        image_context_id=_single_id(tokenizer, IMAGE_CONTEXT, name),
        pad_id=_single_id(tokenizer, END_OF_TEXT if has_end_of_text else TURN_END, name),
        vocab_size=1 + max(tokenizer.get_vocab(with_added_tokens=True).values()),
    )


def _single_id(tokenizer: Tokenizer, text: str, name: str) -> int:
    token_id = tokenizer.token_to_id(text)
    try:
        ids = tokenizer.encode(text, add_special_tokens=False).ids
    except Exception as error:  # the library raises a bare Exception
        raise InputError(f'{name}: cannot take "{text}" ({error}); take an InternVL checkpoint\'s tokenizer') from error
    if token_id is None or ids != [token_id]:
        raise InputError(
            f'{name}: "{text}" must be one token, but gives {ids}; take an InternVL checkpoint\'s tokenizer'
        )
    return token_id


def encode(tokenizer: PRMTokenizer, example: Example, num_tiles: Sequence[int], tokens_per_tile: int) -> Encoded:
    """Tokenises a whole row at once.

    Args:
      tokenizer: of the model that will read the ids.
      example: the row.
      num_tiles: tiles of each image of the row, thumbnail included.
      tokens_per_tile: I image tokens per tile.

    Returns:
      Encoded with T = text tokens + I * sum(num_tiles). The scored position is the token before each label.

    Raises:
      InputError: image tokens that do not match the images, a label that is not one token, or a text too long.
    """
    rendered = _rendered(example)
    try:
        encoding = tokenizer.tokenizer.encode(rendered.text, add_special_tokens=False)
    except Exception as error:  # the library raises a bare Exception, for one where a word is not in a word list
        raise InputError(
            f'{example.place}: "conversations" has text that the tokenizer cannot take ({error}); '
            "set model.tokenizer to the checkpoint's own; a model of the embedded benchmark knows the words of its own "
            "short prompts alone (docs/evaluation.md)",
            kind="conversations",
        ) from error
    return _place_images(tokenizer, example, rendered, encoding, num_tiles, tokens_per_tile)


def encode_many(
    tokenizer: PRMTokenizer, examples: Sequence[Example], num_tiles: Sequence[Sequence[int]], tokens_per_tile: int
) -> list[Encoded | InputError]:
    """`encode` of many rows, in a third of the time; a row's error stands in its place."""

    def one(example: Example, own_tiles: Sequence[int], encoding: Encoding | None) -> Encoded | InputError:
        try:
            if encoding is None:
                return encode(tokenizer, example, own_tiles, tokens_per_tile)
            return _place_images(tokenizer, example, _rendered(example), encoding, own_tiles, tokens_per_tile)
        except InputError as error:
            return error

    try:
        texts = [_rendered(example).text for example in examples]
        encodings = tokenizer.tokenizer.encode_batch(texts, add_special_tokens=False)
    except Exception:  # of one row: which one, and why, is found row by row
        encodings = [None] * len(examples)
    return list(map(one, examples, num_tiles, encodings))


def _rendered(example: Example) -> Rendered:
    """The row's text; one that no context could hold never comes to the tokenizer."""
    rendered = render(example)
    if len(rendered.text) > MAX_CHARACTERS:
        raise InputError(
            f'{example.place}: "conversations" has {len(rendered.text)} characters; the limit is {MAX_CHARACTERS}: '
            "shorten the row",
            kind="length",
        )
    return rendered


def _place_images(
    tokenizer: PRMTokenizer,
    example: Example,
    rendered: Rendered,
    encoding: Encoding,
    num_tiles: Sequence[int],
    tokens_per_tile: int,
) -> Encoded:
    """The one image token of each image becomes as many as its tiles have; the labels are found."""
    ids = np.array(encoding.ids, np.int32)
    images = np.flatnonzero(ids == tokenizer.image_context_id)
    if not len(images) == len(num_tiles) == rendered.num_image_markers:
        raise InputError(
            f'{example.place}: "conversations" has {len(images)} {IMAGE_CONTEXT} token(s) for '
            f"{rendered.num_image_markers} image(s) and {len(num_tiles)} tile count(s); "
            f"take {IMAGE_CONTEXT} out of the text",
            kind="conversations",
        )
    labels = [_label_index(encoding, span, example.place) for span in rendered.label_spans]
    labels = np.array(labels, np.int32)
    repeats = np.ones(len(ids), np.int32)
    repeats[images] = tokens_per_tile * np.array(num_tiles, np.int32)
    ends = np.cumsum(repeats)  # of each token's ids after the expansion
    tokens = np.repeat(ids, repeats)
    return Encoded(
        tokens=tokens,
        image_mask=tokens == tokenizer.image_context_id,
        step_positions=(ends[labels] - 2).astype(np.int32),
        labels=ids[labels],
        num_tiles=int(sum(num_tiles)),
        soft_labels=None if example.soft_labels is None else np.array(example.soft_labels, np.float32),
    )


def _label_index(encoding: Encoding, span: tuple[int, int], place: str) -> int:
    """Index of the token that is exactly the label at `span` (characters)."""
    index = encoding.char_to_token(span[0])
    if index is None or encoding.token_to_chars(index) != span:
        raise field_error(place, "conversations", 'has a label that is not one token; write "+" or "-"')
    return index


def check_length(encoded: Encoded, context: int, place: str) -> None:
    """Checks that a row fits into the model's context of `context` tokens.

    Raises:
      InputError: it does not.
    """
    length = len(encoded.tokens)
    if length > context:
        raise InputError(
            f'{place}: "conversations" gives {length} tokens, {int(encoded.image_mask.sum())} for images; '
            f"the model's context is {context}: shorten the row, lower images.max_tiles or set images.tile_budget",
            kind="length",
        )
