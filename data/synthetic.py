"""Generates seeded toy languages: one of known entropy, and one that requires recall over a chosen distance."""

import math

import numpy as np

from data.cleaning import ScoredText
from data.generated import GeneratedCorpus, check_val_documents
from data.sources import RawDocument
from llm.errors import ConfigError

_LETTERS = b"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789"
_KEYS = np.frombuffer(b"ABCDEFGHIJKLMNOPQRSTUVWXYZ", np.uint8)
_VALUES = np.frombuffer(b"0123456789", np.uint8)
_FILLER = np.frombuffer(b"abcdefghijklmnopqrstuvwxyz", np.uint8)

# With one token per pair, 8 keys, 8 values of each and noise share the printable bytes.
_JOINED_FILLER = np.arange(0x20, 0x30, dtype=np.uint8)
_JOINED = np.arange(0x30, 0x70, dtype=np.uint8).reshape(8, 8)
_JOINED_KEYS = np.arange(0x70, 0x78, dtype=np.uint8)


class MarkovChain(GeneratedCorpus):
    """Text from a random Markov chain over letters, whose entropy is the loss that a perfect model reaches.

    After any `order` letters the next one follows a distribution drawn from a symmetric Dirichlet. The entropy rate is

        H = sum_c pi(c) * H(next | c)        pi: the stationary distribution over contexts

    `entropy` gives it in nats per letter and `bits_per_byte` in bits. The latter is the lower bound of
    val/bits_per_byte with any tokenizer, except for the first letters of each document and the token that begins it.

    Args:
        num_symbols: number of letters, 2 to 62.
        order: number of letters on which the next one depends; num_symbols ** order is at most 65536.
        concentration: parameter of the Dirichlet; text is predictable below 0.1 and nearly noise above 10.
        num_documents: number of documents.
        document_bytes: letters per document.
        seed: seed of the chain and of its text.
        num_val_documents: number of further documents that are the validation set, the same for any num_documents.
            None holds out `loader.val_fraction` of the documents.

    Raises:
        ConfigError: a value is out of its range.
    """

    def __init__(
        self,
        *,
        num_symbols: int,
        order: int,
        concentration: float,
        num_documents: int,
        document_bytes: int,
        seed: int,
        num_val_documents: int | None = None,
    ):
        check_val_documents(num_val_documents)
        if not 2 <= num_symbols <= len(_LETTERS):
            raise ConfigError(f"data.num_symbols={num_symbols}: must be 2 to {len(_LETTERS)}; try 16")
        if order < 1 or num_symbols**order > 1 << 16:
            raise ConfigError(f"data.order={order}: num_symbols ** order must be at most 65536 and order at least 1")
        if concentration <= 0:
            raise ConfigError(f"data.concentration={concentration}: must be positive; try 0.2")
        if document_bytes <= order:
            raise ConfigError(f"data.document_bytes={document_bytes}: must exceed data.order={order}; raise it")
        self.num_symbols = num_symbols
        self.order = order
        self.concentration = concentration
        self.num_documents, self.num_val_documents = num_documents, num_val_documents
        self.document_bytes = document_bytes
        self.seed = seed
        contexts = num_symbols**order
        generator = np.random.default_rng([seed, 0])
        self.transitions = generator.dirichlet(np.full(num_symbols, concentration), size=contexts)
        self._cumulative = np.cumsum(self.transitions, axis=1)

    def settings(self) -> list[object]:
        """See GeneratedCorpus."""
        shape = [self.num_symbols, self.order, self.concentration, self.num_documents, self.document_bytes]
        return ["markov", *shape, self.seed]

    def document(self, number: int) -> RawDocument:
        """Return one document; its first `order` letters are drawn uniformly."""
        generator = np.random.default_rng([self.seed, 1, number])
        draws = generator.random(self.document_bytes)
        contexts = self.num_symbols**self.order
        letters = generator.integers(self.num_symbols, size=self.order).tolist()
        context = 0
        for letter in letters:
            context = context * self.num_symbols + letter
        for draw in draws[self.order :]:
            letter = min(int(np.searchsorted(self._cumulative[context], draw, side="right")), self.num_symbols - 1)
            letters.append(letter)
            context = (context * self.num_symbols + letter) % contexts
        return bytes(_LETTERS[letter] for letter in letters)

    def stationary(self) -> np.ndarray:
        """Return the long-run share of each context, by iterating the chain until it changes by less than 1e-14."""
        contexts = len(self.transitions)
        shares = np.full(contexts, 1 / contexts)
        for _ in range(100_000):
            joint = shares[:, None] * self.transitions
            # context c followed by letter x becomes (c * num_symbols + x) % contexts: the oldest letter drops out
            following = joint.reshape(self.num_symbols, contexts).sum(axis=0)
            moved = np.abs(following - shares).sum()
            shares = (following + shares) / 2  # the mean has the same fixed point and converges on periodic chains too
            if moved < 1e-14:
                break
        return shares

    @property
    def entropy(self) -> float:
        """Loss of the best possible model, in nats per letter."""
        logs = np.log(self.transitions, where=self.transitions > 0, out=np.zeros_like(self.transitions))
        return float(-(self.stationary()[:, None] * self.transitions * logs).sum())

    @property
    def bits_per_byte(self) -> float:
        """Loss of the best possible model, in bits per letter."""
        return self.entropy / math.log(2)


