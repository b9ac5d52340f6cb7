"""What a bilevel iteration costs in PyTorch: the published code's way, and as well as a user could tune it.

`published` follows coder-qicao/DreamPRM-1.5 (main_table.py, model.py) on betty-ml 0.2.1 (hypergradient/darts.py) and
transformers 4.49, operation by operation; `tuned` computes the same estimate with what PyTorch offers; `plain` is its
inner step alone. All run transformers' InternVL and change it in place: give each a model of its own.
Only torch, transformers and numpy are imported. Shape legend: dreamprm_jax/types.py.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import InternVLConfig, PretrainedConfig
from transformers import InternVLForConditionalGeneration as Model

PIXEL_MEAN, PIXEL_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's, as InternVL's preprocessing
MIN_WEIGHT, MAX_WEIGHT = -1.0, 3.0  # InstanceTable's clamp; torch's has derivative 1 on the bounds
RADIUS = 0.01  # darts_alpha, Betty's default: the finite difference moves the parameters by this norm
BETA1, BETA2, ADAM_EPS = 0.9, 0.999, 1e-6  # transformers' defaults


class Settings(NamedTuple):
    """The two optimizers; defaults are those of the published run (run_table.sh)."""

    num_steps: int = 100_000  # length of both cosines
    lr: float = 5e-5
    weight_decay: float = 0.01  # on every parameter
    meta_lr: float = 5e-3
    meta_weight_decay: float = 1e-3
    clip_norm: float = 1.0  # both levels


class PeerBatch(NamedTuple):
    """A batch as the peers take it; images have no padding, text is padded on the right."""

    tokens: Tensor  # [B, T] int64
    pixels: Tensor  # [P, 3, height, width] float32, normalised: the tiles of all rows, one row after the other
    image_positions: Tensor  # [P * I] int64: where in the flattened [B * T] each image feature goes
    step_positions: Tensor  # [B, S] int64: the position whose next token is the label
    labels: Tensor  # [B, S] int64
    step_mask: Tensor  # [B, S] bool
    example_id: Tensor  # [B] int64


class Metrics(NamedTuple):
    """Of one iteration: floats from `published`, tensors that nobody has waited for from `tuned`."""

    inner_loss: Any  # [] unweighted mean over the batch, before the step
    weighted_loss: Any  # []
    meta_loss: Any  # [] after the step
    plus_loss: Any  # [] unweighted, parameters moved by +eps v
    minus_loss: Any  # [] the same, by -eps v
    meta_grad: Any  # [num_examples] before its clip


Step = Callable[[PeerBatch, PeerBatch], Metrics]
"""(batch, meta_batch) -> Metrics: one iteration. It changes the model, and a table and moments of its own."""


def build_model(
    source: str | Path | Mapping[str, Any] | PretrainedConfig,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    *,
    attention: str = "sdpa",
    weights: Mapping[str, np.ndarray] | None = None,
) -> Model:
    """transformers' InternVL, without dropout: from a directory in the -hf layout, or fresh from its config.

    `attention`: "eager" (what the published code gets from `use_flash_attn=False`), "sdpa" or "flash_attention_2".
    `weights` replaces all weights; names of the -hf layout, in either spelling.
    """
    options = {"dtype": dtype, "attn_implementation": attention}
    if isinstance(source, (str, Path)):
        model = Model.from_pretrained(source, **options).to(device)
    else:
        with torch.device(device):
            config = InternVLConfig(**source) if isinstance(source, Mapping) else source
            model = Model._from_config(config, **options)
    if weights is not None:
        model.load_state_dict({_spelt_in_memory(name): torch.tensor(value) for name, value in weights.items()})
    return model.eval()


def _spelt_in_memory(name: str) -> str:
    """The -hf layout's "language_model.model.X", "language_model.lm_head.X", "vision_tower.X" as transformers says."""
    if name.startswith("language_model."):
        return name.removeprefix("language_model.").replace("model.", "model.language_model.", 1)
    return name if name.startswith(("model.", "lm_head.")) else "model." + name


