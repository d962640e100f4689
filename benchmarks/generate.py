"""How fast is generation, compared with transformers' generate with the same weights?

    python benchmarks/generate.py --batch 1,8 --rounds 7

Builds `model/size=small` with random weights (speed does not depend on them), exports it as `python -m llm.export`
does, loads the folder with transformers, and lets both continue the same prompts greedily by the same number of tokens,
in turns, in fp32 and in one process. No text ends early. The prompts of a batch are of one length, or with
`--ragged` of several. First a check: both draw the same tokens. Speeds are medians over rounds, with quartiles; the
ratio is taken within a round. Memory is that of the key/value cache.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from hydra import compose, initialize_config_dir

from llm.commands.export import write_model
from llm.config.build import build_model
from llm.config.files import to_plain
from llm.generate import Decoding
from llm.training.rebuild import TrainedModel

ROOT = Path(__file__).resolve().parents[1]
GREEDY = {"temperature": 0.0, "top_k": None, "top_p": None, "seed": 0}


class Tokenizer:
    """A tokenizer with the vocabulary size that `small` is made for."""

    bos_id = 0

    def save(self, folder: Path) -> None:
        """Write the smallest run folder that an export reads."""
        from tokenizers import AddedToken, Tokenizer, models

        tokenizer = Tokenizer(models.BPE(vocab={"<|endoftext|>": 0}, merges=[]))
        tokenizer.add_special_tokens([AddedToken("<|endoftext|>", special=True)])
        tokenizer.save(str(folder / "tokenizer.json"))


def both_models(folder: Path, size: str, vocab: int, context: int) -> tuple[Any, Any]:
    """Return our decoder and transformers' one with its weights."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    overrides = [f"model/size={size}", "trainer=cpu", "name=generate", f"context_length={context}"]
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        cfg = to_plain(compose("train", overrides))
    model = build_model(cfg, vocab).eval()
    trained = TrainedModel(
        folder=folder, config=cfg, model=model, tokenizer=Tokenizer(), device=torch.device("cpu"), precision="32-true"
    )
    write_model(trained, folder, dtype=torch.float32)
    return model, AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def prompts_of(batch: int, length: int, vocab: int, *, ragged: bool) -> list[list[int]]:
    """Return random prompts."""
    generator = torch.Generator().manual_seed(1)
    lengths = [length - (length // 2) * row // batch if ragged else length for row in range(batch)]
    return [torch.randint(1, vocab, (n,), generator=generator).tolist() for n in lengths]


def ours(model: Any, prompts: list[list[int]], count: int) -> tuple[list[list[int]], int]:
    """Continue with our decoder; return the tokens drawn and the bytes of the cache."""
    decoding = Decoding(model, prompts, max_new_tokens=count, **GREEDY)
    columns = list(decoding)
    return torch.stack(columns, 1).tolist(), decoding.cache_bytes()


def theirs(model: Any, prompts: list[list[int]], count: int) -> tuple[list[list[int]], int]:
    """Continue with transformers; return the tokens drawn and the bytes of the cache."""
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    options = {"max_new_tokens": count, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    out = model.generate(ids, attention_mask=mask, return_dict_in_generate=True, **options)
    held = sum(t.numel() * t.element_size() for layer in out.past_key_values.layers for t in (layer.keys, layer.values))
    return out.sequences[:, longest:].tolist(), held


def seconds(call: Callable[..., Any], *arguments: Any) -> float:
    """Time one call."""
    start = time.perf_counter()
    call(*arguments)
    return time.perf_counter() - start


def spread(values: list[float]) -> str:
    """Median and quartiles."""
    low, middle, high = statistics.quantiles(values, n=4)
    return f"{middle:.2f} ({low:.2f} to {high:.2f})"


def main() -> None:
    """Check that both sides agree, measure, and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="small")
    parser.add_argument("--vocab", type=int, default=8192)
    parser.add_argument("--batch", default="1,8")
    parser.add_argument("--prompt", type=int, default=64, help="tokens per prompt")
    parser.add_argument("--tokens", type=int, default=128, help="new tokens per text")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--ragged", action="store_true", help="prompts of different lengths")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        ours_model, theirs_model = both_models(Path(folder), arguments.size, arguments.vocab, 512)
        print("| batch | ours, tokens/s | transformers, tokens/s | ratio | cache, ours | cache, theirs |")
        print("|---|---|---|---|---|---|")
        for batch in map(int, arguments.batch.split(",")):
            prompts = prompts_of(batch, arguments.prompt, arguments.vocab, ragged=arguments.ragged)
            (drawn, held), (their_drawn, their_held) = (
                call(model, prompts, arguments.tokens) for call, model in ((ours, ours_model), (theirs, theirs_model))
            )
            total = batch * arguments.tokens
            assert drawn == their_drawn, "the two draw different tokens"
            rates: tuple[list[float], list[float]] = ([], [])
            for turn in range(arguments.rounds):
                sides = [(0, ours, ours_model), (1, theirs, theirs_model)]
                for index, call, model in sides if turn % 2 else reversed(sides):
                    rates[index].append(total / seconds(call, model, prompts, arguments.tokens))
            ratios = [a / b for a, b in zip(*rates, strict=True)]
            mebibytes = f"{held / 2**20:.1f} MiB | {their_held / 2**20:.1f} MiB"
            print(f"| {batch} | {spread(rates[0])} | {spread(rates[1])} | {spread(ratios)} | {mebibytes} |", flush=True)


if __name__ == "__main__":
    main()
