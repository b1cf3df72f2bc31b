"""Folders of owners that are killed: removed by the next one, and by nobody while the owner lives."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from agentgym.engine.owned_folder import OwnedFolder, remove_orphans
from agentgym.engine.vllm.adapters import AdapterShelf
from agentgym.engine.vllm.engine import VllmEngine
from agentgym.errors import EngineDiedError

OWNER = """
import asyncio, sys
from pathlib import Path
from agentgym.engine.vllm.adapters import AdapterShelf
from agentgym.engine.vllm.server import VllmServer, VllmServerOptions
from agentgym.engine.vllm.weights import PublishedTensors

async def main(python, near, adapter):
    server = await VllmServer.start(near, VllmServerOptions(python, 64))
    lies_at = AdapterShelf(near).put(1, PublishedTensors(adapter, {}, {}, "{}"))
    print(Path(server.socket).parent, lies_at.parent, flush=True)
    await asyncio.sleep(600)

asyncio.run(main(*map(Path, sys.argv[1:])))
"""


@contextmanager
def owner(near: Path) -> Iterator[tuple[subprocess.Popen[str], list[Path]]]:
    """A process with a server (that does nothing) and an adapter, and the folders of both."""
    python = near / "python"
    python.write_text("#!/bin/sh\nexec sleep 600\n")
    python.chmod(0o755)
    command = [sys.executable, "-c", OWNER, str(python), str(near), str(python)]
    env = os.environ | {"TMPDIR": str(near)}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=env)
    try:
        assert process.stdout is not None
        folders = [Path(folder) for folder in process.stdout.readline().split()]
        assert len(folders) == 2
        yield process, folders
    finally:
        process.kill()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()


def test_kill_9_of_an_owner_leaves_folders_that_the_next_start_removes(
    model_of, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(AdapterShelf.__init__, "__defaults__", (tmp_path,))

    async def start() -> None:
        with pytest.raises(EngineDiedError, match="no vLLM server answers"):
            await VllmEngine.connect(model_of("llama")[0], ["http://127.0.0.1:9"], max_context=64)

    with owner(tmp_path) as (_, living), owner(tmp_path) as (killed, left):
        asyncio.run(start())
        assert all(folder.is_dir() for folder in [*living, *left])
        os.kill(killed.pid, signal.SIGKILL)
        killed.wait()
        assert all(folder.is_dir() for folder in left)
        asyncio.run(start())
        assert not any(folder.exists() for folder in left)
        assert all(folder.is_dir() for folder in living)


def test_what_is_no_owned_folder_stays(tmp_path: Path) -> None:
    for name in ("a-without-a-lock", "a-file", "b-other"):
        (tmp_path / name).mkdir() if name != "a-file" else (tmp_path / name).write_text("")
    folder = OwnedFolder("a-", tmp_path)
    assert remove_orphans("a-", tmp_path) == []
    assert (folder.path.stat().st_mode & 0o777) == 0o700
    folder.remove()
    folder.remove()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a-file", "a-without-a-lock", "b-other"]
