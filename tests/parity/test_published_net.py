"""The published recipe's Instance Net against PyTorch, iteration by iteration, on rows of the recorded table run.

No run of the published net is recorded: the iteration is written down here a second time, from what its code does.
The optimizer alone is shared with the one that replays the recorded table run (test_torch_peers.py).
"""

import json

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

import torch.nn.functional as F  # noqa: E402 (after the skips)
from safetensors.numpy import load_file, save_file  # noqa: E402
from torch import nn  # noqa: E402

from benchmarks import torch_peers  # noqa: E402
from configs import net  # noqa: E402
from dreamprm_jax.experiment import run_training  # noqa: E402
from dreamprm_jax.loading import load_workdir  # noqa: E402
from dreamprm_jax.models import convert  # noqa: E402

PLUS, MINUS = 10, 12  # token ids of the labels
ITERATIONS = (1, 2, 5, 8, 9, 10, 11)  # of the recorded run: those of two pairs of shapes, since each is compiled
SETTINGS = torch_peers.Settings(
    num_steps=len(ITERATIONS), lr=5e-4, weight_decay=0.05, meta_lr=1e-3, meta_weight_decay=1e-3
)


@pytest.fixture(scope="module")
def initial_net():
    """Random, so that hidden units of both signs occur; by our names and in our shapes."""
    rng = np.random.default_rng(0)
    shapes = {"hidden.kernel": (2, 10), "hidden.bias": (10,), "output.kernel": (10, 1), "output.bias": (1,)}
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


class InstanceNet(nn.Module):
    def __init__(self, tensors):
        super().__init__()
        self.hidden, self.output = nn.Linear(2, 10), nn.Linear(10, 1)
        self.load_state_dict(
            {name.replace("kernel", "weight"): torch.from_numpy(value.T.copy()) for name, value in tensors.items()}
        )

    def forward(self, label_logits):
        """The weight [] of an example from its logits of "+" and "-" [S, 2]."""
        probabilities = torch.softmax(label_logits, dim=-1)
        return torch.sigmoid(self.output(F.leaky_relu(self.hidden(probabilities))).mean())

    def by_our_names(self, values):
        """`values`, one for each parameter, in our shapes."""
        names = [name.replace("weight", "kernel") for name, _ in self.named_parameters()]
        return {name: value.detach().numpy().T.copy() for name, value in zip(names, values, strict=True)}


def step_logits(model, batch):
    """Logits where the next token is a label [S, V], and the labels [S]."""
    real = batch.step_mask[0]
    output = model(
        input_ids=batch.tokens,
        pixel_values=batch.pixels,
        attention_mask=torch.ones_like(batch.tokens),
        use_cache=False,
        logits_to_keep=batch.step_positions[0, real],
    )
    return output.logits[0], batch.labels[0, real]


def published_iteration(model, instance_net, settings):
    """(batch, meta_batch) -> what the log of an iteration says, for one example each."""
    params, net_params = list(model.parameters()), list(instance_net.parameters())
    update = torch_peers.hf_adamw(params, settings.lr, settings.weight_decay, settings)
    meta_update = torch_peers.hf_adamw(net_params, settings.meta_lr, settings.meta_weight_decay, settings)

    def loss_and_weight(batch):
        logits, labels = step_logits(model, batch)
        return F.cross_entropy(logits, labels), instance_net(logits[:, [PLUS, MINUS]])

    def net_gradient(batch):
        loss, weight = loss_and_weight(batch)
        return torch.autograd.grad(loss * weight, net_params)

    def iterate(batch, meta_batch):
        loss, weight = loss_and_weight(batch)
        weighted_loss = loss * weight
        weighted_loss.backward(inputs=params)
        grad_norm = nn.utils.get_total_norm([param.grad for param in params])
        update()

        logits, targets = step_logits(model, meta_batch)
        prediction = torch.softmax(logits, dim=-1)[torch.arange(len(targets)), targets].mean()
        meta_loss = F.mse_loss(prediction, torch.ones_like(prediction))
        vector = torch.autograd.grad(meta_loss, params)
        eps = 0.01 / (nn.utils.get_total_norm(vector) + 1e-15).item()
        torch_peers._move(params, vector, eps)
        plus = net_gradient(batch)
        torch_peers._move(params, vector, -2 * eps)
        minus = net_gradient(batch)
        torch_peers._move(params, vector, eps)
        meta_grad = [-(up - down) / (2 * eps) for up, down in zip(plus, minus, strict=True)]
        for param, grad in zip(net_params, meta_grad, strict=True):
            param.grad = grad.clone()  # the clip works in place
        meta_update()
        return {
            "inner_loss": loss.item(),
            "instance_weights": [weight.item()],
            "weighted_loss": weighted_loss.item(),
            "grad_norm": grad_norm.item(),
            "meta_prediction": prediction.item(),
            "meta_loss": meta_loss.item(),
            "meta_grad": instance_net.by_our_names(meta_grad),
        }

    return iterate


