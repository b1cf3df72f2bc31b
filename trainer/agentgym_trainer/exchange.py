"""How the ranks of one run share a batch. Law: only rank 0 talks to the service, and it has the batch before any
collective begins.

A rank that waits for rollouts inside a collective trips the collective's own timeout and takes the run down; here the
others wait on a key of a store, for as long as it takes, and can say what they wait for.
"""

from __future__ import annotations

import logging
import os
import pickle
from datetime import timedelta
from typing import TypeVar

import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from agentgym.errors import TrainingError

log = logging.getLogger(__name__)
_POLL = timedelta(seconds=30)
T = TypeVar("T")
_TCPStore = dist.TCPStore  # pyright: ignore[reportPrivateImportUsage]  (documented, but missing in __all__)


class BatchExchange:
    """Hands a value from rank 0 to every rank, one a step."""

    def __init__(self, accelerator: Accelerator) -> None:
        self.rank = accelerator.process_index
        self.num_ranks = accelerator.num_processes
        self._store: _TCPStore | None = None
        self._last_key: str | None = None
        if self.num_ranks == 1:
            return
        host = os.environ["MASTER_ADDR"]  # set by the launcher, like the process group's own address
        if self.rank == 0:
            self._store = _TCPStore(host, 0, is_master=True, wait_for_workers=False, timeout=_POLL)
        port = [self._store.port if self._store else 0]
        broadcast_object_list(port, from_process=0)
        if self._store is None:
            self._store = _TCPStore(host, port[0], is_master=False, timeout=_POLL)

    def share(self, key: str, value: T | None) -> T:
        """Rank 0 gives `value` under a key used once, the others None; all return it. Raises TrainingError if rank 0
        is gone."""
        if self._store is None or value is not None:
            assert value is not None
            if self._store is not None:
                # our own objects, between the ranks of one run; the stub says str, the store takes bytes
                self._store.set(key, pickle.dumps(value))  # pyright: ignore[reportArgumentType]
                self._forget()
                self._last_key = key
            return value
        waited = 0
        while True:
            try:
                self._store.wait([key], _POLL)
                return pickle.loads(self._store.get(key))
            except dist.DistStoreError:
                waited += int(_POLL.total_seconds())
                log.info("rank %d has waited %d s for rank 0 to share %s", self.rank, waited, key)
            except dist.DistNetworkError as error:
                raise TrainingError(f"rank 0 ended while rank {self.rank} waited for {key}: {error}") from error

    def _forget(self) -> None:
        """Everyone has read the key before: the collectives of its step lie in between."""
        if self._last_key is not None:
            assert self._store is not None
            self._store.delete_key(self._last_key)
