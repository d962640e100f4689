"""Lightning's strategy for training on several devices with DeepSpeed's ZeRO."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import lightning as L
import torch
from lightning.pytorch.strategies import DeepSpeedStrategy
from torch import Tensor

from llm.contracts import ParameterBorrower, ShardedOptimizer
from llm.distributed.lightning_private import is_last_micro_batch
from llm.distributed.zero.engine_settings import (
    check_trainable,
    engine_config,
    precision_config,
    require_deepspeed,
)
from llm.distributed.zero.layouts import read_layouts
from llm.distributed.zero.sharded_gradients import ShardedGradients
from llm.distributed.zero.state import (
    gather_optimizer_state,
    gather_whole,
    optimizer_state_dict,
    scatter_optimizer_state,
    scatter_whole,
    state_by_name,
)
from llm.distributed.zero.weights import refresh_parts
from llm.optim.gradients import WholeGradients
from llm.optim.receipt import unwrap
from llm.optim.shard import ShardLayout, check_coverage


class ZeroStrategy(DeepSpeedStrategy):
    """A strategy that runs DeepSpeed's ZeRO engine so that every optimizer trains as it does on one device.

    It differs from Lightning's own strategy in these points. The module measures and clips gradients once, after they
    were accumulated and averaged. The loss is divided by the accumulation once. Optimizers that need whole tensors
    receive the layouts of their flat shards. Checkpoints equal those of a single process. Mixed precision is torch's
    autocast over fp32 weights, as elsewhere; with `bf16-true`, weights are bf16 and the shards hold fp32 masters. On a
    CPU the same engine runs over gloo and compiles nothing.

    Args:
        stage: 0 shards nothing, 1 shards the optimizer's state, 2 also the gradients, 3 also the weights.
        offload_optimizer: whether the state and the fp32 masters are stored in the host's memory.
        offload_parameters: whether the weights of stage 3 are stored there too.
        bucket_elements: elements that are reduced or gathered at a time.
        persistence_threshold: number of elements below which stage 3 stores a parameter whole on every rank.
        timeout_seconds: seconds after which a rank stops waiting for another.

    Raises:
        ConfigError: DeepSpeed is not installed.

    Source: Rajbhandari et al., "ZeRO: Memory Optimizations Toward Training Trillion Parameter Models",
        arXiv:1910.02054, section 5.
    """

    def __init__(
        self,
        *,
        stage: int,
        offload_optimizer: bool,
        offload_parameters: bool,
        bucket_elements: int,
        persistence_threshold: int,
        timeout_seconds: float,
    ) -> None:
        require_deepspeed()
        config = engine_config(
            stage=stage,
            offload_optimizer=offload_optimizer,
            offload_parameters=offload_parameters,
            bucket_elements=bucket_elements,
            persistence_threshold=persistence_threshold,
        )
        super().__init__(config=config, timeout=timedelta(seconds=timeout_seconds))
        self.stage, self.layouts = stage, list[ShardLayout]()
        self._names: dict[int, str] = {}
        self._sharded_gradients: ShardedGradients | None = None

    @property
    def handles_gradient_accumulation(self) -> bool:
        """False: the trainer counts micro-batches, and `backward` marks the last one of an update."""
        return False

    @property
    def lightning_restore_optimizer(self) -> bool:
        """True: checkpoints are those of a single process."""
        return True

    def setup_environment(self) -> None:
        """Join the other ranks. A CPU uses gloo, for which nothing is compiled."""
        if self.accelerator is None or self.accelerator.get_parallel_devices(1)[0].type != "cpu":
            super().setup_environment()
            return
        import deepspeed.ops

        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # compiles for a minute; only inference uses it
        self.parallel_devices = [torch.device("cpu", i) for i in range(len(self.parallel_devices or []))]
        super(DeepSpeedStrategy, self).setup_environment()

    def setup(self, trainer: L.Trainer) -> None:
        """Wrap the module in the engine. Weights stay fp32 until the engine casts those that it keeps in bf16."""
        self._init_config_if_needed()
        assert self.accelerator is not None
        self.accelerator.setup(trainer)
        self.setup_optimizers(trainer)
        self.setup_precision_plugin()
        assert self.model is not None
        self._initialize_deepspeed_train(self.model)
        self.barrier()

    def _format_config(self) -> None:
        self._format_batch_size_and_grad_accum_config()
        assert isinstance(self.config, dict)
        self.config |= precision_config(str(self.precision_plugin.precision))

    def _setup_model_and_optimizer(self, model: Any, optimizer: Any, lr_scheduler: Any = None) -> tuple[Any, Any]:
        """Let DeepSpeed wrap both, then read the layouts of its shards and check that they cover every parameter."""
        groups, shapes = unwrap(optimizer).param_groups, {}
        for group in groups:
            group["shapes"] = [tuple(parameter.shape) for parameter in group["params"]]
            shapes |= dict(zip(group["names"], group["shapes"], strict=True))
            self._names |= {id(p): name for p, name in zip(group["params"], group["names"], strict=True)}
        check_trainable(model, self._names, stage=self.stage)
        import deepspeed.runtime.torch_autocast as engine_autocast

        engine_autocast.TORCH_AUTOCAST_INITIALIZED = False  # an earlier run of this process may have set it
        engine, wrapped = super()._setup_model_and_optimizer(model, optimizer, lr_scheduler)
        if self.stage == 3:
            self._lend_parameters(model)
        if self.stage:
            self.layouts = read_layouts(wrapped, self._names)
            check_coverage(shapes, self.layouts)
            if isinstance(optimizer, ShardedOptimizer):
                optimizer.attach_layouts(self.layouts)
            self._sharded_gradients = ShardedGradients(wrapped, self.layouts)
        return engine, wrapped

    @staticmethod
    def _lend_parameters(model: Any) -> None:
        """Register parameters with stage 3 for the modules that name them in `borrowed_parameters`."""
        import deepspeed

        for module in model.modules():
            for path in _borrowed_parameters(module):
                owner, _, leaf = path.rpartition(".")
                parameter = getattr(module.get_submodule(owner), leaf)
                if parameter is not None:
                    deepspeed.zero.register_external_parameter(module, parameter)

    def gradients(self) -> ShardedGradients | WholeGradients:
        """Return the gradients between the backward pass and the update."""
        if self._sharded_gradients is not None:
            return self._sharded_gradients
        assert self.lightning_module is not None
        return WholeGradients(self.lightning_module.parameters())

    @contextmanager
    def block_backward_sync(self) -> Iterator[None]:
        """Do nothing: the engine synchronizes gradients only at the last micro-batch, as `backward` sets."""
        yield

    @property
    def forwards_together(self) -> bool:
        """Whether a forward pass needs all ranks, because each rank has a part of every weight."""
        return self.stage == 3

    def squared_gradients(self, parameters: list[Any]) -> Tensor:
        """Return |G|² of some parameters over the whole update, before it is clipped."""
        if self._sharded_gradients is None:
            return torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None]).float().square()
        return self._sharded_gradients.squares_of({self._names[id(parameter)] for parameter in parameters})

    def backward(self, closure_loss: Tensor, optimizer: Any, *args: Any, **kwargs: Any) -> None:
        """Run the backward pass. The trainer has divided the loss by the accumulation, so the engine must not."""
        assert self.lightning_module is not None
        is_last = is_last_micro_batch(self.lightning_module.trainer)
        self.deepspeed_engine.set_gradient_accumulation_boundary(is_last)
        super().backward(closure_loss, optimizer, *args, scale_wrt_gas=False, **kwargs)

    def optimizer_step(self, optimizer: Any, closure: Callable[[], Any], model: Any = None, **kwargs: Any) -> Any:
        """Run the micro-batch, clip, and let the engine update."""
        result = super().optimizer_step(optimizer, closure, model, **kwargs)
        if self._sharded_gradients is not None:
            self._sharded_gradients.after_step()
        return result

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Return whole weights and buffers in fp32 on the first rank, and an empty result on others."""
        assert self.lightning_module is not None
        whole: dict[str, Tensor] = {}
        for layout in self.layouts:
            whole |= gather_whole(layout.flat, layout)
        if not self.is_global_zero:
            return {}
        state: dict[str, Any] = self.lightning_module.state_dict(keep_vars=True)
        named: dict[str, Any] = {name: whole.get(self._names.get(id(held), ""), held) for name, held in state.items()}
        return {name: held.detach() for name, held in named.items()}

    def optimizer_state(self, optimizer: Any) -> dict[str, Any]:
        """Return the state that a single process would save on the first rank, and an empty result on others."""
        inner = unwrap(optimizer)
        if not self.layouts:
            return inner.state_dict() if self.is_global_zero else {}
        state = gather_optimizer_state(inner, self.layouts)
        return optimizer_state_dict(inner.param_groups, state) if self.is_global_zero else {}

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        """Write the folder that a single process would write, from the first rank."""
        if self.is_global_zero:
            self.checkpoint_io.save_checkpoint(checkpoint, filepath, storage_options=storage_options)

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Read a checkpoint folder that any strategy wrote."""
        return self.checkpoint_io.load_checkpoint(checkpoint_path, weights_only=weights_only)

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Copy whole weights into the module and into the engine's shards."""
        assert self.lightning_module is not None
        module, state = self.lightning_module, checkpoint["state_dict"]
        if not self.layouts:
            module.load_state_dict(state, strict=strict)
            return
        held = module.state_dict(keep_vars=True)
        weights = {self._names[id(t)]: state[name] for name, t in held.items() if id(t) in self._names}
        for layout in self.layouts:
            scatter_whole(layout.flat, layout, weights.__getitem__)
        if self.stage == 3:
            state = {name: tensor for name, tensor in state.items() if id(held[name]) not in self._names}
            refresh_parts(self.optimizers[0])
        module.load_state_dict(state, strict=strict and self.stage < 3)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Copy the saved state into this rank's shards."""
        inner, saved = unwrap(self.optimizers[0]), checkpoint["optimizer_states"][0]
        if not self.layouts:
            inner.load_state_dict(saved)
            return
        scatter_optimizer_state(inner, self.layouts, state_by_name(saved, inner.param_groups))


def _borrowed_parameters(module: Any) -> Sequence[str]:
    return module.borrowed_parameters if isinstance(module, ParameterBorrower) else ()
