"""What a service configuration refuses, and how it says so."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from agentgym.config import parse_config
from agentgym.errors import ConfigError, InputError, UnavailableError
from agentgym.server.process import listen
from agentgym.server.settings import ServerSection, ServiceConfig


def config_of(**sections: Any) -> ServiceConfig:
    return parse_config(ServiceConfig, {"env": {"id": "maze"}, **sections})


def test_the_defaults_are_a_run() -> None:
    config = config_of()
    assert (config.rollout.group_size, config.rollout.max_staleness, config.server.host) == (8, 2, "127.0.0.1")
    assert config.max_context == config.rollout.max_episode_tokens
    assert config_of(engine={"max_context": 4096}).max_context == 4096
    assert config_of(engine={"vllm_kv_cache_gb": 1, "vllm_start_s": 600.0}).engine.kind == "torch"  # as it is stored


@pytest.mark.parametrize(
    ("sections", "says"),
    [
        ({"rollout": {"group_size": 1}}, "rollout.group_size: must be >= 2 for group advantages, got 1"),
        ({"rollout": {"in_flight": 0}}, "rollout.in_flight: must be >= 1, got 0"),
        ({"rollout": {"max_staleness": -1}}, "rollout.max_staleness: must be >= 0, got -1"),
        ({"rollout": {"temperature": 0.0}}, "rollout.temperature: must be finite and > 0, got 0.0"),
        ({"rollout": {"max_episode_s": float("inf")}}, "rollout.max_episode_s: must be finite"),
        ({"rollout": {"groupsize": 4}}, "unknown key 'rollout.groupsize'; did you mean 'rollout.group_size'"),
        ({"engine": {"max_context": 64}}, r"engine.max_context must be >= rollout.max_episode_tokens \(2048\), got 64"),
        ({"engine": {"kind": "torhc"}}, "engine.kind"),
        ({"engine": {"dtype": "float16"}}, "engine.dtype"),
        ({"engine": {"vllm_kv_cache_gb": 2}}, "only kind = 'vllm' has vllm_kv_cache_gb; set it, or leave that out"),
        ({"engine": {"vllm_start_s": 60, "replicas": 2}}, "only kind = 'vllm' has replicas, vllm_start_s"),
        (
            {"engine": {"kind": "vllm", "vllm_urls": ["http://a:1"], "vllm_kv_cache_gb": 2}},
            "only one that is started here has vllm_kv_cache_gb",
        ),
        (
            {"engine": {"kind": "vllm", "vllm_urls": ["http://a:1"], "vllm_devices": ["0"]}},
            "only one that is started here has vllm_devices",
        ),
        (
            {"engine": {"kind": "vllm", "vllm_urls": ["http://a:1"], "vllm_python": "python"}},
            "only one that is started here has vllm_python",
        ),
        (
            {"engine": {"kind": "vllm", "replicas": 2, "vllm_devices": ["0"]}},
            "vllm_devices must name the GPUs of 2 servers, got 1",
        ),
        ({"engine": {"weight_transfer": "nccl"}}, "only kind = 'vllm' has weight_transfer"),
        ({"engine": {"kind": "vllm", "weight_transfer": "rdma"}}, "engine.weight_transfer"),
        (
            {"engine": {"kind": "vllm", "sender_devices": ["0"]}},
            'sender_devices is of weight_transfer = "nccl" and "ipc"',
        ),
        (
            {"engine": {"kind": "vllm", "weight_transfer": "nccl", "vllm_devices": ["0"]}},
            r"needs sender_devices: for each server a GPU that no server uses, or one for all 1, got \[\]",
        ),
        (
            {"engine": {"kind": "vllm", "weight_transfer": "ipc", "replicas": 3, "sender_devices": ["0", "1"]}},
            "needs sender_devices: for each server a GPU of the server itself, or one for all 3",
        ),
        ({"server": {"port": 70000}}, "server.port: must be 0 to 65535, got 70000"),
        ({"server": {"max_requests": 0}}, "server.max_requests"),
        ({"server": {"max_body_s": 0.0}}, "server.max_body_s"),
        ({"server": {"drain_s": -1.0}}, "server.drain_s"),
        ({"server": {"log_format": "xml"}}, "server.log_format"),
        ({"server": {"host": "0.0.0.0"}}, "listening on 0.0.0.0 demands server.api_key_file"),
        ({"server": {"host": "my-machine"}}, "listening on my-machine demands server.api_key_file"),
        ({"sandbox": {"tier": "none"}}, "sandbox.tier"),
        ({"sandbox": {"warm": -1}}, "sandbox.warm: must be >= 0, got -1"),
        ({"sandbox": {"starters": 0}}, "sandbox.starters: must be >= 1, got 0"),
        ({"sandbox": {"docker_tls": "/keys"}}, "sandbox.docker_tls needs sandbox.docker_host"),
    ],
)
def test_what_cannot_run_is_refused_with_its_path(sections: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        config_of(**sections)


def test_which_gpus_send_weights() -> None:
    here = {"kind": "vllm", "replicas": 2, "vllm_devices": ["0", "1"]}
    assert config_of(engine={**here, "weight_transfer": "ipc"}).engine.senders_gpus() == ("0", "1")
    apart = {**here, "weight_transfer": "nccl", "sender_devices": ["2"]}
    assert config_of(engine=apart).engine.senders_gpus() == ("2",)
    elsewhere = {"kind": "vllm", "vllm_urls": ["http://a:1"], "vllm_python": "python", "weight_transfer": "nccl"}
    assert config_of(engine={**elsewhere, "sender_devices": ["0"]}).engine.senders_gpus() == ("0",)


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "localhost", "127.1.2.3"])
def test_loopback_needs_no_key(host: str) -> None:
    assert config_of(server={"host": host}).server.is_loopback


def test_elsewhere_with_a_key(tmp_path: Path) -> None:
    assert not config_of(server={"host": "0.0.0.0", "api_key_file": tmp_path / "key"}).server.is_loopback


def test_a_key_file_is_read_and_a_short_key_refused(tmp_path: Path) -> None:
    from agentgym.server.process import read_key

    key = tmp_path / "key"
    section = ServerSection(api_key_file=key)
    with pytest.raises(InputError, match="cannot be read"):
        read_key(section)
    key.write_text("short\n")
    with pytest.raises(InputError, match="at least 16 characters, got 5"):
        read_key(section)
    key.write_text("long-enough-to-be-a-key\n")
    assert read_key(section) == "long-enough-to-be-a-key"
    assert read_key(ServerSection()) is None


def test_a_taken_port_is_said() -> None:
    with listen(ServerSection()) as first:
        port = first.getsockname()[1]
        with pytest.raises(UnavailableError, match=f"cannot listen on 127.0.0.1:{port}"):
            listen(ServerSection(port=port))


def test_the_child_reads_back_what_the_parent_wrote(tmp_path: Path) -> None:
    from agentgym.server.__main__ import read_config

    config = config_of(env={"id": "maze", "kwargs": {"a": [1, None]}}, server={"api_key_file": tmp_path / "key"})
    file = tmp_path / "service.json"
    file.write_text(config.model_dump_json(indent=2))
    assert read_config(file) == config
    file.write_text("{")
    with pytest.raises(ConfigError, match="cannot read the configuration"):
        read_config(file)
