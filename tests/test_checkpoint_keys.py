"""Every file and key that sentence-transformers, transformers and peft read of a checkpoint: honored or refused.

Each test changes files of a tiny BERT, and compares the vectors with those of sentence-transformers.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformer
from tokenizers import Tokenizer as FastTokenizer

from conftest import Family, write_bert
from triton_embed.python_backend.errors import BadInput, ConfigError
from triton_embed.python_backend.inputs.parameters import Item

TEXTS = [
    "hello world",
    "The Cat and THE dog",
    "[CLS] hello [SEP] world [MASK]",
    "[QRY] caf\u00e9 \u4f60\u597d",
    "a b c " * 30,
]
Change = Callable[[Path], None]


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """Write a BERT with mean pooling whose tokenizer is also in vocab.txt, as those of BERT checkpoints are."""
    directory = write_bert(tmp_path / "bert", pooling="mean", vocab_size=128, max_position_embeddings=130)
    vocabulary = json.loads((directory / "tokenizer.json").read_text())["model"]["vocab"]
    (directory / "vocab.txt").write_text("\n".join(sorted(vocabulary, key=vocabulary.__getitem__)) + "\n")
    names = {f"{name}_token": f"[{name.upper()}]" for name in ("unk", "sep", "pad", "cls", "mask")}
    write(directory / "tokenizer_config.json", tokenizer_class="BertTokenizer", model_max_length=120, **names)
    write(directory / "sentence_bert_config.json", max_seq_length=110)
    types = {"": "Transformer", "1_Pooling": "Pooling"}
    modules = [{"path": path, "type": f"sentence_transformers.models.{name}"} for path, name in types.items()]
    (directory / "modules.json").write_text(
        json.dumps([{"idx": i, "name": str(i), **module} for i, module in enumerate(modules)])
    )
    return directory


def write(path: Path, **values: Any) -> None:
    """Add keys to a JSON file, or remove those that are None."""
    content = json.loads(path.read_text()) if path.is_file() else {}
    content = {key: value for key, value in {**content, **values}.items() if value is not None}
    path.write_text(json.dumps(content))


def vectors(directory: Path, texts: list[str]) -> np.ndarray:
    family = Family("bge", directory, pooling="mean")
    rows = family.rows(*map(Item, texts))
    return family.embedder.embed(rows, [family.model.dimensions] * len(rows))


def add_token(directory: Path) -> None:
    """Add a token in tokenizer_config.json that tokenizer.json lacks."""
    token = {
        "content": "[QRY]",
        "lstrip": False,
        "normalized": False,
        "rstrip": False,
        "single_word": False,
        "special": True,
    }
    size = len(json.loads((directory / "tokenizer.json").read_text())["model"]["vocab"])
    write(directory / "tokenizer_config.json", added_tokens_decoder={str(size): token})


def only_vocabulary(**keys: Any) -> Change:
    def change(directory: Path) -> None:
        (directory / "tokenizer.json").unlink()
        write(directory / "tokenizer_config.json", **keys)

    return change


def cased_and_lowercased(directory: Path) -> None:
    """Let tokenizer_config.json say that texts are cased, and sentence_bert_config.json that they are not."""
    only_vocabulary(do_lower_case=False)(directory)
    write(directory / "sentence_bert_config.json", do_lower_case=True)


def tokenizer_length(key: str) -> Change:
    def change(directory: Path) -> None:
        write(directory / "sentence_bert_config.json", max_seq_length=None)
        write(directory / "tokenizer_config.json", **{"model_max_length": None, key: 20})

    return change


def length_file(name: str) -> Change:
    def change(directory: Path) -> None:
        (directory / "sentence_bert_config.json").unlink()
        write(directory / name, max_seq_length=11)

    return change


def old_names(directory: Path) -> None:
    """Name the parameters of the norms as transformers did before version 2."""
    weights = load_file(directory / "model.safetensors")
    endings = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}

    def renamed(name: str) -> str:
        return next((name.removesuffix(new) + old for new, old in endings.items() if name.endswith(new)), name)

    save_file(
        {renamed(name): tensor for name, tensor in weights.items()}, directory / "model.safetensors", {"format": "pt"}
    )


def unused_token(directory: Path) -> None:
    """Give the tokenizer more tokens than the network has embeddings."""
    tokenizer = FastTokenizer.from_file(str(directory / "tokenizer.json"))
    tokenizer.add_special_tokens([f"[MORE{i}]" for i in range(128)])
    tokenizer.save(str(directory / "tokenizer.json"))


def in_sub_folder(directory: Path) -> None:
    """Move all that belongs to the network to a folder of its own, as sentence-transformers did before version 2."""
    folder = directory / "0_Transformer"
    folder.mkdir()
    for path in [path for path in directory.iterdir() if path.is_file() and path.name != "modules.json"]:
        path.rename(folder / path.name)
    modules = json.loads((directory / "modules.json").read_text())
    modules[0]["path"] = folder.name
    (directory / "modules.json").write_text(json.dumps(modules))


HONORED: dict[str, Change] = {
    "network in a sub-folder": in_sub_folder,
    "nothing changed": lambda directory: None,
    "added_tokens_decoder": add_token,
    "model_max_length": tokenizer_length("model_max_length"),
    "max_len": tokenizer_length("max_len"),
    **{
        f"sentence_{network}_config.json": length_file(f"sentence_{network}_config.json")
        for network in ("bert", "roberta", "distilbert", "camembert", "albert", "xlm-roberta", "xlnet")
    },
    "sentence_bert_config.json: do_lower_case": lambda d: write(d / "sentence_bert_config.json", do_lower_case=True),
    "vocab.txt alone": only_vocabulary(),
    "do_lower_case false": only_vocabulary(do_lower_case=False),
    "do_lower_case false and true": cased_and_lowercased,
    "strip_accents false": only_vocabulary(strip_accents=False),
    "tokenize_chinese_chars false": only_vocabulary(tokenize_chinese_chars=False),
    "unk_token": only_vocabulary(unk_token="[MASK]"),
    "names of norms before transformers 2": old_names,
    "token without an embedding": unused_token,
}


@pytest.mark.parametrize("change", HONORED.values(), ids=HONORED)
def test_key_is_honored_as_by_sentence_transformers(change: Change, checkpoint: Path) -> None:
    change(checkpoint)
    expected = SentenceTransformer(str(checkpoint), device="cpu").encode(TEXTS, normalize_embeddings=True)
    np.testing.assert_allclose(vectors(checkpoint, TEXTS), expected, atol=2e-5)


def test_input_with_a_token_without_an_embedding_is_refused(checkpoint: Path) -> None:
    unused_token(checkpoint)
    with pytest.raises(BadInput, match=r"index 1 has token id \d+, which is outside .* \(0 to 127\)"):
        vectors(checkpoint, ["hello", "[MORE127] world"])


def quantize(dtype: torch.dtype) -> Change:
    def change(directory: Path) -> None:
        weights = load_file(directory / "model.safetensors")
        name = "encoder.layer.0.output.dense.weight"
        save_file({**weights, name: weights[name].to(dtype)}, directory / "model.safetensors", {"format": "pt"})

    return change


def lfs_pointer(directory: Path) -> None:
    (directory / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")


def no_tokenizer(directory: Path) -> None:
    for name in ("tokenizer.json", "vocab.txt"):
        (directory / name).unlink()


REFUSED: dict[str, tuple[Change, str]] = {
    "adapter_config.json": (
        lambda d: write(d / "adapter_config.json", base_model_name_or_path="org/base", peft_type="LORA"),
        r"adapter_config\.json: this is an adapter for org/base, and adapters are not applied",
    ),
    "quantization_config": (
        lambda d: write(d / "config.json", quantization_config={"quant_method": "gptq", "bits": 4}),
        r"config\.json: quantization_config has quant_method 'gptq'; quantized weights are not implemented",
    ),
    "int8 weights": (quantize(torch.int8), r"tensor 'encoder\.layer\.0\.output\.dense\.weight' is int8"),
    "float8 weights": (quantize(torch.float8_e4m3fn), r"dense\.weight' is float8_e4m3fn; quantized weights"),
    "git-lfs pointer": (
        lfs_pointer,
        r"model\.safetensors is a git-lfs pointer, not the weights: run git lfs pull",
    ),
    "query_length": (
        lambda d: write(d / "sentence_bert_config.json", query_length=32),
        r"sentence_bert_config\.json: query_length is 32; this is not implemented",
    ),
    "no tokenizer": (
        no_tokenizer,
        "has no tokenizer: none of tokenizer.json, vocab.txt, ",
    ),
}


@pytest.mark.parametrize(("change", "message"), REFUSED.values(), ids=REFUSED)
def test_key_is_refused(change: Change, message: str, checkpoint: Path) -> None:
    change(checkpoint)
    with pytest.raises(ConfigError, match=message):
        vectors(checkpoint, TEXTS)
