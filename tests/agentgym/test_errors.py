from __future__ import annotations

import builtins

import pytest

from agentgym import errors
from agentgym.errors import AgentGymError, InputError, UnknownNameError

ALL = [cls for cls in vars(errors).values() if isinstance(cls, type) and issubclass(cls, AgentGymError)]


@pytest.mark.parametrize("cls", ALL, ids=lambda cls: cls.__name__)
def test_an_error_prints_its_message_and_nothing_else(cls: type[AgentGymError]) -> None:
    assert str(cls("x must be >= 1, got 0")) == "x must be >= 1, got 0"
    assert str(cls()) == cls.__name__


@pytest.mark.parametrize("cls", [cls for cls in ALL if cls is not AgentGymError], ids=lambda cls: cls.__name__)
def test_an_error_is_also_the_standard_one_it_replaces(cls: type[AgentGymError]) -> None:
    standard = [base for base in cls.__mro__ if base.__module__ == builtins.__name__]
    assert standard[0] not in (Exception, BaseException, object)


@pytest.mark.parametrize("cls", ALL, ids=lambda cls: cls.__name__)
def test_the_exit_code_says_whose_turn_it_is(cls: type[AgentGymError]) -> None:
    assert cls.exit_code == (2 if issubclass(cls, InputError) else 1)


def test_an_unknown_name_names_the_nearest_and_all() -> None:
    error = UnknownNameError.of("environment", "mase", ["maze", "guess_number"])
    assert str(error) == "unknown environment 'mase'; did you mean 'maze'? (known: guess_number, maze)"


def test_an_unknown_name_without_a_near_one_names_all() -> None:
    assert str(UnknownNameError.of("anchor", "zzz", ["ewma"])) == "unknown anchor 'zzz' (known: ewma)"
    assert str(UnknownNameError.of("anchor", "zzz", [])) == "unknown anchor 'zzz' (known: none)"
