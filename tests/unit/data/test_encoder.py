"""The tabular encoder against a plain float64 reference, whatever the cut into ranges."""

import json

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.files import Folder
from distill_jobs.data.encoder import Encoder, Moments, Tally
from distill_jobs.data.rows import Rows
from distill_jobs.data.values import text_of
from distill_jobs.errors import DataError
from distill_jobs.spec.parts import Tabular


def rows_of(**columns):
    count = len(next(iter(columns.values())))
    return Rows({name: list(values) for name, values in columns.items()}, [f"f:{i + 1}" for i in range(count)])


@given(
    st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=50),
    st.lists(st.integers(0, 50), max_size=4),
    st.sampled_from([0.0, 1e9]),
)
@settings(deadline=None)
def test_merged_moments_are_those_of_the_whole(values, cuts, offset):
    array = np.array(values) + offset
    merged = Moments()
    for piece in np.split(array, sorted(min(c, len(array)) for c in cuts)):
        merged += Moments.of(piece)
    assert merged.count == len(array)
    assert merged.mean == pytest.approx(array.mean(), rel=1e-12, abs=1e-9)
    assert merged.deviation == pytest.approx(array.std(), rel=1e-6, abs=1e-6)


def test_transform_against_reference(tmp_path):
    random = np.random.default_rng(1)
    age, kind = random.normal(50, 9, 400), random.choice(list("aaaabbbcd"), 400)
    spec = Tabular(numeric=("age",), categorical=("kind",), max_categories=2)
    tally = Tally()
    for part in np.array_split(np.arange(400), 7):
        one = Tally()
        one.add(rows_of(age=age[part], kind=kind[part]), spec)
        tally.merge(Tally.of(json.loads(json.dumps(one.as_dict()))))
    fitted = Encoder.fit(tally, spec)
    fitted.save(Folder(str(tmp_path)))
    encoder = Encoder.load(Folder(str(tmp_path)))
    assert encoder == fitted
    assert encoder.names == ["age", "kind=a", "kind=b", "kind=(other)"]
    frame = pd.DataFrame({"kind": kind, "age": age, "more": 1})
    encoded = encoder.transform({name: frame[name].to_numpy() for name in frame})
    expected = np.stack([(age - age.mean()) / age.std(), kind == "a", kind == "b", np.isin(kind, ["c", "d"])], axis=1)
    assert encoded.dtype == np.float32
    np.testing.assert_allclose(encoded, expected, atol=1e-6)


def test_unseen_values_and_constant_columns():
    spec = Tabular(numeric=("x",), categorical=("kind",))
    tally = Tally()
    tally.add(rows_of(x=[0.1] * 3, kind=["a", None, "b"]), spec)
    encoder = Encoder.fit(tally, spec)
    assert encoder.names == ["x", "kind=(null)", "kind=a", "kind=b"]
    np.testing.assert_allclose(encoder.transform({"x": [0.1], "kind": ["new"]}), [[0, 0, 0, 0]], atol=1e-12)


def test_serving_errors_name_the_row():
    tally, spec = Tally(), Tabular(numeric=("x",))
    tally.add(rows_of(x=[1, 2, 3]), spec)
    encoder = Encoder.fit(tally, spec)
    with pytest.raises(DataError, match="row 2 of the input: numeric column x holds nan"):
        encoder.transform({"x": np.array([1.0, np.nan])})
    with pytest.raises(DataError, match="the input has no column 'x'"):
        encoder.transform({"y": np.array([1.0])})


def test_one_value_has_one_name():
    assert {text_of(v) for v in (5, 5.0, "5", np.int32(5), np.float64(5.0))} == {"5"}
    assert {text_of(v) for v in (None, float("nan"), pd.NA, pd.NaT)} == {"(null)"}
    assert text_of(True) == text_of(np.bool_(True)) == "true"
    assert text_of(0.5) == "0.5"
