"""What the library does in a session over Spark Connect: ``over_connect.py URL FOLDER`` → one JSON object.

FOLDER holds ratings.parquet and items.parquet; predictions are left there.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections.abc import Callable
from typing import Any

import pyarrow.parquet as pq


def main(url: str, folder: str) -> dict[str, Any]:
    os.environ["SPARK_REMOTE"] = url
    from mtl import OracleMTL, OracleMTLModel
    from mtl.config import load_settings
    from mtl.session import open_session
    from mtl.sharing import is_remote
    from mtl.tables import Tables

    spark = open_session(load_settings().spark, "connect")
    # What the folder of this file holds is on nobody's path: functions go by value, and mtl is the server's too.
    ratings, items = (spark.read.parquet(f"{folder}/{name}.parquet") for name in ("ratings", "items"))
    done: dict[str, Any] = {"remote": is_remote(spark)}

    def attempt(name: str, work: Callable[[], Any]) -> Any:
        try:
            result = work()
            done[name] = "works"
            return result
        except Exception as error:
            traceback.print_exc()
            done[name] = f"{type(error).__name__}: {error}"[:300]

    def estimator(**named: Any) -> OracleMTL:
        return OracleMTL(**{**ESTIMATOR, "settings": {**ESTIMATOR["settings"], **named}}).setItemAttributes(items)

    model = attempt("fit", lambda: estimator().fit(ratings))
    if model:
        scored = attempt("transform", lambda: model.transform(ratings).toArrow())
        pq.write_table(scored, f"{folder}/predictions.parquet")
        attempt("recommend", lambda: model.recommendForAllUsers(3).collect())
        attempt("save", lambda: model.save(f"{folder}/model"))
        attempt("overwrite", lambda: model.write().overwrite().save(f"{folder}/model"))
        attempt("load", lambda: OracleMTLModel.load(f"{folder}/model").transform(ratings).collect())
    attempt("fit distributed", lambda: estimator(**{"train.reduction": "distributed"}).fit(ratings))
    attempt("fit trees", lambda: estimator(**TREES).fit(ratings))
    attempt("create tables", lambda: Tables(spark, f"{folder}/tables").create("events"))
    attempt("read a Delta table", lambda: spark.read.format("delta").load(f"{folder}/delta").collect())
    return done


ESTIMATOR: dict[str, Any] = {"labelCol": "rating", "rank": 2, "maxIter": 4, "settings": {"train.partitions": 2}}
TREES = {"oracle.kind": "sklearn", "oracle.factory": "sklearn.tree:DecisionTreeRegressor", "oracle.parallel": True}

if __name__ == "__main__":
    print(json.dumps(main(*sys.argv[1:])))
