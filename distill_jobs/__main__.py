"""``python -m distill_jobs`` is ``distill``."""

from distill_jobs.cli import main

main()
