"""Trees and sums of trees as flat arrays: what a fitted tree model of another library predicts, without that library."""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np

from mtl.gaussian import Array

_CELLS = 1 << 20  # (row, tree) pairs walked at once

_LINE = re.compile(
    r"\s*(?:(?P<branch>If|Else) \(feature (?P<feature>\d+) (?:<=|>) (?P<threshold>\S+)\)|Predict: (?P<value>\S+)"
    r"|Tree \d+ \(weight (?P<weight>\S+)\):)"
)


@dataclass(frozen=True)
class Trees:
    """z ↦ the sum over trees of the leaf's value that z falls to; at a node, left where z[feature] ≤ threshold.

    The nodes of all trees stand in one set of arrays, (nodes,). A leaf is its own child.
    """

    feature: np.ndarray
    threshold: Array
    left: np.ndarray
    right: np.ndarray
    value: Array  # of leaves, times the weight of their tree
    roots: np.ndarray  # (trees,)
    depth: int

    def predict(self, attributes: Array) -> Array:
        rows = max(1, _CELLS // len(self.roots))
        parts = [self._sums(attributes[first : first + rows]) for first in range(0, len(attributes), rows)]
        return np.concatenate(parts) if parts else np.empty(0)

    def _sums(self, attributes: Array) -> Array:
        node = np.tile(self.roots, (len(attributes), 1))
        for _ in range(self.depth):
            # Not > but not ≤: a NaN goes right.
            is_left = np.take_along_axis(attributes, self.feature[node], axis=1) <= self.threshold[node]
            node = np.where(is_left, self.left[node], self.right[node])
        return self.value[node].sum(axis=1)


def parse_trees(text: str, scale: float = 1.0) -> Trees | None:
    """The trees of ``toDebugString`` of a pyspark.ml model, which prints every number so that it reads back the same.

    Args:
        text: a line a node in preorder, after ``Tree i (weight w):`` where there are several trees.
        scale: of every tree's weight.

    Returns:
        None where there is something else in it, as a split on categories.
    """
    feature: list[int] = []
    threshold: list[float] = []
    children: list[list[int]] = []
    value: list[float] = []
    roots: list[int] = []
    path: list[int] = []  # nodes from the root whose right branch is still to come, or that are being filled
    weight, depth = scale, 0
    is_root = True
    for line in text.splitlines()[1:]:
        if not line.strip():
            continue
        match = _LINE.fullmatch(line)
        if match is None:
            return None
        if match["weight"]:
            weight, is_root = scale * float(match["weight"]), True
            continue
        if match["branch"] == "Else":
            # The right branch of the innermost node that has but its left one.
            while len(children[path[-1]]) == 2:
                path.pop()
            continue
        node = len(feature)
        if is_root:
            roots.append(node)
            path, is_root = [], False
        else:
            while len(children[path[-1]]) == 2:
                path.pop()
            children[path[-1]].append(node)
            depth = max(depth, len(path))
        is_leaf = match["branch"] is None
        feature.append(0 if is_leaf else int(match["feature"]))
        threshold.append(0.0 if is_leaf else float(match["threshold"]))
        value.append(weight * float(match["value"]) if is_leaf else 0.0)
        children.append([node, node] if is_leaf else [])
        if not is_leaf:
            path.append(node)
    pairs = np.array(children, np.int32)
    return Trees(
        np.array(feature, np.int32),
        np.array(threshold),
        pairs[:, 0],
        pairs[:, 1],
        np.array(value),
        np.array(roots, np.int32),
        depth,
    )
