import json
import math

import pytest
import yaml

CONFIG = {
    "name": "test",
    "seed": 0,
    "max_steps": 10,
    "max_tokens": None,
    "batch_tokens": 100,
    "context_length": 10,
    "model": {"_target_": "llm.model.transformer.Transformer", "d_model": 32, "num_layers": 2},
    "optimizer": {"_target_": "torch.optim.AdamW", "lr": 0.001, "betas": [0.9, 0.95]},
}


def nested(flat):
    """Return CONFIG with these dotted keys set."""
    config = json.loads(json.dumps(CONFIG))
    for key, value in flat.items():
        node = config
        *parents, last = key.split(".")
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = value
    return config


@pytest.fixture
def make_run(tmp_path):
    """Return a function that writes a run folder, `make_run("name", loss=2.0, seed=1)`. Its loss falls linearly."""

    def make(name, *, loss=2.0, status="finished", steps=10, summary=None, extra=None, start=6.0, **flat):
        folder = tmp_path / name
        folder.mkdir(parents=True)
        config = nested(flat)
        (folder / "config.yaml").write_text(yaml.safe_dump(config))
        batch, total = config["batch_tokens"], config["max_steps"]
        lines = []
        for step in range(1, steps + 1):
            value = loss + (start - loss) * (1 - step / total)
            line = {"step": step, "tokens_seen": step * batch, "train/loss": value, "tokens_per_second": 50.0}
            if step % 2 == 0:
                line["val/loss"] = value
            lines.append(json.dumps(line | (extra(step) if extra else {})))
        (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
        figures = {"status": status, "val/loss": loss if math.isfinite(loss) else None, "active_parameters": 1000}
        figures |= {"parameters": 1000, "optimizer_state_bytes": 8000, "tokens_seen": steps * batch, "seconds": 20.0}
        (folder / "summary.json").write_text(json.dumps(figures | (summary or {})))
        return folder

    return make
