"""What an anchor holds is counted from the objects themselves."""

from __future__ import annotations

import copy
from functools import partial

import numpy as np
import torch
from torch import nn

from agentgym_trainer.lab.memory import extra_bytes, model_bytes


class Holder:
    def __init__(self, *things: object) -> None:
        self.things = things


def model() -> nn.Module:
    return nn.Linear(100, 10)  # 1010 parameters of four bytes


def test_the_trained_model_and_its_gradients_are_not_extra() -> None:
    trained = model()
    trained(torch.ones(1, 100)).sum().backward()
    assert model_bytes(trained) == 4040
    assert extra_bytes(Holder(trained, trained.weight, [trained.weight.grad], trained.weight[3:]), trained) == 0


def test_copies_count_once_however_they_are_held() -> None:
    trained = model()
    kept = copy.deepcopy(trained)
    assert extra_bytes(Holder(kept, {"again": kept.weight}, kept.weight.T), trained) == 4040
    assert extra_bytes(Holder(lambda: kept), trained) == 4040
    assert extra_bytes(Holder(partial(print, kept)), trained) == 4040


def test_arrays_count_by_what_they_hold() -> None:
    array = np.zeros(256, np.float32)
    assert extra_bytes(Holder(array, array[:4]), model()) == 1024
