"""Evaluates a model by samples of its text."""

from typing import Any

from llm.errors import ConfigError
from llm.evals.evaluation import Result, Subject
from llm.generate import check_sampling, generate


class SampledText:
    """An evaluation that continues prompts in one batch.

    Args:
        prompts: texts to continue; an empty one begins a document.
        max_new_tokens: tokens per prompt.
        temperature: 0 takes the most likely token.
        top_k: number of most likely tokens to sample from, or None.
        top_p: sample from the smallest set whose probabilities sum to p, or None.
        repetition_penalty: above 1 makes tokens that occurred already less likely.
        stop: strings that end a text.
        seed: seed of the random numbers.
        use_cache: whether each token is read once; otherwise the whole text is read again for every token.
        steps: forward passes of an objective that draws several tokens at once; None for the objective's own number.

    Raises:
        ConfigError: there is no prompt, or a setting is out of its range.
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
        steps: int | None = None,
    ) -> None:
        if not prompts:
            raise ConfigError("eval.samples.prompts=[]: needs at least one; try ['']")
        drawing: dict[str, Any] = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
        drawing |= {"max_new_tokens": max_new_tokens, "repetition_penalty": repetition_penalty}
        check_sampling(**drawing, steps=steps)
        self.prompts = prompts
        self.sampling = drawing | {"stop": stop, "seed": seed, "use_cache": use_cache, "steps": steps}

    def __call__(self, subject: Subject) -> Result:
        """Continue the prompts."""
        with subject.autocast():
            done = generate(
                subject.model,
                self.prompts,
                tokenizer=subject.data.tokenizer,
                decode=subject.objective.decode,
                **self.sampling,
            )
        rule = f"\n{'-' * 60}\n"
        text = f"{rule[1:]}{rule.join(done.texts)}{rule}{done.tokens_per_second:.0f} tokens per second"
        return Result(headline={}, figures=done.texts, text=text)
