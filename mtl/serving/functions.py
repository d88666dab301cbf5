"""A model's functions of an input's attributes as the steps of an anytime evaluation.

All of them take the encoding of the attributes. Functions that an oracle fitted are a step each; one that is a sum of fits
(:class:`mtl.regressors.Stages`) is two, the first half of the sum being a stage that says what the whole may be. What is linear
in the encoding costs next to nothing, and is one step.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from mtl.basis import OracleBasis
from mtl.forms import Given, PartlyGiven
from mtl.gaussian import Array
from mtl.model import Model
from mtl.prior import VectorPrior, Wrapped
from mtl.regressors import Regressor, Stages
from mtl.serving.anytime import Step
from mtl.serving.executor import Function


@dataclass(frozen=True)
class Plan:
    """Steps with what they call; a function gets encoded attributes (n, p) and the results of the steps that it needs."""

    steps: tuple[Step, ...]
    functions: tuple[Function, ...]
    m: int  # values that they reveal: d, and what stages say

    def values(self, encoded: Array) -> Array:
        """All values of n inputs, evaluated in full, (n, m)."""
        values, results = np.empty((len(encoded), self.m)), list[Any]()
        for step, function in zip(self.steps, self.functions, strict=True):
            results.append(function(encoded, tuple(results[place] for place in step.after)))
            if step.reveals:
                values[:, list(step.reveals)] = results[-1]
        return values


def plan_of(model: Model) -> Plan:
    """The steps of a model; a step's result is (n, its values)."""
    prior, learnt, given = _unwrapped(model.artefact.inputs), np.arange(model.d), None
    if isinstance(prior, PartlyGiven):
        given, learnt = prior.given, prior.given.learnt
        prior = _unwrapped(prior.learnt)
    steps, functions = list[Step](), list[Function]()
    if isinstance(prior, OracleBasis) and prior.functions:
        m = model.d
        for i, function in zip(learnt.tolist(), prior.functions, strict=True):
            if isinstance(function, Stages) and len(function.stages) > 1:
                half = len(function.stages) // 2
                first, rest = Stages(function.stages[:half]), Stages(function.stages[half:])
                steps += [Step(f"f{i} begun", (m,)), Step(f"f{i}", (i,), (len(steps),))]
                functions += [_predict(first), _predict(rest)]
                m += 1
            else:
                steps.append(Step(f"f{i}", (i,)))
                functions.append(_predict(function))
        if given is not None and given.places:
            steps.append(Step("given", given.places))
            functions.append(_given(given))
        return Plan(tuple(steps), tuple(functions), m)
    steps.append(Step("functions", tuple(range(model.d))))
    functions.append(lambda encoded, needed: model.artefact.inputs.mean(encoded))
    return Plan(tuple(steps), tuple(functions), model.d)


def _given(given: Given) -> Function:
    return lambda encoded, needed: given.of(encoded)


def _predict(function: Regressor) -> Callable[[Any, tuple[Any, ...]], Array]:
    """Added to what an earlier stage gave where there is one."""

    def predict(encoded: Any, needed: tuple[Any, ...]) -> Array:
        value = np.asarray(function.predict(encoded), float)[:, None]
        return value + needed[0] if needed else value

    return predict


def _unwrapped(prior: VectorPrior) -> VectorPrior:
    while isinstance(prior, Wrapped):
        prior = prior.prior
    return prior
