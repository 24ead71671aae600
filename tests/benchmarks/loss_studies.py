"""What soft losses are compared on: a set of data with a teacher for it, and how a student of it is trained and judged.

A census with the demo's networks, and text with a small language model. Each trains in plain loops in this process.
"""

import copy
import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow.parquet as pq
import torch
from study import GGUF, TEXTS, chosen, joined, logits_of, positions_of, read_texts, steps_of, train
from torch import Tensor, nn

from cluster.engine import resolve_precision
from distill_jobs.data.encoder import Encoder, Tally
from distill_jobs.data.rows import Rows
from distill_jobs.losses import SoftLoss, distillation_loss
from distill_jobs.models.builtin import Mlp
from distill_jobs.models.layers import cut_layers
from distill_jobs.spec.load import load_job
from distill_jobs.store.codecs.dense import DenseCodec
from distill_jobs.store.codecs.hybrid import HybridCodec
from distill_jobs.store.draws import uniforms
from distill_jobs.store.signal import TeacherSignal

LOG_LOSS, ACCURACY = "log loss", "accuracy"


@dataclass(frozen=True)
class Sizes:
    """What the environment may set, as ``LOSSES_<NAME>``: numbers of tokens are of all texts together."""

    teacher: str = GGUF
    text: str = TEXTS
    census: str = "demo/adult"
    tokens: int = 20_480
    tuning_tokens: int = 8_192
    validation_tokens: int = 4_096
    test_tokens: int = 8_192
    length: int = 128
    batch: int = 2
    layers: str = "0,29"
    seeds: int = 3

    @property
    def of_census(self) -> dict[str, Any]:
        """What results on the census have to agree in to stand in one table."""
        return {"census": self.census}

    @property
    def of_text(self) -> dict[str, Any]:
        """The same of those on text."""
        return {name: value for name, value in asdict(self).items() if name not in ("census", "seeds")}


@dataclass(frozen=True)
class Setting:
    """What a student is trained with; ``alpha`` 0 is training without a teacher."""

    learning_rate: float
    temperature: float = 1.0
    alpha: float = 0.0


class Study(Protocol):
    """One set of data, with a teacher for it.

    Attributes:
        rates, temperatures, alphas: what tuning tries.
        sparse: whether the store keeps only some classes.
    """

    name: str
    rates: tuple[float, ...]
    temperatures: tuple[float, ...]
    alphas: tuple[float, ...]
    sparse: bool

    def learn(self, loss: SoftLoss, setting: Setting, seed: int, tuning: bool) -> nn.Module:
        """A trained student; in tuning perhaps by fewer steps."""

    def judge(self, model: nn.Module | None, split: str) -> dict[str, np.ndarray]:
        """Sums over the positions of each row, [rows] each, of log loss and of right answers; None: the teacher."""

    @property
    def positions(self) -> int:
        """Of a row."""


