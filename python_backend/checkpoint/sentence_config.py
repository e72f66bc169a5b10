"""The config of sentence-transformers' Transformer module: how it calls network and tokenizer."""

from pathlib import Path

from triton_embed.python_backend.checkpoint.json_file import JsonFile

# sentence-transformers reads the first of these that is not empty.
_NAMES = ("bert", "roberta", "distilbert", "camembert", "albert", "xlm-roberta", "xlnet")
_TEXT = {"method": "forward", "method_output_name": "last_hidden_state"}
# Arguments that change no vector, or only their rounding. Each object of arguments has an older and a newer name.
_HARMLESS = {
    "model": {"attn_implementation", "device_map", "dtype", "low_cpu_mem_usage", "torch_dtype", "use_safetensors"},
    "tokenizer": {"padding_side", "use_fast"},
    "config": {"use_cache"},
}
_ARGUMENTS = {
    "model_args": "model",
    "model_kwargs": "model",
    "tokenizer_args": "tokenizer",
    "processor_kwargs": "tokenizer",
    "config_args": "config",
    "config_kwargs": "config",
}


def read_sentence_config(directory: Path, is_text_model: bool) -> JsonFile:
    """Read the config under the first of its names.

    Args:
        directory: Of the network.
        is_text_model: Whether the last hidden states of texts are pooled.

    Raises:
        ConfigError: A key changes what the network reads or returns in a way that is not implemented.
    """
    files = [JsonFile(directory / f"sentence_{name}_config.json") for name in _NAMES]
    file = next((file for file in files if file.values), files[0])
    for key in ("query_length", "document_length", "query_expansion", "processing_kwargs"):
        if file.values.get(key) not in (None, {}):
            raise file.error(key, "this is not implemented; remove the key if the vectors do not need it")
    for key, kind in _ARGUMENTS.items():
        arguments = file.nested(key)
        for name in arguments.values.keys() - _HARMLESS[kind] - {"model_max_length", "trust_remote_code"}:
            raise arguments.error(name, "this argument is not implemented")
    if is_text_model:
        _check_output(file)
    return file


def max_length(file: JsonFile) -> int:
    """Return the maximum length of an input in tokens, special tokens included; 0: the file sets none."""
    for key in ("processor_kwargs", "tokenizer_args"):
        if file.nested(key).has("model_max_length"):
            return file.nested(key).positive_int("model_max_length")
    return file.positive_int("max_seq_length") if file.has("max_seq_length") else 0


def _check_output(file: JsonFile) -> None:
    """Check that the module returns the last hidden states of plain texts."""
    for key, implemented in (("transformer_task", "feature-extraction"), ("module_output_name", "token_embeddings")):
        if file.get(key, str, implemented) != implemented:
            raise file.error(key, f"only '{implemented}' is implemented")
    # With 'message', sentence-transformers puts every text into the tokenizer's chat template.
    if file.get("modality_config", dict, {}) not in ({}, {"text": _TEXT}):
        raise file.error("modality_config", f"only {{'text': {_TEXT}}} is implemented")
