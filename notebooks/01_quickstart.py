# Databricks notebook source
# MAGIC %md
# MAGIC # From a CSV to recommendations
# MAGIC MovieLens-100K as three CSV files, the way your own data may come: ratings, movies, people.

# COMMAND ----------

import shutil

import pandas as pd

from mtl import notebook
from mtl.datasets import fetch_movielens, movielens

here = notebook.folder("quickstart")
shutil.rmtree(here / "tables", ignore_errors=True)
data = movielens(fetch_movielens(notebook.folder("cache")), split=1)
for name in ("train", "stream", "test", "inputs", "users"):
    frame = getattr(data, name).to_pandas()
    if name == "inputs":
        frame["genres"] = frame["genres"].str.join("|")
    frame.rename(columns={"user_id": "person", "input_id": "movie", "label": "stars"}).to_csv(
        here / f"{name}.csv", index=False
    )
print((here / "train.csv").read_text()[:120])

# COMMAND ----------

# MAGIC %md
# MAGIC **Ingest.** Columns are renamed, rows checked; what cannot be read goes to `quarantine` with its reason. The same file
# MAGIC twice adds nothing.

# COMMAND ----------

from mtl.ingest import ingest_files
from mtl.tables import Tables

settings = notebook.settings(here / "tables", 'ingest.list_columns=["genres"]', "ingest.list_separator=|")
tables = Tables(notebook.session(settings, "quickstart"), settings.tables.root)
names = {"user_id": "person", "input_id": "movie", "label": "stars"}
report, _ = ingest_files(
    tables, settings, *(str(here / f"{name}.csv") for name in ("train", "inputs", "users")), columns=names
)
print(report)

# COMMAND ----------

# MAGIC %md
# MAGIC **Train.** Nothing to tune: priors and the number of passes are learnt, and what the data cannot tell apart is shrunk.

# COMMAND ----------

from mtl.retrain import retrain

trained = retrain(tables, settings)
print({name: trained[name] for name in ("model_version", "status", "k", "iterations", "seconds")})

# COMMAND ----------

# MAGIC %md
# MAGIC **Score** ratings that training never saw.

# COMMAND ----------

from mtl.evaluate import evaluate

errors = evaluate(tables, settings, str(here / "test.csv"), columns=names)
print({name: errors[name] for name in ("rmse", "mae", "coverage90", "n")})

# COMMAND ----------

# MAGIC %md
# MAGIC **Recommend** to one person what they have not rated, with how sure we are.

# COMMAND ----------

from pyspark.sql import functions as F

from mtl.models import load_model
from mtl.schema import INPUT_ID, USER_ID
from mtl.score import PREDICTION, STD, score

person = data.train.to_pandas()[USER_ID].mode()[0]
seen = set(data.train.to_pandas().query(f"{USER_ID} == @person")[INPUT_ID])
movies = data.inputs.to_pandas()
pairs = movies.loc[~movies[INPUT_ID].isin(seen), [INPUT_ID]].assign(**{USER_ID: person})
scored = score(tables, load_model(tables), tables.spark.createDataFrame(pairs)).orderBy(F.desc(PREDICTION)).limit(10)
advice = scored.toPandas().merge(movies[[INPUT_ID, "title"]], on=INPUT_ID)
print(advice.sort_values(PREDICTION, ascending=False)[["title", PREDICTION, STD]].to_string(index=False))
assert pd.Series(advice[INPUT_ID]).isin(seen).sum() == 0
