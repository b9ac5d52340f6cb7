"""Exports as transformers reads them, without remote code: ids, chat, tiles, logits, scores, the card's own code."""

import json
import re

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

import jax  # noqa: E402 (after the skips)
from PIL import Image  # noqa: E402
from transformers.processing_utils import ProcessorMixin  # noqa: E402

from configs import export  # noqa: E402
from dreamprm_jax import prm  # noqa: E402
from dreamprm_jax.data import conversation, images, noisy_steps, tokens  # noqa: E402
from dreamprm_jax.data.example import GPT, HUMAN, SYSTEM, Example, Turn  # noqa: E402
from dreamprm_jax.export import run_export  # noqa: E402
from dreamprm_jax.models import convert, internvl, presets  # noqa: E402

QUESTION, STEPS = "### Question:\nHow many? é 数 12345  'll\tx", ["It is 7.\n\nSo: 7 + 0.5 = 7.5", " Answer: (B)"]


def exported(checkpoint, tokenizer, directory, layout="hf"):
    cfg = export.get_config()
    cfg.model.checkpoint, cfg.model.tokenizer = str(checkpoint), tokenizer and str(tokenizer)
    cfg.export.dtype, cfg.export.layout = "float32", layout
    run_export(cfg, directory)
    return directory


@pytest.fixture(scope="module", params=["hf", "original"])
def either(request, seed0_checkpoint, shared, tmp_path_factory):
    """The recorded checkpoint with InternVL3's own tokenizer."""
    return exported(seed0_checkpoint, shared / "tokenizer", tmp_path_factory.mktemp("export") / "e", request.param)


@pytest.fixture(scope="module")
def directory(seed0_checkpoint, shared, tmp_path_factory):
    return exported(seed0_checkpoint, shared / "tokenizer", tmp_path_factory.mktemp("export") / "hf")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """The embedded benchmark's model and tokenizer, for tests that need nothing recorded."""
    folder = tmp_path_factory.mktemp("tiny")
    tokenizer = tokens.wrap(noisy_steps.tokenizer())
    config = presets.tiny(tokenizer.vocab_size)
    params = jax.jit(internvl.init, static_argnums=0)(config, jax.random.key(1, impl="rbg"))
    convert.save_checkpoint(config, params, folder / "model")
    (folder / "model/tokenizer.json").write_text(tokenizer.tokenizer.to_str())
    return exported(folder / "model", None, folder / "export")


def picture(shared):
    return Image.open(shared / "mmmu/images/test_Art_113.png").convert("RGB")


def dialogue(system=None):
    """A chain as our rows have it, and as a chat for transformers, whose last step has no label."""
    turns = [] if system is None else [Turn(SYSTEM, system)]
    chat = [] if system is None else [{"role": "system", "content": system}]
    turns.append(Turn(HUMAN, QUESTION))
    chat.append({"role": "user", "content": [{"type": "image"}, {"type": "text", "text": QUESTION}]})
    for step in STEPS:
        turns += [Turn(HUMAN, step), Turn(GPT, "+")]
        chat += [{"role": "user", "content": step}, {"role": "assistant", "content": "+"}]
    return Example(0, 0, tuple(turns), (b"",), place="chain"), chat[:-1]


def test_the_tokenizer_gives_the_same_ids(either, shared):
    loaded, ours = transformers.AutoTokenizer.from_pretrained(either), tokens.load_tokenizer(shared / "tokenizer")
    assert len(loaded) == ours.vocab_size == 151_674
    assert (loaded.eos_token, loaded.pad_token_id) == (conversation.TURN_END, ours.pad_id)
    vectors = json.loads((shared / "tokenizer/qwen2_vectors.json").read_text())
    texts = [vector["text"] for vector in vectors] + [QUESTION, *STEPS, *conversation.CONTROL_TOKENS]
    for text in texts:
        expected = ours.tokenizer.encode(text, add_special_tokens=False).ids
        assert loaded(text, add_special_tokens=False).input_ids == expected
        assert loaded(text).input_ids == expected  # nothing is added on its own


def test_a_tokenizer_of_another_kind_gives_the_same_ids(tiny):
    """The embedded benchmark's knows whole words, and would be lost on a class that splits text by its own rules."""
    text = f"{conversation.HEADERS[HUMAN]}{conversation.IMAGE_BLOCK}dice:4{conversation.SEPARATOR}"
    expected = tokens.load_tokenizer(tiny).tokenizer.encode(text, add_special_tokens=False).ids
    assert transformers.AutoTokenizer.from_pretrained(tiny)(text).input_ids == expected


@pytest.mark.parametrize("system", [None, "Judge each step."])
def test_the_chat_template_is_our_conversation(either, system):
    example, chat = dialogue(system)
    loaded = transformers.AutoTokenizer.from_pretrained(either)
    text = loaded.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    expected = conversation.render(example)
    wrapped = text.replace(conversation.IMAGE_CONTEXT, conversation.IMAGE_BLOCK)
    assert wrapped == expected.text[: expected.label_spans[-1][0]]
    whole = loaded.apply_chat_template([*chat, {"role": "assistant", "content": "+"}], tokenize=False)
    assert whole.replace(conversation.IMAGE_CONTEXT, conversation.IMAGE_BLOCK) == expected.text


