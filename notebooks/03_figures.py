# Databricks notebook source
# MAGIC %md
# MAGIC # The paper's figures
# MAGIC `make figures` draws all of them into `figures/`; here are 1a and 1b on MovieLens-100K, with fewer repeats. What School
# MAGIC and the text figures need is told by `python tests/bench/figure1.py --help` and `figure2.py --help`.

# COMMAND ----------

import subprocess
import sys
from pathlib import Path

from mtl import notebook

here = notebook.folder("figures")
root = Path(notebook.parameter("checkout", "."))  # these are programs of the repository, not of the library
repeats = notebook.parameter("repeats", "2")
bench = root / "tests" / "bench"
options = ["--repeats", repeats, "--out", str(here), "--cache", str(notebook.folder("cache"))]
for figure in notebook.parameter("figures", "new-users pool").split():
    subprocess.run([sys.executable, str(bench / "figure1.py"), figure, *options], check=True)

# COMMAND ----------

for picture in sorted(here.glob("*.png")):
    notebook.show(picture)
