"""A failure in one line."""

from __future__ import annotations

from mtl.command import _reason


def test_an_error_of_ours_in_a_python_worker_is_the_reason_however_long_sparks_account_of_it_is() -> None:
    trace = "\n".join(
        ["PythonException", *["  frame"] * 1000, "mtl.errors.InputError: an event of user u has no event_time", ""]
    )
    assert _reason(RuntimeError(trace)) == "an event of user u has no event_time"


def test_any_other_error_is_told_by_its_type_and_its_first_words() -> None:
    assert _reason(ValueError("x" * 1000)) == "ValueError: " + "x" * 600
