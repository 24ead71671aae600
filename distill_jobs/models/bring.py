"""Bring a teacher into the workdir, in an actor: the driver needs neither torch nor room for the weights."""

from typing import Any

from cluster.files import Folder
from distill_jobs.data.facts import DataFacts
from distill_jobs.spec import Model


class BringWorker:
    """Imports the teacher that the spec names, checks that it fits the data, and saves it as an ordinary folder."""

    def __init__(self, model: Model, data: Folder, folder: Folder) -> None:
        self.model, self.data, self.folder = model, data, folder

    def run(self, _: Any) -> dict[str, Any]:
        from distill_jobs.models.files import model_digest
        from distill_jobs.models.flops import forward_flops
        from distill_jobs.models.teacher import import_teacher

        facts = DataFacts.load(self.data)
        scorer = import_teacher(self.model, facts, self.data, self.folder)
        return {
            "parameters": sum(p.numel() for p in scorer.parameters()),
            "weights": model_digest(self.folder),
            "forward_flops": forward_flops(scorer, facts),
        }
