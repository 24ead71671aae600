"""What runs on the cluster when a job was submitted: ``python -m distill_jobs.submitted VERB``."""

import sys
from pathlib import Path


def main() -> None:
    """Put what has travelled with the job where all nodes find it, and do what ``distill VERB`` does."""
    from distill_jobs.cli import main as run
    from distill_jobs.cli import told

    told(_unpack)
    sys.argv[1:] = [*sys.argv[1:], "spec.yaml"]
    run()


def _unpack() -> None:
    from cluster.files import Folder
    from distill_jobs.shipping import unpack
    from distill_jobs.spec import load_job

    unpack(Path.cwd(), Folder(load_job("spec.yaml").workdir))


if __name__ == "__main__":
    main()
