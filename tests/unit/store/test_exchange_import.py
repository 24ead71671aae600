"""Others' captures as stores: whole, verified, trained from; and everything wrong with a source is one sentence."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from exchange_cases import encode_position, teacher, top, write_topk

from cluster.files import Folder
from distill_jobs.data.batch import make_batch
from distill_jobs.errors import DataError, DistillError, StoreError
from distill_jobs.losses import distillation_loss
from distill_jobs.store.exchange import importing
from distill_jobs.store.exchange.export import export_store
from distill_jobs.store.exchange.filling import Layout
from distill_jobs.store.exchange.importing import import_store
from distill_jobs.store.exchange.lists import Documents
from distill_jobs.store.plan import StorePlan
from distill_jobs.store.reader import LogitStore
from distill_jobs.store.verify import verify
from distill_jobs.training.source import store_source

CLASSES = 258  # bytes, and the two special tokens of the tokenizer ``bytes``
CURVE = {
    "d": 258,
    "k": 24,
    "exact_k": 8,
    "exact_dtype": "float32",
    "polynomial_terms": [0, 1, 2, "sqrt"],
    "term_dtype": "float32",
    "residual_bins": [{"scale_dtype": "float32", "element_bits": 9, "num_elements": 16}],
    "delta_encoding": False,
}


def rows_of(rng: np.random.Generator, lengths: list[int]) -> tuple[list[list[int]], list[np.ndarray]]:
    """Rows of random bytes and, for each of their positions, a teacher [n, CLASSES]."""
    return [rng.integers(0, 256, n).tolist() for n in lengths], [teacher(rng, n, CLASSES) for n in lengths]


def even_tail(dense: np.ndarray, k: int) -> np.ndarray:
    """[n, V] probabilities with all beyond the k likeliest spread evenly."""
    ids, logprobs = top(dense, k)
    left = 1 - np.exp(logprobs).sum(axis=1, keepdims=True)
    out = np.repeat(left / (dense.shape[1] - k), dense.shape[1], axis=1)
    np.put_along_axis(out, ids, np.exp(logprobs), axis=1)
    return out


def by_tokens(store: LogitStore) -> dict[bytes, tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """For each document of the store, by its bytes: targets [n - 1, V] at T = 2, gold ranks and log-probabilities."""
    columns = store.take(np.arange(store.rows))
    batch = make_batch(columns, store.facts)
    signal = store.signal(columns, "cpu")
    head, tail = signal.at(2.0)
    assert signal.head_ids is not None and tail is not None
    width = store.plan.classes - head.shape[1]
    dense = np.repeat((tail.exp() / width)[:, None].numpy(), store.plan.classes, axis=1)
    np.put_along_axis(dense, signal.head_ids.numpy(), head.exp().numpy(), axis=1)
    found = {}
    ids, segments = batch.inputs["input_ids"].numpy(), batch.inputs["segments"].numpy()
    for row in range(store.rows):
        for segment in range(1, segments[row].max() + 1):
            at = np.flatnonzero(segments[row] == segment)
            flat = row * store.plan.positions_per_row + at[:-1]
            found[ids[row, at].astype(np.uint8).tobytes()] = (
                dense[flat],
                signal.gold_rank.numpy()[flat],
                signal.gold_logprob.numpy()[flat],
            )
    return found


def check_documents(store: LogitStore, rows: list[list[int]], wanted: list[np.ndarray], atol: float) -> None:
    """Each row is a document of the store, and at each of its positions the target is ``wanted`` [n, V] at T = 2."""
    found = by_tokens(store)
    for tokens, probabilities in zip(rows, wanted, strict=True):
        targets, ranks, logprobs = found[bytes(tokens)]
        soft = np.sqrt(probabilities[: len(tokens) - 1])
        np.testing.assert_allclose(targets, soft / soft.sum(axis=1, keepdims=True), atol=atol)
        gold = np.take_along_axis(probabilities[:-1], np.array(tokens[1:])[:, None], axis=1)
        np.testing.assert_allclose(np.exp(logprobs), gold[:, 0], atol=atol)
        better = (probabilities[:-1] > gold * (1 + 1e-6)).sum(axis=1)
        np.testing.assert_array_equal(ranks, better)


def test_plain_lists(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    rows, dense = rows_of(rng, [40, 7, 12, 30, 9, 2])
    write_topk(tmp_path / "in" / "data" / "one.parquet", rows[:4], dense[:4], 10)
    write_topk(tmp_path / "in" / "data" / "two.parquet", rows[4:], dense[4:], 10)
    told, into = [], Folder(str(tmp_path / "store"))
    layout = Layout(teacher="somebody")
    manifest = import_store(str(tmp_path / "in"), into, "bytes", layout, lambda *now: told.append(now))
    assert manifest["parts"] == 2 and manifest["tokens"] == 100 and told == [(1, 2), (2, 2)]
    assert verify(into) == []
    store = LogitStore.open(into)
    assert store.facts.sequence_length == 40 and store.facts.reads["origin"] == "import"
    assert store.plan.teacher == "import:somebody" and store.plan.codec == {"name": "topk", "k": 10}
    # Packed: the four rows of the first file take 89 tokens, in three sequences and no more.
    assert store.rows == 4
    check_documents(store, rows, [even_tail(d, 10) for d in dense], atol=2e-3)
    # What a training run sees; there are no data beside the store.
    batch, signal = store_source(into, Folder(str(tmp_path / "nothing")), soft=True).load(np.arange(store.rows), "cpu")
    assert signal is not None and len(signal) == 94
    student = torch.zeros(len(signal), CLASSES, requires_grad=True)
    loss = distillation_loss(student, batch.labels.reshape(-1)[batch.keep.reshape(-1)], signal, 0.5, 2.0).total
    loss.backward()
    assert torch.isfinite(loss) and torch.isfinite(student.grad).all()


def test_distillkit(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    rows, dense = rows_of(rng, [20, 33])
    columns: dict[str, list] = {"input_ids": rows, "compressed_logprobs": [], "bytepacked_indices": []}
    decoded = []
    for one in dense:
        ids, values = top(one, CURVE["k"])
        # As captured through vLLM: the last token of a row has no entry.
        coded = [encode_position(i, v, CURVE) for i, v in zip(ids.tolist(), values.tolist(), strict=True)][:-1]
        columns["bytepacked_indices"].append([list(c[0]) for c in coded])
        columns["compressed_logprobs"].append([list(c[1]) for c in coded])
        share = (1 - np.exp([c[2] for c in coded]).sum(axis=1, keepdims=True)) / (CLASSES - CURVE["k"])
        probabilities = np.repeat(share, CLASSES, axis=1)
        np.put_along_axis(probabilities, ids[:-1], np.exp([c[2] for c in coded]), axis=1)
        decoded.append(np.concatenate([probabilities, probabilities[-1:]]))
    kinds = {"input_ids": pa.list_(pa.uint64())}
    arrays = {n: pa.array(v, kinds.get(n, pa.list_(pa.list_(pa.uint8())))) for n, v in columns.items()}
    (tmp_path / "in").mkdir()
    pq.write_table(pa.table(arrays), tmp_path / "in" / "data_0.parquet")
    (tmp_path / "in" / "compression_config.yaml").write_text(yaml.safe_dump(CURVE))
    into = Folder(str(tmp_path / "store"))
    import_store(str(tmp_path / "in"), into, "bytes", Layout("distillkit"))
    assert verify(into) == []
    store = LogitStore.open(into)
    assert store.plan.codec["k"] == 24
    check_documents(store, rows, decoded, atol=3e-3)
    other = tmp_path / "other.yaml"
    other.write_text(yaml.safe_dump({"teacher": {"logprob_compressor": CURVE | {"exact_k": 9, "residual_bins": []}}}))
    with pytest.raises(DataError, match="belongs to other data"):
        import_store(
            str(tmp_path / "in"), Folder(str(tmp_path / "b")), "bytes", Layout("distillkit", config=str(other))
        )


def test_an_export_comes_back(tmp_path: Path) -> None:
    rng = np.random.default_rng(2)
    rows, dense = rows_of(rng, [16, 5, 9, 3])
    write_topk(tmp_path / "in" / "one.parquet", rows, dense, 10)
    import_store(str(tmp_path / "in"), Folder(str(tmp_path / "a")), "bytes", Layout())
    export_store(Folder(str(tmp_path / "a")), Folder(str(tmp_path / "out")))
    import_store(str(tmp_path / "out"), Folder(str(tmp_path / "b")), "bytes", Layout())
    stores = [LogitStore.open(Folder(str(tmp_path / name))) for name in "ab"]
    # Documents that were packed into one sequence are told apart by its column of segments.
    assert [store.rows for store in stores] == [3, 3] and verify(Folder(str(tmp_path / "b"))) == []
    one, two = map(by_tokens, stores)
    assert set(one) == set(two) == {bytes(row) for row in rows}
    for key, (targets, ranks, logprobs) in one.items():
        np.testing.assert_allclose(two[key][0], targets, atol=1e-3)
        np.testing.assert_array_equal(two[key][1], ranks)
        np.testing.assert_allclose(two[key][2], logprobs, atol=0.02)


def test_names_kinds_and_alignment(tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    rows, dense = rows_of(rng, [10, 14])
    wanted = [even_tail(d, 6) for d in dense]
    # Entry t is about token t: the first has nobody to foretell it, and logits are off by a constant.
    shifted = [np.concatenate([d[:1], d[:-1]]) for d in dense]
    write_topk(tmp_path / "same.parquet", rows, shifted, 6, ("tok", "lp"))
    layout = Layout(ids="tok", values="lp", align="same")
    import_store(str(tmp_path / "same.parquet"), Folder(str(tmp_path / "same")), "bytes", layout)
    check_documents(LogitStore.open(Folder(str(tmp_path / "same"))), rows, wanted, atol=2e-3)
    write_topk(tmp_path / "logits.parquet", rows, [d + 7.0 for d in dense], 6, ("indices", "logits"))
    import_store(str(tmp_path / "logits.parquet"), Folder(str(tmp_path / "logits")), "bytes", Layout(kind="logits"))
    alone = [np.where(w > w.min(axis=1, keepdims=True), w, 0) for w in wanted]
    alone = [a / a.sum(axis=1, keepdims=True) for a in alone]
    store = LogitStore.open(Folder(str(tmp_path / "logits")))
    for tokens, probabilities in zip(rows, alone, strict=True):
        soft = np.sqrt(probabilities[:-1])
        np.testing.assert_allclose(
            by_tokens(store)[bytes(tokens)][0], soft / soft.sum(axis=1, keepdims=True), atol=2e-3
        )


def test_long_rows_are_cut_and_padding_at_their_end_left_out(tmp_path: Path, monkeypatch) -> None:
    rng = np.random.default_rng(4)
    rows, dense = rows_of(rng, [50, 11, 1])
    facts = importing.tokenizer.convert("bytes", Folder(str(tmp_path / "t")))
    pad = facts.pad_id
    assert pad >= 256 and facts.end_id != pad
    padded = [row + [pad] * 3 for row in rows]
    dense_padded = [np.concatenate([d, d[:1], d[:1], d[:1]]) for d in dense]
    write_topk(tmp_path / "in.parquet", padded, dense_padded, 5)
    monkeypatch.setattr(importing, "_TOKENS_PER_PART", 55)
    into = Folder(str(tmp_path / "store"))
    manifest = import_store(str(tmp_path / "in.parquet"), into, "bytes", Layout(length=16))
    assert verify(into) == [] and manifest["parts"] == 2 and manifest["tokens"] == 61
    pieces = [(r[i : i + 16], d[i : i + 16]) for r, d in zip(rows, dense, strict=True) for i in range(0, len(r), 16)]
    pieces = [(r, d) for r, d in pieces if len(r) > 1]
    store = LogitStore.open(into)
    check_documents(store, [r for r, _ in pieces], [even_tail(d, 5) for _, d in pieces], atol=2e-3)
    assert store.facts.dropped == {"single_token": 1}


def test_it_goes_on_and_grows(tmp_path: Path, monkeypatch) -> None:
    rng = np.random.default_rng(5)
    rows, dense = rows_of(rng, [12] * 6)
    for number in range(2):
        some = slice(2 * number, 2 * number + 2)
        write_topk(tmp_path / "in" / f"{number}.parquet", rows[some], dense[some], 6)
    into, parts = Folder(str(tmp_path / "store")), tmp_path / "store" / "parts"
    write, written = importing.write_rows, []

    def stops(work, into, plan, part, *rest):
        if part == 1 and len(written) == 1:
            raise KeyboardInterrupt
        written.append(part)
        return write(work, into, plan, part, *rest)

    monkeypatch.setattr(importing, "write_rows", stops)
    with pytest.raises(KeyboardInterrupt):
        import_store(str(tmp_path / "in"), into, "bytes", Layout())
    with pytest.raises(StoreError, match="not complete"):
        LogitStore.open(into)
    written += [None]
    import_store(str(tmp_path / "in"), into, "bytes", Layout())
    assert written == [0, None, 1]
    before = {path.name: path.read_bytes() for path in parts.glob("*.arrow")}
    write_topk(tmp_path / "in" / "2.parquet", rows[4:], dense[4:], 6)
    import_store(str(tmp_path / "in"), into, "bytes", Layout())
    assert written == [0, None, 1, 2] and verify(into) == []
    assert all((parts / name).read_bytes() == data for name, data in before.items())
    check_documents(LogitStore.open(into), rows, [even_tail(d, 6) for d in dense], atol=2e-3)


EMPTY = pa.array([[[]] * 3], pa.list_(pa.list_(pa.int32())))


def table(**columns) -> pa.Table:
    """One good row of three tokens, with some columns in place of the good ones."""
    good = {
        "input_ids": pa.array([[1, 2, 3]], pa.list_(pa.int64())),
        "ids": pa.array([[[1, 2]] * 3], pa.list_(pa.list_(pa.int32()))),
        "logprobs": pa.array([[[-1.0, -2.0]] * 3], pa.list_(pa.list_(pa.float32()))),
    }
    return pa.table({name: value for name, value in (good | columns).items() if value is not None})


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"logprobs": None}, "has no column logprobs; it has input_ids, ids"),
        ({"input_ids": None}, "has no column input_ids"),
        ({"input_ids": pa.array(["abc"])}, "should hold lists, not string"),
        ({"input_ids": pa.array([[1.5, 2.0, 3.0]])}, "should be integers without nulls, not double"),
        ({"input_ids": pa.array([[1, None, 3]])}, "should be integers without nulls"),
        ({"input_ids": pa.array([None], pa.list_(pa.int64()))}, "has nulls"),
        ({"input_ids": pa.array([[1, 258, 3]])}, "holds token 258, but the tokenizer has 258"),
        ({"input_ids": pa.array([[1, -4, 3]])}, "holds -4, which is no token id"),
        ({"input_ids": pa.array([[1, 2, 1 << 63]], pa.list_(pa.uint64()))}, "an id is 9223372036854775808"),
        ({"input_ids": pa.array([[7]])}, "no rows of more than one token"),
        ({"input_ids": pa.array([[1, 2, 3, 4, 5]])}, "has 5 tokens but lists entries for 3"),
        ({"ids": pa.array([[[1, 2]] * 2])}, "don't list the same number of positions"),
        ({"ids": pa.array([[[1, 2, 3]] * 3])}, "more ids than values"),
        ({"ids": pa.array([[[1, 300]] * 3])}, "rows 0 to 0: class 300 is listed"),
        ({"ids": pa.array([[[1, 1]] * 3])}, "class 1 is listed twice"),
        ({"logprobs": pa.array([[["a", "b"]] * 3])}, "should be numbers without nulls, not string"),
        ({"logprobs": pa.array([[[3.0, 4.0]] * 3])}, "if the values are logits, say so"),
        ({"segments": pa.array([[1, 1]])}, "segments and input_ids don't have the same lengths"),
        ({"segments": pa.array(["abc"])}, "column segments should hold lists"),
        ({"segments": pa.array([[0, 0, 0]])}, "no rows of more than one token"),
        ({"ids": EMPTY, "logprobs": EMPTY}, "lists nothing in its first rows"),
        (
            {"ids": pa.array([[[1, 2], [], [1, 2]]]), "logprobs": pa.array([[[-1.0, -2.0], [], [-1.0, -2.0]]])},
            "a position lists nothing",
        ),
    ],
)
def test_sources_that_are_refused(tmp_path: Path, columns: dict, message: str) -> None:
    pq.write_table(table(**columns), tmp_path / "in.parquet")
    with pytest.raises(DataError, match=message):
        import_store(str(tmp_path / "in.parquet"), Folder(str(tmp_path / "store")), "bytes", Layout())
    assert not (tmp_path / "store" / "manifest.json").exists()


def test_places_that_are_refused(tmp_path: Path) -> None:
    into = Folder(str(tmp_path / "store"))
    with pytest.raises(DataError, match="no Parquet files"):
        import_store(str(tmp_path), into, "bytes", Layout())
    with pytest.raises(DataError, match="does not exist"):
        import_store(str(tmp_path / "no.parquet"), into, "bytes", Layout())
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 is not enough")
    with pytest.raises(DataError, match="as Parquet"):
        import_store(str(tmp_path / "bad.parquet"), into, "bytes", Layout())
    pq.write_table(table(), tmp_path / "in.parquet")
    with pytest.raises(DataError, match="name DistillKit's compression configuration"):
        import_store(str(tmp_path / "in.parquet"), into, "bytes", Layout("distillkit"))
    (tmp_path / "compression_config.yaml").write_text("{")
    with pytest.raises(DataError, match="not valid YAML"):
        import_store(str(tmp_path / "in.parquet"), into, "bytes", Layout("distillkit"))
    import_store(str(tmp_path / "in.parquet"), into, "bytes", Layout())
    plan = into.read_json("plan.json")
    plan["facts"]["reads"] = {}
    into.write_json("plan.json", plan)
    with pytest.raises(StoreError, match="that was captured"):
        import_store(str(tmp_path / "in.parquet"), into, "bytes", Layout())


def test_segments_are_documents() -> None:
    marks = np.array([1, 1, 2, 2, 0, 2, 3, 3, 0, 0, 1])
    found = Documents.marked(np.array([0, 5, 5, 9, 11]), marks)
    assert found.rows.tolist() == [0, 0, 2, 2, 3]
    assert found.begins.tolist() == [0, 2, 0, 1, 1] and found.lengths.tolist() == [2, 2, 1, 2, 1]
    assert found.after(7).within(9, 10).begins.tolist() == [0, 1]


@pytest.mark.parametrize("times", [60, pytest.param(3000, marks=pytest.mark.slow)])
def test_mutated_files_end_in_one_sentence_or_in_a_store(tmp_path: Path, times: int) -> None:
    rng = np.random.default_rng(times)
    rows, dense = rows_of(rng, [9, 5])
    write_topk(tmp_path / "in.parquet", rows, dense, 4)
    good = (tmp_path / "in.parquet").read_bytes()
    for number in range(times):
        bad = bytearray(good)
        for place in rng.integers(0, len(bad), 3):
            bad[place] = rng.integers(256)
        (tmp_path / "in.parquet").write_bytes(
            bytes(bad[: rng.integers(1, len(bad))]) if number % 4 == 0 else bytes(bad)
        )
        into = Folder(str(tmp_path / "store"))
        (into / "parts").clear()
        into.remove("plan.json")
        try:
            import_store(str(tmp_path / "in.parquet"), into, "bytes", Layout())
        except DistillError as error:
            assert "\n" not in str(error)
        else:
            assert verify(into) == []


def test_the_plan_says_where_it_comes_from(tmp_path: Path) -> None:
    pq.write_table(table(), tmp_path / "in.parquet")
    into = Folder(str(tmp_path / "store"))
    import_store(str(tmp_path / "in.parquet"), into, "bytes", Layout(k=3))
    plan = StorePlan.load(into)
    assert plan.facts["reads"] == {"origin": "import", "format": "topk", "values": "logprobs", "tail": "even"}
    assert plan.codec == {"name": "topk", "k": 3}
