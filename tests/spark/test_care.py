"""What the job does to its tables between batches."""

from __future__ import annotations

from pyspark.sql import SparkSession

from mtl.care import vacuum
from mtl.schema import LEDGER
from mtl.tables import Tables

GROUP = "spark.jobGroup.id"


def test_vacuum_takes_few_tasks_for_a_small_table(spark: SparkSession, tables: Tables) -> None:
    tables.create(LEDGER)
    context = spark.sparkContext
    context.setLocalProperty(GROUP, "vacuum")
    try:
        vacuum(tables, LEDGER)
    finally:
        context.setLocalProperty(GROUP, None)
    tracker = context.statusTracker()
    jobs = [tracker.getJobInfo(job) for job in tracker.getJobIdsForGroup("vacuum")]
    stages = [tracker.getStageInfo(stage) for job in jobs if job for stage in job.stageIds]
    assert 0 < max(stage.numTasks for stage in stages if stage) < 100
