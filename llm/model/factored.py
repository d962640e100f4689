"""Linear layers that are the product of two narrow ones."""

from collections.abc import Mapping

from jaxtyping import Float
from torch import Tensor, nn

from llm.errors import ConfigError, did_you_mean
from llm.ops.linear_layer import Linear, biased_linear


class FactoredLinear(nn.Module):
    """A linear layer of bounded rank: y = B (A x), with A of shape [rank, d_in] and B of shape [d_out, rank].

    Args:
        d_in: width of the input.
        d_out: width of the output.
        rank: width in between, in [1, min(d_in, d_out)].
        bias: whether a bias is added to the output.

    Source: Denil et al., "Predicting Parameters in Deep Learning", arXiv:1306.0543, section 2.
    """

    def __init__(self, *, d_in: int, d_out: int, rank: int, bias: bool = False) -> None:
        super().__init__()
        self.first = Linear(d_in, rank, bias=False)
        self.second = biased_linear(rank, d_out, bias=bias)

    @property
    def weight(self) -> Float[Tensor, "d_out d_in"]:
        """The whole matrix B A."""
        return self.second.weight @ self.first.weight

    def forward(self, input: Float[Tensor, "*shape d_in"]) -> Float[Tensor, "*shape d_out"]:
        """Project the last axis."""
        return self.second(self.first(input))


def factor_projections(model: nn.Module, low_rank: Mapping[str, int]) -> None:
    """Replace projections of a decoder by `FactoredLinear`, before their weights are drawn.

    Args:
        model: the decoder.
        low_rank: rank by the name of a projection, such as `q_proj`, which holds in every layer.

    Raises:
        ConfigError: no projection has the name, or the rank lies outside [1, min(d_in, d_out)].
    """
    linear = {
        name: module for name, module in model.named_modules() if type(module) is Linear and name.endswith("_proj")
    }
    for key, rank in low_rank.items():
        found = {name: module for name, module in linear.items() if name.rpartition(".")[2] == key}
        if not found:
            known = sorted({name.rpartition(".")[2] for name in linear})
            raise ConfigError(
                f"model.low_rank.{key}={rank}: the model has no such projection; use {', '.join(known)}"
                f"{did_you_mean(key, known)}"
            )
        for name, module in found.items():
            largest = min(module.in_features, module.out_features)
            if not 1 <= rank <= largest:
                raise ConfigError(f"model.low_rank.{key}={rank}: must lie in [1, {largest}], the rank of {name}")
            has_bias = module.bias is not None
            narrow = FactoredLinear(d_in=module.in_features, d_out=module.out_features, rank=rank, bias=has_bias)
            owner, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(owner), leaf, narrow)


def matrix_names(model: nn.Module) -> set[str]:
    """Return the last names of the linear projections of a decoder, such as `q_proj`."""
    ends = (name.rpartition(".")[2] for name, module in model.named_modules() if isinstance(module, nn.Linear))
    return {name for name in ends if name.endswith("_proj")}


def stacked_matrix(name: str, projection: nn.Module, heads: int) -> str:
    """Return the name of the matrix of a projection that stacks heads, along its input where `heads` is negative."""
    if not isinstance(projection, FactoredLinear):
        return f"{name}.weight"
    return f"{name}.first.weight" if heads < 0 else f"{name}.second.weight"


def matrix_size(projection: nn.Module) -> int:
    """Return the number of weights of a projection, whole or factored."""
    return sum(matrix.numel() for matrix in projection.parameters() if matrix.ndim == 2)
