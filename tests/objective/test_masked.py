"""Masked diffusion: its bound is the mean over all orders, and its decoding samples the model's distribution."""

import itertools
import math

import pytest
import torch
from objective_tables import TABLE_BOS, TABLE_VOCABULARY, any_order_nll, enumerated, window

from llm.contracts import IGNORED_LABEL, LossShare
from llm.errors import ConfigError
from llm.model.transformer import TransformerOutput
from llm.objective.masked_diffusion import MaskedDiffusion
from llm.objective.unmasking import reveal
from llm.ops.noise import KeyedNoise

SAMPLING = {"temperature": 1.0, "top_k": None, "top_p": None}


def masked(**settings):
    options = {"samples": 8, "order": "margin", "steps": None} | settings
    return MaskedDiffusion(vocab_size=TABLE_VOCABULARY, bos_id=TABLE_BOS, **options)


@pytest.mark.parametrize("num_scored", [1, 2, 3, 4])
def test_the_bound_is_the_mean_over_all_orders_of_the_any_order_loss(table, num_scored):
    tokens = [TABLE_BOS, 2, 0, 1, 2][: num_scored + 1]
    scored = list(range(1, num_scored + 1))
    noise = enumerated(num_scored, len(tokens), scored)
    batch = window(tokens, rows=len(noise.rows))
    found = masked().token_nll(table, table, batch, noise, sample=0, samples=1)
    expected = any_order_nll(table, tokens, scored, clean=[0])
    assert float(found.nats.sum(1).mean()) == pytest.approx(expected, rel=1e-12)
    assert found.labels[0].tolist() == [IGNORED_LABEL, *tokens[1:]]


def test_two_documents_in_a_row_add_up_and_bos_stays_clean(table):
    tokens, documents = [TABLE_BOS, 1, 2, TABLE_BOS, 0], [0, 3]
    noise = enumerated(3, 5, [1, 2, 4])
    batch = window(tokens, documents=documents, rows=len(noise.rows))
    found = masked().token_nll(table, table, batch, noise, sample=0, samples=1)
    first = any_order_nll(table, tokens, [1, 2], clean=[0])
    second = any_order_nll(table, tokens, [4], clean=[3])
    assert float(found.nats.sum(1).mean()) == pytest.approx(first + second, rel=1e-12)
    prepared = masked().prepare(table, batch, noise)
    assert (prepared.inputs["input_ids"][:, [0, 3]] == TABLE_BOS).all()


def test_exactly_as_many_tokens_are_masked_as_the_level_says_and_weighted():
    tokens = torch.randint(0, 3, (40, 33)).tolist()
    batch = {name: torch.cat([window(row)[name] for row in tokens]) for name in window([0, 1])}
    batch["labels"][:, 7] = IGNORED_LABEL
    noise = KeyedNoise(0, 0, torch.arange(40))
    prepared = masked().prepare(None, batch, noise)
    hidden = prepared.targets["labels"] != IGNORED_LABEL
    counts = 1 + (noise.levels()[:, 0] * 31).long()
    assert torch.equal(hidden.sum(1), counts)
    assert not hidden[:, [0, 8]].any()
    assert torch.equal(prepared.inputs["input_ids"] == TABLE_VOCABULARY, hidden)
    torch.testing.assert_close(prepared.targets["weights"][:, 0], 31 / counts.double())


def test_the_divisor_does_not_depend_on_the_noise(table):
    batch = window([TABLE_BOS, 0, 1, 2], rows=2)
    objective = masked()
    prepared = objective.prepare(table, batch, KeyedNoise(0, 0, torch.arange(2)))
    out = table(**prepared.inputs)
    total = table.loss(out.hidden, prepared.targets["labels"], reduction="sum", weights=prepared.targets["weights"])
    assert objective.loss(table, table, prepared, out, LossShare(None, 1))[0] == total / 6
    assert objective.loss(table, table, prepared, out, LossShare(10, 2))[0] == total * 0.2


def test_levels_of_an_evaluation_are_stratified(table):
    batch = window([TABLE_BOS, *[0, 1, 2, 1] * 8], rows=3)
    noise = KeyedNoise(0, 5, torch.arange(3))
    objective, seen = masked(), []

    def watched(**inputs):
        seen.append((inputs["input_ids"] == TABLE_VOCABULARY).sum(1))
        return TransformerOutput(torch.zeros(*inputs["input_ids"].shape, TABLE_VOCABULARY).double(), {}, {})

    for sample in range(4):
        objective.token_nll(table, watched, batch, noise, sample=sample, samples=4)
    for sample, counts in enumerate(seen):
        assert ((counts > 8 * sample) & (counts <= 8 * (sample + 1) + 1)).all()


