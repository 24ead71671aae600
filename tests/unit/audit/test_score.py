"""What is kept of scored rows, against plain float64."""

import math

import numpy as np
import pytest
import torch

from distill_jobs.audit.pieces import Pieces, bin_of
from distill_jobs.audit.score import SUMS, Verdicts
from distill_jobs.audit.scores import Scores
from distill_jobs.data.batch import Batch, next_tokens
from distill_jobs.errors import NotReadyError


def packed() -> Batch:
    """Two rows: pieces of 3, 2 and 2 tokens, and one of 6."""
    segments = torch.tensor([[1, 1, 1, 2, 2, 3, 3, 0], [1, 1, 1, 1, 1, 1, 0, 0]])
    ids = torch.arange(16).view(2, 8)
    inputs = {"input_ids": ids, "segments": segments, "position_ids": torch.zeros_like(ids)}
    return Batch(inputs, next_tokens(ids, segments), torch.tensor([5, 6]))


def test_pieces_are_documents_within_rows() -> None:
    pieces = Pieces.of(packed())
    assert pieces.row.tolist() == [0, 0, 0, 1] and pieces.segment.tolist() == [1, 2, 3, 1]
    assert pieces.positions.tolist() == [2, 1, 1, 5]
    values = torch.arange(9.0)
    assert pieces.sums(values).tolist() == [1.0, 2.0, 3.0, 30.0]
    rows = {"sample_id": np.array([5, 6]), "source": np.array(["a.txt:1 (+2)", "a.txt:4"], dtype=object)}
    assert pieces.documents(rows).tolist() == ["a.txt:1", "5/2", "5/3", "a.txt:4"]
    rows["documents"] = np.array(["a.txt:1\na.txt:4\nb.txt:1", "a.txt:4"], dtype=object)
    assert pieces.documents(rows).tolist() == ["a.txt:1", "a.txt:4", "b.txt:1", "a.txt:4"]


def test_rows_of_a_table_are_pieces() -> None:
    pieces = Pieces.of(Batch({"features": torch.zeros(3, 2)}, torch.tensor([0, 1, 0]), torch.arange(3)))
    assert pieces.row.tolist() == [0, 1, 2] and pieces.positions.tolist() == [1, 1, 1]


def test_bins_hold_their_upper_bound() -> None:
    edges = torch.tensor([0.0, 0.0666, 0.0667, 0.5, 1.0])
    assert bin_of(edges).tolist() == [0, 0, 1, 7, 14]
    histogram = Pieces.of(packed()).histogram(torch.full((9,), 0.5), torch.ones(9))
    assert histogram["bin_count"].sum(axis=1).tolist() == [2, 1, 1, 5]
    assert histogram["bin_confidence"][3, 7] == pytest.approx(2.5)


def test_sums_against_float64() -> None:
    torch.manual_seed(0)
    own, teacher = (torch.log_softmax(3 * torch.randn(600, 11), dim=-1) for _ in range(2))
    gold = torch.randint(0, 11, (600,))
    right = Verdicts.of(teacher, teacher, gold)
    found = Verdicts.of(own, teacher, gold)
    p, q = own.double().exp().numpy(), teacher.double().exp().numpy()
    expected = {
        "nll": -np.log(p[np.arange(600), gold.numpy()]),
        "correct": p.argmax(1) == gold.numpy(),
        "agree": p.argmax(1) == q.argmax(1),
        "kl": (q * np.log(q / p)).sum(1),
        "entropy": -(p * np.log(p)).sum(1),
    }
    assert set(expected) == set(SUMS)
    for what, values in expected.items():
        np.testing.assert_allclose(found.sum_of(what, right).double().numpy(), values, rtol=2e-4, atol=1e-5)
    np.testing.assert_allclose(found.confidence.numpy(), p.max(1), rtol=1e-5)


def test_a_confident_mistake_of_a_language_model() -> None:
    """Sure and wrong; sure and right; unsure; sure of another, but leaving the right one a chance."""
    probabilities = torch.tensor([[0.998, 0.0015, 0.0005], [0.998, 0.0015, 0.0005], [0.4, 0.3, 0.3], [0.9, 0.05, 0.05]])
    log_probs = probabilities.log()
    said = Verdicts.of(log_probs, log_probs, torch.tensor([2, 0, 2, 2]))
    assert said.mistaken(low_entropy=0.5, tiny_gold=0.001).tolist() == [True, False, False, False]
    assert said.mistaken(low_entropy=2.0, tiny_gold=0.35).tolist() == [True, False, True, True]


def test_arms_are_in_the_order_of_their_seeds() -> None:
    names = ("student/10", "student/9", "teacher", "gate-drop/3")
    scores = Scores.of({f"{name}.nll": np.zeros(1) for name in names})
    assert scores.arms["student"] == ("student/9", "student/10") and list(scores.students) == ["gate-drop", "student"]
    with pytest.raises(NotReadyError, match="earlier release"):
        scores.of_model("teacher", "entropy")


def test_an_entropy_is_at_most_that_of_a_flat_distribution() -> None:
    flat = torch.full((4, 8), -math.log(8))
    said = Verdicts.of(flat, flat, torch.zeros(4, dtype=torch.long))
    assert said.entropy.tolist() == pytest.approx([math.log(8)] * 4)


def test_a_class_that_is_ruled_out_plays_no_part() -> None:
    teacher = torch.log_softmax(torch.tensor([[1.0, -torch.inf, 0.0]]), dim=-1)
    own = torch.log_softmax(torch.tensor([[0.5, 0.2, 0.0]]), dim=-1)
    found, right = Verdicts.of(own, teacher, torch.tensor([0])), Verdicts.of(teacher, teacher, torch.tensor([0]))
    left = teacher[:, [0, 2]]
    torch.testing.assert_close(found.kl, (left.exp() * (left - own[:, [0, 2]])).sum(-1))
    torch.testing.assert_close(right.entropy, -(left.exp() * left).sum(-1))
    assert right.kl.item() == 0.0
    # Ruled out by the other one, it is infinitely far.
    assert Verdicts.of(teacher, own, torch.tensor([0])).kl.item() == torch.inf
