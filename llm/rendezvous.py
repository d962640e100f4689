"""What ranks agree on before there is a process group: the run folder, which has the time in its name."""

import os
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from llm.launch import Launch

PATIENCE = timedelta(minutes=5)
KEY = "crucible/agreed"
_kept: list[Any] = []
"""The store lives as long as the process: the process group is made with the same address."""


def agree(text: str, launch: Launch) -> str:
    """Return the first rank's `text` on every rank."""
    if launch.world_size == 1:
        return text
    store = _store(launch)
    _kept.append(store)
    if launch.rank == 0:
        store.set(KEY, text)
    return store.get(KEY).decode()


def _store(launch: Launch) -> Any:
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
    store = rendezvous.TCPStore(address, port, None, serves, PATIENCE, wait_for_workers=False, multi_tenant=True)
    return rendezvous.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
