"""Law G for ranks: two processes give the gradient of one, through the real launcher and the real learner."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from gradient_worker import CASES

pytestmark = pytest.mark.timeout(900)  # three runs
WORKER = Path(__file__).with_name("gradient_worker.py")


def run_worker(out: Path, micro_batch_tokens: int, num_processes: int) -> dict[str, torch.Tensor]:
    worker = [str(WORKER), str(out), str(micro_batch_tokens)]
    # torchrun: `accelerate launch --cpu` starts one process, however many it is asked for
    several = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(num_processes))
    command = [sys.executable, *(several if num_processes > 1 else ()), *worker]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]
    found = torch.load(out)
    assert int(found.pop("num_ranks")) == num_processes
    return found


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, torch.Tensor]]:
    """Every case's gradients and figures: one process, one that cuts the step up, and two."""
    folder = tmp_path_factory.mktemp("gradients")
    layouts = {"one": (4096, 1), "cut": (40, 1), "two": (60, 2)}
    return {name: run_worker(folder / f"{name}.pt", *layout) for name, layout in layouts.items()}


@pytest.mark.parametrize("case", CASES)
def test_two_processes_give_the_gradient_of_one(found: dict[str, dict[str, torch.Tensor]], case: str) -> None:
    one = {name: value for name, value in found["one"].items() if name.startswith(f"{case}/")}
    for layout in ("cut", "two"):
        for name, value in one.items():
            torch.testing.assert_close(
                found[layout][name], value, rtol=1e-4, atol=2e-7, msg=lambda m, n=f"{layout} {name}": f"{n}: {m}"
            )
    assert any(value.abs().max() > 1e-4 for name, value in one.items() if "figures" not in name)


def test_the_cases_drop_some_tokens_and_not_all(found: dict[str, dict[str, torch.Tensor]]) -> None:
    for case in CASES:
        active, reference = found["one"][f"{case}/figures"][2:4].tolist()
        assert 0.05 < active < 1.0, case
        assert (reference > 1e-4) == (case == "snapshot")