def peer_batch(batch: Any, tokens_per_tile: int, device: str = "cpu", num_tokens: int | None = None) -> PeerBatch:
    """A numpy `dreamprm_jax.types.Batch` for the peers, without the rows that only fill it up.

    Its tiles are uint8 [B, P, height, width, 3], zeros after a row's own; `tokens_per_tile` is I. `num_tokens` cuts the
    text: the longest row's length drops what only fills a bucket.
    """
    rows = np.flatnonzero(batch.example_mask)
    image_mask = batch.image_mask[rows, :num_tokens]
    num_tiles = image_mask.sum(axis=1) // tokens_per_tile  # [B]
    tiles = np.concatenate([batch.tiles[row, :count] for row, count in zip(rows, num_tiles, strict=True)])
    pixels = (tiles.astype(np.float32) / 255 - np.float32(PIXEL_MEAN)) / np.float32(PIXEL_STD)
    arrays = {
        "tokens": batch.tokens[rows, :num_tokens].astype(np.int64),
        "pixels": np.ascontiguousarray(pixels.transpose(0, 3, 1, 2)),
        "image_positions": np.flatnonzero(image_mask),
        "step_positions": batch.step_positions[rows].astype(np.int64),
        "labels": batch.labels[rows].astype(np.int64),
        "step_mask": batch.step_mask[rows],
        "example_id": batch.example_id[rows].astype(np.int64),
    }
    return PeerBatch(**{name: torch.from_numpy(array).to(device) for name, array in arrays.items()})


def published(model: Model, num_examples: int, settings: Settings) -> Step:
    """The iteration as the published code computes it: one example a batch, logits and softmax at every position.

    Each layer of its vision tower recomputes its activations (modeling_intern_vit.py: gradient_checkpointing = True
    in training mode, which Betty sets). With bfloat16 parameters on a GPU the passes run under autocast (Betty's
    training_step_exec). Left out: tokenizing the prompt anew for each of the four passes, printing, drop path.
    """
    for layer in model.model.vision_tower.encoder.layer:
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)
    params = list(model.parameters())
    device = params[0].device
    table = torch.ones(num_examples, device=device, requires_grad=True)
    update = hf_adamw(params, settings.lr, settings.weight_decay, settings)
    meta_update = hf_adamw([table], settings.meta_lr, settings.meta_weight_decay, settings)
    under_autocast = device.type == "cuda" and params[0].dtype == torch.bfloat16
    autocast = partial(torch.autocast, device.type, torch.bfloat16, under_autocast)

    def weighted_loss(batch: PeerBatch) -> tuple[Tensor, float]:
        with autocast():
            logits, target = _full_logits(model, batch)
            loss = F.cross_entropy(logits[target != -1], target[target != -1])
            weight = torch.clamp(table, MIN_WEIGHT, MAX_WEIGHT)[batch.example_id]
        return (loss * weight).sum(), loss.item()

    def step(batch: PeerBatch, meta_batch: PeerBatch) -> Metrics:
        loss, inner_loss = weighted_loss(batch)
        weighted = loss.item()
        loss.backward(inputs=params)
        update()

        with autocast():
            logits, target = _full_logits(model, meta_batch)
            at = torch.nonzero(target != -1)[:, 0]  # the steps' positions
            prediction = torch.softmax(logits, dim=-1)[at, target[at]].mean()  # of P(target)
            meta_loss = F.mse_loss(prediction, torch.ones_like(prediction))
        meta_value = meta_loss.item()
        vector = torch.autograd.grad(meta_loss, params)
        eps = RADIUS / (torch.cat([v.reshape(-1) for v in vector]).norm() + 1e-15).item()
        _move(params, vector, eps)
        loss, plus_loss = weighted_loss(batch)
        table.grad = -torch.autograd.grad(loss, table)[0] / (2 * eps)
        _move(params, vector, -2 * eps)
        loss, minus_loss = weighted_loss(batch)
        (loss / (2 * eps)).backward(inputs=[table])  # added to what the other side left
        _move(params, vector, eps)
        meta_grad = table.grad.tolist()
        meta_update()
        return Metrics(inner_loss, weighted, meta_value, plus_loss, minus_loss, meta_grad)

    return step


