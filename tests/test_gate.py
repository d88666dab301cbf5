"""The gate that batches pass: one at a time, and none once it is closed."""

from __future__ import annotations

import threading

import pytest

from mtl.gate import ClosedError, Gate


def test_closing_waits_for_the_batch_in_hand_and_refuses_the_next() -> None:
    gate, said = Gate(), list[str]()

    def close() -> None:
        gate.close()
        said.append("closed")

    closing = threading.Thread(target=close)
    with gate:
        closing.start()
        closing.join(0.2)
        said.append("done")
    closing.join(10)
    assert said == ["done", "closed"]
    for _ in range(2):
        with pytest.raises(ClosedError, match="for the next run"), gate:
            said.append("too late")
    assert said == ["done", "closed"]
    gate.close()


def test_a_batch_that_fails_leaves_it_open() -> None:
    gate = Gate()
    with pytest.raises(RuntimeError, match="failed"), gate:
        raise RuntimeError("failed")
    with gate:
        pass
