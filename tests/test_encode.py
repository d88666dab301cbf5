"""Attributes as numbers: an encoding for every type of column, and what is missing, unseen or useless."""

from __future__ import annotations

import cloudpickle
import numpy as np
import pandas as pd
import pytest

from mtl.config import load_settings
from mtl.encode import Categories, Encoder, Number, Text
from mtl.errors import ConfigError, InputError
from mtl.prior import Prior

SETTINGS = load_settings(assignments=["encode.min_category_count=2", "encode.max_categories=3"]).encode

TITLES = ["the quick brown fox", "the lazy old dog", "a quick brown dog", "the old red fox", "one more lazy fox"]


def fitted(**columns: list) -> tuple[Encoder, pd.DataFrame]:
    frame = pd.DataFrame({name: pd.Series(values) for name, values in columns.items()})
    return Encoder.fit(frame, SETTINGS), frame


def everything() -> tuple[Encoder, pd.DataFrame]:
    return fitted(
        number=[1.0, 2.0, None, 4.0, 9.0] * 4,
        category=["a", "b", "a", None, "rare"] * 4,
        genres=[["x", "y"], ["x"], [], None, ["z", "x"]] * 4,
        text=[f"{title} {i}" for i in range(4) for title in TITLES],
    )


def test_columns_are_encoded_by_their_type() -> None:
    encoder, _ = everything()
    assert [type(column) for column in encoder.columns] == [Number, Categories, Categories, Text]
    assert [column.name for column in encoder.columns] == ["number", "category", "genres", "text"]


def test_the_first_column_is_1_and_the_others_are_centred() -> None:
    encoder, frame = everything()
    z = encoder(frame)
    assert z.shape == (20, encoder.width)
    assert z.dtype == np.float64
    assert np.isfinite(z).all()
    np.testing.assert_array_equal(z[:, 0], 1)
    np.testing.assert_allclose(z[:, 1:].mean(0), 0, atol=1e-12)


def test_a_number_is_its_standardized_value_and_the_square_of_it() -> None:
    encoder, frame = fitted(age=[1.0, 3.0, 5.0, 7.0])
    z = encoder(frame)
    standard = np.array([-3, -1, 1, 3]) / np.sqrt(5)
    np.testing.assert_allclose(z, np.column_stack([np.ones(4), standard, standard**2 - 1]))


def test_a_missing_number_is_told_apart_where_training_had_missing_ones() -> None:
    encoder, frame = fitted(age=[1.0, 3.0, 2.0, None, np.nan], other=[1.0] * 5)
    # Value 0, square 0 and an indicator, all of them before centring.
    raw = encoder(frame)[:, 1:4] + encoder.centre[:3]
    one = np.sqrt(1.5)
    np.testing.assert_allclose(raw, [[-one, 1.5, 0], [one, 1.5, 0], [0, 0, 0], [0, 0, 1], [0, 0, 1]], atol=1e-12)


def test_two_values_need_no_square_and_equal_ones_say_nothing() -> None:
    encoder, frame = fitted(flag=[0.0, 1.0, 1.0, 0.0], constant=[7.0] * 4)
    np.testing.assert_allclose(encoder(frame), [[1, -1, 0], [1, 1, 0], [1, 1, 0], [1, -1, 0]])


def test_linear_columns_are_the_attributes_without_squares_and_indicators() -> None:
    encoder, _ = fitted(age=[1.0, 3.0, None, 4.0], kind=["a", "b", "a", "b"], flag=[0.0, 1.0, 1.0, 0.0])
    age, kind, flag = (1,), (4, 5, 6), (7,)  # age has a square and an indicator
    assert encoder.linear("model.per_user", ["*"]) == age + kind + flag
    assert encoder.linear("model.per_user", ["flag", "age"]) == age + flag
    with pytest.raises(ConfigError, match=r"model.per_user: there is no attribute 'size'; there are age, kind, flag"):
        encoder.linear("model.per_user", ["size"])


def test_numbers_far_outside_what_training_saw_do_not_explode() -> None:
    encoder, _ = fitted(age=[1.0, 3.0, 5.0, 7.0])
    z = encoder(pd.DataFrame({"age": [1e300, -1e300, np.inf]}))
    assert np.isfinite(z).all()
    assert np.abs(z).max() <= 100


def test_categories_are_indicators_of_the_frequent_and_one_for_all_others() -> None:
    encoder, frame = fitted(c=["a"] * 4 + ["b"] * 3 + ["c"] * 2 + ["d"] * 2 + ["once"])
    (column,) = encoder.columns
    assert column.known == ("a", "b", "c")  # three at most, two rows at least
    raw = column(pd.Series(["a", "c", "d", "once", "never seen", None]))
    expected = [[1, 0, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1], [0, 0, 0, 1], [0, 0, 0, 1], [0, 0, 0, 0]]
    np.testing.assert_array_equal(raw, expected)
    assert encoder(frame).shape == (12, 5)


def test_a_list_of_categories_sets_every_one_it_holds() -> None:
    encoder, _ = fitted(genres=[np.array(["x", "y"], object), ["x", "y"], ["x"], [], None])
    (column,) = encoder.columns
    assert column.many
    raw = column(pd.Series([["y", "x"], ("y",), np.array(["new", "x"], object), [], None]))
    np.testing.assert_array_equal(raw, [[1, 1, 0], [0, 1, 0], [1, 0, 1], [0, 0, 0], [0, 0, 0]])


