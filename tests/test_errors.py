import inspect

import pytest

from misstep import errors
from misstep.errors import InputError, MissingExtra, MisstepError, RunError

ALL = [kind for _, kind in inspect.getmembers(errors, inspect.isclass)]


@pytest.mark.parametrize("kind", ALL, ids=lambda kind: kind.__name__)
def test_each_error_is_drawn_in_the_tree_and_has_the_status_of_its_branch(
    kind: type[MisstepError],
) -> None:
    assert kind.__name__ in str(errors.__doc__)
    assert kind.exit_status == (2 if issubclass(kind, InputError) else 1)


def test_no_error_is_both_wrong_input_and_a_failed_run() -> None:
    branches = [kind for kind in ALL if kind is not MisstepError]
    assert all(issubclass(kind, InputError) != issubclass(kind, RunError) for kind in branches)


def test_a_missing_extra_names_the_command_that_installs_it() -> None:
    assert "pip install 'misstep[openvino]'" in str(MissingExtra("openvino_genai", "openvino"))
