"""Lets ranks agree on a value before the process group exists."""

import os
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from llm.distributed.launch import Launch

PATIENCE = timedelta(minutes=5)
KEY = "crucible/agreed"
_kept: list[Any] = []
"""The store is kept for the whole process, because the process group uses the same address later."""


def agree(text: str, launch: Launch, *, about: str = "run folder", patience: timedelta = PATIENCE) -> str:
    """Return the first rank's `text` on every rank.

    Args:
        text: the first rank's text; that of other ranks is ignored.
        launch: the launcher of this process.
        about: key of the agreement; each key is used once.
        patience: time after which a rank stops waiting for the first one.
    """
    if launch.world_size == 1:
        return text
    store = _store(launch, patience)
    _kept.append(store)
    if launch.rank == 0:
        store.set(f"{KEY}/{about}", text)
    return store.get(f"{KEY}/{about}").decode()


def smallest(number: int, launch: Launch, *, about: str) -> int:
    """Return the smallest number of all ranks on every rank; see `agree` for the arguments."""
    if launch.world_size == 1:
        return number
    store = _store(launch, PATIENCE)
    _kept.append(store)
    store.set(f"{KEY}/{about}/{launch.rank}", str(number))
    return min(int(store.get(f"{KEY}/{about}/{rank}")) for rank in range(launch.world_size))


def _store(launch: Launch, patience: timedelta) -> Any:
    """Open the key-value store of the address at which the ranks will meet."""
    if launch.name == "srun":
        from lightning.fabric.plugins.environments.slurm import SLURMEnvironment

        slurm = SLURMEnvironment()
        address, port = slurm.main_address, int(slurm.main_port)
    else:
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    served_by_agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    serves = launch.rank == 0 and not served_by_agent
    rendezvous: Any = dist  # its names are not in the type stubs' public list
    store = rendezvous.TCPStore(address, port, None, serves, patience, wait_for_workers=False, multi_tenant=True)
    return rendezvous.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
