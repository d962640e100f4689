"""Empties parameters outside the calls for which ZeRO stage 3 gathers them."""

from collections import Counter

import torch

from llm.contracts import ParameterBorrower


class Parts:
    """Empties every parameter of a model except during the calls for which stage 3 would gather it."""

    def __init__(self, model):
        self.whole = {id(p): p.data for p in model.parameters()}
        self.readers = Counter()
        for module in model.modules():
            held = [*module.parameters(recurse=False)]
            if isinstance(module, ParameterBorrower):
                names = (path.rpartition(".") for path in module.borrowed_parameters)
                borrowed = (getattr(module.get_submodule(owner), leaf) for owner, _, leaf in names)
                held += [p for p in borrowed if p is not None]
            module.register_forward_pre_hook(lambda *_, held=held: self.gather(held))
            module.register_forward_hook(lambda *_, held=held: self.release(held))
        for parameter in model.parameters():
            parameter.data = torch.empty(0)

    def gather(self, held):
        for parameter in held:
            self.readers[id(parameter)] += 1
            parameter.data = self.whole[id(parameter)]

    def release(self, held):
        for parameter in held:
            self.readers[id(parameter)] -= 1
            if self.readers[id(parameter)] == 0:
                parameter.data = torch.empty(0)