class Census:
    """The demo's census, teacher and student, from a ``dense`` store."""

    temperatures, alphas, sparse, positions = (1.0, 2.0, 4.0), (0.5, 1.0), False, 1
    rates = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)

    def __init__(self, folder: str) -> None:
        job = load_job("distill_jobs/examples/adult.yaml")
        spec = job.data.features.tabular
        assert spec is not None
        tables = {split: pq.read_table(Path(folder) / f"{split}.parquet") for split in ("train", "test")}
        order = torch.randperm(len(tables["train"]), generator=torch.Generator().manual_seed(0))
        train_rows, validation_rows = order[len(order) // 10 :], order[: len(order) // 10]
        tables = {
            "train": tables["train"].take(train_rows.numpy()),
            "validation": tables["train"].take(validation_rows.numpy()),
            "test": tables["test"],
        }
        rows = {
            name: Rows(dict(zip(t.column_names, t.columns, strict=True)), [""] * len(t)) for name, t in tables.items()
        }
        tally = Tally()
        tally.add(rows["train"], spec)
        encoder = Encoder.fit(tally, spec)
        self.features = {name: torch.from_numpy(encoder.encode(r)) for name, r in rows.items()}
        classes = job.data.classes or ()
        self.labels = {
            name: torch.tensor([classes.index(str(value)) for value in t[job.data.label].to_pylist()])
            for name, t in tables.items()
        }
        self.width, self.outputs = encoder.width, len(classes)
        taught, self.student = job.teacher.model.chosen, job.student.model.chosen
        self.teacher = self._taught(Mlp(self.width, list(taught.hidden), self.outputs, taught.dropout))
        with torch.no_grad():
            logits = self.teacher(self.features["train"])
        codec = DenseCodec()
        self.signal = codec.decode(codec.encode(logits, self.labels["train"]), self.outputs)
        self.name, self.rows, self.epochs = "census", len(logits), 6

    def cut(self, name: str, share: float, epochs: int) -> "Census":
        """The same with students that learn from a share of the rows."""
        other = copy.copy(self)
        other.name, other.rows, other.epochs = name, int(share * self.rows), epochs
        return other

    def _taught(self, teacher: nn.Module) -> nn.Module:
        torch.manual_seed(0)

        def loss_of(step: Tensor) -> Tensor:
            return nn.functional.cross_entropy(teacher(self.features["train"][step]), self.labels["train"][step])

        train(teacher, steps_of(len(self.features["train"]), 512, 15, 0), loss_of, 1e-3)
        return teacher

    def learn(self, loss: SoftLoss, setting: Setting, seed: int, tuning: bool) -> nn.Module:  # noqa: ARG002
        torch.manual_seed(seed)
        student = Mlp(self.width, list(self.student.hidden), self.outputs)

        def loss_of(step: Tensor) -> Tensor:
            logits, signal = student(self.features["train"][step]), chosen(self.signal, step)
            labels = self.labels["train"][step]
            return distillation_loss(logits, labels, signal, setting.alpha, setting.temperature, loss).total

        train(student, steps_of(self.rows, 256, self.epochs, seed), loss_of, setting.learning_rate)
        return student

    @torch.inference_mode()
    def judge(self, model: nn.Module | None, split: str) -> dict[str, np.ndarray]:
        return judged((model or self.teacher)(self.features[split]), self.labels[split], 1)


class Text:
    """A language model teaches a copy of itself with few layers, from a ``hybrid`` 48 + 16 store.

    To be quick, both have only the tokens that occur in the texts.
    """

    name, rates, sparse = "text", (5e-4, 1e-3, 2e-3), True
    # Above T = 2 a hybrid store of so large a vocabulary says too little.
    temperatures, alphas = (1.0, 2.0), (0.5, 1.0)

    def __init__(self, sizes: Sizes, scratch: Path) -> None:
        tokens = {"test": sizes.test_tokens, "validation": sizes.validation_tokens, "train": sizes.tokens}
        texts, teacher = read_texts(sizes.teacher, sizes.text.split(","), sizes.length, tokens, scratch)
        kept = torch.cat([texts.rows(split) for split in tokens]).unique()
        self.teacher, self.classes = narrowed(teacher, kept), len(kept)
        self.splits = {split: torch.searchsorted(kept, texts.rows(split)) for split in tokens}
        # The corpora stand one behind the other: a part of the rows must hold both.
        order = torch.randperm(len(self.splits["train"]), generator=torch.Generator().manual_seed(0))
        self.splits["train"] = self.splits["train"][order]
        self.positions, self.batch = sizes.length, sizes.batch
        self.layers = [int(layer) for layer in sizes.layers.split(",")]
        self.rows = {True: sizes.tuning_tokens // sizes.length, False: len(self.splits["train"])}
        self.half = resolve_precision("auto", "cpu") == "bf16"
        started = time.perf_counter()
        self.signal = self._captured(HybridCodec(48, 16))
        print(f"the teacher's pass took {time.perf_counter() - started:.0f} s; {self.classes:,} tokens", flush=True)

    def _logits(self, model: nn.Module, rows: Tensor) -> tuple[Tensor, Tensor]:
        with torch.autocast("cpu", torch.bfloat16) if self.half else nullcontext():
            return logits_of(model, rows, self.classes)

    @torch.no_grad()
    def _captured(self, codec: HybridCodec) -> TeacherSignal:
        signals = []
        for numbers in torch.arange(len(self.splits["train"])).split(self.batch):
            logits, gold = self._logits(self.teacher, self.splits["train"][numbers])
            chances = uniforms(0, numbers, self.positions)
            signals.append(codec.decode(codec.encode(logits.float(), gold, chances), self.classes))
        return joined(signals)

    def learn(self, loss: SoftLoss, setting: Setting, seed: int, tuning: bool) -> nn.Module:
        student = cut_layers(self.teacher, self.layers)

        def loss_of(step: Tensor) -> Tensor:
            logits, gold = self._logits(student, self.splits["train"][step])
            signal = chosen(self.signal, positions_of(step, self.positions))
            return distillation_loss(logits, gold, signal, setting.alpha, setting.temperature, loss).total

        train(student, steps_of(self.rows[tuning], self.batch, 1, seed), loss_of, setting.learning_rate)
        return student

    @torch.inference_mode()
    def judge(self, model: nn.Module | None, split: str) -> dict[str, np.ndarray]:
        found: dict[str, list[np.ndarray]] = {}
        for rows in self.splits[split].split(self.batch):
            for name, values in judged(*self._logits(model or self.teacher, rows), self.positions).items():
                found.setdefault(name, []).append(values)
        return {name: np.concatenate(values) for name, values in found.items()}


def narrowed(model: nn.Module, kept: Tensor) -> nn.Module:
    """The model (whose embedding is its head, too) with only the tokens ``kept``, in that order."""
    old: Any = model.get_input_embeddings()
    new = nn.Embedding(len(kept), old.weight.shape[1], _weight=old.weight.data[kept].clone())
    assert model.get_output_embeddings().weight is old.weight, "only for tied embeddings"
    model.set_input_embeddings(new)
    head: Any = model.get_output_embeddings()
    head.weight, head.out_features, model.config.vocab_size = new.weight, len(kept), len(kept)
    return model


def judged(logits: Tensor, labels: Tensor, positions: int) -> dict[str, np.ndarray]:
    """Log losses and right answers, summed over the positions of each row."""
    log_loss = nn.functional.cross_entropy(logits.float(), labels, reduction="none")
    right = (logits.argmax(dim=-1) == labels).float()
    return {n: v.view(-1, positions).sum(dim=1).numpy() for n, v in ((LOG_LOSS, log_loss), (ACCURACY, right))}
