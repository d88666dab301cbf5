"""One holder at a time, named to whoever comes second, and no lock outlives its process."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from mtl.errors import StateError
from mtl.lock import exclusive

HOLD = (
    "import sys; from mtl.lock import exclusive\nwith exclusive(sys.argv[1], 'x'): print('held', flush=True); input()"
)


def test_a_second_process_is_refused_with_the_first_ones_id_until_it_dies(tmp_path: Path) -> None:
    path = str(tmp_path / "folder" / "it.lock")
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout.readline() == "held\n"
    with (
        pytest.raises(StateError, match=f"the ingest stream is run by process {holder.pid} on"),
        exclusive(path, "the ingest stream"),
    ):
        pass
    with (
        pytest.raises(StateError, match=r"/proc/none/it\.lock cannot be locked"),
        exclusive("/proc/none/it.lock", "it"),
    ):
        pass
    holder.kill()
    holder.wait()
    for _ in range(2):
        with exclusive(path, "the ingest stream"):
            pass
