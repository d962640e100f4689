"""One rank of a test's session: trains the jobs of a JSON file one after the other, and records how each ended."""

import json
import os
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # as `pythonpath` does for the tests themselves

from llm.config.check import check
from llm.training.train import train


def clip_after_the_update():
    """A mutant: gradients go unclipped into the rule, and the update that comes out is scaled instead."""
    from llm.distributed.strategy import ZeroStrategy
    from llm.distributed.zero.sharded_gradients import ShardedGradients

    step = ZeroStrategy.optimizer_step
    ShardedGradients.clip = lambda self, limit, norm: setattr(self, "late", (limit / (norm + 1e-6)).clamp(max=1.0))

    def scaled(self, *arguments, **options):
        before = [layout.flat.detach().clone() for layout in self.layouts]
        result = step(self, *arguments, **options)
        with torch.no_grad():
            for layout, old in zip(self.layouts, before, strict=True):
                layout.flat.copy_(old + self.gradients().late * (layout.flat - old))
        return result

    ZeroStrategy.optimizer_step = scaled


def forget_layouts():
    """A mutant: the optimizer is not told what its shards hold."""
    from llm.optim.shard_steps import ShardSteps

    ShardSteps.attach_layouts = lambda self, layouts: None


def poison_second_rank():
    """The second rank's loss is not a number at update 4."""
    from llm.training.module import LanguageModule

    plain = LanguageModule.training_step

    def poisoned(self, batch, batch_idx):
        loss = plain(self, batch, batch_idx)
        return loss * float("nan") if self.global_step == 3 and self.trainer.global_rank == 1 else loss

    LanguageModule.training_step = poisoned


def poison_second_rank_until_it_went_back():
    """The second rank's loss is not a number at update 4, and after a return from there at update 6, each once."""
    from llm.training.module import LanguageModule

    plain = LanguageModule.training_step

    def poisoned(self, batch, batch_idx):
        loss, returns = plain(self, batch, batch_idx), len(self.trainer.datamodule.left_out)
        is_bad = (self.global_step, returns) in ((3, 0), (5, 1)) and self.trainer.global_rank == 1
        return loss * float("nan") if is_bad else loss

    LanguageModule.training_step = poisoned


def drift():
    """The second rank changes a weight of its own."""
    from llm.callbacks.rank_checksum import RankChecksum

    compare = RankChecksum._compare

    def drifting(self, trainer, pl_module):
        if trainer.global_rank == 1 and trainer.global_step:
            pl_module.model.final_norm.weight.data[0] += 1e-6
        compare(self, trainer, pl_module)

    RankChecksum._compare = drifting


def keep_spare_parameters():
    """Each block has a matrix and a gain that no pass uses."""
    from llm.model.block import Block

    build = Block.__init__

    def built(self, **settings):
        build(self, **settings)
        size = self.attention.q_proj.in_features
        self.spare = torch.nn.Sequential(torch.nn.Linear(size, size, bias=False), torch.nn.RMSNorm(size))

    Block.__init__ = built


MUTANTS = [
    keep_spare_parameters,
    clip_after_the_update,
    forget_layouts,
    poison_second_rank,
    poison_second_rank_until_it_went_back,
    drift,
]


def main(jobs_path):
    for job in json.loads(Path(jobs_path).read_text()):
        for mutant in MUTANTS:
            if mutant.__name__ == job.get("mutant"):
                mutant()
        folder = Path(job["folder"])
        folder.mkdir(parents=True, exist_ok=True)
        try:
            check(job["config"])
            train(job["config"], folder)
            answer = "finished"
        except Exception as error:
            if not job.get("may_fail"):
                raise
            answer = f"{type(error).__name__}: {error}"
        (folder / f"answer{os.environ['RANK']}").write_text(answer)


if __name__ == "__main__":
    main(sys.argv[1])
