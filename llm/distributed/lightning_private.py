"""Wraps private names of Lightning that this project uses; pyproject.toml bounds its version, and tests name them."""

import lightning as L

OVERRIDDEN = {
    "lightning.pytorch.strategies.DeepSpeedStrategy": (
        "_format_config",
        "_format_batch_size_and_grad_accum_config",
        "_initialize_deepspeed_train",
        "_setup_model_and_optimizer",
    ),
}
"""Private methods that `ZeroStrategy` overrides or calls, by class."""

WEIGHT_AVERAGING_STATE = ("_average_model", "_latest_update_step")
"""Private attributes of Lightning's WeightAveraging that the averages read."""


def validation_follows(trainer: L.Trainer) -> bool:
    """Return whether the trainer validates after the current batch, before the next one."""
    loop = trainer.fit_loop
    return loop.epoch_loop._should_check_val_fx(loop._data_fetcher)  # pyright: ignore[reportArgumentType]


def is_last_micro_batch(trainer: L.Trainer) -> bool:
    """Return whether the current micro-batch is the last one of its update."""
    return not trainer.fit_loop._should_accumulate()


def take_sigterm(trainer: L.Trainer) -> bool:
    """Return whether Lightning has received a SIGTERM, and reset its flag."""
    received = trainer.received_sigterm
    trainer._signal_connector.received_sigterm = False
    return received
