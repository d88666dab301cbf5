"""How far inputs have moved, by hand."""

from __future__ import annotations

import numpy as np
import pytest

from mtl.drift import Seen
from mtl.progress import Progress


def test_a_shift_is_in_standard_deviations_of_what_training_saw() -> None:
    # Of the second function: 0, 0, 0, 2.
    seen = Seen.of_sums(4.0, np.array([4.0, 2.0]), np.array([4.0, 4.0]))
    np.testing.assert_allclose(seen.std, [0, 0.75**0.5])
    moved = Progress.nothing(2)
    moved.n[0], moved.phi[:] = 4, [4.0, 8.0]
    assert seen.distance(moved) == pytest.approx((2.0 - 0.5) / 0.75**0.5)
    assert seen.distance(Progress.nothing(2)) == 0.0
