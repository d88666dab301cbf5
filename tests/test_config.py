"""Settings: the layers and their order, and mistakes that end in one line which names the remedy."""

import os
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mtl.config import DEFAULTS, ENVIRONMENT_PREFIX, Settings, load_settings, valid_keys
from mtl.errors import ConfigError


@pytest.fixture(autouse=True)
def own_environment(monkeypatch):
    for name in list(os.environ):
        if name.startswith(ENVIRONMENT_PREFIX):
            monkeypatch.delenv(name)


@pytest.fixture
def toml(tmp_path):
    def write(text, name="a.toml"):
        file = tmp_path / name
        file.write_bytes(text if isinstance(text, bytes) else text.encode())
        return file

    return write


def mistake(*assignments, files=()):
    with pytest.raises(ConfigError) as raised:
        load_settings(files, assignments)
    reason = str(raised.value)
    assert "\n" not in reason
    return reason


# --- The default file, and those beside it ------------------------------------------------------------------------------


@pytest.mark.parametrize("file", sorted(DEFAULTS.parent.glob("*.toml")), ids=lambda file: file.stem)
def test_every_file_of_settings_is_valid_and_says_something_new(file):
    changed = load_settings([file]) != load_settings()
    assert changed == (file != DEFAULTS)


def default_lines():
    section = ""
    for line in DEFAULTS.read_text(encoding="utf-8").splitlines():
        if line.startswith("["):
            section = line[1:].partition("]")[0]
        elif match := re.match(r"(\w+)\s*=\s*(.*)", line):
            yield f"{section}.{match[1]}", match[2]


def test_default_file_holds_every_setting_once():
    keys = [key for key, _ in default_lines()]
    assert sorted(keys) == sorted(valid_keys())
    assert {key.split(".")[0] for key in keys} == set(Settings.model_fields)


@pytest.mark.parametrize(("key", "rest"), list(default_lines()))
def test_every_default_says_what_it_means(key, rest):
    without_strings = re.sub(r'"[^"]*"', "", rest)
    assert len(without_strings.partition("#")[2].split()) >= 2, f"{key} has no comment"


def test_settings_cannot_be_changed():
    settings = load_settings()
    with pytest.raises(ValueError, match="frozen"):
        settings.model.k = 3


# --- Layers -----------------------------------------------------------------------------------------------------------

LAYERS = ("first", "second", "environment", "set")


@given(st.sets(st.sampled_from(LAYERS)))
def test_later_layer_wins(tmp_path_factory, present):
    folder = tmp_path_factory.mktemp("layers")
    files, assignments, expected = [], [], "auto"
    with pytest.MonkeyPatch.context() as patch:
        for value, layer in enumerate(LAYERS, start=2):
            if layer not in present:
                continue
            expected = value
            if layer == "environment":
                patch.setenv("MTL_MODEL__K", str(value))
            elif layer == "set":
                assignments.append(f"model.k={value}")
            else:
                files.append(folder / f"{layer}.toml")
                files[-1].write_text(f"[model]\nk = {value}\n")
        settings = load_settings(files, assignments)
    assert settings.model.k == expected
    assert settings.train == load_settings().train  # a layer changes what it names and nothing else


def test_files_count_in_the_order_given(toml):
    one, two = toml("[train]\nseed = 1\n", "one.toml"), toml("[train]\nseed = 2\n", "two.toml")
    assert load_settings([one, two]).train.seed == 2
    assert load_settings([two, one]).train.seed == 1


def test_last_set_wins():
    assert load_settings((), ["train.seed=1", "train.seed=2"]).train.seed == 2


def test_tables_of_two_files_are_joined(toml):
    files = [toml('[spark.options]\n"a.b" = "1"\n', "one.toml"), toml('[spark.options]\nc = "2"\n', "two.toml")]
    assert load_settings(files).spark.options == {"a.b": "1", "c": "2"}


def test_loading_does_not_remember_earlier_settings(toml):
    load_settings([toml("[oracle.params]\nalpha = 1\n")], ["oracle.params.beta=2"])
    assert load_settings().oracle.params == {}