def test_one_category_where_lists_were_is_one_and_a_list_where_one_was_is_refused() -> None:
    lists = Encoder.fit(pd.DataFrame({"genres": [["ab"], ["a", "b"]] * 5}), SETTINGS)
    np.testing.assert_array_equal(lists(pd.DataFrame({"genres": ["ab"]})), lists(pd.DataFrame({"genres": [["ab"]]})))
    single = Encoder.fit(pd.DataFrame({"genre": ["a", "b"] * 5}), SETTINGS)
    with pytest.raises(InputError, match="was one text or number"):
        single(pd.DataFrame({"genre": [["a", "b"]]}))


def test_a_missing_list_is_missing_however_pandas_writes_it() -> None:
    encoder, frame = fitted(genres=[["x"], ["x"], ["y"], ["y"]])
    joined = pd.DataFrame({"key": [0, 9]}).merge(frame.assign(key=range(4)), "left", "key")
    assert isinstance(joined.genres[1], float)  # NaN, as a join leaves it
    np.testing.assert_array_equal(encoder.columns[0](joined.genres), [[1, 0, 0], [0, 0, 0]])
    assert Encoder.fit(joined[["genres"]], SETTINGS).width == 2


def test_texts_alike_are_near_and_others_far() -> None:
    numbers = ("one", "two", "three", "four")
    titles = [f"{a} {b} {c}" for a in ("green", "blue") for b in ("tea", "coffee") for c in numbers]
    encoder, frame = fitted(title=titles)
    assert isinstance(encoder.columns[0], Text)
    z = encoder(pd.DataFrame({"title": ["green tea five", "green tea six", "blue coffee five"]}))[:, 1:]
    assert np.linalg.norm(z[0] - z[1]) < np.linalg.norm(z[0] - z[2])
    np.testing.assert_allclose(np.var(encoder(frame)[:, 1:], axis=0).mean(), 1)


@pytest.mark.parametrize(
    "titles",
    [
        ["one lonely title here"],
        ["one title here", "quite another one"],
        ["aa bb cc", "dd ee ff", "gg hh ii"],
        ["the same text everywhere", None, "the same text everywhere"],
        ["a b c", "d e f", "g h i"],
        ["a b c", "a c b", "b a c", "b c a", "c a b", "c b a"],
    ],
)
def test_few_or_unrelated_texts_are_no_reason_to_fail(titles: list) -> None:
    encoder, frame = fitted(title=titles)
    assert np.isfinite(encoder(frame)).all()
    assert encoder(pd.DataFrame({"title": ["something new", None]})).shape == (2, encoder.width)


@pytest.mark.parametrize("value", [7.0, 0.1, "same", ["same"]])
def test_an_attribute_that_is_always_the_same_encodes_as_0(value: object) -> None:
    encoder, frame = fitted(constant=[value] * 7)
    np.testing.assert_allclose(encoder(frame)[:, 1:], 0, atol=1e-12)


def test_a_constant_whose_mean_is_rounded_is_no_scale() -> None:
    encoder, _ = fitted(constant=[0.1] * 7)
    assert encoder.columns[0].scale == 1.0


def test_columns_that_repeat_each_other_do_no_harm_to_the_prior_learnt_from_them() -> None:
    encoder, frame = fitted(a=[1.0, 2.0, 3.0, 4.0], b=[2.0, 4.0, 6.0, 8.0], c=[1, 2, 3, 4])
    z = encoder(frame)
    prior = Prior.start(z.T @ z, 2, 1.0)
    assert np.isfinite(np.linalg.solve(prior.gram + np.eye(len(prior.gram)), z.T)).all()
    np.testing.assert_allclose(z[:, 1], z[:, 3])


def test_a_column_missing_when_predicting_counts_as_missing_values() -> None:
    encoder, frame = everything()
    absent = encoder(frame.drop(columns=["category", "number"]))
    nulls = encoder(frame.assign(category=None, number=np.nan))
    np.testing.assert_array_equal(absent, nulls)


def test_columns_in_another_order_or_unknown_ones_change_nothing() -> None:
    encoder, frame = everything()
    shuffled = frame[frame.columns[::-1]].assign(surplus=1)
    np.testing.assert_array_equal(encoder(shuffled), encoder(frame))


def test_a_row_of_which_nothing_is_known_is_the_average() -> None:
    # So that a user without an attribute row, or an event of an input without one, is no special case.
    encoder, frame = everything()
    average = np.eye(1, encoder.width)[0]
    np.testing.assert_array_equal(encoder(pd.DataFrame(index=[0])), [average])
    nothing = pd.DataFrame([dict.fromkeys(frame.columns)])
    np.testing.assert_array_equal(encoder(nothing), [average])
    np.testing.assert_array_equal(encoder(frame.reindex(range(21)))[-1], average)


def test_encoding_a_row_does_not_depend_on_the_rows_beside_it() -> None:
    encoder, frame = everything()
    whole = encoder(frame)
    for i in (0, 3, 7):
        np.testing.assert_allclose(encoder(frame.iloc[[i]]), whole[[i]], atol=1e-12)


def test_without_attributes_or_values_there_is_the_constant_alone() -> None:
    for frame in (pd.DataFrame(index=range(3)), pd.DataFrame({"empty": [None] * 3}), pd.DataFrame({"a": []})):
        encoder = Encoder.fit(frame, SETTINGS)
        assert encoder.width == 1
        np.testing.assert_array_equal(encoder(pd.DataFrame({"a": [1, 2]})), [[1], [1]])


def test_a_stored_encoder_encodes_the_same() -> None:
    encoder, frame = everything()
    np.testing.assert_array_equal(cloudpickle.loads(cloudpickle.dumps(encoder))(frame), encoder(frame))
