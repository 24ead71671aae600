"""The tokenizer: found, converted once to an ordinary Hugging Face folder in ``data/tokenizer``, and fast to load.

It is the one that the spec names (a Hugging Face folder or id, a GGUF file, or ``bytes``), by default the teacher's.
"""

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from tokenizers import Tokenizer

from cluster.errors import FileError
from cluster.files import Folder, digest, sha256, store_folder
from distill_jobs.data.at_hand import at_hand, is_remote, stamps
from distill_jobs.data.gguf_file import check_gguf, quick_gguf_reading
from distill_jobs.errors import DataError
from distill_jobs.spec import Job

FACTS = "tokenizer_facts.json"
_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json")
_MORE_FILES = ("merges.txt", "vocab.txt", "tokenizer.model", "spiece.model")
_PAD, _END = "<|pad|>", "<|endoftext|>"


@dataclass(frozen=True)
class TokenizerFacts:
    """What packing and the vocabulary contract need. ``identity`` is the digest of what it was converted from."""

    identity: str
    vocabulary: int
    sha: str
    pad_id: int
    end_id: int | None

    @classmethod
    def load(cls, data: Folder) -> Self | None:
        """What an earlier conversion into ``data/tokenizer`` recorded; None when there was none."""
        try:
            return cls(**data.read_json(FACTS))
        except (FileError, TypeError):
            return None


def tokenizer_of(job: Job) -> str | None:
    """Where the job's tokenizer comes from; None for features without text.

    Raises:
        DataError: the spec names none, and the teacher brings none.
    """
    features = job.data.features
    if features.kind not in ("documents", "text"):
        return None
    model = job.teacher.model
    source = features.chosen.tokenizer or model.hf or model.gguf
    if source is None:
        raise DataError(
            f"a {model.kind} teacher brings no tokenizer: set data.features.{features.kind}.tokenizer to a Hugging "
            "Face folder, a GGUF file, or bytes"
        )
    return str(source)


def identity(source: str) -> str:
    """A digest of the tokenizer's files (of the bare name for a Hugging Face id), without loading it."""
    path = Path(source)
    if is_remote(source):
        ours = {source.rpartition("/")[2], *_FILES, *_MORE_FILES}
        return digest({name: stamp for name, stamp in stamps(source).items() if name in ours})
    try:
        if path.is_file():
            return digest(sha256(Folder(str(path.parent)), path.name))
        if path.is_dir():
            folder, names = Folder(source), (*_FILES, *_MORE_FILES)
            return digest({name: sha256(folder, name) for name in names if (path / name).exists()})
    except FileError as error:
        raise DataError(f"can't read the tokenizer: {error}") from None
    if source.endswith(".gguf"):
        raise DataError(f"the tokenizer's file {source} does not exist")
    return digest(source)


def convert(source: str, data: Folder) -> TokenizerFacts:
    """Save the tokenizer as ``data/tokenizer`` and its facts as ``data/tokenizer_facts.json``, unless that is done.

    Raises:
        DataError: it can't be loaded, or has no fast (``tokenizer.json``) form.
        ModelError: its GGUF file is damaged or cut short, or there is nothing at its address.
    """
    wanted = identity(source)
    done = TokenizerFacts.load(data)
    if done is not None and done.identity == wanted and (data / "tokenizer").exists("tokenizer.json"):
        return done
    tokenizer = _bytes_tokenizer() if source == "bytes" else _load(at_hand(source))
    vocabulary = tokenizer.get_vocab()
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    facts = TokenizerFacts(
        identity=wanted,
        vocabulary=max(len(tokenizer), max(vocabulary.values()) + 1),
        sha=vocabulary_digest(vocabulary),
        pad_id=0 if pad is None else int(pad),
        end_id=tokenizer.eos_token_id,
    )
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        if not (Path(folder) / "tokenizer.json").exists():
            raise DataError(f"the tokenizer {source} has no fast form (tokenizer.json); convert it first")
        store_folder(Path(folder), data / "tokenizer")
    data.write_json(FACTS, vars(facts))
    return facts


def vocabulary_digest(vocabulary: dict[str, int]) -> str:
    """The digest of each token with its id: equal digests mean that the numbers mean the same tokens."""
    return digest(sorted((number, token) for token, number in vocabulary.items()))


def open_tokenizer(data: Folder) -> Tokenizer:
    """The converted tokenizer for encoding many texts at once, without the weight of transformers."""
    try:
        tokenizer = Tokenizer.from_buffer((data / "tokenizer").read("tokenizer.json"))
    except FileError as error:
        raise DataError(f"{error}; prepare the data again") from None
    except Exception:
        raise DataError(f"{data}/tokenizer/tokenizer.json is damaged; prepare the data again") from None
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


def _load(source: str) -> Any:
    from transformers import AutoTokenizer

    path = Path(source)
    if source.endswith(".gguf"):
        check_gguf(path)
    try:
        if source.endswith(".gguf"):
            with quick_gguf_reading():
                return AutoTokenizer.from_pretrained(str(path.parent), gguf_file=path.name)
        return AutoTokenizer.from_pretrained(source)
    except Exception as error:
        # transformers raises nearly anything for a folder that is not one, or a file cut short.
        why = (" ".join(str(error).split()) or type(error).__name__)[:200]
        raise DataError(f"can't load the tokenizer from {source} ({why})") from None


def _bytes_tokenizer() -> Any:
    """Every byte a token whose id is the byte, and after them one token each to pad and to end a document."""
    from tokenizers import decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {char: byte for byte, char in enumerate(_byte_characters())}
    core = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens([_PAD, _END])
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token=_PAD, eos_token=_END)


def _byte_characters() -> list[str]:
    """The printable character that stands for each byte in byte-level BPE (Radford et al. 2019, GPT-2)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    characters, spare = [], 256
    for byte in range(256):
        characters.append(chr(byte if byte in printable else spare))
        spare += byte not in printable
    return characters
