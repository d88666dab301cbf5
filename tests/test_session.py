"""Where Delta's jars are looked for, and the one line when they are not there. No JVM is started."""

from pathlib import Path

import pyspark
import pytest

from mtl import session
from mtl.config import load_settings
from mtl.errors import StateError
from mtl.session import jars_folder, open_session

HOSTS = ("PYSPARK_GATEWAY_PORT", "DATABRICKS_RUNTIME_VERSION", "SPARK_REMOTE")


class Started(Exception):
    """The session would have been built now."""


@pytest.fixture(autouse=True)
def no_spark(monkeypatch):
    class Builder:
        def __getattr__(self, _):
            raise Started

    monkeypatch.setattr(session, "SparkSession", type("SparkSession", (), {"builder": Builder()}))
    for name in ("SPARK_HOME", *HOSTS):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def spark_home(monkeypatch, tmp_path):
    (tmp_path / "jars").mkdir()
    monkeypatch.setenv("SPARK_HOME", str(tmp_path))
    return tmp_path


def settings(*assignments):
    return load_settings((), assignments).spark


def test_jars_lie_beside_the_package_s_own():
    assert jars_folder() == Path(pyspark.__path__[0]) / "jars"
    assert list(jars_folder().glob("spark-core_*.jar"))


def test_spark_home_comes_first(spark_home):
    assert jars_folder() == spark_home / "jars"


def test_without_jars_one_line_says_what_to_run(spark_home):
    with pytest.raises(StateError) as raised:
        open_session(settings(), "test")
    reason = str(raised.value)
    assert str(spark_home / "jars") in reason
    assert "make setup" in reason
    assert "\n" not in reason


def test_other_jars_do_not_pass_for_delta_s(spark_home):
    (spark_home / "jars" / "spark-core_2.13-4.2.0.jar").touch()
    (spark_home / "jars" / "part").touch()  # what a killed set-up leaves
    with pytest.raises(StateError):
        open_session(settings(), "test")


def test_with_jars_the_session_starts(spark_home):
    (spark_home / "jars" / "delta-spark_4.2_2.13-4.4.0.jar").touch()
    with pytest.raises(Started):
        open_session(settings(), "test")


@pytest.mark.parametrize("key", ["spark.jars", "spark.jars.packages"])
def test_configured_jars_are_enough(spark_home, key):
    with pytest.raises(Started):
        open_session(settings(f'spark.options={{"{key}" = "x"}}'), "test")


@pytest.mark.parametrize("host", HOSTS)
def test_where_there_is_a_host_jars_are_its_business(spark_home, monkeypatch, host):
    monkeypatch.setenv(host, "1")
    with pytest.raises(Started):
        open_session(settings(), "test")
