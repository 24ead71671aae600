"""The error tree survives the way between processes, and one line tells of an unforeseen error."""

import pickle

import pytest

from cluster import errors


def _tree(kind: type[Exception]) -> list[type[Exception]]:
    return [kind] + [below for child in kind.__subclasses__() for below in _tree(child)]


@pytest.mark.parametrize("kind", _tree(errors.ClusterError))
def test_errors_travel(kind: type[errors.ClusterError]) -> None:
    back = pickle.loads(pickle.dumps(kind("what, where, what to do")))
    assert type(back) is kind and str(back) == "what, where, what to do"
    assert back.exit_code == (2 if kind in (errors.ResourceError, errors.LeaseError, errors.JobError) else 1)


def test_one_line() -> None:
    with pytest.raises(KeyError) as caught:
        {}["a\n b"]
    assert errors.one_line(caught.value).startswith("KeyError: 'a\\n b' (test_cluster_errors.py:")
    assert errors.one_line(ValueError("two\nlines")) == "ValueError: two lines"
