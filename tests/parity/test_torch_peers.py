"""The benchmark's PyTorch peers do what they claim: the published code's recorded run, and one mathematics in both."""

import json

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from benchmarks import torch_peers  # noqa: E402 (after the skips)

NUM_ITERATIONS = 3


@pytest.fixture(scope="module")
def settings(recorded):
    known = recorded["args"]
    return torch_peers.Settings(
        num_steps=known["iteration_num"],
        lr=known["lr"],
        weight_decay=known["weight_decay"],
        meta_lr=known["meta_lr"],
        meta_weight_decay=known["meta_weight_decay"],
        clip_norm=known["gradiant_clipping"],
    )


def replay(peer, rows):
    return [peer(batch, meta_batch) for batch, meta_batch in rows[:NUM_ITERATIONS]]


def close(got, expected):
    np.testing.assert_allclose(got, expected, rtol=1e-4)


def meta_grad_close(got, expected):
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-3 * np.linalg.norm(expected))


@pytest.fixture(scope="module")
def published(checkpoint, rows, settings):
    model = torch_peers.build_model(checkpoint[1], attention="eager")
    return replay(torch_peers.published(model, 12, settings), rows)


def test_published_replays_the_recorded_run(published, recorded):
    column = [recorded["index"][str(row)] for row in range(12)]  # the recorded table is ordered by id as a string
    for n, metrics in enumerate(published):
        inner, plus, minus = (known["loss"] for known in recorded["lower"][3 * n : 3 * n + 3])
        close([metrics.inner_loss, metrics.plus_loss, metrics.minus_loss], [inner, plus, minus])
        close(metrics.meta_loss, recorded["upper"][n]["loss"])
        weight = recorded["upper"][n]["raw_weights_before"][recorded["index"][str(recorded["train_order"][n])]]
        np.testing.assert_allclose(metrics.weighted_loss / metrics.inner_loss, weight, rtol=1e-6)
        meta_grad_close(metrics.meta_grad, np.asarray(recorded["upper"][n]["meta_grad"])[0, column])


def test_tuned_computes_the_same_iteration(published, checkpoint, rows, settings):
    """Up to where AdamW puts its eps; the weights are given by name, as on a machine without the file."""
    from safetensors.numpy import load_file

    config = json.loads((checkpoint[1] / "config.json").read_text())
    model = torch_peers.build_model(config, weights=load_file(checkpoint[1] / "model.safetensors"))
    for known, metrics in zip(published, replay(torch_peers.tuned(model, 12, settings), rows), strict=True):
        close(metrics.inner_loss, known.inner_loss)
        close(metrics.meta_loss, known.meta_loss)
        meta_grad_close(metrics.meta_grad, known.meta_grad)


def test_padding_and_neighbours_change_nothing(checkpoint, datasets, peer_batch):
    model = torch_peers.build_model(checkpoint[1])
    pair = [7, 0]  # 546 tokens with one tile, 2,069 with seven
    with torch.no_grad():
        together = torch_peers.step_log_probs(model, peer_batch(datasets[0], pair))
        for got, index in zip(together, pair, strict=True):
            alone = peer_batch(datasets[0], [index])
            real = alone.step_mask[0]
            close(got[real], torch_peers.step_log_probs(model, alone)[0][real])
