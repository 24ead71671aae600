from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from model_cases import LM

from cluster.files import Folder
from distill_jobs import spec
from distill_jobs.data.facts import DataFacts
from distill_jobs.data.gguf_file import check_gguf, quick_gguf_reading
from distill_jobs.data.tokenizer import convert
from distill_jobs.errors import ModelError, VocabularyError
from distill_jobs.models.brought import brought_digest
from distill_jobs.models.build import build_model
from distill_jobs.models.files import load_model
from distill_jobs.models.scorer import sample_inputs
from distill_jobs.models.teacher import import_teacher

WIDTH, INNER, LAYERS, VOCABULARY = 64, 96, 2, 40


def write_llama(path: Path, vocabulary: int = VOCABULARY) -> Path:
    """A tiny llama with weights in 4 bits."""
    random = np.random.default_rng(0)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(128)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(vocabulary)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([f"<{i}>" for i in range(vocabulary)])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)

    def add(name: str, *shape: int) -> None:
        values = random.normal(0, 0.05, shape).astype(np.float32)
        if len(shape) == 1:
            writer.add_tensor(name, values + 1)
        else:
            kind = gguf.GGMLQuantizationType.Q4_1
            writer.add_tensor(name, gguf.quantize(values, kind), raw_dtype=kind)

    add("token_embd.weight", vocabulary, WIDTH)
    for i in range(LAYERS):
        for name, shape in (
            ("attn_norm", (WIDTH,)),
            ("attn_q", (WIDTH, WIDTH)),
            ("attn_k", (WIDTH // 2, WIDTH)),
            ("attn_v", (WIDTH // 2, WIDTH)),
            ("attn_output", (WIDTH, WIDTH)),
            ("ffn_norm", (WIDTH,)),
            ("ffn_gate", (INNER, WIDTH)),
            ("ffn_up", (INNER, WIDTH)),
            ("ffn_down", (WIDTH, INNER)),
        ):
            add(f"blk.{i}.{name}.weight", *shape)
    add("output_norm.weight", WIDTH)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_llama(tmp_path_factory.mktemp("gguf") / "tiny.gguf")


def test_a_gguf_teacher_becomes_an_ordinary_folder_with_the_same_logits(llama: Path, tmp_path: Path) -> None:
    folder = Folder(str(tmp_path / "teacher"))
    model = spec.Model(gguf=str(llama))
    teacher = import_teacher(model, LM, Folder(str(tmp_path / "data")), folder)
    config = folder.read_json("config.json")
    assert "quantization_config" not in config
    assert str(llama.parent) not in str(config)
    assert folder.exists("model.safetensors")
    with torch.no_grad():
        assert torch.equal(load_model(folder)(**sample_inputs(LM)), teacher(**sample_inputs(LM)))
    assert brought_digest(model) == brought_digest(model)


def test_quick_reading_gives_the_same_weights_as_transformers_alone(llama: Path) -> None:
    from transformers import AutoModelForCausalLM, GgufConfig

    settings = GgufConfig(gguf_file=llama.name, dequantize=True)
    plain = AutoModelForCausalLM.from_pretrained(
        llama.parent, gguf_file=llama.name, dtype=torch.float32, quantization_config=settings
    )
    quick = build_model(spec.Model(gguf=str(llama)), LM, seed=0).core
    for name, value in plain.state_dict().items():
        assert torch.equal(value, quick.state_dict()[name]), name


def test_quick_reading_leaves_the_library_as_it_was() -> None:
    before = gguf.GGUFReader, gguf.get_tensor_name_map
    with pytest.raises(KeyError), quick_gguf_reading():
        raise KeyError
    assert (gguf.GGUFReader, gguf.get_tensor_name_map) == before


def test_a_file_cut_anywhere_is_refused(llama: Path, tmp_path: Path) -> None:
    whole = llama.read_bytes()
    check_gguf(llama)
    cut = tmp_path / "cut.gguf"
    places = [0, 2, 4, 10, 24, 60, 300, 900, 1500, 3000, len(whole) // 2, len(whole) - 1]
    for place in places:
        cut.write_bytes(whole[:place])
        with pytest.raises(ModelError, match=r"cut short|is empty") as caught:
            build_model(spec.Model(gguf=str(cut)), LM, seed=0)
        assert "\n" not in str(caught.value) and str(cut) in str(caught.value)


def test_what_is_no_gguf_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="can't read the GGUF file"):
        check_gguf(tmp_path / "absent.gguf")
    for content in (b"PK\x03\x04" * 50, b"GGUF" + b"\x63\0\0\0" * 50, b"GGUF\x03\0\0\0" + b"\0" * 200):
        (tmp_path / "other.gguf").write_bytes(content)
        with pytest.raises(ModelError, match="is not a GGUF file that can be read"):
            check_gguf(tmp_path / "other.gguf")


def test_flipped_bytes_in_the_header_never_escape_as_other_errors(llama: Path, tmp_path: Path) -> None:
    whole = llama.read_bytes()
    random = np.random.default_rng(3)
    damaged = tmp_path / "damaged.gguf"
    for place in random.integers(0, 2500, 300):
        changed = bytearray(whole)
        changed[place] ^= int(random.integers(1, 256))
        damaged.write_bytes(bytes(changed))
        try:
            check_gguf(damaged)
        except ModelError as error:
            assert "\n" not in str(error)


def test_a_vocabulary_smaller_than_the_tokenizers_is_refused(tmp_path: Path) -> None:
    small = write_llama(tmp_path / "small.gguf", vocabulary=32)
    with pytest.raises(VocabularyError, match="knows 32 tokens"):
        build_model(spec.Model(gguf=str(small)), LM, seed=0)


def test_a_teacher_whose_tokenizer_did_not_make_the_data_is_refused(tmp_path: Path) -> None:
    large = write_llama(tmp_path / "large.gguf", vocabulary=300)
    data = Folder(str(tmp_path / "data"))
    made = convert("bytes", data)
    facts = DataFacts(**{**vars(LM), "vocabulary": made.vocabulary})
    with pytest.raises(ModelError, match="has a tokenizer of its own, and the data were made with another"):
        import_teacher(spec.Model(gguf=str(large)), facts, data, Folder(str(tmp_path / "teacher")))
    assert not (tmp_path / "teacher").exists()
