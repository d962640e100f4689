"""Adapts a decoder to the model interface of EleutherAI's harness; needs the package `lm_eval`."""

import logging
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from lm_eval.api.model import TemplateLM  # pyright: ignore[reportMissingImports]
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window  # pyright: ignore[reportMissingImports]
from torch import Tensor

from llm.errors import ConfigError
from llm.generate import generate

MAX_NEW_TOKENS = 256
"""Tokens generated where a task gives no number, as in the harness's own models."""

AUTO_BATCH_SIZE = 64
"""Texts per forward pass at which batch_size=auto starts; it is halved whenever memory runs out."""

log = logging.getLogger(__name__)


class HarnessModel(TemplateLM):
    """A decoder that scores and continues texts for the harness; each text begins a document as in training.

    Args:
        model: the decoder, on its device, in evaluation mode.
        tokenizer: with `bos_id`, `encode` and `decode`.
        max_length: tokens per window; longer contexts lose their beginning, and longer texts are scored in windows.
        batch_size: texts per forward pass, at least 1, or `auto` for as many as fit in memory, at most 64.
        autocast: entered around the decoder.

    Raises:
        ConfigError: batch_size is neither a number of at least 1 nor `auto`.

    Differs: where a text is scored from its start, its first token follows one bos token. The harness's `hf` model
    reads two where the tokenizer adds one itself; `add_bos_token=False` makes both equal.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        max_length: int,
        batch_size: int | str,
        autocast: AbstractContextManager[Any] | None = None,
    ) -> None:
        super().__init__()
        self.model, self.vocabulary = model, tokenizer
        self.max_length, self.batch_size = max_length, check_batch_size(batch_size)
        self.autocast = nullcontext() if autocast is None else autocast
        self._device = next(model.parameters()).device

    @property
    def eot_token_id(self) -> int:
        """The token that ends a document, which is the one that begins the next."""
        return self.vocabulary.bos_id

    @property
    def tokenizer_name(self) -> str:
        """A name for the harness's cache of requests."""
        return self.vocabulary.fingerprint()

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """Return None where no template is asked for; otherwise raise ConfigError, since runs have no chat template."""
        if chat_template:
            raise ConfigError("apply_chat_template: a run's tokenizer has no chat template; remove this option")
        return None

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Return the ids of a text, after the bos token unless `add_special_tokens` is False."""
        first = [] if add_special_tokens is False else [self.eot_token_id]
        return [*first, *map(int, self.vocabulary.encode(string))]

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Return the log-probability of each whole text."""
        texts = [self.tok_encode(request.args[0], add_special_tokens=False) for request in requests]
        return [self._score_windows([self.eot_token_id], ids)[0] for ids in texts]

    def _score_windows(self, context: list[int], tokens: list[int]) -> tuple[float, bool]:
        """Return the log-probability of tokens of any number after a context, and whether all are the likeliest."""
        windows = get_rolling_token_windows(
            token_list=tokens, prefix_token=context[-1], max_seq_len=self.max_length, context_len=1
        )
        pairs = [(("", ""), *make_disjoint_window(window)) for window in windows]
        scores = self._loglikelihood_tokens(pairs)
        return sum(score for score, _ in scores), all(is_greedy for _, is_greedy in scores)

    def _loglikelihood_tokens(
        self, requests: Sequence[Any], disable_tqdm: bool = False, **_: Any
    ) -> list[tuple[float, bool]]:
        """Return each continuation's score and whether greedy decoding gives it; requests end in two lists of ids."""
        answers: dict[int, tuple[float, bool]] = {}
        too_long = [i for i, (_, _, ids) in enumerate(requests) if len(ids) > self.max_length]
        if too_long:
            log.warning(
                "%d continuations are longer than the %d tokens that the model reads; they are scored in windows, "
                "without the beginning of their context",
                len(too_long),
                self.max_length,
            )
        answers |= {i: self._score_windows(list(requests[i][1]), list(requests[i][2])) for i in too_long}
        others = sorted(set(range(len(requests))) - set(too_long), key=lambda i: -sum(map(len, requests[i][1:])))
        scores = self._in_batches(others, lambda chosen: self._score([requests[i] for i in chosen]))
        answers |= dict(zip(others, scores, strict=True))
        return [answers[i] for i in range(len(requests))]

    def _in_batches(self, indices: list[int], work: Callable[[list[int]], list[Any]]) -> list[Any]:
        """Apply `work` to batches of indices; where memory runs out, halve the batch and try again."""
        answers: list[Any] = []
        while len(answers) < len(indices):
            try:
                answers += work(indices[len(answers) : len(answers) + self.batch_size])
            except torch.OutOfMemoryError:
                if self.batch_size == 1:
                    raise
                self.batch_size //= 2
                log.warning("batch_size: memory ran out; continuing with %d", self.batch_size)
        return answers

    @torch.inference_mode()
    def _score(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        rows = [(list(context) + list(continuation))[-self.max_length - 1 :] for _, context, continuation in requests]
        time = max(len(row) for row in rows) - 1
        ids = torch.zeros(len(rows), time, dtype=torch.long)
        for row, tokens in zip(ids, rows, strict=True):
            row[: len(tokens) - 1] = torch.tensor(tokens[:-1])
        ids, answers = ids.to(self._device), []
        with self.autocast:
            hidden = self.model(ids, positions=torch.arange(time, device=ids.device).expand_as(ids)).hidden
            for row, tokens, (_, _, continuation) in zip(hidden, rows, requests, strict=True):
                end = len(tokens) - 1
                wanted = row[None, end - len(continuation) : end]
                answers.append(self._compare(self.model.logits(wanted)[0], tokens[-wanted.shape[1] :]))
        return answers

    def _compare(self, logits: Tensor, continuation: list[int]) -> tuple[float, bool]:
        scores = F.log_softmax(logits.float(), dim=-1)
        wanted = torch.tensor(continuation, device=scores.device)
        total = scores.gather(1, wanted[:, None]).sum()
        return float(total), bool((scores.argmax(-1) == wanted).all())

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Continue each text until one of its task's strings."""
        answers: dict[int, str] = {}
        groups: dict[str, list[int]] = {}
        for index, request in enumerate(requests):
            groups.setdefault(repr(request.args[1]), []).append(index)
        for members in groups.values():
            options = self._options(requests[members[0]].args[1])
            members.sort(key=lambda i: -len(requests[i].args[0]))
            texts = self._in_batches(
                members, lambda chosen, options=options: self._continue([requests[i].args[0] for i in chosen], options)
            )
            answers |= dict(zip(members, texts, strict=True))
        return [answers[i] for i in range(len(requests))]

    def _options(self, given: dict[str, Any]) -> dict[str, Any]:
        return generation_options(given)

    def _continue(self, contexts: list[str], options: dict[str, Any]) -> list[str]:
        room = self.max_length - options["max_new_tokens"]
        if room < 1:
            raise ConfigError(
                f"max_gen_toks={options['max_new_tokens']}: no room for a prompt in the {self.max_length} tokens that "
                f"the model reads; set it below {self.max_length} in the task's generation_kwargs"
            )
        prompts = [self.tok_encode(context)[-room:] for context in contexts]
        with self.autocast:
            return generate(self.model, prompts, tokenizer=self.vocabulary, **options).continuations


LENGTH_KEYS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
"""Names that tasks use for the most tokens to generate; the first that is set wins, as in the harness."""

NEUTRAL = {"num_beams": 1, "num_return_sequences": 1, "min_p": 0, "use_cache": True}
"""Settings that are accepted at the value which changes nothing."""


def generation_options(given: dict[str, Any]) -> dict[str, Any]:
    """Return a task's generation_kwargs as options of `llm.generate`.

    Decoding is greedy where do_sample is false, where the temperature is 0, and where neither is given.

    Raises:
        ConfigError: a setting is not supported.
    """
    given = {key: value for key, value in given.items() if value is not None and NEUTRAL.get(key) != value}
    until = given.pop("until", [])
    lengths = [given.pop(key) for key in LENGTH_KEYS if key in given]
    samples = given.pop("do_sample", given.get("temperature", 0.0) > 0)
    temperature = float(given.pop("temperature", 1.0))
    options = {
        "max_new_tokens": int(lengths[0]) if lengths else MAX_NEW_TOKENS,
        "stop": [text for text in ([until] if isinstance(until, str) else until) if text],
        "seed": 0,
        "temperature": temperature if samples else 0.0,
        "top_k": given.pop("top_k", 0) or None,
        "top_p": given.pop("top_p", None),
        "repetition_penalty": given.pop("repetition_penalty", 1.0),
    }
    if given:
        raise ConfigError(f"generation_kwargs={given}: not supported; remove them from the task")
    return options


def check_batch_size(batch_size: object) -> int:
    """Return the number of texts per forward pass, or raise ConfigError for what is no such number."""
    text = str(batch_size)
    if text == "auto" or text.startswith("auto:"):  # auto:N of the harness tries again N times
        return AUTO_BATCH_SIZE
    try:
        count = int(text)
    except ValueError:
        count = 0
    if count < 1:
        raise ConfigError(f"batch_size={batch_size}: must be at least 1, or auto; try 8")
    return count
