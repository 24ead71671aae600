"""DistillKit's layout: what the encoder of the tests writes is what the decoder reads."""

import numpy as np
import pytest
from exchange_cases import encode_position, pack_bits, teacher, top
from hypothesis import given, settings
from hypothesis import strategies as st

from distill_jobs.errors import DataError
from distill_jobs.store.exchange.distillkit import Coding, decode_ids, decode_older, decode_values, unpack_bits

PLAIN = {"d": 50, "k": 16, "exact_k": 16, "exact_dtype": "bfloat16", "residual_bins": [], "delta_encoding": False}
CURVE = {
    **PLAIN,
    "exact_k": 4,
    "polynomial_terms": [0, 1, 2, "sqrt"],
    "term_dtype": "float32",
}
BINS = {
    **CURVE,
    "exact_dtype": "float32",
    "normalize_t": True,
    "residual_bins": [
        {"scale_dtype": "float16", "element_bits": 5, "num_elements": 6},
        {"scale_dtype": "bfloat16", "element_bits": 1, "num_elements": 3},
    ],
}
DELTA = {**BINS, "delta_encoding": True, "exact_dtype": "float16", "polynomial_terms": None}
CONFIGS = [
    pytest.param(PLAIN, id="exact"),
    pytest.param(CURVE, id="curve"),
    pytest.param(BINS, id="bins"),
    pytest.param(DELTA, id="delta"),
    pytest.param({**CURVE, "d": 151_669, "term_dtype": "float64", "polynomial_terms": [0, "exp"]}, id="wide"),
    pytest.param({**CURVE, "d": 65_536, "exact_k": 0}, id="nothing exact"),
]


@pytest.mark.parametrize("config", CONFIGS)
def test_what_was_encoded_is_decoded(config: dict) -> None:
    rng = np.random.default_rng(0)
    ids, values = top(teacher(rng, 20, min(config["d"], 3000)), config["k"])
    ids[:, 0] = config["d"] - 1
    encoded = [encode_position(i, v, config) for i, v in zip(ids.tolist(), values.tolist(), strict=True)]
    coding = Coding.of(config)
    packed_ids, packed_values = (
        np.array([list(position[which]) for position in encoded], dtype=np.uint8) for which in (0, 1)
    )
    assert packed_ids.shape[1] == coding.id_bytes and packed_values.shape[1] == coding.value_bytes
    np.testing.assert_array_equal(decode_ids(packed_ids, coding), ids)
    wanted = np.array([position[2] for position in encoded])
    np.testing.assert_allclose(decode_values(packed_values, coding), wanted, rtol=1e-6, atol=1e-6)


@settings(max_examples=100, deadline=None)
@given(bits=st.integers(1, 56), data=st.data())
def test_bits_come_back(bits: int, data) -> None:
    values = data.draw(st.lists(st.integers(0, (1 << bits) - 1), min_size=1, max_size=20))
    packed = np.frombuffer(pack_bits(values, bits), dtype=np.uint8)[None]
    assert unpack_bits(packed, bits, len(values)).tolist() == [values]


def test_the_older_layout() -> None:
    config = {"vocab_size": 1000, "k": 8, "exact_k": 3, "polynomial_degree": 2, "with_sqrt_term": True}
    coding = Coding.of({"teacher": {"kind": "dataset", "legacy_logit_compression": config}})
    ids = np.array([[999, 5, 1, 2, 3, 4, 6, 7]])
    words = np.zeros((1, 2), dtype=np.uint64)
    for place, number in enumerate(ids[0].tolist()):
        words[0, place // 6] |= np.uint64(number << 10 * (place % 6))
    coefficients = np.array([[-3.0, 0.5, 1.0, -0.25]])
    exact = np.array([[-0.5, -1.0, -1.5]], dtype=np.float32)
    found, values = decode_older(words, exact, coefficients, coding)
    np.testing.assert_array_equal(found, ids)
    t = np.arange(1, 6)
    np.testing.assert_allclose(values[0], [*exact[0], *(-3 + 0.5 / t + 1 / t**2 - 0.25 * np.sqrt(t))])


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([], "not a mapping"),
        ({}, "'d' is missing"),
        ({**PLAIN, "k": 10**9}, "value 1000000000"),
        ({**PLAIN, "k": True}, "value True"),
        ({**PLAIN, "exact_k": 17}, "contradict"),
        ({**PLAIN, "exact_dtype": "int8"}, "data type 'int8'"),
        ({**PLAIN, "exact_dtype": []}, "data type"),
        ({**PLAIN, "residual_bins": 3}, "missing or wrong"),
        ({**CURVE, "polynomial_terms": ["__import__"]}, "value '__import__'"),
        ({**PLAIN, "residual_bins": [{"scale_dtype": "float16", "element_bits": 64, "num_elements": 2}]}, "value 64"),
        ({"teacher": {"legacy_logit_compression": {"k": 3}}}, "is missing"),
    ],
)
def test_configurations_that_are_refused(values, message: str) -> None:
    with pytest.raises(DataError, match=message):
        Coding.of(values)
