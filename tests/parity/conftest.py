"""What the published run trained on: its record, checkpoint and rows, ours and as PyTorch takes them."""

import json

import pytest

from dreamprm_jax.data import batches, records, tokens
from dreamprm_jax.data.dataset import ImageSpec, encode_all
from dreamprm_jax.models import convert


@pytest.fixture(scope="session")
def recorded(shared):
    return json.loads((shared / "golden/train_table.json").read_text())


@pytest.fixture(scope="session")
def checkpoint(seed0_checkpoint, tmp_path_factory):
    """Our config, the -hf layout's config and tensors of the checkpoint that the run began with."""
    directory = tmp_path_factory.mktemp("hf")
    config, params = convert.load_checkpoint(seed0_checkpoint)
    convert.save_checkpoint(config, params, directory, layout="hf")
    return config, directory


@pytest.fixture(scope="session")
def datasets(shared, checkpoint):
    """The recorded run's training and meta set."""
    tokenizer = tokens.load_tokenizer(shared / "tokenizer")
    images = ImageSpec(
        max_tiles=6, tile_size=checkpoint[0].vision.image_size, tokens_per_tile=checkpoint[0].image_tokens_per_tile
    )
    train, meta = (
        encode_all(
            records.read_examples(
                str(shared / f"golden/{level}_rows.json"), shared / "mmmu/images", outcome_required=level == "meta"
            ),
            tokenizer,
            images,
            context=32_768,
            outcome_targets=level == "meta",
        )
        for level in ("train", "meta")
    )
    return train, meta


@pytest.fixture(scope="session")
def peer_batch():
    """(dataset, indices) -> PeerBatch, no longer than its longest row."""
    from benchmarks import torch_peers  # needs torch

    def make(dataset, indices):
        length = max(dataset.num_tokens[index] for index in indices)
        batch = batches.collate(dataset, indices)
        return torch_peers.peer_batch(batch, dataset.images.tokens_per_tile, num_tokens=length)

    return make


@pytest.fixture(scope="session")
def rows(datasets, recorded, peer_batch):
    """The run's (batch, meta_batch) of every iteration."""
    train, meta = datasets
    orders = zip(recorded["train_order"], recorded["meta_order"], strict=True)
    return [(peer_batch(train, [i]), peer_batch(meta, [j])) for i, j in orders]
