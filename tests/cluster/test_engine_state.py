"""An engine's state on two real ranks: taken up bit for bit, on other layouts, and what becomes of bad steps."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from engine_cases import ACCUMULATION, RANKS, ROWS, STEPS, Tied, batch, loss_of

from cluster.engine import Engine
from cluster.engine_config import EngineConfig
from cluster.errors import CheckpointError
from cluster.gang import Gang, Rank, run_gang
from cluster.session import Session

pytestmark = pytest.mark.slow

HALF = STEPS // 2
EMA = 0.8
BAD = ("loss", "gradient", "skip")
# So low that ZeRO-3 really cuts such small parameters; by default it keeps them whole on every rank.
CUT = {"zero_optimization": {"stage3_param_persistence_threshold": 0}}


def config(stage: int, precision: str = "fp32", **more: Any) -> EngineConfig:
    return EngineConfig(ROWS, ACCUMULATION, STEPS, 2e-2, 0.1, "cosine", 2, 0.3, precision, stage, ema=EMA, **more)


QUICK = {
    "0-fp32": config(0),
    "0-bf16": config(0, "bf16"),
    "1-bf16": config(1, "bf16"),
    "2-fp32": config(2),
    "3-fp32-cut": config(3, deepspeed=CUT),
    "2-bf16-offload": config(2, "bf16", offload="optimizer"),
}
THOROUGH = {
    "1-fp32": config(1),
    "2-bf16": config(2, "bf16"),
    "3-fp32": config(3),
    "3-bf16": config(3, "bf16"),
    "3-bf16-cut": config(3, "bf16", deepspeed=CUT),
    "3-bf16-offload": config(3, "bf16", offload="optimizer"),
    "3-fp32-offload": config(3, offload="parameters", deepspeed=CUT),
    "1-bf16-fp32-gradients": config(1, "bf16", deepspeed={"data_types": {"grad_accum_dtype": "fp32"}}),
}
LAYOUTS = QUICK | THOROUGH
CASES = [*QUICK, *THOROUGH]
CROSSINGS = [("0-fp32", "3-fp32-cut"), ("3-fp32-cut", "2-fp32"), ("1-bf16", "2-bf16-offload")]
ALONE = ["0-fp32", "1-bf16", "3-fp32-cut"]


class Counting(Tied):
    """With a buffer that training changes, on each rank in its own way, as batch norms do."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(2))


def walk(engine: Engine, rank: Rank, first: int, end: int) -> None:
    """Steps ``first`` to ``end``; the same global batches whatever the number of ranks."""
    each = RANKS * ACCUMULATION // rank.world_size
    for step in range(first, end):
        for micro in range(rank.rank * each, (rank.rank + 1) * each):
            ids, shift, labels = batch(step, *divmod(micro, ACCUMULATION))
            engine.backward(loss_of(engine.forward(ids=ids, shift=shift), labels))
            engine.step()
        engine._module.seen += 1 + rank.rank


def arrays(state: dict[str, torch.Tensor] | None) -> dict[str, np.ndarray]:
    return {name: value.numpy() for name, value in (state or {}).items()}


def ended(engine: Engine) -> dict[str, Any]:
    found = {"state": arrays(engine.full_state()), "ema": arrays(engine.full_state(ema=True)), "steps": engine.steps}
    with engine.averaged():
        found["averaged"] = arrays(engine.full_state())
        found["scored"] = engine.forward(ids=batch(0, 0, 0)[0], shift=batch(0, 0, 0)[1]).detach().float().numpy()
    found["after"] = arrays(engine.full_state())
    found["seen"] = engine._module.seen.float().numpy()
    return found


def straight(rank: Rank, settings: EngineConfig, folder: str) -> dict[str, Any]:
    engine = Engine(Counting(), settings, rank.device)
    walk(engine, rank, 0, HALF)
    snapshot = engine.snapshot()
    walk(engine, rank, HALF, STEPS)
    Path(folder).mkdir(exist_ok=True, parents=True)
    names = snapshot.write(Path(folder))  # written when the engine has long gone on
    assert sorted(names) == [f"engine-0000{rank.rank}.json", f"engine-0000{rank.rank}.safetensors"]
    engine.barrier()
    return _closed(engine, ended(engine))


def resumed(rank: Rank, settings: EngineConfig, folder: str) -> dict[str, Any]:
    engine = Engine(Counting(), settings, rank.device)
    walk(engine, rank, 7, 9)  # into quite another state
    engine.load_state(Path(folder))
    assert engine.steps == HALF
    walk(engine, rank, HALF, STEPS)
    return _closed(engine, ended(engine))


