import math

import numpy as np
import pytest

from data.synthetic import AssociativeRecall, MarkovChain
from llm.errors import ConfigError

MARKOV = {"num_symbols": 5, "order": 2, "concentration": 0.3, "num_documents": 40, "document_bytes": 2000, "seed": 0}
RECALL = {"num_pairs": 6, "pair_tokens": 2, "distance": 50, "length": 128, "num_documents": 300, "seed": 0}


def empirical_loss(source: MarkovChain) -> tuple[float, float]:
    """Return mean and standard error of -log p under the true transitions, over documents."""
    means = []
    for number in range(source.num_documents):
        letters = np.frombuffer(source.document(number), np.uint8) - ord("a")
        context = letters[:-2].astype(int) * source.num_symbols + letters[1:-1]
        means.append(-np.log(source.transitions[context, letters[2:]]).mean())
    return float(np.mean(means)), float(np.std(means) / math.sqrt(len(means)))


def test_the_text_has_the_entropy_that_is_stated():
    source = MarkovChain(**MARKOV)
    mean, error = empirical_loss(source)
    assert abs(mean - source.entropy) < 5 * error
    assert error < 0.02 * source.entropy


def test_the_stationary_shares_are_those_of_the_transition_matrix():
    source = MarkovChain(**MARKOV)
    contexts = 25
    matrix = np.zeros((contexts, contexts))
    for context in range(contexts):
        for letter in range(5):
            matrix[context, (context * 5 + letter) % contexts] += source.transitions[context, letter]
    shares = source.stationary()
    assert np.allclose(shares @ matrix, shares, atol=1e-12)  # the iteration stops at 1e-14
    assert abs(shares.sum() - 1) < 1e-12


def test_the_entropy_of_a_nearly_uniform_chain_is_that_of_a_fair_die():
    source = MarkovChain(**MARKOV | {"concentration": 1e6})
    assert abs(source.entropy - math.log(5)) < 1e-5  # Dirichlet(1e6) deviates by about 1e-3, the entropy by its square
    assert abs(source.bits_per_byte - math.log2(5)) < 2e-5


@pytest.mark.parametrize(("kind", "settings"), [(MarkovChain, MARKOV), (AssociativeRecall, RECALL)])
def test_documents_are_pure_functions_of_settings_and_number(kind, settings, read_all):
    assert repr(kind(**settings).document(3)) == repr(kind(**settings).document(3))
    assert kind(**settings).document(3) != kind(**settings).document(4)
    assert kind(**settings).document(3) != kind(**settings | {"seed": 1}).document(3)
    assert kind(**settings).fingerprint() != kind(**settings | {"seed": 1}).fingerprint()
    assert len(read_all(kind(**settings))[0]) == settings["num_documents"]


def test_every_question_has_one_answer_at_the_required_distance():
    source = AssociativeRecall(**RECALL)
    for number in range(50):
        data, is_scored = source.document(number)
        places = np.flatnonzero(is_scored)
        assert len(places) == 6
        for place in places:
            key, value = data[place - 1 : place], data[place : place + 1]
            first = data.index(key)
            assert data[first + 1 : first + 2] == value
            assert place - 1 - (first + 1) > 50
            assert data.count(key) == 2


def test_with_one_token_per_pair_each_question_asks_for_a_symbol_of_the_first_part():
    source = AssociativeRecall(**RECALL | {"pair_tokens": 1})
    owners = {}
    for number in range(300):
        data, is_scored = source.document(number)
        places = np.flatnonzero(is_scored)
        assert sorted(data[place] for place in places) == sorted(data[:6])
        assert data[6:56].translate(None, bytes(range(0x20, 0x30))) == b""  # noise alone
        for place in places:
            assert place - 1 - data.index(data[place]) > 50
            assert owners.setdefault(data[place], data[place - 1]) == data[place - 1]  # a symbol has one key, always
    assert len(owners) == 64
    assert len(set(owners.values())) == 8


@pytest.mark.parametrize("pair_tokens", [1, 2])
def test_chance_is_the_entropy_of_the_answers(pair_tokens):
    source = AssociativeRecall(**RECALL | {"pair_tokens": pair_tokens})
    asked = [
        (data[place - 1] if pair_tokens == 1 else 0, data[place])
        for data, scored in map(source.document, range(300))
        for place in np.flatnonzero(scored)
    ]
    entropy = 0.0
    for key in {key for key, _ in asked}:
        answers = [answer for k, answer in asked if k == key]
        shares = np.unique(answers, return_counts=True)[1] / len(answers)
        entropy -= (shares * np.log(shares)).sum() * len(answers) / len(asked)
    # 1800 answers: the plug-in entropy is (10 - 1) / (2 * 1800) = 0.0025 too low on average, for 8 keys 0.016
    assert source.chance - 0.03 < entropy < source.chance + 0.0025


def test_each_window_of_recall_is_one_document_and_only_answers_are_labels(make_module):
    module = make_module(AssociativeRecall(**RECALL), context_length=128, batch_tokens=256)
    module.prepare_data()
    batch = module.windows("train").__getitems__([0, 7, 11])
    assert (batch["input_ids"][:, 0] == 256).all()
    assert (batch["document_ids"] == 1).all()
    assert ((batch["labels"] != -100).sum(dim=1) == 6).all()
    answers = batch["labels"][batch["labels"] != -100]
    assert ((answers >= ord("0")) & (answers <= ord("9"))).all()
    assert batch["input_ids"].max() == 256


def test_recall_with_a_tokenizer_that_merges_bytes_is_refused(make_module):
    from data.tokenizer import BpeTokenizer

    module = make_module(AssociativeRecall(**RECALL), tokenizer=BpeTokenizer(vocab_size=300, sample_bytes=1000))
    with pytest.raises(ConfigError, match="set tokenizer=bytes"):
        module.prepare_data()


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        (MarkovChain, {"num_symbols": 1}, "data.num_symbols=1: must be 2 to 62"),
        (MarkovChain, {"order": 9}, "data.order=9: .*65536"),
        (MarkovChain, {"concentration": 0.0}, "data.concentration=0.0: must be positive"),
        (MarkovChain, {"document_bytes": 2}, "data.document_bytes=2: must exceed data.order=2"),
        (AssociativeRecall, {"num_pairs": 27}, "data.num_pairs=27: must be 1 to 26"),
        (AssociativeRecall, {"num_pairs": 9, "pair_tokens": 1}, "data.num_pairs=9: must be 1 to 8"),
        (AssociativeRecall, {"pair_tokens": 3}, "data.pair_tokens=3: a pair is 1 or 2 tokens"),
        (
            AssociativeRecall,
            {"distance": 104},
            "data.distance=104: .* = 129 of its data.length=128 tokens; choose 0 to 103",
        ),
    ],
)
def test_settings_out_of_range_are_refused(kind, settings, message):
    with pytest.raises(ConfigError, match=message):
        kind(**(MARKOV if kind is MarkovChain else RECALL) | settings)