# --- Values -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("assignment", "section", "key", "value"),
    [
        ("model.k=auto", "model", "k", "auto"),
        ("model.k = 16", "model", "k", 16),
        ("train.tolerance=1e-5", "train", "tolerance", 1e-5),
        ("oracle.residual=false", "oracle", "residual", False),
        ("spark.master=local[2]", "spark", "master", "local[2]"),
        ("tables.root=s3://bucket/a=b", "tables", "root", "s3://bucket/a=b"),
        ('tables.root="data/a b"', "tables", "root", "data/a b"),
        ("tables.root=2026", "tables", "root", "2026"),
        ("tables.root=2026-01-01", "tables", "root", "2026-01-01"),
        ("ingest.list_separator=", "ingest", "list_separator", ""),
        ('ingest.list_columns=["genres"]', "ingest", "list_columns", ["genres"]),
        ('oracle.params={alpha = 1.5, name = "x"}', "oracle", "params", {"alpha": 1.5, "name": "x"}),
        ("oracle.params.alpha=1.5", "oracle", "params", {"alpha": 1.5}),
        ("spark.options.spark.executor.memory=8g", "spark", "options", {"spark.executor.memory": "8g"}),
        ("spark.options.spark.executor.cores=4", "spark", "options", {"spark.executor.cores": "4"}),
    ],
)
def test_set_and_environment_read_a_value_alike(assignment, section, key, value, monkeypatch):
    assert getattr(getattr(load_settings((), [assignment]), section), key) == value
    name, _, text = assignment.partition("=")
    if name.count(".") == 1:
        monkeypatch.setenv(ENVIRONMENT_PREFIX + name.strip().replace(".", "__").upper(), text)
        assert getattr(getattr(load_settings(), section), key) == value


# --- Mistakes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("assignment", "wrong", "nearest"),
    [
        ("model.kk=3", "model.kk", "model.k"),
        ("train.iteration=3", "train.iteration", "train.iterations"),
        ("update.trigger_secs=3", "update.trigger_secs", "update.trigger_seconds"),
        ("modle.k=3", "modle", "model"),
    ],
)
def test_unknown_setting_names_the_nearest(assignment, wrong, nearest):
    assert mistake(assignment) == f"unknown setting {wrong!r}: did you mean {nearest!r}?"


@given(st.text(st.characters(codec="ascii", exclude_characters=".="), min_size=1))
def test_every_unknown_key_is_refused_with_a_valid_one(key):
    key = key.strip()
    if not key or f"model.{key}" in valid_keys():
        return
    with pytest.raises(ConfigError, match="did you mean") as raised:
        load_settings((), [f"model.{key}=3"])
    assert str(raised.value).rpartition("did you mean ")[2].strip("'?") in valid_keys()


def test_unknown_keys_of_a_file_are_all_named(toml):
    reason = mistake(files=[toml("[model]\nkk = 3\n[spark]\nmastr = 'x'\n")])
    assert "'model.kk': did you mean 'model.k'?" in reason
    assert "'spark.mastr': did you mean 'spark.master'?" in reason


@pytest.mark.parametrize(
    ("assignment", "shown"),
    [
        ("train.max_iterations=0", "train.max_iterations = 0: input should be greater than or equal to 1"),
        ("train.seed=1.5", "train.seed = 1.5: input should be a valid integer"),
        ("spark.driver_memory=4 gigabytes", "spark.driver_memory = '4 gigabytes': "),
        ("oracle.kind=forest", "oracle.kind = 'forest': input should be 'identity', 'linear', 'sklearn', "),
        ("evaluate.als_ranks=[]", "evaluate.als_ranks = []: "),
        ("evaluate.validation_fraction=1", "evaluate.validation_fraction = 1: input should be less than 1"),
        ("train.tolerance=nan", "train.tolerance = nan: "),
        ("model.implicit_weight=inf", "model.implicit_weight = inf: input should be a finite number"),
        ("serve.coarseness=[inf]", "serve.coarseness = inf: input should be a finite number"),
    ],
)
def test_bad_value_is_named_with_what_would_be_right(assignment, shown):
    assert mistake(assignment).startswith(f"setting {shown}")


