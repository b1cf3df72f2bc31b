"""Adapters as vLLM loads them: a folder with PEFT's two files for each version, in shared memory. Law: a folder is
whole before anyone hears of it, stays while a request may need it, and does not outlive its owner for long.

A published adapter is one safetensors file with its configuration in the metadata (weight_file.py). Must never know a
server.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Collection
from pathlib import Path

from agentgym.engine.owned_folder import OWNER, OwnedFolder, remove_orphans
from agentgym.engine.vllm.weights import PublishedTensors
from agentgym.errors import EngineError

_MEMORY = Path("/dev/shm")
_PREFIX = "agentgym-adapters-"


class AdapterShelf:
    """Adapters by version. `near`: a folder to make the shelf in; None: this machine's memory."""

    def __init__(self, near: Path | None = None) -> None:
        self._near = near or (_MEMORY if os.access(_MEMORY, os.W_OK) else Path(tempfile.gettempdir()))
        self._root: OwnedFolder | None = None

    def remove_orphans(self) -> None:
        """Removes what owners left that were killed: memory that nobody else would give back."""
        remove_orphans(_PREFIX, self._near)

    def put(self, version: int, published: PublishedTensors) -> Path:
        """The folder of `published`, which is an adapter. Raises EngineError where there is no room."""
        assert published.adapter_config is not None, "an adapter"
        try:
            folder = self._folder() / f"{version:08d}-{_digest(published)}"
            if not folder.exists():
                partial = folder.with_suffix(".partial")
                shutil.rmtree(partial, ignore_errors=True)
                partial.mkdir()
                (partial / "adapter_config.json").write_text(published.adapter_config, encoding="utf-8")
                shutil.copyfile(published.path, partial / "adapter_model.safetensors")
                partial.rename(folder)
        except OSError as error:
            raise EngineError(f"adapter {version} cannot be laid out in {self._near}: {error}") from error
        return folder

    def keep(self, versions: Collection[int]) -> None:
        """Removes every other version."""
        if self._root is not None:
            for folder in self._root.path.iterdir():
                if folder.name != OWNER and int(folder.name.split("-")[0]) not in versions:
                    shutil.rmtree(folder, ignore_errors=True)

    def close(self) -> None:
        """Removes all; idempotent."""
        if self._root is not None:
            self._root.remove()
            self._root = None

    def _folder(self) -> Path:
        if self._root is None:
            self._root = OwnedFolder(_PREFIX, self._near)
        return self._root.path


def _digest(published: PublishedTensors) -> str:
    """Tells apart what was published under one number, where the first try failed."""
    told = f"{published.adapter_config} {sorted(published.checksums.items())}"
    return hashlib.blake2b(told.encode(), digest_size=8).hexdigest()
