"""What share of a training step does loading take?

    python benchmarks/data_loading.py --repeats 5

Reads the micro-batches of a run from the loader of the data module, alternating with forward, backward and AdamW of a
model of the given size. That model has only the dense layers (no attention, no normalisation), so its step is faster
than any real one and the printed share is an upper bound.
"""

import argparse
import statistics
import tempfile
import time

import torch
from torch.utils.data import DataLoader

from data.data_module import TokenDataModule
from data.sources import PythonSource
from data.tokenizer import BpeTokenizer


class LinearLayersOnly(torch.nn.Module):
    """The matrix products of a decoder and nothing between them."""

    def __init__(self, vocab_size: int, d_model: int, num_layers: int):
        super().__init__()
        self.embedding = torch.nn.Embedding(vocab_size, d_model)
        up_and_down = [
            torch.nn.Sequential(
                torch.nn.Linear(d_model, 6 * d_model, bias=False), torch.nn.Linear(6 * d_model, d_model, bias=False)
            )
            for _ in range(num_layers)
        ]  # 12 * d_model^2 per layer, the size of the projections of a usual one
        self.layers = torch.nn.ModuleList(up_and_down)
        self.head = torch.nn.Linear(d_model, vocab_size, bias=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Return logits."""
        hidden = self.embedding(ids)
        for layer in self.layers:
            hidden = hidden + layer(hidden)
        return self.head(hidden)


def build_module(arguments: argparse.Namespace, cache_dir: str) -> TokenDataModule:
    """Return the data module of the default run at the given geometry."""
    module = TokenDataModule(
        source=PythonSource(site_packages=False, tests=False),
        tokenizer=BpeTokenizer(vocab_size=4096, sample_bytes=1 << 24),
        context_length=arguments.context_length,
        batch_tokens=arguments.context_length * arguments.micro_batch_size,
        micro_batch_size=arguments.micro_batch_size,
        seed=0,
        val_fraction=0.02,
        val_tokens=131072,
        num_workers=arguments.num_workers,
        cache_dir=cache_dir,
        deduplicate=True,
        max_line_bytes=65536,
        num_processes=None,
    )
    module.prepare_data()
    return module


def time_round(module: TokenDataModule, model: torch.nn.Module, steps: int) -> tuple[float, float]:
    """Return the mean seconds of loading and of computing a step."""
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    sampler = module.train_sampler(total_steps=steps)
    loader = DataLoader(
        module.windows("train"), batch_sampler=sampler, collate_fn=lambda batch: batch, num_workers=module.num_workers
    )
    batches = iter(loader)
    loading = computing = 0.0
    for _ in range(steps):
        started = time.perf_counter()
        batch = next(batches)
        loaded = time.perf_counter()
        logits = model(batch["input_ids"])
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()
        loading += loaded - started
        computing += time.perf_counter() - loaded
    return loading / steps, computing / steps


def main() -> None:
    """Print the seconds of both and the share."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--context-length", type=int, default=512)
    parser.add_argument("--micro-batch-size", type=int, default=8)
    parser.add_argument("--d-model", type=int, default=384)
    parser.add_argument("--num-layers", type=int, default=6)
    parser.add_argument("--num-workers", type=int, default=0)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as cache_dir:
        module = build_module(arguments, cache_dir)
        model = LinearLayersOnly(module.tokenizer.vocab_size, arguments.d_model, arguments.num_layers)
        time_round(module, model, 2)
        rounds = [time_round(module, model, arguments.steps) for _ in range(arguments.repeats)]
    loading, computing = (statistics.median(values) for values in zip(*rounds, strict=True))
    shares = [load / (load + compute) for load, compute in rounds]
    tokens = arguments.context_length * arguments.micro_batch_size
    print(
        f"{tokens} tokens per step, {arguments.num_layers} layers of {arguments.d_model}, "
        f"{torch.get_num_threads()} threads"
    )
    print(f"loading    {loading * 1e6:10.0f} us per step   {tokens / loading / 1e6:8.2f} M tokens/s")
    print(f"computing  {computing * 1e6:10.0f} us per step   {tokens / computing / 1e6:8.4f} M tokens/s")
    print(f"share      {statistics.median(shares):10.3%}   ({min(shares):.3%} to {max(shares):.3%})")


if __name__ == "__main__":
    main()