def bad(rank: Rank, settings: EngineConfig, kinds: tuple[str, ...]) -> dict[str, Any]:
    """A good step, then one of each kind that must not move, and a good one."""
    engine = Engine(Counting(), settings, rank.device)
    outcomes, unmoved = [], True
    for step, what in ((0, "good"), *((1, kind) for kind in kinds), (2, "good")):
        before = engine.full_state()
        for micro in range(ACCUMULATION):
            ids, shift, labels = batch(step, rank.rank, micro)
            loss = loss_of(engine.forward(ids=ids, shift=shift), labels)
            if (micro, rank.rank) == (0, 1):
                # The second has a finite value, and a gradient that is infinite: the slope of a root at 0.
                rooted = loss + (loss - loss.detach()).abs().sqrt()
                loss = {"loss": loss * float("nan"), "gradient": rooted}.get(what, loss)
            engine.backward(loss)
            outcomes.append(engine.skip() if (micro, what) == (1, "skip") else engine.step(strict=False))
        after = engine.full_state()
        if what != "good" and before and after:
            unmoved = unmoved and all(torch.equal(before[name], after[name]) for name in before)
    told = [(outcome.what, outcome.culprit) for outcome in outcomes]
    return _closed(engine, {"state": arrays(engine.full_state()), "told": told, "unmoved": unmoved})


def damaged(rank: Rank, settings: EngineConfig, folder: str) -> str:
    engine = Engine(Counting(), settings, rank.device)
    try:
        engine.load_state(Path(folder))
    except CheckpointError as error:
        return str(error)
    finally:
        engine.close()
    return "not noticed"


def _closed(engine: Engine, found: dict[str, Any]) -> dict[str, Any]:
    engine.barrier()
    engine.close()
    return found


def everything(rank: Rank, jobs: list[tuple[Any, ...]]) -> list[Any]:
    return [job(rank, *rest) for job, *rest in jobs]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("states")


def jobs_of(names: Any, folder: Path) -> dict[Any, tuple[Any, ...]]:
    jobs: dict[Any, tuple[Any, ...]] = {}
    for name in names:
        jobs["straight", name] = (straight, LAYOUTS[name], str(folder / name))
        jobs["resumed", name] = (resumed, LAYOUTS[name], str(folder / name))
        jobs["bad", name] = (bad, LAYOUTS[name], BAD)
        jobs["good", name] = (bad, LAYOUTS[name], ())
    return jobs


@pytest.fixture(scope="module")
def results(session: Session, folder: Path, request: pytest.FixtureRequest) -> dict[Any, Any]:
    asked = {item.callspec.params["name"] for item in request.session.items if "name" in _parameters(item)}
    jobs = jobs_of([name for name in LAYOUTS if name in asked or name in QUICK], folder)
    jobs |= {("crossed", pair): (resumed, LAYOUTS[pair[1]], str(folder / pair[0])) for pair in CROSSINGS}
    values, _ = run_gang(session, everything, list(jobs.values()), Gang(RANKS), lambda _: None)
    return dict(zip(jobs, values, strict=True))


@pytest.fixture(scope="module")
def alone(session: Session, results: dict[Any, Any], folder: Path) -> dict[str, Any]:
    """What one rank makes of the states that two have written, and of some that somebody has tampered with."""
    assert results
    jobs: dict[str, tuple[Any, ...]] = {
        name: (resumed, replace(LAYOUTS[name], accumulation=RANKS * ACCUMULATION), str(folder / name)) for name in ALONE
    }
    jobs |= {name: (damaged, LAYOUTS["1-bf16"], str(path)) for name, path in tampered(folder / "1-bf16").items()}
    values, _ = run_gang(session, everything, list(jobs.values()), Gang(1), lambda _: None)
    return dict(zip(jobs, values, strict=True))


def tampered(source: Path) -> dict[str, Path]:
    made = {name: source.parent / name for name in ("facts lost", "tensors lost", "cut", "text", "foreign", "empty")}
    for name, folder in made.items():
        folder.mkdir()
        for path in source.iterdir() if name != "empty" else ():
            (folder / path.name).write_bytes(path.read_bytes())
    (made["facts lost"] / "engine-00001.json").unlink()
    (made["tensors lost"] / "engine-00001.safetensors").unlink()
    cut = made["cut"] / "engine-00001.safetensors"
    cut.write_bytes(cut.read_bytes()[:-20])
    (made["text"] / "engine-00000.json").write_text("{")
    for path in made["foreign"].glob("*.json"):
        path.write_text(path.read_text().replace('"body.0.bias"', '"body.9.bias"'))
    return made