def _full_logits(model: Model, batch: PeerBatch) -> tuple[Tensor, Tensor]:
    """Logits of the whole sequence [T, V] and targets [T], -1 where nothing is supervised."""
    if len(batch.tokens) != 1:
        raise ValueError(f"the published code takes batches of 1, not of {len(batch.tokens)}")
    target = torch.full_like(batch.tokens[0], -1)
    target[batch.step_positions[batch.step_mask]] = batch.labels[batch.step_mask]
    mask = torch.ones_like(batch.tokens)
    output = model(input_ids=batch.tokens, pixel_values=batch.pixels, attention_mask=mask, use_cache=False)
    return output.logits[0], target


@torch.no_grad()
def _move(params: Sequence[Tensor], vector: Sequence[Tensor], scale: float) -> None:
    for param, v in zip(params, vector, strict=True):
        param.add_(v, alpha=scale)


def tuned(
    model: Model, num_examples: int, settings: Settings, autocast: torch.dtype | None = None, compiled: bool = False
) -> Step:
    """The same iteration for any batch size, as fast as stock PyTorch gets it.

    Logits at the step positions only, fused AdamW, and the finite difference from two passes without a graph: the
    table's gradient is the difference of two losses. The host never waits for the device. `autocast`: compute type,
    where it is not the parameters' own; `compiled`: by torch.compile, anew for every shape.
    """
    log_probs = _forward(model, autocast, compiled)
    params = list(model.parameters())
    table = torch.ones(num_examples, device=params[0].device)
    update = fused_adamw(params, settings.lr, settings.weight_decay, settings)
    meta_update = fused_adamw([table], settings.meta_lr, settings.meta_weight_decay, settings)

    def losses(batch: PeerBatch) -> Tensor:
        return -_masked_mean(log_probs(batch), batch.step_mask)  # [B]

    def step(batch: PeerBatch, meta_batch: PeerBatch) -> Metrics:
        raw, inner_losses = table[batch.example_id], losses(batch)  # [B], [B]
        loss = (raw.clamp(MIN_WEIGHT, MAX_WEIGHT) * inner_losses).mean()
        loss.backward()
        update()

        prediction = _masked_mean(log_probs(meta_batch).exp(), meta_batch.step_mask)  # [B], mean of P(target)
        meta_loss = (prediction - 1).square().mean()
        vector = torch.autograd.grad(meta_loss, params)
        eps = RADIUS / (nn.utils.get_total_norm(vector) + 1e-15)
        torch._foreach_mul_(vector, eps)
        with torch.no_grad():
            torch._foreach_add_(params, vector)
            plus = losses(batch)
            torch._foreach_add_(params, vector, alpha=-2)
            minus = losses(batch)
            torch._foreach_add_(params, vector)
        inside = (raw >= MIN_WEIGHT) & (raw <= MAX_WEIGHT)
        entries = inside * (minus - plus) / (2 * eps * len(raw))  # [B]
        meta_grad = torch.zeros_like(table).index_add_(0, batch.example_id, entries)
        table.grad = meta_grad.clone()  # the clip works in place
        meta_update()
        return Metrics(*(x.detach().mean() for x in (inner_losses, loss, meta_loss, plus, minus)), meta_grad)

    return step


def plain(
    model: Model, settings: Settings, autocast: torch.dtype | None = None, compiled: bool = False
) -> Callable[[PeerBatch], Tensor]:
    """batch -> loss []: a step of supervised training as in `tuned`, every weight 1."""
    log_probs = _forward(model, autocast, compiled)
    update = fused_adamw(list(model.parameters()), settings.lr, settings.weight_decay, settings)

    def step(batch: PeerBatch) -> Tensor:
        loss = -_masked_mean(log_probs(batch), batch.step_mask).mean()
        loss.backward()
        update()
        return loss.detach()

    return step


def _forward(model: Model, autocast: torch.dtype | None, compiled: bool) -> Callable[[PeerBatch], Tensor]:
    """batch -> log P(label) [B, S]."""
    if model.config._attn_implementation == "eager":
        raise ValueError('use attention="sdpa" or "flash_attention_2": "eager" is causal by a mask, and none is made')
    forward = torch.compile(partial(step_log_probs, model)) if compiled else partial(step_log_probs, model)
    return torch.autocast(model.device.type, autocast, autocast is not None)(forward)


