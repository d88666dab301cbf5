"""The notebooks run from top to bottom, as plain scripts."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from mtl.datasets import fetch_movielens
from mtl.errors import InputError

ROOT = Path(__file__).resolve().parents[2]
FAST = "model.k=2;train.iterations=2;spark.shuffle_partitions=2;spark.driver_memory=2g"


LONG = [pytest.param(name, marks=pytest.mark.long) for name in ("01_quickstart", "04_operating", "05_your_own_oracle")]


@pytest.mark.parametrize("name", ["02_how_it_works", *LONG])
def test_a_notebook_runs_headless(name: str, tmp_path: Path) -> None:
    if name == "01_quickstart":
        try:
            fetch_movielens(tmp_path / "cache")
        except InputError as error:
            pytest.skip(str(error))
    environment = {
        **os.environ,
        "MTL_NOTEBOOK_FOLDER": str(tmp_path),
        "MTL_NOTEBOOK_SETTINGS": FAST,
        "PYTHONPATH": str(ROOT),
    }
    file = ROOT / "notebooks" / f"{name}.py"
    assert file.read_text().startswith("# Databricks notebook source\n")
    done = subprocess.run([sys.executable, str(file)], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