def test_a_secret_of_the_wrong_type_is_not_shown(toml):
    reason = mistake(files=[toml("[serve]\ntoken = 123456\n")])
    assert reason.startswith("setting serve.token = (not shown): ")
    assert "123456" not in reason


def test_a_section_that_contradicts_itself_shows_no_secret_in_it():
    reason = mistake("serve.token=hunter2", "serve.contest_shares=[0.5,0.5]")
    assert reason.startswith("section serve: ")
    assert "hunter2" not in reason


def test_one_bad_value_is_one_reason():
    assert mistake("model.k=-1") == "setting model.k = -1: input should be 'auto' or greater than or equal to 0"


def test_two_bad_values_are_two_reasons():
    assert mistake("model.k=-1", "train.max_iterations=0").count("setting ") == 2


@pytest.mark.parametrize("assignment", ["model.k", "model", "k=3", "=3", ".k=3", "model.=3", ""])
def test_malformed_set_shows_the_form(assignment):
    assert mistake(assignment) == f"--set {assignment}: write section.key=value"


def test_a_setting_is_not_a_table():
    assert mistake("model.k=3", "model.k.x=3").startswith("setting model.k = {'x': 3}: ")


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("[model\n", r"line 1"),
        ("[model]\nk = 3\nk = 4\n", r"line 3"),
        (b'[tables]\nroot = "\xff"\n', r"0xff"),
    ],
)
def test_malformed_file_is_named(toml, content, reason):
    file = toml(content)
    shown = mistake(files=[file])
    assert shown.startswith(f"configuration file {file} is not valid TOML: ")
    assert re.search(reason, shown)


def test_missing_file_is_named(tmp_path):
    assert (
        mistake(files=[tmp_path / "none.toml"]) == f"configuration file {tmp_path}/none.toml: No such file or directory"
    )
    assert mistake(files=[tmp_path]) == f"configuration file {tmp_path}: Is a directory"


def test_value_in_place_of_a_section_is_refused(toml):
    assert mistake(files=[toml("model = 3\n")]).startswith("setting model = 3: ")


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("MTL_MODLE__K", "environment variable MTL_MODLE__K: no section 'modle'; there are tables, spark"),
        ("MTL_MODEL__KK", "unknown setting 'model.kk': did you mean 'model.k'?"),
        ("MTL_MODEL_K", "environment variable MTL_MODEL_K: "),
        ("MTL_MODEL", "environment variable MTL_MODEL: "),
        ("MTL_INGEST__LIST_COLUMNS", "setting ingest.list_columns = 'a,b': "),
    ],
)
def test_mistaken_variable_is_named(monkeypatch, name, shown):
    monkeypatch.setenv(name, "a,b")
    assert mistake().startswith(shown)


def test_other_programs_variables_are_left_alone(monkeypatch):
    usual = load_settings()
    monkeypatch.setenv("MTL_HUD_ENABLED", "1")  # Apple's Metal has the same prefix
    assert load_settings() == usual


def test_values_by_key_are_the_last_layer_and_checked_like_the_others() -> None:
    settings = load_settings(assignments=["model.k=3"], values={"model.k": 5, "oracle.params": {"max_depth": 2}})
    assert (settings.model.k, settings.oracle.params) == (5, {"max_depth": 2})
    with pytest.raises(ConfigError, match=r"did you mean 'model\.k'"):
        load_settings(values={"model.kk": 5})
    with pytest.raises(ConfigError, match=r"setting 'k': write section\.key"):
        load_settings(values={"k": 5})


def test_centres_of_clustered_classes_are_two_at_least():
    with pytest.raises(ConfigError, match=r"numbers of centres are wanted, 2 or more each, such as \[1000, 100\]"):
        load_settings([], ["serve.classes=clustered"])
    assert load_settings([], ["serve.classes=clustered", "serve.coarseness=[9, 2]"]).serve.coarseness == [9, 2]
