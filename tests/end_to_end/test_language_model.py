"""A tiny language model on real text: train a teacher, cut a student from its layers, distil, report."""

import json
from pathlib import Path

import yaml
from conftest import Distill
from transformers import AutoModelForCausalLM, AutoTokenizer


def test_from_text_to_report(prose: Path, distill: Distill, tmp_path: Path) -> None:
    config = {
        "model_type": "llama",
        "hidden_size": 48,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    train = {"steps": 20, "batch_size": 16, "micro_batch": 8, "learning_rate": 0.003, "cpus_per_worker": 2}
    spec = {
        "name": "prose",
        "task": "causal_lm",
        "workdir": str(tmp_path / "prose"),
        "data": {
            "train": str(prose),
            "slices": ["corpus"],
            "features": {"documents": {"sequence_length": 128, "tokenizer": "bytes"}},
            "rows_per_part": 10,
        },
        "teacher": {"model": {"config": config}, "train": train},
        "student": {"model": {"init_from_teacher": {"layers": [0, 2]}}, "train": {**train, "zero_stage": 1}},
        "distill": {"temperature": 1.0, "alpha": 0.9},
        "capture": {"codec": {"topk": {"k": 16}}, "cpus_per_actor": 2},
    }
    path = tmp_path / "prose.yaml"
    path.write_text(yaml.safe_dump(spec))
    done = distill("run", path)
    assert done.returncode == 0, done.stdout + done.stderr
    workdir = tmp_path / "prose"
    found = json.loads((workdir / "evaluation.json").read_text())
    assert found["metric"] == "perplexity" and set(found["slices"]["corpus"]) == {"data", "python"}
    # Bytes at random have a perplexity of 256.
    assert all(1 < measured["perplexity"] < 100 for measured in found["models"].values()), found["models"]
    plan = json.loads((workdir / "store/plan.json").read_text())
    assert plan["codec"] == {"name": "topk", "k": 16} and plan["positions_per_row"] == 128
    # What the codec keeps was measured on rows that nothing was trained on, and is on the last screen.
    kept = json.loads((workdir / "store/fidelity.json").read_text())
    assert kept["split"] == "validation" and kept["codings"][0]["name"] == "topk 16"
    assert set(kept["codings"][0]["slices"]["corpus"]) <= {"data", "python"}
    assert "kept:    topk 16 at" in done.stdout
    told = distill("store", "inspect", workdir / "store")
    assert told.returncode == 0 and "topk" in told.stdout, told.stderr
    # The student is an ordinary Hugging Face folder of two layers.
    student = AutoModelForCausalLM.from_pretrained(workdir / "student/0/model")
    assert student.config.num_hidden_layers == 2
    tokenizer = AutoTokenizer.from_pretrained(workdir / "student/0/model")
    assert tokenizer.decode(tokenizer("A data set.")["input_ids"], skip_special_tokens=True) == "A data set."
