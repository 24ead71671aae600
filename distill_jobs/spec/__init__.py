"""The job spec: typed, strict, YAML. Reading one imports neither torch nor ray."""

from distill_jobs.spec.capture import Capture, Codec
from distill_jobs.spec.distill import Distill
from distill_jobs.spec.job import Job
from distill_jobs.spec.load import load_job, parse_job
from distill_jobs.spec.model import Lora, Model, PrunedTeacher
from distill_jobs.spec.parts import Data, Features
from distill_jobs.spec.train import Train

__all__ = [
    "Capture",
    "Codec",
    "Data",
    "Distill",
    "Features",
    "Job",
    "Lora",
    "Model",
    "PrunedTeacher",
    "Train",
    "load_job",
    "parse_job",
]
