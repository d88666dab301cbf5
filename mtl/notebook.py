"""What the notebooks need of where they run: parameters, a session, a place for pictures."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

from pyspark.sql import SparkSession

from mtl.config import Settings, load_settings
from mtl.session import open_session


def parameter(name: str, default: str) -> str:
    """A widget's value where there are widgets (Databricks), else the environment's MTL_NOTEBOOK_<NAME>, else the default."""
    try:
        import IPython

        widgets: Any = IPython.get_ipython().user_ns["dbutils"].widgets
    except (ImportError, AttributeError, KeyError):
        return os.environ.get(f"MTL_NOTEBOOK_{name.upper()}", default)
    widgets.text(name, default)
    return widgets.get(name)


def folder(name: str) -> Path:
    """A folder of the notebook's own, under the parameter ``folder``."""
    path = Path(parameter("folder", str(Path(tempfile.gettempdir()) / "oracle-mtl-notebooks"))) / name
    path.mkdir(parents=True, exist_ok=True)
    return path


def settings(tables: Path | str, *assignments: str) -> Settings:
    """Shipped defaults, the notebook's ``assignments`` and those of the parameter ``settings`` (separated by ;)."""
    more = [text for text in parameter("settings", "").split(";") if text]
    return load_settings([], [f"tables.root={tables}", *assignments, *more])


def session(chosen: Settings, name: str) -> SparkSession:
    return open_session(chosen.spark, name)


def show(path: Path) -> None:
    """A picture, below the cell where that can be, else its path."""
    try:
        from IPython.display import Image, display
    except ImportError:
        print(f"picture: {path}")
    else:
        display(Image(filename=str(path)))
