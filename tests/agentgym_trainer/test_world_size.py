"""Law G for ranks: two processes give the gradient of one, through the real launcher and the real learner."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

WORKER = Path(__file__).with_name("gradient_worker.py")


def run_worker(out: Path, anchor: str, micro_batch_tokens: int, num_processes: int) -> dict[str, torch.Tensor]:
    command = [sys.executable, str(WORKER), str(out), anchor, str(micro_batch_tokens)]
    if num_processes > 1:
        launch = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", str(num_processes)]
        rest = [
            "--num_machines",
            "1",
            "--mixed_precision",
            "no",
            "--dynamo_backend",
            "no",
            "--num_cpu_threads_per_process",
            "1",
        ]
        command = [*launch, *rest, "--main_process_port", "0", *command[1:]]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    return torch.load(out)


@pytest.mark.parametrize("anchor", ["snapshot", "behavior"])
def test_two_processes_give_the_gradient_of_one(tmp_path, anchor):
    one = run_worker(tmp_path / "one.pt", anchor, 4096, 1)
    cut = run_worker(tmp_path / "cut.pt", anchor, 40, 1)
    two = run_worker(tmp_path / "two.pt", anchor, 60, 2)
    for name, gradient in one.items():
        torch.testing.assert_close(cut[name], gradient, rtol=1e-4, atol=2e-7, msg=lambda m, n=name: f"{n}: {m}")
        torch.testing.assert_close(two[name], gradient, rtol=1e-4, atol=2e-7, msg=lambda m, n=name: f"{n}: {m}")
    assert any(gradient.abs().max() > 1e-4 for gradient in one.values())
