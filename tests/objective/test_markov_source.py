"""On a source of known entropy, every figure lies above the entropy and comes close to it after a short training."""

import math

import pytest
import torch
from catalogue import options

from llm.config.build import build_model, build_objective
from llm.contracts import WHOLE_UPDATE
from llm.ops.noise import KeyedNoise

NEEDS = {"block": ("objective.block_length=4",), "uniform": ("model.tie_embeddings=false",)}
LETTERS, TIME = 4, 16
LENGTHS = {"uniform": (240, 2e-2), "flow": (240, 1e-2)}
"""Updates and rate of an objective that learns slowly: it must first ignore the token in the place it predicts."""


def transitions():
    """Return the chain's matrix of transitions; its stationary distribution is uniform."""
    base = torch.tensor([0.7, 0.2, 0.05, 0.05], dtype=torch.float64)
    return torch.stack([base.roll(shift) for shift in range(LETTERS)])


def texts(count, seed):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.empty(count, TIME + 1, dtype=torch.long)
    ids[:, 0] = torch.randint(LETTERS, (count,), generator=generator)
    for column in range(TIME):
        ids[:, column + 1] = torch.multinomial(transitions()[ids[:, column]], 1, generator=generator)[:, 0]
    positions = torch.arange(TIME).expand(count, -1)
    documents = torch.zeros(count, TIME, dtype=torch.long)
    return {"input_ids": ids[:, :-1], "labels": ids[:, 1:], "positions": positions, "document_ids": documents}


def figure(objective, model, batch):
    """Return nats per scored token and the standard error over windows."""
    samples = 4 if objective.is_bound else 1
    found = [
        objective.token_nll(
            model, model, batch, KeyedNoise(0, k, torch.arange(len(batch["input_ids"]))), sample=k, samples=samples
        )
        for k in range(samples)
    ]
    by_window = torch.stack([f.nats.double().sum(1) for f in found]).mean(0) / (TIME - 1)
    return float(by_window.mean()), float(by_window.std() / math.sqrt(len(by_window)))


@pytest.mark.parametrize("name", options("objective"))
def test_the_entropy_is_a_lower_bound_that_training_approaches(name, composed, tiny):
    cfg = composed(*tiny, f"objective={name}", *NEEDS.get(name, ()), "model.num_layers=1", "context_length=16")
    model = build_model(cfg, LETTERS + 1)
    objective = build_objective(cfg, vocab_size=LETTERS + 1, bos_id=LETTERS)
    updates, lr = LENGTHS.get(name, (70, 1e-2))
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0)
    held_out = texts(128, seed=1)
    before, _ = figure(objective, model, held_out)
    for step in range(updates):
        batch = texts(48, seed=100 + step)
        prepared = objective.prepare(model, batch, KeyedNoise(0, step, torch.arange(48)))
        loss, _ = objective.loss(model, model, prepared, model(**prepared.inputs), WHOLE_UPDATE)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        for group in optimizer.param_groups:
            group["lr"] = lr * (1 - step / updates)
    after, error = figure(objective, model, held_out)
    entropy = float(-(transitions()[0] * transitions()[0].log()).sum())
    assert after > entropy - 3 * error
    assert after - entropy < 0.35 * (before - entropy)
