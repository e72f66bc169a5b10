"""Every file and key that sentence-transformers, transformers and peft read of a checkpoint: honored or refused.

Each test changes files of a tiny checkpoint and compares the vectors: those of a BERT with sentence-transformers, those
of other networks with transformers.
"""

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoints import CORPUS, write_clip, write_decoder, write_qwen2_vl, write_xlm_roberta
from oracles import clip_text_vectors, decoder_vectors, gme_inputs, gme_vectors, token_ids
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformer
from sentencepiece import SentencePieceTrainer
from tokenizers import Tokenizer as FastTokenizer
from transformers import AutoConfig

from conftest import Family, write_bert
from triton_embed.python_backend.errors import BadInput, ConfigError
from triton_embed.python_backend.inputs.parameters import Item

TEXTS = [
    "hello world",
    "The Cat and THE dog",
    "[CLS] hello [SEP] world [MASK]",
    "[QRY] caf\u00e9 \u4f60\u597d",
    "hello world " + "a b c " * 60,
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


def vectors(directory: Path, texts: list[str], family: str = "bge", **parameters: str) -> np.ndarray:
    loaded = Family(family, directory, **({"pooling": "mean"} if family == "bge" else {}), **parameters)
    rows, dimensions = loaded.rows(*map(Item, texts)), loaded.model.dimensions
    return loaded.embedder.embed(rows, [dimensions] * len(rows))[:, :dimensions]


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


def without(*keys: str, section: str = "") -> Change:
    """Leave keys of config.json, or of an object in it, to the default of the class."""

    def change(directory: Path) -> None:
        config = json.loads((directory / "config.json").read_text())
        for key in keys:
            (config[section] if section else config).pop(key)
        (directory / "config.json").write_text(json.dumps(config))

    return change


def sentence_config(**values: Any) -> Change:
    return lambda directory: write(directory / "sentence_bert_config.json", **values)


def config(**values: Any) -> Change:
    return lambda directory: write(directory / "config.json", **values)


def in_tokenizer_json(**values: Any) -> Change:
    return lambda directory: write(directory / "tokenizer.json", **values)


def empty_length_file(directory: Path) -> None:
    (directory / "sentence_bert_config.json").write_text("{}")
    write(directory / "sentence_roberta_config.json", max_seq_length=11)


def null_prompt(directory: Path) -> None:
    (directory / "config_sentence_transformers.json").write_text(json.dumps({"prompts": {"query": None}}))


def tensors(change_all: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> Change:
    def change(directory: Path) -> None:
        changed = change_all(load_file(directory / "model.safetensors"))
        save_file({name: tensor.clone() for name, tensor in changed.items()}, directory / "model.safetensors")

    return change


def other_weights(directory: Path) -> None:
    """Add the weights of another network, under the names that transformers reads last."""
    weights = load_file(directory / "model.safetensors")
    others = {name: torch.randn_like(tensor) for name, tensor in weights.items()}
    save_file(others, directory / "model-00001-of-00001.safetensors", {"format": "pt"})
    index = {"weight_map": dict.fromkeys(weights, "model-00001-of-00001.safetensors")}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    torch.save(others, directory / "pytorch_model.bin")


def classifier(directory: Path) -> None:
    """Name the tensors as a classifier does, and add its head."""
    head = {"classifier.weight": torch.ones(2, 60), "qa_outputs.weight": torch.ones(2, 60)}
    tensors(lambda weights: {f"bert.{name}": tensor for name, tensor in weights.items()} | head)(directory)


def add_module(kind: str, **values: Any) -> Change:
    def change(directory: Path) -> None:
        modules = json.loads((directory / "modules.json").read_text())
        modules.append({"idx": 2, "name": "2", "path": f"2_{kind}", "type": f"sentence_transformers.models.{kind}"})
        (directory / "modules.json").write_text(json.dumps(modules))
        (directory / f"2_{kind}").mkdir()
        write(directory / f"2_{kind}" / "config.json", **values)

    return change


LEFT = {"direction": "Left", "max_length": 64, "strategy": "LongestFirst", "stride": 0}
TEXT_MODALITY = {"text": {"method": "forward", "method_output_name": "last_hidden_state"}}


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
    "keys left to the class": without("layer_norm_eps", "hidden_act", "type_vocab_size", "pad_token_id"),
    "aliases of activations": config(hidden_act="gelu_python"),
    "another alias": config(hidden_act="gelu_fast"),
    "first length file empty": empty_length_file,
    "arguments of the tokenizer: length": sentence_config(processor_kwargs={"model_max_length": 9}),
    "arguments without effect": sentence_config(model_args={"dtype": "float32"}, tokenizer_args={"use_fast": True}),
    "config by sentence-transformers 6": sentence_config(
        transformer_task="feature-extraction",
        modality_config=TEXT_MODALITY,
        module_output_name="token_embeddings",
        unpad_inputs=False,
    ),
    "truncation_side": lambda d: write(d / "tokenizer_config.json", truncation_side="left"),
    "tokenizer.json: truncation": in_tokenizer_json(truncation=LEFT),
    "padding_side": lambda d: write(d / "tokenizer_config.json", padding_side="left"),
    "chat_template": lambda d: write(d / "tokenizer_config.json", chat_template="{{ 'X' }}"),
    "special_tokens_map.json": lambda d: write(d / "special_tokens_map.json", unk_token="[MASK]"),
    "truncate_dim": lambda d: write(d / "config_sentence_transformers.json", truncate_dim=20),
    "similarity_fn_name": lambda d: write(d / "config_sentence_transformers.json", similarity_fn_name="dot"),
    "prompt null": null_prompt,
    "Dropout module": add_module("Dropout", dropout=0.5),
    "weights in several files": other_weights,
    "heads of classifiers": classifier,
    "weights in float64": tensors(lambda weights: {name: tensor.double() for name, tensor in weights.items()}),
    "generation_config.json": lambda d: write(d / "generation_config.json", max_length=5, eos_token_id=7),
    "auto_map": config(auto_map={"AutoModel": "modeling.Network"}),
    "num_labels": config(num_labels=5, problem_type="regression"),
}


@pytest.mark.parametrize("change", HONORED.values(), ids=HONORED)
def test_key_is_honored_as_by_sentence_transformers(change: Change, checkpoint: Path) -> None:
    change(checkpoint)
    network = SentenceTransformer(str(checkpoint), device="cpu")
    expected = network.encode(TEXTS, normalize_embeddings=True, batch_size=1)  # padding would shift positions
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
    **{
        f"sentence_bert_config.json: {key}": (
            sentence_config(**{key: value}),
            rf"sentence_bert_config\.json: {key}.* is .*not? implemented|{key} is .*only .* is implemented",
        )
        for key, value in (
            ("processing_kwargs", {"text": {"max_length": 7}}),
            ("transformer_task", "fill-mask"),
            ("module_output_name", "sentence_embedding"),
            ("modality_config", {**TEXT_MODALITY, "message": TEXT_MODALITY["text"]}),
            ("tokenizer_args", {"do_lower_case": False}),
            ("config_kwargs", {"num_hidden_layers": 2}),
            ("model_kwargs", {"quantization_config": {}}),
        )
    },
    "adapter without its base": (
        lambda d: ((d / "config.json").unlink(), write(d / "adapter_config.json", peft_type="LORA")),
        r"adapter_config\.json: this is an adapter for its base model",
    ),
    "adapter that is not merged": (
        tensors(lambda weights: {**weights, "encoder.layer.0.attention.self.query.lora_A.weight": torch.ones(2, 60)}),
        r"lora_A\.weight' belongs to an adapter that is not merged",
    ),
    **{
        f"weights by {kind}": (
            tensors(lambda weights, name=name: {**weights, name: torch.ones(2)}),
            rf"'{name}' belongs to weights quantized as {kind}",
        )
        for kind, name in (
            ("GPTQ or AWQ", "encoder.layer.0.output.dense.qweight"),
            ("FP8", "encoder.layer.0.output.dense.weight_scale_inv"),
            ("bitsandbytes INT8", "encoder.layer.0.output.dense.SCB"),
        )
    },
    "unknown tensor": (
        tensors(lambda weights: {**weights, "gate.weight": torch.ones(2)}),
        r"model\.safetensors: tensor 'gate\.weight' is not part of this network",
    ),
    "git-lfs pointer of the tokenizer": (
        lambda d: (d / "tokenizer.json").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n"),
        r"tokenizer\.json is a git-lfs pointer, not the file: run git lfs pull",
    ),
    "git-lfs pointer of the config": (
        lambda d: (d / "config.json").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n"),
        r"config\.json is a git-lfs pointer, not the file: run git lfs pull",
    ),
    "is_decoder": (config(is_decoder=True), r"config\.json: is_decoder is True; only false is implemented"),
    "is_causal": (config(is_causal=True), r"config\.json: is_causal is True; only false is implemented"),
    "position_embedding_type": (
        config(position_embedding_type="relative_key"),
        r"config\.json: position_embedding_type is 'relative_key'; only 'absolute'",
    ),
    "hidden_act": (config(hidden_act="mish"), r"config\.json: hidden_act is 'mish'; must be one of gelu, "),
    "value that transformers refuses": (
        lambda d: (without("layer_norm_eps")(d), config(hidden_dropout_prob="none")(d)),
        r"config\.json: transformers cannot read it: .*hidden_dropout_prob",
    ),
    "truncation_side": (
        lambda d: write(d / "tokenizer_config.json", truncation_side="middle"),
        "transformers cannot load the tokenizer: Truncation side should be selected between 'right' and 'left'",
    ),
    "model_type of sentence-transformers": (
        lambda d: write(d / "config_sentence_transformers.json", model_type="SparseEncoder"),
        r"config_sentence_transformers\.json: model_type is 'SparseEncoder'; only 'SentenceTransformer'",
    ),
    "LayerNorm module": (add_module("LayerNorm"), r"modules\.json: module '.*LayerNorm' is not implemented"),
    "WordWeights module": (add_module("WordWeights"), r"modules\.json: module '.*WordWeights' is not implemented"),
    "include_prompt": (
        lambda d: write(d / "1_Pooling" / "config.json", include_prompt=False),
        r"1_Pooling/config\.json: include_prompt is False; only true",
    ),
    "weightedmean": (
        lambda d: write(d / "1_Pooling" / "config.json", pooling_mode="weightedmean"),
        r"1_Pooling/config\.json: pooling 'weightedmean' is not implemented; use one of cls, mean, last, max",
    ),
    "files of another tokenizer class": (
        lambda d: ((d / "tokenizer.json").unlink(), (d / "vocab.txt").rename(d / "spiece.model")),
        r"has none of tokenizer\.json, vocab\.txt, the files of its tokenizer class BertTokenizer",
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


DECODERS = {"mistral": "e5_mistral", "llama": "e5_mistral", "qwen2": "gte_qwen2", "qwen3": "qwen3_embedding"}
# In the class: of every decoder here. With these, a file without the keys describes the same network.
CLASS_DEFAULTS = {"rms_norm_eps": 1e-6, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}
DECODER_TEXTS = ["hello world", "The Cat and THE dog", "the cat sat on the mat " * 40]


def changed_decoder(kind: str, change: Change, directory: Path, **options: Any) -> Path:
    if kind == "qwen2":
        options["is_causal"] = True
    change(write_decoder(directory, kind, **options))
    return directory


def older_rope(**values: Any) -> Change:
    """Write rotary positions as transformers 4 does."""

    def change(directory: Path) -> None:
        without("rope_parameters")(directory)
        write(directory / "config.json", rope_theta=1e4, **values)

    return change


def sliding_layers(directory: Path) -> None:
    layers = ["full_attention", "sliding_attention", "full_attention"]
    write(directory / "config.json", sliding_window=5, use_sliding_window=True, layer_types=layers)


def eos_in_special_tokens_map(directory: Path) -> None:
    write(directory / "tokenizer_config.json", eos_token=None)
    write(directory / "special_tokens_map.json", eos_token="</s>", bos_token="<s>")


def vocabulary_and_merges(directory: Path) -> None:
    tokenizer = json.loads((directory / "tokenizer.json").read_text())
    (directory / "tokenizer.json").unlink()
    (directory / "vocab.json").write_text(json.dumps(tokenizer["model"]["vocab"]))
    merges = "\n".join(map(" ".join, tokenizer["model"]["merges"]))
    (directory / "merges.txt").write_text(f"#version: 0.2\n{merges}\n")
    added = {token.pop("id"): token for token in tokenizer["added_tokens"]}
    write(directory / "tokenizer_config.json", added_tokens_decoder=added)


def sentencepiece_model(name: str, **options: Any) -> Change:
    """Replace the tokenizer by one that is in a *.model file alone."""

    def change(directory: Path) -> None:
        model = io.BytesIO()
        SentencePieceTrainer.train(
            sentence_iterator=iter(CORPUS), model_writer=model, hard_vocab_limit=False, minloglevel=2, **options
        )
        (directory / name).write_bytes(model.getvalue())
        (directory / "tokenizer.json").unlink()

    return change


BPE = {"model_type": "bpe", "vocab_size": 420, "byte_fallback": True, "pad_id": -1}
LLAMA3 = {"rope_type": "llama3", "factor": 2.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
DECODER_KEYS: dict[str, tuple[str, Change, dict[str, Any]]] = {
    **{
        f"keys of a {kind} left to the class": (
            kind,
            without("rms_norm_eps", "hidden_act", "rope_parameters", "max_position_embeddings"),
            CLASS_DEFAULTS,
        )
        for kind in DECODERS
    },
    "heads left to the class of a llama": (
        "llama",
        without("num_key_value_heads", "head_dim"),
        {"num_key_value_heads": 6, "head_dim": 10},
    ),
    "head_dim left to the class of a qwen3": ("qwen3", without("head_dim"), {"head_dim": 128}),
    "sliding_window left to the class": ("mistral", without("sliding_window"), {}),
    "max_window_layers left to the class": (
        "qwen3",
        lambda d: (
            without("layer_types", "max_window_layers")(d),
            config(sliding_window=5, use_sliding_window=True)(d),
        ),
        {},
    ),
    "trained length of llama3 left to the class": ("llama", older_rope(rope_scaling=LLAMA3), {}),
    "trained length of yarn beside its scaling": (
        "llama",
        older_rope(rope_scaling={"type": "yarn", "factor": 2.0}, original_max_position_embeddings=32),
        {},
    ),
    "empty rope_scaling": ("llama", config(rope_scaling={}), {}),
    "swish": ("llama", config(hidden_act="swish"), {}),
    "layer_types of a mistral": ("mistral", sliding_layers, {}),
    "layer_types of a qwen3": ("qwen3", sliding_layers, {}),
    "biases that a mistral does not read": ("mistral", config(attention_bias=True, mlp_bias=True), {}),
    "head of a classifier": ("qwen3", tensors(lambda weights: {**weights, "score.weight": torch.ones(2, 52)}), {}),
    "constants of rotary positions": (
        "llama",
        tensors(lambda weights: {**weights, "rotary_emb.inv_freq": torch.ones(8)}),
        {},
    ),
    "special_tokens_map.json: eos_token": ("mistral", eos_in_special_tokens_map, {}),
    "max_seq_length above the trained length": ("mistral", sentence_config(max_seq_length=150), {}),
    "vocab.json and merges.txt": ("qwen2", vocabulary_and_merges, {}),
    "tokenizer.model": ("mistral", sentencepiece_model("tokenizer.model", **BPE), {"vocab_size": 600}),
    "tokenizer.model of a llama": (
        "llama",
        lambda d: (
            sentencepiece_model("tokenizer.model", **BPE)(d),
            write(d / "tokenizer_config.json", tokenizer_class="LlamaTokenizer"),
        ),
        {"vocab_size": 600},
    ),
}


@pytest.mark.parametrize(("kind", "change", "options"), DECODER_KEYS.values(), ids=DECODER_KEYS)
def test_key_of_a_decoder_is_honored_as_by_transformers(
    kind: str, change: Change, options: dict[str, Any], tmp_path: Path
) -> None:
    directory = changed_decoder(kind, change, tmp_path, **options)
    sentence = tmp_path / "sentence_bert_config.json"
    trained = AutoConfig.from_pretrained(directory).max_position_embeddings
    limit = json.loads(sentence.read_text())["max_seq_length"] if sentence.is_file() else trained
    expected = decoder_vectors(directory, token_ids(directory, DECODER_TEXTS, limit))
    np.testing.assert_allclose(vectors(directory, DECODER_TEXTS, DECODERS[kind]), expected, atol=2e-5)


DECODER_REFUSED: dict[str, tuple[str, Change, str]] = {
    "is_causal of a qwen2, which its class does not have": (
        "qwen2",
        without("is_causal", "rms_norm_eps"),
        r"config\.json: 'is_causal' is missing",
    ),
    "is_causal": ("llama", config(is_causal=False), r"config\.json: is_causal is False; the family requires True"),
    "longrope": (
        "mistral",
        older_rope(rope_scaling={"type": "longrope", "factor": 2.0}),
        r"config\.json: rope_scaling: type is 'longrope'; must be one of default, ",
    ),
    "partial_rotary_factor": (
        "llama",
        config(partial_rotary_factor=0.5),
        r"config\.json: rope_parameters: only a partial_rotary_factor of 1 is implemented",
    ),
    "hidden_act": (
        "qwen3",
        config(hidden_act="gelu"),
        r"hidden_act is 'gelu'; only 'silu' is implemented in a decoder",
    ),
    "eos_token that a *.model file does not have": (
        "mistral",
        lambda d: (
            sentencepiece_model("tokenizer.model", **BPE)(d),
            write(d / "tokenizer_config.json", eos_token="<end>"),
        ),
        "the tokenizer has no token '<end>', which every text must end with",
    ),
}


@pytest.mark.parametrize(("kind", "change", "message"), DECODER_REFUSED.values(), ids=DECODER_REFUSED)
def test_key_of_a_decoder_is_refused(kind: str, change: Change, message: str, tmp_path: Path) -> None:
    directory = changed_decoder(kind, change, tmp_path, vocab_size=600)
    with pytest.raises(ConfigError, match=message):
        vectors(directory, ["hello"], DECODERS[kind])


def test_sentencepiece_model_of_an_xlm_roberta_is_read(tmp_path: Path) -> None:
    write_xlm_roberta(tmp_path, vocab_size=400, pooling="mean")
    sentencepiece_model("sentencepiece.bpe.model", vocab_size=150)(tmp_path)
    expected = SentenceTransformer(str(tmp_path), device="cpu").encode(TEXTS, normalize_embeddings=True, prompt="")
    np.testing.assert_allclose(vectors(tmp_path, TEXTS), expected, atol=2e-5)


def test_padding_id_of_an_xlm_roberta_is_that_of_its_class(tmp_path: Path) -> None:
    write_xlm_roberta(tmp_path, pooling="mean")
    without("pad_token_id", "hidden_act")(tmp_path)
    expected = SentenceTransformer(str(tmp_path), device="cpu").encode(TEXTS, normalize_embeddings=True, prompt="")
    np.testing.assert_allclose(vectors(tmp_path, TEXTS), expected, atol=2e-5)


def test_clip_with_the_prefix_of_its_class_and_without_its_keys_is_read(tmp_path: Path) -> None:
    write_clip(tmp_path, projection_dim=512)
    tensors(lambda weights: {f"clip.{name}": tensor for name, tensor in weights.items()})(tmp_path)
    without("projection_dim")(tmp_path)
    without("layer_norm_eps", "max_position_embeddings", section="text_config")(tmp_path)
    expected = clip_text_vectors(tmp_path, token_ids(tmp_path, TEXTS, 77))
    np.testing.assert_allclose(vectors(tmp_path, TEXTS, "clip"), expected, atol=2e-5)


def test_keys_of_a_qwen2_vl_are_those_of_its_class(tmp_path: Path) -> None:
    write_qwen2_vl(tmp_path, rms_norm_eps=1e-5)
    without("rope_theta", "hidden_act", "rms_norm_eps")(tmp_path)
    expected = gme_vectors(tmp_path, list(gme_inputs(tmp_path, [{"text": text} for text in DECODER_TEXTS[:2]], 4, 16)))
    np.testing.assert_allclose(vectors(tmp_path, DECODER_TEXTS[:2], "gme_qwen2_vl"), expected, atol=2e-5)
