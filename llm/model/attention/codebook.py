"""The codebook that quantises keys, and the estimators that learn it."""

from collections.abc import Callable
from typing import ClassVar, NamedTuple

import torch
import torch.distributed as dist
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from llm.model.attention.codebook_settings import BY_GRADIENT, Estimator, check_codebook
from llm.model.attention.diveq import moved_to_codes
from llm.model.attention.key_draws import draw_keys
from llm.model.attention.rotation_trick import rotate_to_codes

ASSIGN_TOKENS = 4096
"""Number of keys whose distances to all codes are in memory at a time: 8 MiB per head for 512 codes in fp32."""

DEAD_SHARE = 0.05
"""A code is dead when its average count is below this share of the mean count of its head."""


class Quantized(NamedTuple):
    """The keys of a batch, replaced by their nearest codes."""

    keys: Float[Tensor, "batch time kv_heads head_dim"]
    """Equal to the codes in value; the estimator defines the gradient with respect to the original keys."""
    code_ids: Int[Tensor, "batch time kv_heads"]
    losses: dict[str, Tensor]
    metrics: dict[str, Tensor]


class Codebook(nn.Module):
    """A codebook that replaces each key by the nearest of `codebook_size` codes of its head, and learns the codes.

        z = argmin_s ‖k − C_s‖²,   loss: commitment_weight · ‖k − sg(C_z)‖²/head_dim  [+ ‖sg(k) − C_z‖²/head_dim]

    The estimator defines the gradient of keys and how codes are learned:

    - ema: straight through; C_s is the moving average of its keys, updated once per optimizer step.
    - straight_through: k̂ = k + sg(C_z − k), dk̂/dk = 1; codes minimize the loss in brackets.
    - rotation: dk̂/dk is the rotation and scaling that take k to C_z; codes minimize the same loss.
    - diveq: codes take the part of the loss's gradient along the error, keys the part across it; no further loss.
    - simvq: straight through; C = B M with frozen B and one learned matrix M per head, so that every code moves.

    Codes start at distinct random keys of the first training batch; M starts as the identity. Every `revive_every`
    optimizer steps, codes that few keys choose are moved to random keys of the next batch.

    Args:
        num_heads: number of key/value heads; each has its own codes.
        head_dim: size of a code.
        codebook_size: codes per head, at least 2.
        estimator: ema | straight_through | rotation | simvq | diveq.
        commitment_weight: weight of the loss that draws keys to their codes, a mean over tokens and heads; 0 for diveq.
        ema_decay: decay of the moving averages of counts and keys per optimizer step, in [0, 1).
        revive_every: optimizer steps between revivals of dead codes, or None for never.
        seed: seed of the choice of keys.

    Raises:
        ConfigError: a setting is out of range.

    Source: van den Oord et al., "Neural Discrete Representation Learning", arXiv:1711.00937, eq. 3 and appendix A.1;
    Fifty et al., "Restructuring Vector Quantization with the Rotation Trick", arXiv:2410.06424, section 4; Zhu et al.,
    "Addressing Representation Collapse in Vector Quantized Models with One Linear Layer" (SimVQ), arXiv:2411.02038;
    Vali et al., "DiVeQ: Differentiable Vector Quantization Using the Reparameterization Trick", arXiv:2509.26469.
    Differs: means over head_dim in the losses; codes start from keys for every estimator.
    """

    parameter_kinds: ClassVar = {"codes": "embedding", "mixing": "embedding"}
    base: Tensor
    counts: Tensor
    pending: Tensor
    steps: Tensor

    def __init__(
        self,
        *,
        num_heads: int,
        head_dim: int,
        codebook_size: int,
        estimator: Estimator,
        commitment_weight: float,
        ema_decay: float,
        revive_every: int | None,
        seed: int,
    ) -> None:
        super().__init__()
        check_codebook(codebook_size, estimator, commitment_weight, ema_decay, revive_every)
        self.estimator: Estimator = estimator
        self.codebook_size, self.commitment_weight, self.ema_decay = codebook_size, commitment_weight, ema_decay
        self.revive_every, self.seed = revive_every, seed
        shape = (num_heads, codebook_size, head_dim)
        generator = torch.Generator().manual_seed(seed)
        # only the optimizer writes parameters: values that come from keys are buffers, which are added to them
        self.codes = nn.Parameter(torch.zeros(shape)) if estimator in BY_GRADIENT else None
        self.mixing = nn.Parameter(torch.zeros(num_heads, head_dim, head_dim)) if estimator == "simvq" else None
        self.register_buffer("base", torch.randn(shape, generator=generator, device="cpu"))
        self.register_buffer(
            "mixing_base", torch.eye(head_dim).repeat(num_heads, 1, 1) if estimator == "simvq" else None
        )
        self.register_buffer("counts", torch.zeros(shape[:2]))
        self.register_buffer("key_sums", torch.zeros(shape) if estimator == "ema" else None)
        self.register_buffer("pending", torch.ones(shape[:2], dtype=torch.bool))
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))
        self.may_be_pending, self.num_steps = True, 0  # plain copies: forward never synchronizes with the GPU
        self.register_load_state_dict_post_hook(lambda module, _: module.read_state())

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Codebook":
        """Move or cast as asked, but keep averages and codes in fp32: bf16 would round updates away."""
        super()._apply(fn, recurse)
        for name, buffer in self._buffers.items():
            if buffer is not None and buffer.dtype in (torch.bfloat16, torch.float16):
                self._buffers[name] = buffer.float()
        return self

    def read_state(self) -> None:
        """Refresh the plain copies of buffers after a checkpoint was loaded."""
        self.may_be_pending, self.num_steps = bool(self.pending.any()), int(self.steps)

    def all_codes(self) -> Float[Tensor, "kv_heads codes head_dim"]:
        """Return the codes in fp32."""
        if self.codes is not None:
            return self.base + self.codes
        return self.base if self.mixing is None else self.base @ (self.get_buffer("mixing_base") + self.mixing)

    def forward(self, keys: Float[Tensor, "batch time kv_heads head_dim"]) -> Quantized:
        with torch.autocast(keys.device.type, enabled=False):
            exact = keys.to(torch.promote_types(keys.dtype, torch.float32))
            if self.training and self.may_be_pending:
                self.place_pending(exact.detach())
            codes = self.all_codes()
            code_ids = self.nearest(exact.detach())
            chosen = codes[torch.arange(codes.shape[0], device=codes.device), code_ids].to(exact.dtype)
            quantized = self._with_gradient(exact, chosen)
            losses = self._losses(exact, chosen) if self.training else {}
            metrics = self._metrics(exact.detach(), chosen.detach(), code_ids)
            return Quantized(quantized.to(keys.dtype), code_ids, losses, metrics)

    def _with_gradient(self, keys: Tensor, chosen: Tensor) -> Tensor:
        """Return the chosen codes in value, with the estimator's gradient."""
        if self.estimator == "diveq":
            passed = moved_to_codes(keys, chosen)
        else:
            passed = rotate_to_codes(keys, chosen.detach()) if self.estimator == "rotation" else keys
        return passed + (chosen - passed).detach()

    @torch.no_grad()
    def nearest(self, keys: Float[Tensor, "batch time kv_heads head_dim"]) -> Int[Tensor, "batch time kv_heads"]:
        """Return the nearest code of each key: the largest k·C − ‖C‖²/2, the first of equals."""
        codes = self.all_codes().to(keys.dtype)
        half_norms = codes.square().sum(-1) / 2
        flat = keys.flatten(0, 1)
        nearest = [
            (torch.einsum("ngd,gsd->ngs", part, codes) - half_norms).argmax(-1) for part in flat.split(ASSIGN_TOKENS)
        ]
        return torch.cat(nearest).view(keys.shape[:3])

    def soft_assignment(
        self, keys: Float[Tensor, "batch time kv_heads head_dim"], temperature: float
    ) -> Float[Tensor, "batch time kv_heads codes"]:
        """Return shares that are 1 for the nearest code and 0 otherwise, with the gradient of a softmax over distances.

            share_s = softmax_s(−‖k − C_s‖² / (2 · temperature · head_dim))

        The softmax tends to the shares as the temperature falls. It is Performer's key feature for ω_s = C_s, divided
        by its sum over features (kexue.fm/archives/9862).
        """
        with torch.autocast(keys.device.type, enabled=False):
            codes = self.all_codes().detach()
            logits = torch.einsum("btgd,gsd->btgs", keys.to(codes.dtype), codes) - codes.square().sum(-1) / 2
            soft = (logits / (temperature * keys.shape[-1])).softmax(-1)
            hard = torch.zeros_like(soft).scatter_(-1, logits.argmax(-1, keepdim=True), 1.0)
            return hard + (soft - soft.detach())

    def _losses(self, keys: Tensor, chosen: Tensor) -> dict[str, Tensor]:
        if self.estimator == "diveq":
            return {}
        losses = {"commitment_loss": self.commitment_weight * (keys - chosen.detach()).square().mean()}
        if self.estimator != "ema":
            losses["codebook_loss"] = (keys.detach() - chosen).square().mean()
        return losses

    @torch.no_grad()
    def _metrics(self, keys: Tensor, chosen: Tensor, code_ids: Tensor) -> dict[str, Tensor]:
        """Return usage and perplexity of the codes, the relative error and, in training, the sums for an update."""
        counts = torch.zeros_like(self.counts)
        by_head = code_ids.flatten(0, 1).T
        counts.scatter_add_(1, by_head, torch.ones_like(by_head, dtype=counts.dtype))
        shares = counts / counts.sum(-1, keepdim=True)
        metrics = {
            "codebook_usage": (counts > 0).float().mean(),
            "codebook_perplexity": torch.special.entr(shares).sum(-1).exp().mean(),
            "quantization_error": (keys - chosen).square().sum() / keys.square().sum().clamp_min(1e-30),
        }
        if self.training:
            metrics["stat/code_counts"] = counts
            if self.estimator == "ema":
                index = by_head[..., None].expand(-1, -1, keys.shape[-1])
                flat = keys.flatten(0, 1).transpose(0, 1).to(self.base.dtype)
                metrics["stat/key_sums"] = torch.zeros_like(self.base).scatter_add_(1, index, flat)
        return metrics

    @torch.no_grad()
    def after_optimizer_step(self, statistics: dict[str, Tensor]) -> None:
        """Average counts and keys, move EMA codes, and mark dead codes, given sums over the whole update."""
        if "code_counts" not in statistics:
            return
        self.counts.lerp_(statistics["code_counts"].to(self.counts), 1 - self.ema_decay)
        if self.estimator == "ema":
            key_sums = self.get_buffer("key_sums")
            key_sums.lerp_(statistics["key_sums"].to(key_sums), 1 - self.ema_decay)
            means = key_sums / self.counts.clamp_min(1e-20)[..., None]
            self.base.copy_(torch.where(self.counts[..., None] > 1e-20, means, self.base))
        self.steps += 1
        self.num_steps += 1
        if self.revive_every is not None and self.num_steps % self.revive_every == 0:
            self.pending |= self.counts < DEAD_SHARE * self.counts.mean(-1, keepdim=True)
            self.may_be_pending = bool(self.pending.any())

    @torch.no_grad()
    def place_pending(self, keys: Float[Tensor, "batch time kv_heads head_dim"]) -> None:
        """Move pending codes to random keys of this batch, on every rank to those of rank 0."""
        self.may_be_pending = False
        codes = draw_keys(
            keys.flatten(0, 1).to(self.base.dtype), self.codebook_size, seed=self.seed + 1_000_003 * self.num_steps
        )
        if dist.is_available() and dist.is_initialized():
            dist.broadcast(codes, 0)
        self._put(codes, self.pending)
        mean = self.counts.mean(-1, keepdim=True)
        self.counts.copy_(torch.where(self.pending, mean, self.counts))
        if self.estimator == "ema":
            key_sums = self.get_buffer("key_sums")
            key_sums.copy_(torch.where(self.pending[..., None], mean[..., None] * codes, key_sums))
        self.pending.zero_()

    def _put(self, codes: Float[Tensor, "kv_heads codes head_dim"], where: Bool[Tensor, "kv_heads codes"]) -> None:
        """Change the buffers so that `all_codes` returns these codes where `where` is true."""
        if self.codes is not None:
            codes = codes - self.codes
        elif self.mixing is not None:
            mixing_base = self.get_buffer("mixing_base")
            from_identity = torch.eye(codes.shape[-1], device=codes.device) - self.mixing
            mixing_base.copy_(torch.where(where.all(), from_identity, mixing_base))
            codes = torch.linalg.solve(mixing_base + self.mixing, codes, left=False)
        self.base.copy_(torch.where(where[..., None], codes, self.base))
