"""A short look at the real teacher and student on real rows: the rates from which a job's time is foretold."""

import time
from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import torch

from cluster.files import Folder
from distill_jobs.costs.rates import Rates
from distill_jobs.costs.sample import counts, prepare_sample
from distill_jobs.data.batch import Batch, make_batch
from distill_jobs.data.facts import DataFacts
from distill_jobs.data.reader import TableReader
from distill_jobs.losses import distillation_loss, make_loss
from distill_jobs.models.build import build_model
from distill_jobs.models.files import load_model, save_model
from distill_jobs.models.flops import forward_flops
from distill_jobs.models.place import device_for, load_placed, place
from distill_jobs.models.scorer import Scorer
from distill_jobs.models.spread import spread_for
from distill_jobs.models.taps import Taps, widths
from distill_jobs.models.teacher import import_teacher
from distill_jobs.spec import Job, Train
from distill_jobs.spec.distill import greatest
from distill_jobs.store.codecs import Codec, bytes_per_position, make_codec
from distill_jobs.store.features import FeatureCoding
from distill_jobs.store.signal import TeacherSignal

_SECONDS = 0.5


class ProbeWorker:
    """Measures in an actor that holds what a capture actor will hold: its device, its threads."""

    def __init__(self, job: Job, data: Folder | None, teacher: Folder | None) -> None:
        self.job, self.prepared, self.taught = job, data, teacher
        self.gpus = job.capture.crews[0].gpus_per_actor
        self.device = device_for(self.gpus)

    def run(self, scratch: str) -> dict[str, Any]:
        """Measure; returns ``Sizes`` and ``Rates`` as plain values.

        What isn't prepared or taught yet is prepared from the first rows, or built untaught, in ``scratch``.
        """
        folder = Folder(scratch)
        sizes = counts(self.prepared) if self.prepared else prepare_sample(self.job, folder)
        self.data = self.prepared or folder / "data"
        facts = DataFacts.load(self.data)
        started = time.perf_counter()
        teacher, saved = self._teacher(facts, folder / "model")
        brought = 0.0 if self.taught or self.job.teacher.train else time.perf_counter() - started
        student = build_model(self.job.student.model, facts, seed=0, teacher=saved, lora=self.job.student.lora)
        sizes = replace(sizes, teacher_bytes=_bytes(teacher), student_bytes=_bytes(student), bring_seconds=brought)
        return {"sizes": asdict(sizes), "rates": self._rates(facts, teacher, student).as_dict()}

    def _rates(self, facts: DataFacts, teacher: Scorer, student: Scorer) -> Rates:
        job = self.job
        taught = self._row_seconds(teacher, job.teacher.train, facts) if job.teacher.train else 0.0
        place(teacher, self.device, job.capture.precision, autocast=job.capture.autocast)
        codec, features = make_codec(job.capture.codec, facts), FeatureCoding.of(job.capture.features)
        taps = Taps(teacher, features.layers if features else (), "capture.features.layers")
        if features is not None:
            features.check_widths(widths(teacher, taps, facts))
        if job.distill.features is not None:
            # A name that the student doesn't have is better told before the teacher is paid for.
            widths(student, Taps(student, tuple(job.distill.features.pairs), "distill.features.pairs"), facts)
        batch = self._batch(facts, int(job.capture.crews[0].batch_tokens or 0) // facts.positions_per_row // 2)

        def capture() -> None:
            with taps.listening(batch.inputs, lambda layer, rows: features and features.encode(layer, rows)):
                logits = teacher(**batch.inputs)
            _encode(codec, logits.flatten(0, -2)[:, : facts.targets], batch.labels.flatten())

        with torch.inference_mode():
            bare = _seconds(lambda: teacher(**batch.inputs)) / batch.rows
            captured = max(bare, _seconds(capture) / batch.rows)
            student_bare = _seconds(lambda: student.to(self.device).eval()(**batch.inputs)) / batch.rows
        stored = bytes_per_position(codec, facts.targets) + (features.bytes_per_position if features else 0)
        return Rates(
            capture_row_seconds=captured,
            encoding_share=1 - bare / captured,
            student_row_seconds=self._row_seconds(student, job.student.train, facts, teacher),
            baseline_row_seconds=self._row_seconds(student, job.student.train, facts),
            teacher_row_seconds=taught,
            student_forward_row_seconds=student_bare,
            bytes_per_row=float(stored * facts.positions_per_row),
            positions_per_row=facts.positions_per_row,
            teacher_flops=forward_flops(teacher, facts) or 0.0,
            student_flops=forward_flops(student, facts) or 0.0,
        )

    def _teacher(self, facts: DataFacts, scratch: Folder) -> tuple[Scorer, Folder]:
        if self.taught is not None and self.job.teacher.train is not None:
            return load_model(self.taught), self.taught
        if self.taught is not None:
            spec = self.job.capture
            spread = spread_for(self.gpus)
            return load_placed(
                self.taught, self.device, spec.precision, autocast=spec.autocast, spread=spread
            ), self.taught
        model = self.job.teacher.model
        if self.job.teacher.train is None:
            return import_teacher(model, facts, self.data, scratch), scratch
        built = build_model(model, facts, seed=self.job.teacher.seed)
        save_model(built, scratch, facts, self.data)
        return built, scratch

    def _batch(self, facts: DataFacts, rows: int) -> Batch:
        table = TableReader(self.data / "train")
        numbers = np.arange(max(1, rows)) % table.rows
        return make_batch(table.take(numbers), facts).to(self.device)

    def _row_seconds(self, model: Scorer, spec: Train, facts: DataFacts, teacher: Scorer | None = None) -> float:
        """Seconds a row of forward and backward; with a teacher, on its soft labels too."""
        batch = self._batch(facts, spec.rows_per_micro_batch)
        keep = (batch.labels != -100).flatten()
        labels = batch.labels.flatten()[keep]
        signal: TeacherSignal | None = None
        if teacher is not None:
            codec = make_codec(self.job.capture.codec, facts)
            with torch.no_grad():
                logits = teacher(**batch.inputs).flatten(0, -2)[keep][:, : facts.targets]
                encoded = _encode(codec, logits, labels)
            signal = codec.decode(encoded, facts.targets)
        distill = self.job.distill
        # At its largest the soft part counts; how far it moves changes no time.
        alpha, temperature = (greatest(distill.alpha) if signal is not None else 0.0), greatest(distill.temperature)
        soft = make_loss(distill.loss, distill.standardise)
        model.to(self.device, torch.float32).train()

        def step() -> None:
            logits = model(**batch.inputs).flatten(0, -2)[keep]
            loss = distillation_loss(logits, labels, signal, alpha, temperature, soft).total
            torch.autograd.backward(loss)
            model.zero_grad()

        return _seconds(step) / batch.rows


def _encode(codec: Codec, logits: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
    # What a codec draws here is used by nobody: any chances will do.
    return codec.encode(logits, labels, torch.full((len(labels),), 0.5, dtype=torch.float64, device=logits.device))


def _seconds(work: Callable[[], Any]) -> float:
    """Seconds of ``work``: the fastest of at least two passes after one to warm up, over about half a second.

    The fastest, since whatever else the machine does can only make a pass slower.
    """
    work()
    times: list[float] = []
    while len(times) < 2 or (sum(times) < _SECONDS and len(times) < 20):
        started = time.perf_counter()
        work()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    return min(times)


def _bytes(model: Scorer) -> int:
    """Of the saved model, which is in fp32."""
    return 4 * sum(p.numel() for p in model.parameters())