@pytest.fixture(scope="module")
def peer(checkpoint, rows, initial_net):
    """What every iteration said; the net and the model as the last one left them."""
    model, instance_net = torch_peers.build_model(checkpoint[1]), InstanceNet(initial_net)
    iterate = published_iteration(model, instance_net, SETTINGS)
    return [iterate(*rows[n]) for n in ITERATIONS], instance_net, model


@pytest.fixture(scope="module")
def workdir(shared, seed0_checkpoint, recorded, initial_net, tmp_path_factory):
    """Our run of the same."""
    folder = tmp_path_factory.mktemp("published_net")
    cfg = net.get_config("internvl3_1b,published")
    cfg.model.checkpoint, cfg.model.tokenizer = str(seed0_checkpoint), str(shared / "tokenizer")
    cfg.model.compute_dtype = cfg.model.param_dtype = "float32"
    cfg.model.remat, cfg.model.matmul_precision = "none", "highest"
    cfg.images.max_tiles = 6
    for level in ("train", "meta"):
        order = folder / f"{level}_order.json"
        order.write_text(json.dumps([recorded[f"{level}_order"][n] for n in ITERATIONS]))
        cfg[level].path, cfg[level].images = str(shared / f"golden/{level}_rows.json"), str(shared / "mmmu/images")
        cfg[level].order = str(order)
    cfg.weighting.init = str(folder / "net.safetensors")
    save_file(initial_net, cfg.weighting.init)
    cfg.num_steps, cfg.inner.lr, cfg.outer.lr = SETTINGS.num_steps, SETTINGS.lr, SETTINGS.meta_lr
    cfg.log_meta_grad = True
    assert (cfg.inner.weight_decay, cfg.outer.weight_decay) == (SETTINGS.weight_decay, SETTINGS.meta_weight_decay)
    run_training(cfg, folder / "run")
    return folder / "run"


def close(got, expected):
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)


def flat(tensors):
    return np.concatenate([np.ravel(tensors[name]) for name in sorted(tensors)])


def test_every_iteration_says_the_same(peer, workdir):
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    for line, known in zip(lines, peer[0], strict=True):
        for name in ("inner_loss", "instance_weights", "weighted_loss", "grad_norm", "meta_prediction", "meta_loss"):
            close(line[name], known[name])
        assert line["meta_grad"].keys() == known["meta_grad"].keys()
        got, expected = flat(line["meta_grad"]), flat(known["meta_grad"])
        assert np.linalg.norm(got - expected) <= 1e-3 * np.linalg.norm(expected)


def moves_close(got, expected, initial, tolerance, name):
    """Both ended at about the same distance and in about the same direction from where they began."""
    moved = np.linalg.norm(expected - initial)
    assert moved > 0, name
    assert np.linalg.norm(got - expected) <= tolerance * moved, name


def test_the_net_ends_the_same(peer, workdir, initial_net):
    got, expected = load_file(workdir / "meta_params.safetensors"), peer[1].by_our_names(peer[1].parameters())
    assert got.keys() == expected.keys()
    for name, tensor in got.items():
        moves_close(tensor, expected[name], initial_net[name], 1e-3, name)


def test_the_model_ends_the_same(peer, workdir, checkpoint):
    initial = load_file(checkpoint[1] / "model.safetensors")
    got, expected = convert.to_tensors(*load_workdir(workdir), "hf"), peer[2].state_dict()
    assert got.keys() == initial.keys()
    assert len(got) == len(expected)
    for name, tensor in got.items():
        known = expected[torch_peers._spelt_in_memory(name)].numpy()
        moves_close(np.asarray(tensor), known, initial[name], 1e-2, name)
