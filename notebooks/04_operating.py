# Databricks notebook source
# MAGIC %md
# MAGIC # Operating it
# MAGIC A live version and its stream; a candidate that must prove itself on fresh events; rollback; what the tables guarantee.

# COMMAND ----------

import shutil

import numpy as np
import pandas as pd

from mtl import notebook, schema
from mtl.ingest import ingest_files
from mtl.retrain import retrain
from mtl.tables import Tables

here = notebook.folder("operating")
shutil.rmtree(here / "tables", ignore_errors=True)
settings = notebook.settings(
    here / "tables", "switch.policy=automatic", "switch.min_events=200", "switch.tolerance=0.05"
)
tables = Tables(notebook.session(settings, "operating"), settings.tables.root)

random = np.random.default_rng(0)
p, q = random.normal(size=(60, 2)), random.normal(size=(40, 2))


def arrive(n: int, name: str) -> None:
    """``n`` events come in as a file."""
    user, item = random.integers(60, size=n), random.integers(40, size=n)
    label = 3 + (p[user] * q[item]).sum(1) + 0.3 * random.normal(size=n)
    frame = pd.DataFrame({"user_id": user.astype(str), "input_id": item.astype(str), "label": label})
    frame.to_parquet(here / f"{name}.parquet")
    print(ingest_files(tables, settings, str(here / f"{name}.parquet"))[0])


arrive(1500, "history")
retrain(tables, settings)

# COMMAND ----------

# MAGIC %md
# MAGIC **The stream** adds new events to their users, each exactly once (`jobs/update.py`; without `--available-now` it runs on).

# COMMAND ----------

from mtl.update import update

arrive(300, "monday")
print(update(tables, settings))

# COMMAND ----------

# MAGIC %md
# MAGIC **A candidate.** Both versions predict Tuesday's events before they learn from them; the candidate goes live if it is no
# MAGIC worse by more than the tolerance.

# COMMAND ----------

retrain(tables, settings)
arrive(300, "tuesday")
result = update(tables, settings)
print({name: result[name] for name in ("model_version", "compared", "promoted")})

# COMMAND ----------

# MAGIC %md
# MAGIC **Back again**, in one commit, and what the tables promise, checked against answers of their own.

# COMMAND ----------

from mtl import models
from mtl.audit import audit

if result["promoted"]:
    print(models.rollback(tables))
update(tables, settings)
checks = audit(tables, settings)
print({name: check["holds"] for name, check in checks["checks"].items()})
assert not checks["failed"]

# COMMAND ----------

# MAGIC %md
# MAGIC **A lost checkpoint** is refused, for its events would count twice; `--recover` goes on from the ledger.

# COMMAND ----------

from mtl.errors import ReplayError

live = models.live_version(tables)
shutil.rmtree(here / "tables" / "_checkpoints" / f"update-v{live}")
arrive(100, "wednesday")
try:
    update(tables, settings)
except ReplayError as error:
    print(f"refused: {error}")
print(update(tables, settings, from_ledger=True)["applied"], "events applied after the recovery")
assert not audit(tables, settings)["failed"]

# COMMAND ----------

# MAGIC %md
# MAGIC **Status**: the page that `jobs/status.py --html FILE` writes, and the table behind it.

# COMMAND ----------

from mtl.page import page
from mtl.status import batches, status

(here / "status.html").write_text(page(status(tables), batches(tables)), encoding="utf-8")
print(f"page: {here / 'status.html'}")
columns = [schema.MODEL_VERSION, schema.BATCH_ID, schema.N_EVENTS, schema.VALIDATED, schema.LOSS]
print(batches(tables)[columns].to_string(index=False))
