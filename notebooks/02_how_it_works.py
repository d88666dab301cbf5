# Databricks notebook source
# MAGIC %md
# MAGIC # How it works
# MAGIC The model of user *u* and input *x* is `h = o(x) + w_u · φ(x)`. All users share the features φ; each has a Gaussian
# MAGIC posterior over their own weights *w*. An event adds one packed row to the sums *A* and *b* behind that posterior, and
# MAGIC that is all an update is.

# COMMAND ----------

import numpy as np

from mtl import gaussian, notebook
from mtl.figures import Curve, plot_curves

here = notebook.folder("how_it_works")
random = np.random.default_rng(0)
d, noise = 3, 0.5
prior = gaussian.pack(np.eye(d)[None])[0]  # S⁻¹ of w ~ N(0, I)
truth = np.array([0.5, 1.2, -0.8])
phi = np.column_stack([np.ones(60), random.normal(size=(60, d - 1))])
labels = phi @ truth + noise**0.5 * random.normal(size=60)

# COMMAND ----------

# MAGIC %md
# MAGIC One user, event by event: `A += φφᵀ`, `b += yφ`, and the posterior is one Cholesky away.

# COMMAND ----------

A, b = np.zeros(gaussian.packed_length(d)), np.zeros(d)
means, deviations = [], []
for x, y in zip(phi, labels, strict=True):
    A += gaussian.outer(x[None])[0]
    b += y * x
    w = gaussian.posterior((A / noise + prior)[None], (b / noise)[None])
    means.append(w.mean[0])
    deviations.append(np.sqrt(np.diag(gaussian.unpack(w.covariance, d)[0])))

events = list(range(1, len(labels) + 1))
curves = {}
for i, weight in enumerate(truth):
    mean, std = np.array(means)[:, i], np.array(deviations)[:, i]
    low, high = mean - 1.64 * std, mean + 1.64 * std
    curves[f"w_{i}, truly {weight}"] = Curve(events, mean.tolist(), low.tolist(), high.tolist())
picture = here / "posterior.png"
plot_curves(picture, curves, "One user's weights, event by event", "events", "weight, with its 90% interval")
notebook.show(picture)

# COMMAND ----------

# MAGIC %md
# MAGIC Sums do not care for order: the last posterior is the ridge regression over all events at once, to rounding.

# COMMAND ----------

at_once = np.linalg.solve(phi.T @ phi / noise + np.eye(d), phi.T @ labels / noise)
difference = float(np.abs(means[-1] - at_once).max())
print(f"largest difference from one regression over all events: {difference:.1e}")
assert difference < 1e-10

# COMMAND ----------

# MAGIC %md
# MAGIC **Features.** Given the users, all events of an input collapse into `A_x = Σ E[wwᵀ]` and `b_x = Σ y E[w]`, and basis
# MAGIC function *i* is one weighted regression, a row an input. Any regressor fits it: see `05_your_own_oracle`. Because the
# MAGIC users' covariances stay in the weights, more basis functions do not overfit; below, the objective of a training on
# MAGIC random data never rises.

# COMMAND ----------

from itertools import pairwise

import pandas as pd

from mtl import schema
from mtl.figures import plot_objective
from mtl.fitting import train

settings = notebook.settings("unused", "model.k=2", "train.max_iterations=15")
spark = notebook.session(settings, "how it works")
user, item = random.integers(80, size=2500), random.integers(50, size=2500)
p, q = random.normal(size=(80, 2)), random.normal(size=(50, 2))
rows = pd.DataFrame(
    {
        schema.USER_ID: user.astype(str),
        schema.INPUT_ID: item.astype(str),
        schema.LABEL: (p[user] * q[item]).sum(1) + 0.5 * random.normal(size=2500),
        schema.WEIGHT: 1.0,
    }
)
inputs = pd.DataFrame({schema.INPUT_ID: np.arange(50).astype(str)})
users = pd.DataFrame({schema.USER_ID: np.arange(80).astype(str)})
trained = train(*(spark.createDataFrame(frame) for frame in (rows, inputs, users)), settings)
trained.engine.close()
objective = trained.fit.objective
assert all(later <= earlier + 1e-9 * abs(earlier) for earlier, later in pairwise(objective))
picture = here / "objective.png"
plot_objective(picture, objective)
notebook.show(picture)
