"""Block diffusion: its limits are next-token prediction and masked diffusion, and one pass computes all blocks."""

import itertools

import pytest
import torch
from objective_tables import TABLE_BOS, TABLE_VOCABULARY, GivenNoise, any_order_nll, enumerated, window

from llm.config.build import build_model
from llm.config.check import check
from llm.contracts import BIDIRECTIONAL, IGNORED_LABEL, RewindableCache, Sight
from llm.errors import ConfigError
from llm.objective.block_diffusion import BlockDiffusion
from llm.objective.masked_diffusion import MaskedDiffusion
from llm.ops.noise import KeyedNoise

SAMPLING = {"temperature": 1.0, "top_k": None, "top_p": None, "seed": 0}
OWN = {"samples": 8, "order": "margin", "steps": None}


def block(length, vocab_size=TABLE_VOCABULARY, bos_id=TABLE_BOS, **settings):
    return BlockDiffusion(vocab_size=vocab_size, bos_id=bos_id, block_length=length, **(OWN | settings))


def by_blocks(table, tokens, length):
    """The mean over all orders inside each block, given all clean tokens of earlier blocks."""
    total = 0.0
    for start in range(0, len(tokens), length):
        scored = [i for i in range(start, min(start + length, len(tokens))) if i > 0]
        clean = [i for i in range(start + length) if i < start or i == 0]
        total += any_order_nll(table, tokens, scored, clean=[i for i in clean if i < len(tokens)])
    return total


@pytest.mark.parametrize("length", [1, 2, 3, 4, 5, 8])
def test_the_bound_is_the_mean_over_orders_inside_each_block(table, length):
    tokens = [TABLE_BOS, 2, 0, 1, 2]
    # twelve levels make each count 1 … n equally frequent for n up to 4
    rows = [((level + 0.5) / 12, order) for level in range(12) for order in itertools.permutations(range(1, 5))]
    levels = torch.tensor([[level] for level, _ in rows], dtype=torch.float64)
    noise = GivenNoise(levels, torch.tensor([[0.99, *(place / 100 for place in order)] for _, order in rows]))
    batch = window(tokens, rows=len(rows))
    found = block(length).token_nll(table, table, batch, noise, sample=0, samples=1)
    assert float(found.nats.sum(1).mean()) == pytest.approx(by_blocks(table, tokens, length), rel=1e-12)


def test_length_1_is_the_next_token_loss_without_noise_and_length_t_is_masked(table):
    tokens = [TABLE_BOS, 1, 1, 0, 2]
    next_token = sum(table.nll(i, frozenset((j, tokens[j]) for j in range(i)), tokens[i]) for i in range(1, 5))
    batch = window(tokens, rows=3)
    noise = KeyedNoise(0, 0, torch.arange(3))
    found = block(1).token_nll(table, table, batch, noise, sample=0, samples=1)
    assert found.nats.sum(1).tolist() == pytest.approx([next_token] * 3, rel=1e-12)
    masked = MaskedDiffusion(vocab_size=TABLE_VOCABULARY, bos_id=TABLE_BOS, **OWN)
    given = enumerated(4, 5, [1, 2, 3, 4])
    batch = window(tokens, rows=len(given.rows))
    one, two = (o.token_nll(table, table, batch, given, sample=0, samples=1) for o in (block(5), masked))
    torch.testing.assert_close(one.nats, two.nats)
    assert torch.equal(one.labels, two.labels)


def test_blocks_restart_with_each_document_and_counts_are_exact_inside_each():
    documents = [0, 5, 16]
    ids = torch.randint(0, 3, (40, 24)).tolist()
    rows = [window([TABLE_BOS if i in documents else t for i, t in enumerate(row)], documents=documents) for row in ids]
    batch = {name: torch.cat([row[name] for row in rows]) for name in rows[0]}
    objective, noise = block(4), KeyedNoise(0, 0, torch.arange(40))
    prepared = objective.prepare(None, batch, noise)
    hidden = prepared.targets["labels"] != IGNORED_LABEL
    levels = noise.levels(24)
    starts = [0, 4, 5, 9, 13, 16, 20, 24]
    for run, (start, stop) in enumerate(itertools.pairwise(starts)):
        places = [i for i in range(start, stop) if i not in documents]
        counts = (1 + (levels[:, run] * len(places)).long()).clamp_max(len(places))
        assert torch.equal(hidden[:, places].sum(1), counts), run
        if places:
            torch.testing.assert_close(prepared.targets["weights"][:, places[0]], len(places) / counts.double())
    assert not hidden[:, documents].any()
    clean = prepared.inputs["input_ids"][:, 24:]
    assert torch.equal(clean, batch["input_ids"])
    assert torch.equal(prepared.inputs["input_ids"][:, :24] == TABLE_VOCABULARY, hidden)