class Joint:
    """The exact conditionals of a joint distribution of three tokens over three values."""

    vocab_size = TABLE_VOCABULARY

    def __init__(self):
        weights = torch.rand(3, 3, 3, generator=torch.Generator().manual_seed(5), dtype=torch.float64) ** 3
        self.joint = weights / weights.sum()

    def __call__(self, ids, **inputs):
        hidden = torch.full((*ids.shape, self.vocab_size), -torch.inf, dtype=torch.float64)
        for row, values in enumerate(ids.tolist()):
            for place in range(1, 4):
                choice = tuple(
                    slice(None) if j == place or v == self.vocab_size else slice(v, v + 1)
                    for j, v in enumerate(values[1:], 1)
                )
                others = [axis for axis in range(3) if axis != place - 1]
                hidden[row, place, :3] = self.joint[choice].sum(others).log()
        return TransformerOutput(hidden, {}, {})

    def logits(self, hidden):
        return hidden.clone()

    def parameters(self):
        yield torch.zeros(1)


def drawn_shares(order, count=4000, steps=None):
    """Return how often each of the 27 texts is drawn."""
    model, objective = Joint(), masked(order=order)
    text = objective.decode(model, [[TABLE_BOS]] * count, max_new_tokens=3, steps=steps, seed=0, **SAMPLING)
    (tokens,) = list(text)
    numbers = (tokens * torch.tensor([9, 3, 1])).sum(1)
    return torch.bincount(numbers, minlength=27).double() / count, model.joint.flatten()


@pytest.mark.parametrize("order", ["random", "margin"])
def test_one_token_per_pass_samples_the_joint_distribution(order):
    shares, joint = drawn_shares(order)
    # half the summed distance of 27 shares of 4000 draws from their means is about 0.02
    assert (shares - joint).abs().sum() / 2 < 0.035


def test_confidence_seeks_modes_and_more_tokens_per_pass_lose_their_dependence():
    shares, joint = drawn_shares("confidence")
    assert (shares - joint).abs().sum() / 2 > 0.06
    assert torch.special.entr(shares).sum() < torch.special.entr(joint).sum()
    at_once, joint = drawn_shares("random", steps=1)
    product = math.prod(
        joint.view(3, 3, 3).sum([a for a in range(3) if a != axis]).view([-1 if a == axis else 1 for a in range(3)])
        for axis in range(3)
    )
    assert (at_once - product.flatten()).abs().sum() / 2 < 0.035


@pytest.mark.parametrize("order", ["random", "margin", "confidence"])
def test_passes_reveal_all_masks_evenly_and_never_bos(order):
    ids = torch.full((2, 7), TABLE_VOCABULARY)
    ids[:, 2] = 0
    generator, left = torch.Generator().manual_seed(0), []
    for passes_left in (3, 2, 1):
        logits = torch.zeros(2, 7, TABLE_VOCABULARY)
        logits[..., TABLE_BOS] = 9.0
        options = {"order": order, "bos_id": TABLE_BOS, "sampling": SAMPLING, "generator": generator}
        reveal(ids, logits, passes_left=passes_left, **options)
        left.append((ids == TABLE_VOCABULARY).sum(1).tolist())
    assert left == [[4, 4], [2, 2], [0, 0]]
    assert (ids[:, 2] == 0).all()
    assert (ids < TABLE_BOS).all()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": 0}, "steps=0: must be at least 1"),
        ({"steps": 9}, "steps=9: above max_new_tokens=4"),
        ({"repetition_penalty": 1.2}, r"repetition_penalty=1\.2: objective=masked draws tokens in no fixed order"),
        ({"use_cache": False}, "use_cache=false: objective=masked reads the whole text"),
    ],
)
def test_decoding_refuses_settings_without_a_meaning(settings, message):
    options = {"steps": None, "seed": 0} | SAMPLING | settings
    with pytest.raises(ConfigError, match=message):
        masked().decode(Joint(), [[TABLE_BOS]], max_new_tokens=4, **options)


def test_settings_out_of_range_are_refused():
    with pytest.raises(ConfigError, match=r"objective\.samples=0: must be at least 1"):
        masked(samples=0)
    with pytest.raises(ConfigError, match=r"objective\.steps=0: must be at least 1"):
        masked(steps=0)


def test_a_prompt_stays_as_it_is_and_shorter_ones_are_padded():
    text = masked().decode(Joint(), [[TABLE_BOS], [TABLE_BOS, 1]], max_new_tokens=2, steps=None, seed=0, **SAMPLING)
    prompts = text.ids[:, :2].clone()
    assert [tokens.shape for tokens in text] == [(2, 2)]
    assert torch.equal(text.ids[:, :2], prompts)
    assert text.documents is not None
    assert text.cache_bytes() == 0


def test_every_combination_of_scored_tokens_is_masked_alike():
    """Over many rows, each pair of places is masked as often as any other."""
    noise = KeyedNoise(0, 0, torch.arange(4000))
    batch = window([TABLE_BOS, 0, 1, 2, 0], rows=4000)
    hidden = (masked().prepare(None, batch, noise).targets["labels"] != IGNORED_LABEL).double()
    shares = [float((hidden[:, i] * hidden[:, j]).mean()) for i, j in itertools.combinations(range(1, 5), 2)]
    # the chance of a pair is the mean of l (l − 1) / 12 over l = 1 … 4, 0.417; its standard deviation is 0.008
    assert shares == pytest.approx([5 / 12] * 6, abs=0.03)
