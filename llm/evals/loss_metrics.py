"""Derives loss, bits per byte and perplexity from sums of losses."""

import math


def validation_metrics(total_loss: float, num_tokens: float, num_bytes: float) -> dict[str, float]:
    """Return val/loss in nats per token, val/bits_per_byte = loss sum / (ln 2 · bytes), and val/perplexity.

    Bits per byte are absent where the labels represent no bytes, as synthetic tokens do.
    """
    loss = total_loss / max(num_tokens, 1.0)
    metrics = {"val/loss": loss, "val/perplexity": math.exp(min(loss, 700.0))}
    if num_bytes:
        metrics["val/bits_per_byte"] = total_loss / (math.log(2) * num_bytes)
    return metrics