@pytest.fixture
def model(composed, tiny):
    cfg = composed(*tiny, "objective=block", "objective.block_length=4")
    return build_model(cfg, 64).double().eval()


@torch.no_grad()
def test_one_pass_over_both_copies_equals_a_pass_per_block_and_the_cached_passes(model):
    objective, time = block(4, vocab_size=64, bos_id=63), 14
    ids = torch.randint(0, 63, (2, time), generator=torch.Generator().manual_seed(2))
    places = torch.arange(time).expand(2, -1)
    batch = {"input_ids": ids, "labels": ids.roll(-1, 1), "positions": places, "document_ids": torch.zeros_like(ids)}
    prepared = objective.prepare(model, batch, KeyedNoise(0, 0, torch.arange(2)))
    whole = model(**prepared.inputs).hidden[:, :time]
    noisy = prepared.inputs["input_ids"][:, :time]
    caches = model.new_caches(batch=2, max_length=time, dtype=torch.float64)
    for start in range(0, time, 4):
        span = slice(start, min(start + 4, time))
        text = torch.cat([ids[:, :start], noisy[:, span]], 1)
        single = model(text, positions=places[:, : span.stop], sight=Sight("block", 4)).hidden[:, start:]
        torch.testing.assert_close(whole[:, span], single, rtol=1e-12, atol=1e-12)
        cached = model(noisy[:, span], positions=places[:, span], caches=caches, sight=BIDIRECTIONAL).hidden
        torch.testing.assert_close(whole[:, span], cached, rtol=1e-12, atol=1e-12)
        for cache in caches:
            assert isinstance(cache, RewindableCache)
            cache.rewind(start)
            assert cache.length == start
        model(ids[:, span], positions=places[:, span], caches=caches, sight=BIDIRECTIONAL)


@pytest.mark.parametrize("steps", [None, 2])
def test_decoding_with_the_cache_equals_decoding_without_and_keeps_prompts(model, steps):
    objective = block(4, vocab_size=64, bos_id=63)
    prompts = [[63, 1, 2], [63], [63, 5, 6, 7, 8, 9, 10], [63, 3, 4, 5, 6]]
    texts = []
    for use_cache in (True, False):
        drawn = objective.decode(model, prompts, max_new_tokens=9, steps=steps, use_cache=use_cache, **SAMPLING)
        texts.append(torch.cat(list(drawn), 1))
        assert (drawn.cache_bytes() > 0) == use_cache
        for rows, group in drawn.groups:
            for row, ids in zip(rows, group.ids, strict=True):
                assert ids[group.length - len(prompts[row]) : group.length].tolist() == prompts[row]
    assert torch.equal(*texts)
    assert texts[0].shape == (4, 9)
    assert (texts[0] < 63).all()


def test_a_text_appears_block_by_block(model):
    drawn = block(4, vocab_size=64, bos_id=63).decode(model, [[63, 1]], max_new_tokens=9, steps=None, **SAMPLING)
    assert [columns.shape[1] for columns in drawn] == [2, 4, 3]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("objective.block_length=5",), r"objective\.block_length=5: must divide context_length=32; try 2 or 4"),
        (("objective.block_length=0",), r"objective\.block_length=0: must be at least 1"),
        (("model.attention.window=8",), r"objective=block: model\.attention\.window=8: a window cuts through blocks"),
        (("model/attention=vq", "model/position=none"), r"objective=block: model\.attention=vq counts only"),
        (("model/position=none",), r"objective=block: model\.position=NoPosition: without causality"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_built(composed, tiny, overrides, message):
    with pytest.raises(ConfigError, match=message):
        check(composed(*tiny, "objective=block", *overrides))
