"""databricks.yml as far as it can be checked without a workspace: its parts, its references, its files and its settings."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Literal

import pytest
from pydantic import BaseModel, ConfigDict, ValidationError

from mtl.config import load_settings

yaml = pytest.importorskip("yaml")
ROOT = Path(__file__).resolve().parent.parent


class Part(BaseModel):
    """What this bundle uses of the format, and no key beside: a misspelt one is refused here as the CLI warns of it."""

    model_config = ConfigDict(extra="forbid")


class Variable(Part):
    description: str
    default: str


class Artifact(Part):
    type: Literal["whl"]
    build: str


class Schema(Part):
    catalog_name: str
    name: str
    comment: str


class Volume(Part):
    catalog_name: str
    schema_name: str
    name: str
    comment: str


class PythonTask(Part):
    python_file: str
    parameters: list[str] = []


class NotebookTask(Part):
    notebook_path: str
    base_parameters: dict[str, str] = {}


class Pypi(Part):
    package: str


class Library(Part):
    whl: str | None = None
    pypi: Pypi | None = None


class Dependency(Part):
    task_key: str


class Task(Part):
    task_key: str
    job_cluster_key: str
    libraries: list[Library]
    depends_on: list[Dependency] = []
    spark_python_task: PythonTask | None = None
    notebook_task: NotebookTask | None = None


class NewCluster(Part):
    spark_version: str
    node_type_id: str
    num_workers: str
    data_security_mode: Literal["DATA_SECURITY_MODE_DEDICATED"]
    spark_env_vars: dict[str, str]


class Cluster(Part):
    job_cluster_key: str
    new_cluster: NewCluster


class Schedule(Part):
    quartz_cron_expression: str
    timezone_id: str


class Continuous(Part):
    pause_status: Literal["UNPAUSED", "PAUSED"]


class FileArrival(Part):
    url: str
    min_time_between_triggers_seconds: int


class Trigger(Part):
    file_arrival: FileArrival


class Job(Part):
    name: str
    job_clusters: list[Cluster]
    tasks: list[Task]
    max_concurrent_runs: int = 1
    schedule: Schedule | None = None
    continuous: Continuous | None = None
    trigger: Trigger | None = None


class Resources(Part):
    schemas: dict[str, Schema]
    volumes: dict[str, Volume]
    jobs: dict[str, Job]


class Workspace(Part):
    root_path: str


class Target(Part):
    mode: Literal["development", "production"]
    default: bool = False
    workspace: Workspace | None = None


class Name(Part):
    name: str


class Bundle(Part):
    bundle: Name
    variables: dict[str, Variable]
    artifacts: dict[str, Artifact]
    resources: Resources
    targets: dict[str, Target]


TEXT = (ROOT / "databricks.yml").read_text()
TREE: dict[str, Any] = yaml.safe_load(TEXT)
BUNDLE = Bundle.model_validate(TREE)
JOBS = BUNDLE.resources.jobs
TASKS = [task for job in JOBS.values() for task in job.tasks]


def resolved(text: str) -> str:
    """With the variables' defaults in their places."""
    return re.sub(r"\$\{var\.(\w+)\}", lambda found: BUNDLE.variables[found[1]].default, text)


def test_jobs_start_as_they_should():
    assert JOBS["retrain"].schedule
    assert JOBS["update"].continuous
    assert JOBS["ingest"].trigger
    assert set(JOBS) == {"ingest", "retrain", "update", "figures"}


def test_a_misspelt_key_is_refused():
    job = {**TREE["resources"]["jobs"]["update"], "continous": {}}
    with pytest.raises(ValidationError, match="continous"):
        Job.model_validate(job)


def test_every_variable_is_there_and_used():
    used = set(re.findall(r"\$\{var\.(\w+)\}", TEXT))
    assert used == set(BUNDLE.variables)


def test_every_other_reference_leads_somewhere():
    known = ("bundle.name", "bundle.target", "workspace.file_path")  # given by the CLI or by the bundle's own head
    for reference in set(re.findall(r"\$\{([\w.]+)\}", TEXT)):
        if reference.startswith("var.") or reference in known:
            continue
        place: Any = TREE
        for step in reference.split("."):
            assert step in place, reference
            place = place[step]


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.task_key)
def test_a_task_is_one_file_on_a_cluster_of_its_job(task):
    files = [task.spark_python_task and task.spark_python_task.python_file]
    files += [task.notebook_task and task.notebook_task.notebook_path]
    (file,) = filter(None, files)
    if not file.startswith("notebooks/") or (ROOT / "notebooks").is_dir():
        assert (ROOT / file).is_file()
    (job,) = (job for job in JOBS.values() if task in job.tasks)
    assert task.job_cluster_key in [cluster.job_cluster_key for cluster in job.job_clusters]
    assert {earlier.task_key for earlier in task.depends_on} <= {other.task_key for other in job.tasks}
    assert any(library.whl == "dist/*.whl" for library in task.libraries)


@pytest.mark.parametrize("job", JOBS.values(), ids=list(JOBS))
def test_settings_of_the_cluster_are_settings(job, monkeypatch):
    for name, value in job.job_clusters[0].new_cluster.spark_env_vars.items():
        monkeypatch.setenv(name, resolved(value))
    settings = load_settings()
    assert settings.tables.root == "main.oracle_mtl"
    assert settings.update.checkpoints == "/Volumes/main/oracle_mtl/files/checkpoints"


def test_mlflow_is_the_version_that_is_pinned():
    packages = [library.pypi.package for task in TASKS for library in task.libraries if library.pypi]
    assert packages
    for package in packages:
        assert f'"{package}"' in (ROOT / "pyproject.toml").read_text()
