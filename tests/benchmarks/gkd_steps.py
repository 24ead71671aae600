"""Steps of TRL's GKD trainer on random tokens: a script for a Python that has TRL, which knows nothing of this project.

Off-policy throughout (lmbda 0: the data's own text), forward KL (beta 0) at T = 1, in fp32. Takes its settings as JSON
and prints, as JSON on its last line, the seconds of each step on the clock and of the processor, and the highest
resident size in bytes.
"""

import json
import resource
import sys
import tempfile
import time
from typing import Any

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast, TrainerCallback, set_seed
from trl.experimental.gkd import GKDConfig, GKDTrainer


class Watch(TrainerCallback):  # type: ignore[misc]
    """Looks at the clocks after each step."""

    def __init__(self) -> None:
        self.seen: list[tuple[float, float]] = []

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.seen.append((time.perf_counter(), time.process_time()))


def model_of(config: dict[str, Any]) -> Any:
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(**config), dtype=torch.float32)


def collated(examples: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
    """Whole rows, every token of which is scored but the first; the first stands for the prompt."""
    ids = torch.tensor([example["input_ids"] for example in examples])
    labels = ids.clone()
    labels[:, 0] = -100
    prompts = ids[:, :1]
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "labels": labels,
        "prompts": prompts,
        "prompt_attention_mask": torch.ones_like(prompts),
    }


def main(given: dict[str, Any]) -> dict[str, Any]:
    set_seed(0)
    torch.set_num_threads(given["threads"])
    classes = given["student"]["vocab_size"]
    rows = torch.randint(0, classes, (given["rows"] * given["steps"], given["length"])).tolist()
    words = models.WordLevel({"<pad>": 0, "<end>": 1}, unk_token="<pad>")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(words), pad_token="<pad>", eos_token="<end>")
    watch = Watch()
    with tempfile.TemporaryDirectory() as scratch:
        config = GKDConfig(
            output_dir=scratch,
            lmbda=0.0,
            beta=0.0,
            temperature=1.0,
            seq_kd=False,
            max_length=given["length"],
            max_steps=given["steps"],
            per_device_train_batch_size=given["rows"],
            learning_rate=5e-4,
            bf16=False,
            use_cpu=True,
            gradient_checkpointing=False,
            optim="adamw_torch",
            report_to=[],
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
        )
        trainer = GKDTrainer(
            model=model_of(given["student"]),
            teacher_model=model_of(given["teacher"]),
            args=config,
            data_collator=collated,
            train_dataset=Dataset.from_dict({"input_ids": rows}),
            processing_class=tokenizer,
            callbacks=[watch],
        )
        trainer.train()
    pairs = list(zip(watch.seen, watch.seen[1:], strict=False))
    return {
        "seconds": [after[0] - before[0] for before, after in pairs],
        "processor": [after[1] - before[1] for before, after in pairs],
        "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10,
        "threads": torch.get_num_threads(),
    }


if __name__ == "__main__":
    print(json.dumps(main(json.loads(sys.argv[1]))))
