"""Evaluates a model by samples of its text."""

from typing import Any

from llm.errors import ConfigError
from llm.evals.base import Result, Subject
from llm.generate import check_sampling, generate


class Samples:
    """Continues prompts, all of them side by side.

    Args:
        prompts: texts to go on from; an empty one starts a document.
        max_new_tokens: tokens drawn for each prompt.
        temperature: 0 takes the likeliest token.
        top_k: draw among the k likeliest, or None.
        top_p: draw among the fewest whose probabilities reach p, or None.
        repetition_penalty: above 1 makes tokens that occurred already less likely.
        stop: strings that end a text.
        seed: of the draws.
        use_cache: whether each token is read once; without it the whole text is read again for every token.

    Raises:
        ConfigError: no prompt, or a setting out of its range.
    """

    def __init__(
        self,
        *,
        prompts: list[str],
        max_new_tokens: int,
        temperature: float,
        top_k: int | None,
        top_p: float | None,
        repetition_penalty: float,
        stop: list[str],
        seed: int,
        use_cache: bool,
    ) -> None:
        if not prompts:
            raise ConfigError("eval.samples.prompts=[]: needs at least one; try ['']")
        drawing: dict[str, Any] = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
        drawing |= {"max_new_tokens": max_new_tokens, "repetition_penalty": repetition_penalty}
        check_sampling(**drawing)
        self.prompts = prompts
        self.sampling = drawing | {"stop": stop, "seed": seed, "use_cache": use_cache}

    def __call__(self, subject: Subject) -> Result:
        """Write."""
        with subject.autocast():
            done = generate(subject.model, self.prompts, tokenizer=subject.data.tokenizer, **self.sampling)
        rule = f"\n{'-' * 60}\n"
        text = f"{rule[1:]}{rule.join(done.texts)}{rule}{done.tokens_per_second:.0f} tokens per second"
        return Result(headline={}, figures=done.texts, text=text)