def step_log_probs(model: Model, batch: PeerBatch) -> Tensor:
    """log P(label) over the full vocabulary at the step positions: [B, S], float32.

    transformers' merge of text and images counts image tokens on the host, and its masks are looked at there: a GPU
    would have to wait. So features go to known places, and no mask means the attention's own causal form.
    """
    num_rows, width = len(batch.tokens), model.config.text_config.hidden_size
    x = model.get_input_embeddings()(batch.tokens).view(-1, width)  # [B * T, D]
    features = model.model.get_image_features(pixel_values=batch.pixels).pooler_output.reshape(-1, width)
    x = x.index_copy(0, batch.image_positions, features.to(x.dtype)).view(num_rows, -1, width)
    language = model.model.language_model
    hidden = language(inputs_embeds=x, attention_mask={"full_attention": None}, use_cache=False).last_hidden_state
    at_steps = hidden.gather(1, batch.step_positions[..., None].expand(-1, -1, width))  # [B, S, D]
    logits = model.lm_head(at_steps).float()  # [B, S, V]
    return -F.cross_entropy(logits.flatten(0, 1), batch.labels.flatten(), reduction="none").view(num_rows, -1)


def _masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    return torch.where(mask, values, 0.0).sum(-1) / mask.sum(-1).clamp(min=1)


def cosine_rate(count: int, peak: float, num_steps: int) -> float:
    """transformers' get_cosine_schedule_with_warmup at 0.05 * num_steps warm-up steps, a float; 0 at first."""
    warmup = 0.05 * num_steps
    if count < warmup:
        return peak * count / max(1.0, warmup)
    return peak * 0.5 * (1.0 + math.cos(math.pi * min(1.0, (count - warmup) / max(1.0, num_steps - warmup))))


def hf_adamw(params: Sequence[Tensor], lr: float, weight_decay: float, settings: Settings) -> Callable[[], None]:
    """update(): clip, then a step of transformers' own AdamW, which version 5 dropped; uses up the gradients.

    p -= lr sqrt(1 - b2^t) / (1 - b1^t) m / (sqrt(v) + eps), then p -= lr decay p: eps comes before the correction.
    """
    moments = [(torch.zeros_like(param), torch.zeros_like(param)) for param in params]
    counts = itertools.count(1)

    @torch.no_grad()
    def update() -> None:
        count = next(counts)
        nn.utils.clip_grad_norm_(params, settings.clip_norm)
        rate = cosine_rate(count - 1, lr, settings.num_steps)
        step_size = rate * math.sqrt(1 - BETA2**count) / (1 - BETA1**count)
        for param, (m, v) in zip(params, moments, strict=True):
            m.mul_(BETA1).add_(param.grad, alpha=1 - BETA1)
            v.mul_(BETA2).addcmul_(param.grad, param.grad, value=1 - BETA2)
            param.addcdiv_(m, v.sqrt().add_(ADAM_EPS), value=-step_size)
            param.add_(param, alpha=-rate * weight_decay)
            param.grad = None

    return update


def fused_adamw(params: Sequence[Tensor], lr: float, weight_decay: float, settings: Settings) -> Callable[[], None]:
    """update(): clip, then a step of torch's fused AdamW; uses up the gradients.

    Its eps comes after the correction; scaled by it, it is `hf_adamw`'s. Its decay comes first: off by lr^2 decay.
    """
    optimizer = torch.optim.AdamW(params, betas=(BETA1, BETA2), weight_decay=weight_decay, fused=True)
    (group,) = optimizer.param_groups
    counts = itertools.count(1)

    def update() -> None:
        count = next(counts)
        nn.utils.clip_grad_norm_(params, settings.clip_norm)
        group["lr"] = cosine_rate(count - 1, lr, settings.num_steps)
        group["eps"] = ADAM_EPS / math.sqrt(1 - BETA2**count)
        optimizer.step()
        optimizer.zero_grad()

    return update