def _parameters(item: Any) -> dict[str, Any]:
    callspec = getattr(item, "callspec", None)
    return callspec.params if callspec is not None and item.path == Path(__file__) else {}


def same(left: dict[str, np.ndarray], right: dict[str, np.ndarray]) -> None:
    assert left.keys() == right.keys()
    for name in left:
        np.testing.assert_array_equal(left[name], right[name], err_msg=name)


@pytest.mark.parametrize("name", CASES)
def test_a_resumed_run_is_the_undisturbed_one_bit_for_bit(results: dict[Any, Any], name: str) -> None:
    whole, again = results["straight", name], results["resumed", name]
    same(whole["state"], again["state"])
    same(whole["ema"], again["ema"])
    assert whole["steps"] == again["steps"] == STEPS
    np.testing.assert_array_equal(again["seen"], [STEPS, STEPS])


@pytest.mark.parametrize("pair", CROSSINGS, ids=" to ".join)
def test_another_zero_stage_takes_up_the_same_state(results: dict[Any, Any], pair: tuple[str, str]) -> None:
    whole, crossed = results["straight", pair[1]], results["crossed", pair]
    tolerance = 2e-6 if "fp32" in pair[0] else 0.02
    for part in ("state", "ema"):
        for name, value in whole[part].items():
            np.testing.assert_allclose(crossed[part][name], value, atol=tolerance, err_msg=name)


@pytest.mark.parametrize("layout", ALONE)
def test_another_number_of_ranks_takes_up_the_same_state(
    results: dict[Any, Any], alone: dict[str, Any], layout: str
) -> None:
    tolerance = 2e-6 if "fp32" in layout else 0.02
    for key, value in results["straight", layout]["state"].items():
        if key != "seen":
            np.testing.assert_allclose(alone[layout]["state"][key], value, atol=tolerance, err_msg=key)


@pytest.mark.parametrize("name", CASES)
def test_the_average_is_that_of_the_masters(results: dict[Any, Any], name: str) -> None:
    found = results["straight", name]
    same(found["averaged"], found["ema"])
    same(found["after"], found["state"])
    assert any(not np.array_equal(found["ema"][key], found["state"][key]) for key in found["state"])
    tolerance = 2e-5 if "fp32" in name.split("-")[1] else 0.05
    for key, value in averages().items():
        np.testing.assert_allclose(found["ema"][key], value, atol=tolerance, err_msg=key)


def averages() -> dict[str, np.ndarray]:
    """The reference: the moving average over the same run in one process, without an engine."""
    model = Tied()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    plain = [p for name, p in trained.items() if p.ndim >= 2]
    vectors = [p for name, p in trained.items() if p.ndim < 2]
    optimizer = torch.optim.AdamW([{"params": plain, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}])
    average = {name: p.detach().clone() for name, p in trained.items()}
    for step in range(STEPS):
        parts = [batch(step, rank, micro) for rank in range(RANKS) for micro in range(ACCUMULATION)]
        loss = torch.stack([loss_of(model(ids, shift), labels) for ids, shift, labels in parts]).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained.values(), 0.3)
        for group in optimizer.param_groups:
            group["lr"] = config(0).learning_rate_at(step)
        optimizer.step()
        decay = min(EMA, (2 + step) / (11 + step))
        for name, p in trained.items():
            average[name] = decay * average[name] + (1 - decay) * p.detach()
    return {name: value.numpy() for name, value in average.items()}


@pytest.mark.parametrize("name", CASES)
def test_bad_steps_leave_no_trace(results: dict[Any, Any], name: str) -> None:
    found = results["bad", name]
    pending, moved = ("pending", None), ("moved", None)
    middle = [("not_finite", "loss"), pending, ("not_finite", "gradient"), pending, ("skipped", None)]
    assert found["told"] == [pending, moved, pending, *middle, pending, moved]
    assert found["unmoved"]
    same(found["state"], results["good", name]["state"])


def test_damaged_and_foreign_states_are_refused(alone: dict[str, Any]) -> None:
    assert "incomplete: 1 of 2 ranks" in alone["facts lost"] and "damaged" in alone["tensors lost"]
    assert "damaged" in alone["cut"] and "damaged" in alone["text"]
    assert "of another model: body.0.bias differs" in alone["foreign"]
    assert "incomplete" in alone["empty"]