def test_tiles_are_ours_to_the_bit(either, shared):
    processor = transformers.AutoImageProcessor.from_pretrained(either)
    for name in ("test_Art_113.png", "test_History_134.png"):
        image = Image.open(shared / "mmmu/images" / name).convert("RGB")
        ours = images.normalise(images.tile_image(image, max_tiles=12)).transpose(0, 3, 1, 2)
        np.testing.assert_array_equal(processor(image, return_tensors="pt").pixel_values.numpy(), ours)


def test_the_processor_gives_the_tokens_of_a_row(directory, shared, monkeypatch):
    """But for its part for videos, which needs torchvision; with that, AutoProcessor makes it of the same files."""
    monkeypatch.setattr(ProcessorMixin, "check_argument_for_proper_class", lambda *arguments: None)
    fields = json.loads((directory / "processor_config.json").read_text())
    template = (directory / "chat_template.jinja").read_text()
    processor = getattr(transformers, fields.pop("processor_class"))(
        transformers.AutoImageProcessor.from_pretrained(directory),
        transformers.AutoTokenizer.from_pretrained(directory),
        None,
        chat_template=template,
        **fields,
    )
    example, chat = dialogue("Judge each step.")
    chat[1]["content"][0]["image"] = picture(shared)
    got = processor.apply_chat_template(
        chat, tokenize=True, return_dict=True, return_tensors="pt", add_generation_prompt=True
    )
    tokenizer = tokens.load_tokenizer(shared / "tokenizer")
    encoded = tokens.encode(tokenizer, example, [len(got["pixel_values"])], tokens_per_tile=256)
    np.testing.assert_array_equal(got["input_ids"][0], encoded.tokens[: encoded.step_positions[-1] + 1])


def test_the_config_is_transformers_own(directory):
    config = transformers.AutoConfig.from_pretrained(directory)
    assert type(config) is transformers.InternVLConfig
    assert (config.image_token_id, config.image_seq_length, config.dtype) == (151_667, 256, torch.float32)


def logits_of_ours(directory, ids, pixels):
    config, params = convert.load_checkpoint(directory)

    @jax.jit
    def forward(params):
        features = internvl.encode_pixels(config, params, pixels).reshape(1, -1, config.language.width)
        x = internvl.embed_tokens(config, params, ids)
        x = internvl.merge_image_features(x, internvl.image_index(ids == image_token), features)
        positions = np.arange(ids.shape[1])[None]
        return internvl.head(config, params, internvl.language_states(config, params, x, positions))

    image_token = tokens.load_tokenizer(directory).image_context_id
    return forward(params)


def test_the_model_gives_the_same_logits(tiny):
    """`from_pretrained` as anybody calls it: the config's own image token, the two tiles' features in its places."""
    loaded = transformers.InternVLForConditionalGeneration.from_pretrained(tiny).eval()
    assert loaded.dtype == torch.float32
    rng = np.random.default_rng(0)
    tokenizer = tokens.load_tokenizer(tiny)
    ids = rng.integers(0, tokenizer.vocab_size, (1, 40))
    ids[ids == tokenizer.image_context_id] = tokenizer.plus_id
    ids[0, 5:7] = tokenizer.image_context_id
    pixels = rng.normal(size=(2, 28, 28, 3)).astype(np.float32)
    with torch.no_grad():
        tensor = torch.from_numpy(pixels.transpose(0, 3, 1, 2).copy())
        expected = loaded(input_ids=torch.from_numpy(ids), pixel_values=tensor).logits
    np.testing.assert_allclose(logits_of_ours(tiny, ids, pixels), expected.numpy(), rtol=0, atol=1e-4)


def test_the_cards_code_gives_our_scores(directory, shared, tmp_path, capsys):
    """Both blocks of the card, run as they stand; ours asked as the other asks."""
    small = picture(shared).resize((448, 448))
    small.save(tmp_path / "picture.png")
    (code,) = re.findall(r"```python\n(import torch.*?)```", (directory / "README.md").read_text(), re.DOTALL)
    for name, value in (
        ('"DIRECTORY"', repr(str(directory))),
        ('"PICTURE"', repr(str(tmp_path / "picture.png"))),
        ('"QUESTION"', repr(QUESTION)),
        ('["STEP 1", "STEP 2"]', repr(STEPS)),
    ):
        assert name in code
        code = code.replace(name, value)
    exec(compile(code, "card", "exec"), {})
    scorer = prm.load(directory, system=None, question_form="{question}")
    ours = scorer.score(QUESTION, [small], STEPS).full
    np.testing.assert_allclose(json.loads(capsys.readouterr().out), ours, rtol=1e-4, atol=1e-5)
    assert abs(ours[0] - ours[1]) > 1e-4
