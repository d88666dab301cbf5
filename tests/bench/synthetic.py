"""Synthetic events of a planted low-rank model, written once as Parquet."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

RANK = 10
_CHUNK = 1_000_000


def write_events(folder: Path, n_events: int, n_users: int, n_inputs: int, seed: int = 0) -> Path:
    """Parquet files of event_id, user_id, input_id (text), user, input (numbers) and label; users uniform, inputs Zipf."""
    target = folder / f"events-{n_events}-{n_users}-{n_inputs}"
    target.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(seed)
    p, q = (random.normal(size=(n, RANK)) / RANK**0.5 for n in (n_users, n_inputs))
    b_user, b_input = random.normal(scale=0.4, size=n_users), random.normal(scale=0.5, size=n_inputs)
    popularity = 1 / (np.arange(n_inputs) + 20.0)
    popularity /= popularity.sum()
    for part, first in enumerate(range(0, n_events, _CHUNK)):
        n = min(_CHUNK, n_events - first)
        user = random.integers(n_users, size=n)
        item = random.choice(n_inputs, size=n, p=popularity)
        label = (
            3.5
            + b_user[user]
            + b_input[item]
            + np.einsum("nk,nk->n", p[user], q[item])
            + random.normal(scale=0.8, size=n)
        )
        rows = pa.table(
            {
                "event_id": pa.array(np.arange(first, first + n)).cast(pa.string()),
                "user_id": pa.array(user).cast(pa.string()),
                "input_id": pa.array(item).cast(pa.string()),
                "user": pa.array(user.astype(np.int32)),
                "input": pa.array(item.astype(np.int32)),
                "label": label,
                "weight": np.ones(n),
            }
        )
        pq.write_table(rows, target / f"part-{part:03}.parquet")
    return target
