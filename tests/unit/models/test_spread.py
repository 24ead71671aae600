"""Which device each layer of a large teacher goes to, over devices of made-up sizes."""

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import dispatch_model
from model_cases import GPT2, LLAMA, LM, TABULAR, config

from cluster.files import Folder
from distill_jobs.errors import ModelError
from distill_jobs.models import files, spread
from distill_jobs.models.build import build_model
from distill_jobs.models.files import load_model, save_model
from distill_jobs.models.head import split_head
from distill_jobs.models.huggingface import auto_class
from distill_jobs.models.place import load_placed, place
from distill_jobs.models.scorer import Scorer, sample_inputs
from distill_jobs.models.spread import is_spread, layer_map, spread_for
from distill_jobs.spec import Model

EIGHT: dict[str, Any] = {**LLAMA, "num_hidden_layers": 8}
FP32 = torch.float32


def saved(model: Model, path: Path) -> tuple[Scorer, Folder]:
    scorer, folder = build_model(model, LM, seed=3), Folder(str(path / "model"))
    save_model(scorer, folder, LM, Folder(str(path / "no data")))
    return scorer, folder


def mapped(folder: Folder, **free: int) -> dict[str, str]:
    return layer_map(auto_class("documents"), folder.path(), FP32, free)


def test_layers_go_in_order_and_in_even_shares(tmp_path: Path) -> None:
    scorer, folder = saved(config(EIGHT), tmp_path)
    found = mapped(folder, a=10**9, b=10**9, c=10**9, d=10**9)
    assert found["model.embed_tokens"] == found["lm_head"] == "a" and found["model.norm"] == "d"
    layers = [found[f"model.layers.{number}"] for number in range(8)]
    assert layers == sorted(layers) and set(layers) == set("abcd")
    core: Any = scorer.core
    used = dict.fromkeys("abcd", 0)
    for name, device in found.items():
        used[device] += sum(p.numel() * 4 for p in core.get_submodule(name).parameters())
    layer = sum(p.numel() * 4 for p in core.model.layers[0].parameters())
    assert max(used.values()) - min(used.values()) <= layer
    # Every weight belongs to exactly one part, and no layer is cut.
    for name, _ in core.named_parameters():
        assert sum(name.startswith(f"{part}.") for part in found) == 1


def test_a_device_with_less_room_gets_less(tmp_path: Path) -> None:
    _, folder = saved(config(EIGHT), tmp_path)
    found = mapped(folder, small=10**8, large=10**9)
    layers = [found[f"model.layers.{number}"] for number in range(8)]
    assert 0 <= layers.count("small") < 2


def test_tied_and_learned_embeddings_stay_together(tmp_path: Path) -> None:
    _, folder = saved(config(GPT2), tmp_path)
    found = mapped(folder, a=10**9, b=10**9)
    assert found["transformer.wte"] == found["lm_head"] == "a" and found["transformer.ln_f"] == "b"


def test_a_model_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    _, folder = saved(config(EIGHT), tmp_path)
    with pytest.raises(
        ModelError, match=r"2 GPUs have room for 0\.00 GiB \(85% of what is free\); raise gpus_per_actor"
    ):
        mapped(folder, a=10**5, b=10**5)
    with pytest.raises(ModelError, match="its layers can't be told apart"):
        mapped(folder, **{str(number): 10**9 for number in range(40)})


def test_the_map_loads_every_weight(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original, folder = saved(config(EIGHT), tmp_path)
    monkeypatch.setattr(files, "gpus", lambda count: {"cpu": 10**9} if count == 2 else {})
    loaded, inputs = load_placed(folder, "cpu", "fp32", spread=2), sample_inputs(LM)
    assert not is_spread(loaded) and "meta" not in {p.device.type for p in loaded.parameters()}
    assert torch.equal(original(**inputs), loaded(**inputs))


def test_hooks_between_devices_leave_results_and_the_split_head_alone(tmp_path: Path) -> None:
    original, folder = saved(config(EIGHT), tmp_path)
    loaded, inputs = load_model(folder), sample_inputs(LM, rows=3)
    core: Any = loaded.core
    parts = mapped(folder, a=10**9, b=10**9)
    dispatch_model(core, dict.fromkeys(parts, "cpu"), main_device="cpu", force_hooks=True)
    core.hf_device_map = parts
    assert is_spread(loaded) and "forward" in vars(core.lm_head)
    hooked = core.lm_head.forward
    place(loaded, "meta", "fp32")
    assert {p.device.type for p in loaded.parameters()} == {"cpu"}
    split = split_head(loaded, LM)
    assert split is not None and core.lm_head.forward is hooked
    with torch.no_grad():
        own, ours = original(**inputs), split.logits(split.hidden(inputs).flatten(0, 1))
    torch.testing.assert_close(ours, own.flatten(0, 1))
    with pytest.raises(ModelError, match=r"spread over several devices, which torch.compile can't follow"):
        place(loaded, "cpu", "fp32", compile=True)


def test_what_cannot_be_spread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, folder = saved(config(LLAMA), tmp_path)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(
        ModelError, match="can't spread the model over 2 GPUs: this process sees 1; lower gpus_per_actor"
    ):
        load_model(folder, spread=2)
    mlp = Folder(str(tmp_path / "mlp"))
    save_model(build_model(Model.model_validate({"mlp": {}}), TABULAR, seed=0), mlp, TABULAR, Folder(str(tmp_path)))
    with pytest.raises(ModelError, match=r"only Hugging Face models can be spread .* is a mlp model"):
        load_model(mlp, spread=2)


def test_shares_of_a_gpu_are_not_spread(monkeypatch: pytest.MonkeyPatch) -> None:
    assert [spread_for(gpus) for gpus in (0, 0.5, 2, 4)] == [1, 1, 1, 1]
    monkeypatch.setattr(spread.torch.cuda, "is_available", lambda: True)
    assert [spread_for(gpus) for gpus in (0, 0.5, 1, 2, 4)] == [1, 1, 1, 2, 4]