class AssociativeRecall(GeneratedCorpus):
    """Key-value pairs, then noise, then the keys again in another order; only the values of the second part carry loss.

        pair_tokens=2:  A7 Q2 F0 ... qhxsvobn(distance letters) ... F0 A7 Q2
        pair_tokens=1:  one symbol stands for A7, in the first part and in the answer

    At least `distance` letters lie between a pair and its question. A model without memory over that distance cannot
    be better than `chance`, and one that recalls reaches 0. With two tokens per pair, a value must first be bound to
    the key before it. That takes two steps of attention, each useless without the other, so small models stay on a
    plateau for thousands of updates. With one token per pair, a single step of attention by content is enough.
    A document and its first token together have `length` tokens, so with `length` = context_length each window holds
    one document. The source needs tokenizer=bytes.

    Args:
        num_pairs: number of pairs, 1 to 26, or 1 to 8 with one token per pair; the keys of a document differ.
        pair_tokens: tokens per pair: 2, a key of 26 and a value of 10, or 1, one of 8 keys with one of 8 values.
        distance: letters of noise between the pairs and the questions.
        length: tokens per document; noise fills its end.
        num_documents: number of documents.
        seed: seed of the text.
        num_val_documents: number of further documents that are the validation set, the same for any num_documents.
            None holds out `loader.val_fraction` of the documents.

    Raises:
        ConfigError: a value is out of its range, or the pairs and the distance do not fit the length.

    Source: the task of Arora et al. 2023, "Zoology" (arXiv:2312.04927), section 3.
    Differs: the distance is fixed by the setting, letters of noise come from an alphabet of their own, and a pair may
        be one token.
    """

    is_scored = True

    def __init__(
        self,
        *,
        num_pairs: int,
        pair_tokens: int,
        distance: int,
        length: int,
        num_documents: int,
        seed: int,
        num_val_documents: int | None = None,
    ):
        check_val_documents(num_val_documents)
        if pair_tokens not in (1, 2):
            raise ConfigError(f"data.pair_tokens={pair_tokens}: a pair is 1 or 2 tokens; choose one of them")
        most = len(_KEYS) if pair_tokens == 2 else len(_JOINED)
        if not 1 <= num_pairs <= most:
            raise ConfigError(f"data.num_pairs={num_pairs}: must be 1 to {most} of {pair_tokens} tokens each; try 8")
        pairs = (pair_tokens + 2) * num_pairs
        if distance < 0 or 1 + pairs + distance > length:
            room = length - 1 - pairs
            remedy = (
                f"choose 0 to {room}" if room >= 0 else f"choose data.length of at least {1 + pairs}, or fewer pairs"
            )
            raise ConfigError(
                f"data.distance={distance}: the document needs 1 + {pair_tokens + 2} * num_pairs + distance = "
                f"{1 + pairs + distance} of its data.length={length} tokens; {remedy}"
            )
        self.num_pairs = num_pairs
        self.pair_tokens = pair_tokens
        self.distance = distance
        self.length = length
        self.num_documents, self.num_val_documents = num_documents, num_val_documents
        self.document_bytes = length - 1
        self.seed = seed

    def settings(self) -> list[object]:
        """See GeneratedCorpus."""
        shape = [self.num_pairs, self.pair_tokens, self.distance, self.length, self.num_documents]
        return ["recall", *shape, self.seed]

    def document(self, number: int) -> RawDocument:
        """Return one document with its scored bytes."""
        generator = np.random.default_rng([self.seed, number])
        data = generator.choice(_FILLER if self.pair_tokens == 2 else _JOINED_FILLER, self.document_bytes)
        is_scored = np.zeros(self.document_bytes, bool)
        if self.pair_tokens == 2:
            keys, answers = generator.permutation(_KEYS)[: self.num_pairs], generator.choice(_VALUES, self.num_pairs)
            front = np.stack([keys, answers], axis=1).ravel()
        else:
            chosen = generator.permutation(len(_JOINED))[: self.num_pairs]
            keys = _JOINED_KEYS[chosen]
            front = answers = _JOINED[chosen, generator.integers(_JOINED.shape[1], size=self.num_pairs)]
        data[: len(front)] = front
        first = len(front) + self.distance
        data[first : first + 2 * self.num_pairs] = generator.permutation(np.stack([keys, answers], axis=1)).ravel()
        is_scored[first + 1 : first + 2 * self.num_pairs : 2] = True
        return ScoredText(data.tobytes(), is_scored)

    @property
    def chance(self) -> float:
        """Loss of a model that recalls nothing, in nats per answer."""
        return math.log(len(_VALUES) if self.pair_tokens == 2 else _JOINED.shape[1])
