"""The LightningModule: one training step, and the one line that sets the learning rate."""

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Int
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR

from llm.adapt.work import training_factor
from llm.contracts import Batch, Objective, ParamGroup, ShardingStrategy, WorkSharer
from llm.distributed.zero.weights import state_shapes
from llm.model.transformer import Transformer, TransformerOutput
from llm.optim.gradients import FirstGradients, WholeGradients
from llm.optim.qk_clip import QueryKeyClip, meters_of
from llm.optim.rank_shares import RankShares
from llm.optim.receipt import unwrap
from llm.run_folder.checkpoint import compare_state
from llm.scaling.batching import BatchRamp
from llm.scaling.derivation import derivation
from llm.scaling.rates import Rates
from llm.training.learning_rate import rated_groups, restart_schedule
from llm.training.spikes import SpikeGuard
from llm.training.step_guard import NonFinitePolicy, StepGuard, UpdateVerdict
from llm.training.update_metrics import UpdateMetrics, hand_statistics
from llm.training.update_share import UpdateShares
from llm.training.validation import ValidatedModule


class LanguageModule(ValidatedModule):
    """A LightningModule that trains a decoder on the loss of an objective plus the losses of the sublayers.

        lr(step) = group.lr x scaling(batch_tokens at step) x schedule(step)

    Args:
        model: the decoder.
        objective: what the decoder is trained to predict.
        seed: seed of the objective's noise.
        optimizer: factory, called as `optimizer(param_groups)`.
        lr: peak learning rate at the base batch.
        weight_decay: decoupled decay of matrices.
        schedule: `f(step, total_steps=…) -> lr_factor`.
        scaling: `f(batch_tokens) -> lr_scale`.
        rates: derives each tensor's lr and decay from those of the run.
        ramp: number of updates in the run, and the tokens of each.
        half_life_note: how the batch changed the optimizer's half-lives in tokens, for the receipt.
        batch_tokens: tokens per update over all devices; the largest number where updates differ.
        context_length: tokens per window.
        token_bytes: number of bytes that each token id stands for, which bits per byte needs.
        on_nonfinite: policy for a loss or gradient that is not finite; see `StepGuard`.
        generate: `f(model, prompts, …) -> texts`, for samples during training; see `llm.generate`.
        qk_clip: threshold of attention logits, see `llm.optim.qk_clip`; None for no bound.
        spikes: judges finite updates; None accepts all of them.

    Attributes:
        step_metrics: metrics of the last update by full name, on the device.
    """

    def __init__(
        self,
        *,
        model: Transformer,
        objective: Objective,
        seed: int,
        optimizer: Callable[[list[ParamGroup]], torch.optim.Optimizer],
        lr: float,
        weight_decay: float,
        schedule: Callable[..., float],
        scaling: Callable[[int], float],
        rates: Rates,
        ramp: BatchRamp,
        half_life_note: str,
        batch_tokens: int,
        context_length: int,
        token_bytes: Int[Tensor, " vocab"],
        on_nonfinite: NonFinitePolicy,
        generate: Callable[..., list[str]],
        qk_clip: float | None = None,
        spikes: SpikeGuard | None = None,
    ) -> None:
        super().__init__()
        self.model, self.objective = model, objective
        self.build_optimizer, self.lr, self.weight_decay = optimizer, lr, weight_decay
        self.schedule, self.scaling, self.rates = schedule, scaling, rates
        self.ramp, self.total_steps = ramp, ramp.total_steps
        self.batch_tokens, self.context_length, self.half_life_note = batch_tokens, context_length, half_life_note
        self.generate = generate
        self.clip = None if qk_clip is None else QueryKeyClip(qk_clip, meters_of(model.attentions()))
        self.guard = StepGuard(on_nonfinite=on_nonfinite, spikes=spikes)
        self.register_buffer("token_bytes", token_bytes.float(), persistent=False)
        factor = training_factor(model, context_length, objective.sight)
        self.flops_per_token = factor * objective.flops_per_token(model, context_length)
        self.run_model: Callable[..., TransformerOutput] = model.__call__  # a method: the decoder is registered once
        self.step_metrics: dict[str, Tensor | float] = {}
        self._shares = UpdateShares(seed=seed, with_last=objective.scores_last_label)
        self._update = UpdateMetrics(self.reduced)
        self._refused: dict[str, Any] | None = None
        self._verdict = UpdateVerdict()
        self._first_gradients: FirstGradients | None = None

    def compile_model(self, **options: Any) -> None:
        """Run the decoder through torch.compile from now on; state and names stay those of the plain decoder."""
        self.run_model = torch.compile(self.model, **options).__call__

    # The learning rate.

    def configure_optimizers(self) -> Any:
        """Return one optimizer over tagged groups, and one factor on every group's rate, set before each update."""
        groups = rated_groups(
            self.model, self.rates, optimizer=self.build_optimizer, lr=self.lr, weight_decay=self.weight_decay
        )
        optimizer = self.build_optimizer(groups)
        scheduler = LambdaLR(optimizer, lambda step: self.lr_multiplier(step))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def lr_multiplier(self, step: int) -> float:
        """Return the factor on every group's lr at `step`."""
        return self.scaling(self.batch_tokens_at(step)) * self.schedule(step, total_steps=self.total_steps)

    @property
    def lr_derivation(self) -> list[str]:
        """One line for each batch size of the run: how the learning rate follows from the batch."""
        sizes = dict.fromkeys(batch_tokens for _, _, batch_tokens in self.ramp.stages)
        note = f"; {self.half_life_note}" if self.half_life_note else ""
        return [derivation(self.scaling, lr=self.lr, batch_tokens=size) + note * (len(sizes) == 1) for size in sizes]

    @property
    def peak_lr_scale(self) -> float:
        """The largest factor of the batch rule over the run."""
        return max(self.scaling(batch_tokens) for _, _, batch_tokens in self.ramp.stages)

    def batch_tokens_at(self, step: int) -> int:
        """Return the tokens of the update that follows `step` updates."""
        return self.ramp.batch_tokens_at(step)

    def tokens_seen(self, step: int) -> int:
        """Return the tokens of the first `step` updates."""
        return self.ramp.tokens_seen(step)

    # The training step.

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Return the loss of one micro-batch: that of the objective in nats per label, plus the sublayers' losses."""
        share, noise = self._shares.of_micro_batch(batch, trainer=self.trainer)
        prepared = self.objective.prepare(self.model, batch, noise)
        out = self.run_model(**prepared.inputs)
        loss, found = self.objective.loss(self.model, self.run_model, prepared, out, share)
        metrics = out.losses | out.metrics | found
        self._update.collect({"train/loss": loss, **{f"train/{name}": value for name, value in metrics.items()}})
        for extra in out.losses.values():
            loss = loss + extra
        return loss

    def on_train_start(self) -> None:
        """Follow the schedule from the next update on; on several devices, watch that all parameters get gradients."""
        scheduler = self.lr_schedulers()
        assert isinstance(scheduler, LambdaLR)
        restart_schedule(scheduler, multiplier=self.lr_multiplier, total_steps=self.total_steps)
        if self.clip is not None:
            strategy = self.trainer.strategy
            layouts = strategy.layouts if isinstance(strategy, ShardingStrategy) else ()
            self.clip.attach(unwrap(self.trainer.optimizers[0]), layouts)
        if self.trainer.world_size > 1:
            self._first_gradients = FirstGradients(self.model)
        optimizer = self.optimizers(use_pl_optimizer=False)
        if isinstance(self.trainer.strategy, DDPStrategy) and isinstance(optimizer, WorkSharer):
            optimizer.share_work(RankShares())

    def on_after_backward(self) -> None:
        """After the first backward pass, refuse parameters that received no gradient."""
        if self._first_gradients is not None:
            watched, self._first_gradients = self._first_gradients, None
            watched.check(lambda counts: self.reduced(counts.to(self.device), "sum"))

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Measure the raw gradient's norm, let the guard judge the update, and clip: always before the update rule.

        An optimizer that folds gradients into its momentum during the backward pass leaves none to measure here.
        """
        gradients = self._gradients()
        norm = gradients.norm()
        losses, means = self._update.close()
        # a kind with several rates is shown with its first
        rates = {f"lr/{group['kind']}": float(group["lr"]) for group in reversed(optimizer.param_groups)}
        if len(self.ramp.stages) > 1:
            rates["batch_tokens"] = self.batch_tokens_at(self.global_step)
        self.step_metrics = {**means, **({"grad_norm": norm} if gradients.exist else {}), **rates}
        verdict = self._verdict = self.guard.judge(self.global_step, loss=means["train/loss"], norm=norm)
        if self.clip is not None:
            self.step_metrics |= self.clip.measure(self._update.take_peaks(), is_dropped=verdict.is_dropped)
        if verdict.reason:
            self._note_refused(verdict.reason, losses, means["train/loss"], norm)
            self.step_metrics |= verdict.counts or {}
            if verdict.error is not None:
                raise verdict.error
            if verdict.is_dropped:
                gradients.drop()
        if gradient_clip_val and not verdict.reason:
            gradients.clip(gradient_clip_val, norm)
        elif gradient_clip_val and not verdict.is_dropped:  # the optimizer updates the tensors with finite gradients
            gradients.clip_finite(gradient_clip_val)

    def optimizer_step(self, *arguments: Any, **options: Any) -> None:
        """Run the micro-batch and the update, then hand statistics to the layers that gathered them."""
        super().optimizer_step(*arguments, **options)
        statistics = self._update.take_statistics()
        if self._verdict.is_dropped:  # a dropped update changes no state
            return
        for index, layer in enumerate(self.model.blocks()):
            own = self._update.statistics_of_layer(index, statistics)
            hand_statistics(layer, own, only_finite=bool(self._verdict.reason))

    def take_refused(self) -> dict[str, Any] | None:
        """Return the record of the last refused update once; None where there is none."""
        refused, self._refused = self._refused, None
        return refused

    def _note_refused(self, why: str, losses: Tensor, loss: Tensor, norm: Tensor) -> None:
        """Remember an update that is not applied, with the losses of every rank's micro-batches."""
        ranks = losses[None] if self.trainer.world_size == 1 else self.trainer.strategy.all_gather(losses)
        self._refused = {"step": self.global_step + 1, "why": why, "loss": float(loss), "grad_norm": float(norm)}
        self._refused["losses"] = ranks.float().reshape(-1, len(losses)).tolist()

    def _gradients(self) -> Any:
        """Return the gradients of the coming update: whole, or in the shards of a strategy that holds them so."""
        strategy = self.trainer.strategy
        return (
            strategy.gradients() if isinstance(strategy, ShardingStrategy) else WholeGradients(self.model.parameters())
        )

    # Checkpoints.

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Save the spike detector's state and the counts of refused updates; leave out frozen weights."""
        self.guard.save_to(checkpoint)
        for name in self.model.frozen_names:
            checkpoint["state_dict"].pop(f"model.{name}", None)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse the weights of another architecture before Lightning copies any, then restore the guard."""
        own = self.state_dict()
        checkpoint["state_dict"] |= {f"model.{name}": own[f"model.{name}"] for name in self.model.frozen_names}
        compare_state(checkpoint["state_dict"], state_shapes(self), source=f"resume=step {checkpoint['global_step']}")
        self.guard.load_from(checkpoint)

    def generate_text(self, prompts: list[str], **options: Any) -> list[str]:
        """Continue prompts with the current weights."""
        return self.generate(self.model, prompts, decode=self.objective.decode, **options)
