"""What is packaged is complete, and finds its defaults in a checkout and inside a zip alike."""

import subprocess
import sys
import zipfile
from pathlib import Path

from mtl.config import CONF, tomllib
from mtl.tracking import _requirements

ROOT = Path(__file__).resolve().parent.parent
SETUPTOOLS = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]


def test_every_package_is_listed():
    found = {".".join(file.parent.relative_to(ROOT).parts) for file in (ROOT / "mtl").rglob("__init__.py")}
    assert {*found, "mtl.conf"} == set(SETUPTOOLS["packages"])


def test_a_checkout_has_its_defaults_at_the_top_level():
    assert ROOT / SETUPTOOLS["package-dir"]["mtl.conf"] == CONF


def test_a_zip_has_its_defaults_inside(tmp_path):
    archive = tmp_path / "mtl.zip"
    with zipfile.ZipFile(archive, "w") as written:
        for file in (ROOT / "mtl").rglob("*.py"):
            written.write(file, file.relative_to(ROOT))
        for file in (ROOT / "conf").iterdir():
            written.write(file, f"mtl/conf/{file.name}")
    script = f"""
import sys
sys.path.insert(0, {str(archive)!r})
import mtl.config, mtl.session
print(mtl.config.__file__)
print(mtl.config.load_settings().train.max_iterations, mtl.config.CONF)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    where, loaded = done.stdout.splitlines()
    assert where == str(archive / "mtl" / "config.py")
    assert loaded.startswith("30 ")
    assert str(archive) in loaded


def test_the_server_and_the_mathematics_import_no_spark(tmp_path):
    pure = [
        "gaussian",
        "prior",
        "alternation",
        "basis",
        "firstorder",
        "train",
        "model",
        "encode",
        "supervised",
        "oracle.trees",
    ]
    of_server = ["server", "http", "housekeeping", "decisions"]
    script = f"""
import runpy, sys
class NoSpark:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("pyspark", "delta", "py4j"):
            raise ImportError("no " + name)
sys.meta_path.insert(0, NoSpark())
sys.path.insert(0, {str(ROOT)!r})
import importlib
for name in {[f"mtl.{name}" for name in pure] + [f"mtl.serving.{name}" for name in of_server]!r}:
    importlib.import_module(name)
for job in ("serve", "offpolicy"):
    sys.argv = [job, "--help"]
    try:
        runpy.run_path({str(ROOT / "jobs")!r} + f"/{{job}}.py", run_name="__main__")
    except SystemExit as ended:
        assert ended.code == 0, ended
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr


def test_a_logged_model_brings_what_it_imports():
    wanted = " ".join(_requirements())
    for name in ("pyspark", "numpy", "cloudpickle"):
        assert name in wanted
    assert "mlflow" not in wanted
