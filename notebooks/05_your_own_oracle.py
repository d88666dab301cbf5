# Databricks notebook source
# MAGIC %md
# MAGIC # Your own oracle
# MAGIC A basis function is fitted by anything with `fit(X, y, sample_weight)` and `predict(X)`. It sees one row an input, never
# MAGIC an event, a user or k.

# COMMAND ----------

import shutil
import sys

import numpy as np
import pandas as pd

from mtl import notebook
from mtl.ingest import ingest_files
from mtl.retrain import retrain
from mtl.tables import Tables

here = notebook.folder("own_oracle")
shutil.rmtree(here / "tables", ignore_errors=True)
(here / "nearest.py").write_text(
    '''
import numpy as np


class Nearest:
    """The weighted mean of the ten nearest inputs."""

    def fit(self, X, y, sample_weight):
        self.X, self.y, self.weight = X, y, sample_weight
        return self

    def predict(self, X):
        nearest = np.argsort(((X[:, None] - self.X[None]) ** 2).sum(2), axis=1)[:, :10]
        weight = self.weight[nearest] + 1e-12
        return (weight * self.y[nearest]).sum(1) / weight.sum(1)
'''
)
sys.path.insert(0, str(here))

# COMMAND ----------

# MAGIC %md
# MAGIC Songs with a tempo, a mood and a title; what people like depends on all three, and not linearly.

# COMMAND ----------

random = np.random.default_rng(0)
n, mood = 150, np.array(["calm", "wild", "sad"])
songs = pd.DataFrame({"input_id": [f"s{i}" for i in range(n)], "tempo": random.uniform(60, 180, n)})
songs["mood"] = mood[random.integers(3, size=n)]
words = np.array(["river", "stone", "winter", "garden", "silver", "harbour", "letter", "window", "mountain", "lantern"])
songs["title"] = [" ".join(random.permutation(words)[:3]) + " at night" * (i % 2) for i in range(n)]
shape = np.column_stack([np.sin(songs["tempo"] / 15), (songs["mood"] == "wild") * 1.0, np.arange(n) % 2])
taste = random.normal(size=(80, 3))
user, song = random.integers(80, size=4000), random.integers(n, size=4000)
label = (taste[user] * shape[song]).sum(1) + 0.3 * random.normal(size=4000)
events = pd.DataFrame(
    {"user_id": [f"u{u}" for u in user], "input_id": songs["input_id"][song].to_numpy(), "label": label}
)
known = song < 110  # the other songs are new: only their attributes say anything
events[known].to_parquet(here / "known.parquet")
events[~known].to_parquet(here / "new.parquet")
songs.to_parquet(here / "songs.parquet")

# COMMAND ----------

from mtl.evaluate import evaluate

spark = notebook.session(notebook.settings("unused"), "own oracle")
spark.addArtifacts(str(here / "nearest.py"), pyfile=True)  # tasks evaluate it, too
oracles = {
    "linear": [],
    "trees": [
        "oracle.kind=sklearn",
        "oracle.factory=sklearn.ensemble:RandomForestRegressor",
        "oracle.params={n_estimators=50}",
    ],
    "our own": ["oracle.kind=sklearn", "oracle.factory=nearest:Nearest"],
}
errors = {}
for name, assignments in oracles.items():
    settings = notebook.settings(here / "tables" / name.replace(" ", "_"), "model.k=3", *assignments)
    tables = Tables(spark, settings.tables.root)
    ingest_files(tables, settings, str(here / "known.parquet"), str(here / "songs.parquet"))
    trained = retrain(tables, settings)
    errors[name] = evaluate(tables, settings, str(here / "new.parquet"))["rmse"]
    print(f"{name}: {trained['iterations']} passes, {trained['damped_iterations']} damped")

# COMMAND ----------

# MAGIC %md
# MAGIC Error on songs that nobody had heard, by oracle. The title is text, which all three see as dimensions made of its
# MAGIC character trigrams.

# COMMAND ----------

from mtl.figures import plot_errors

picture = here / "oracles.png"
plot_errors(picture, errors, ["our own"], "liking")
notebook.show(picture)
print(errors)
