"""A teacher that is brought: checked, and saved in the workdir like any other model."""

from pathlib import Path
from typing import Any

from cluster.files import Folder
from distill_jobs import spec
from distill_jobs.data.at_hand import at_hand
from distill_jobs.data.facts import DataFacts
from distill_jobs.data.tokenizer import TokenizerFacts, identity, open_tokenizer
from distill_jobs.errors import ModelError
from distill_jobs.models.build import build_model
from distill_jobs.models.files import save_model
from distill_jobs.models.huggingface import offline
from distill_jobs.models.packing import check_packing
from distill_jobs.models.scorer import Scorer


def import_teacher(model: spec.Model, facts: DataFacts, data: Folder, folder: Folder) -> Scorer:
    """Load a teacher that comes with its weights (hf, gguf, factory or saved), check it against the data, and save it.

    A GGUF file's weights are dequantised to fp32 and saved as an ordinary Hugging Face folder.

    Raises:
        ModelError: it can't be loaded, is cut short, lacks weights, lets packed documents see each other, names the
            data's classes in another order, or was made for another tokenizer.
        VocabularyError: its vocabulary or number of classes is not the data's.
    """
    scorer = build_model(model, facts, seed=0, trained_further=False, data=data)
    if scorer.origin["kind"] == "hf" and model.kind != "saved":
        _check_class_order(scorer, facts, str(model.chosen))
        _check_tokenizer(model, facts, data)
    check_packing(scorer, facts)
    save_model(scorer, folder, facts, data)
    return scorer


def _check_class_order(scorer: Scorer, facts: DataFacts, where: str) -> None:
    core: Any = scorer.core
    if facts.features == "documents":
        return
    names = [str(core.config.id2label[i]) for i in range(len(core.config.id2label))]
    if set(names) == set(facts.classes) and names != list(facts.classes):
        raise ModelError(
            f"{where} numbers the classes {', '.join(names)}, and the data {', '.join(facts.classes)}: "
            f"set data.classes to the teacher's order"
        )


def _check_tokenizer(model: spec.Model, facts: DataFacts, data: Folder) -> None:
    """Where the teacher brings a tokenizer, the data must have been made with it: other ids would be noise to it."""
    known = TokenizerFacts.load(data)
    if known is None or known.identity == identity(model.chosen):
        return
    theirs = _own_tokens(model)
    if theirs is None:
        return
    ours = open_tokenizer(data).get_vocab(with_added_tokens=True)
    if any(theirs.get(token, number) != number for token, number in ours.items()) or not ours.keys() & theirs.keys():
        raise ModelError(
            f"{model.chosen} has a tokenizer of its own, and the data were made with another: "
            f"leave data.features.{facts.features}.tokenizer out, so that the teacher's is used"
        )


def _own_tokens(model: spec.Model) -> dict[str, int] | None:
    """The teacher's own tokens with their ids; None when it brings no tokenizer."""
    where = at_hand(model.chosen)
    if model.kind == "gguf":
        from transformers.integrations.gguf.reader import read_gguf_metadata

        tokens = read_gguf_metadata(where, ("tokenizer.ggml.tokens",))[0].get("tokenizer.ggml.tokens")
        return {token: number for number, token in enumerate(tokens)} if tokens else None
    from transformers import AutoTokenizer

    local = Path(where).is_dir()
    if local and not any((Path(where) / name).exists() for name in ("tokenizer.json", "tokenizer_config.json")):
        return None
    try:
        found = AutoTokenizer.from_pretrained(where, local_files_only=local or offline())
    except (OSError, ValueError):
        return None
    return dict(found.get_vocab())
