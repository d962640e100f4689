"""A decoder as EleutherAI's harness sees a model; needs the package `lm_eval`."""

from collections.abc import Sequence
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
"""Tokens generated where a task names no number, as in the harness's own models."""


class HarnessModel(TemplateLM):
    """Scores and continues texts for the harness, each text beginning a document as in training.

    Args:
        model: the decoder, on its device, in evaluation mode.
        tokenizer: with `bos_id`, `encode` and `decode`.
        max_length: tokens that are read at a time; longer texts lose their beginning, and rolling ones are cut.
        batch_size: texts side by side.
        autocast: entered around the decoder.

    Differs: where a text is scored from its start on, its first token follows one bos token. The harness's `hf` model
    reads two where the tokenizer adds one itself; `add_bos_token=False` makes it count alike.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        max_length: int,
        batch_size: int,
        autocast: AbstractContextManager[Any] | None = None,
    ) -> None:
        super().__init__()
        if batch_size < 1:
            raise ConfigError(f"batch_size={batch_size}: must be at least 1; try 8")
        self.model, self.vocabulary = model, tokenizer
        self.max_length, self.batch_size = max_length, batch_size
        self.autocast = nullcontext() if autocast is None else autocast
        self._device = next(model.parameters()).device

    @property
    def eot_token_id(self) -> int:
        """The token that ends a document, which is the one that begins the next."""
        return self.vocabulary.bos_id

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Return the ids of a text, after the token that begins a document unless told otherwise."""
        first = [] if add_special_tokens is False else [self.eot_token_id]
        return [*first, *map(int, self.vocabulary.encode(string))]

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Return the log-probability of each whole text."""
        sums = []
        for request in requests:
            (text,) = request.args
            windows = get_rolling_token_windows(
                token_list=self.tok_encode(text, add_special_tokens=False),
                prefix_token=self.eot_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            pairs = [(("", ""), *make_disjoint_window(window)) for window in windows]
            sums.append(sum(score for score, _ in self._loglikelihood_tokens(pairs)))
        return sums

    def _loglikelihood_tokens(self, requests: Sequence[Any], **_: Any) -> list[tuple[float, bool]]:
        """Return for each (texts, context ids, continuation ids) its log-probability and whether greedy gives it."""
        order = sorted(range(len(requests)), key=lambda i: -len(requests[i][1]) - len(requests[i][2]))
        answers: dict[int, tuple[float, bool]] = {}
        for start in range(0, len(order), self.batch_size):
            chosen = order[start : start + self.batch_size]
            answers |= dict(zip(chosen, self._score([requests[i] for i in chosen]), strict=True))
        return [answers[i] for i in range(len(requests))]

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
                wanted = row[None, max(0, end - len(continuation)) : end]
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
            for start in range(0, len(members), self.batch_size):
                chosen = members[start : start + self.batch_size]
                texts = self._continue([requests[i].args[0] for i in chosen], dict(options))
                answers |= dict(zip(chosen, texts, strict=True))
        return [answers[i] for i in range(len(requests))]

    def _options(self, given: dict[str, Any]) -> dict[str, Any]:
        """Translate a task's settings; greedy unless it samples."""
        given = dict(given)
        until = given.pop("until", None) or []
        count = given.pop("max_gen_toks", given.pop("max_new_tokens", MAX_NEW_TOKENS))
        samples = given.pop("do_sample", given.get("temperature", 0) not in (0, None))
        temperature = given.pop("temperature", 1.0)
        options = {"max_new_tokens": int(count), "stop": [until] if isinstance(until, str) else list(until), "seed": 0}
        options |= {"temperature": float(temperature or 1.0) if samples else 0.0}
        options |= {"top_k": given.pop("top_k", None), "top_p": given.pop("top_p", None)}
        options |= {"repetition_penalty": given.pop("repetition_penalty", 1.0)}
        if given:
            raise ConfigError(f"generation_kwargs={given}: not known here; leave them out of the task")
        return options

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
