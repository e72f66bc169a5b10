"""Tiny seeded checkpoints of every family, saved by transformers and laid out like the files on the hub.

The sizes are odd on purpose: 6 query heads share 2 key heads, heads are not hidden/heads wide, vocabulary sizes are not
multiples of 8, and weights are large enough for a wrong layer to show. No bias or norm keeps its initial value of 0 or
1, which would hide mistakes. Each checkpoint is smaller than 2 MB and is written in much less than a second.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from torch import nn
from transformers import (
    BertModel,
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPVisionConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
    MistralConfig,
    MistralForCausalLM,
    MistralModel,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2Model,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3Model,
    XLMRobertaConfig,
    XLMRobertaForMaskedLM,
    XLMRobertaModel,
)
from transformers.models.qwen2_vl.configuration_qwen2_vl import Qwen2VLVisionConfig

from triton_embed.gateway import locations
from triton_embed.python_backend.checkpoint import repository

FAMILIES = tuple(repository.family_names(locations.FAMILIES))  # every family of the model repository
EXTRA_TOKEN = "<cat-toy>"  # added to the vocabulary of some CLIPs
TASK = "Given a web search query, retrieve relevant passages that answer the query"

# Training text of the tokenizers. Words that are not in it fall back to characters or bytes.
CORPUS = (
    "the cat sat on the mat and the dog ran after the cat over the hill while the other dog sat",
    f"Instruct: {TASK}\nQuery: hello world\nQuery: hello there, the world is a hill",
    "You are a helpful assistant. system user assistant",
    "a photo of a cat, a photo of a dog, a drawing of a hill and a house",
    "embeddings of sentences and images are compared by the cosine of their angle",
    "The capital of France is Paris; the capital of China is Beijing.",
    "你好，世界。中国的首都是北京。你好，北京。",
    "naïve café, naïve façade, 12345 and 2024",
)

KINDS: dict[str, tuple[Any, Any, Any]] = {
    "mistral": (MistralConfig, MistralModel, MistralForCausalLM),
    "llama": (LlamaConfig, LlamaModel, LlamaForCausalLM),
    "qwen2": (Qwen2Config, Qwen2Model, Qwen2ForCausalLM),
    "qwen3": (Qwen3Config, Qwen3Model, Qwen3ForCausalLM),
}

_THETA = {"mistral": 1e4, "llama": 5e5, "qwen2": 1e6, "qwen3": 1e6}
_QWEN_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_CLIP_SPLIT = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
# In the order of Qwen's ids. gte-Qwen2 has only the first three.
_QWEN_SPECIALS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|object_ref_start|>",
    "<|object_ref_end|>",
    "<|box_start|>",
    "<|box_end|>",
    "<|quad_start|>",
    "<|quad_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
_CLIP_MEAN = [0.48145466, 0.4578275, 0.40821073]
_CLIP_STD = [0.26862954, 0.26130258, 0.27577711]


def write_decoder(
    directory: Path,
    kind: str,
    *,
    seed: int = 0,
    form: str = "model",
    dtype: str = "float32",
    pooling: str = "last",
    old_rope: bool = False,
    is_causal: bool | None = None,
    inv_freq: bool = False,
    max_seq_length: int | None = 100,
    **config_changes: object,
) -> Path:
    """Write a Mistral, Llama, Qwen2 or Qwen3 embedder.

    Args:
        directory: Created if necessary.
        kind: A key of `KINDS`.
        form: `model` (names without a prefix), `causal_lm` (prefix `model.`, plus a separate `lm_head`), `tied` (the
            head is the embedding and not stored) or `sharded` (names without a prefix, in several files).
        old_rope: Write config.json like transformers 4 and most files on the hub: `rope_theta`, `rope_scaling`,
            `torch_dtype`.
        is_causal: The key of gte-Qwen2's config.json; None omits it.
        inv_freq: Store the rotary constants, as files of Llama 2's time do.
        max_seq_length: Of sentence_bert_config.json, which Qwen3-Embedding does not have.
    """
    tokenizer, tokenizer_config = decoder_tokenizer(kind)
    # Llama requires a hidden size that is a multiple of its heads; Qwen2's config has no head_dim.
    widths = {"llama": {"hidden_size": 60, "head_dim": 16}, "qwen2": {"hidden_size": 60}}
    sizes = {
        **widths.get(kind, {"hidden_size": 52, "head_dim": 16}),
        "vocab_size": _odd(tokenizer.get_vocab_size() + 3),
        "intermediate_size": 76,
        "num_hidden_layers": 3,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "rms_norm_eps": 1e-5,
        "initializer_range": 0.2,
        "tie_word_embeddings": form == "tied",
        "rope_parameters": {"rope_type": "default", "rope_theta": _THETA[kind]},
        "bos_token_id": tokenizer.token_to_id("<|endoftext|>" if kind.startswith("qwen") else "<s>"),
        "eos_token_id": tokenizer.token_to_id("<|endoftext|>" if kind.startswith("qwen") else "</s>"),
        **({} if is_causal is None else {"is_causal": is_causal}),
    }
    config_class, base_class, lm_class = KINDS[kind]
    config = config_class(**{**sizes, **config_changes})
    network = _seeded(lm_class if form in {"causal_lm", "tied"} else base_class, config, seed)
    _save(network, directory, dtype, "40KB" if form == "sharded" else "50GB")
    if inv_freq:
        prefix = "" if form in {"model", "sharded"} else "model."
        names = [f"{prefix}layers.{i}.self_attn.rotary_emb.inv_freq" for i in range(config.num_hidden_layers)]
        _add_tensors(directory, {name: torch.ones(config.head_dim // 2) for name in names})
    if old_rope:
        _rewrite_as_transformers_4(directory / "config.json")
    _save_tokenizer(directory, tokenizer, tokenizer_config)
    _save_modules(directory, config.hidden_size, pooling, _PROMPTS[kind])
    if kind != "qwen3" and max_seq_length:
        _write(directory / "sentence_bert_config.json", {"max_seq_length": max_seq_length, "do_lower_case": False})
    return directory


def write_clip(
    directory: Path,
    *,
    seed: int = 0,
    eos_rule: str = "old",
    dtype: str = "float32",
    form: str = "model",
    hidden_act: str = "quick_gelu",
    extra_token: bool = False,
    sparse: bool = False,
    text: Mapping[str, object] | None = None,
    vision: Mapping[str, object] | None = None,
    **changes: object,
) -> Path:
    """Write a CLIP with towers of different width.

    Args:
        directory: Created if necessary.
        eos_rule: `old` as in OpenAI's files: `eos_token_id: 2`, which makes transformers pool the highest id, int64
            `position_ids` among the tensors, and a preprocessor with sizes as plain numbers. `new` stores the real id.
        form: `model` or `sharded`.
        extra_token: Add a token above <|endoftext|>, as textual inversion does. Then the two rules pool different
            tokens.
        sparse: Omit transformers' defaults from config.json, as clip-vit-large-patch14-336 does.
        text: Changes to the config of the text tower.
        vision: Changes to the config of the vision tower.
    """
    tokenizer, tokenizer_config = clip_tokenizer(extra_token)
    start, end = (tokenizer.token_to_id(token) for token in ("<|startoftext|>", "<|endoftext|>"))
    towers = {"hidden_act": hidden_act, "initializer_factor": 3.0, "layer_norm_eps": 1e-5}
    text_config = {
        **towers,
        "vocab_size": tokenizer.get_vocab_size(),
        "hidden_size": 36,
        "intermediate_size": 52,
        "num_hidden_layers": 3,
        "num_attention_heads": 6,
        "max_position_embeddings": 77,
        "bos_token_id": 0 if eos_rule == "old" else start,
        "eos_token_id": 2 if eos_rule == "old" else end,
        "pad_token_id": 1,
        **(text or {}),
    }
    vision_config = {
        **towers,
        "hidden_size": 40,
        "intermediate_size": 68,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "image_size": 48,
        "patch_size": 8,
        **(vision or {}),
    }
    sizes = {"projection_dim": 28, "text_config": text_config, "vision_config": vision_config}
    config = CLIPConfig(**{**sizes, **changes})
    _save(_seeded(CLIPModel, config, seed), directory, dtype, "40KB" if form == "sharded" else "50GB")
    if eos_rule == "old":
        text_positions = config.text_config.max_position_embeddings
        vision_positions = (config.vision_config.image_size // config.vision_config.patch_size) ** 2 + 1
        _add_tensors(
            directory,
            {
                "text_model.embeddings.position_ids": torch.arange(text_positions)[None],
                "vision_model.embeddings.position_ids": torch.arange(vision_positions)[None],
            },
        )
    if sparse:
        stored = json.loads((directory / "config.json").read_text())
        stored["text_config"] = _without_defaults(stored["text_config"], CLIPTextConfig())
        stored["vision_config"] = _without_defaults(stored["vision_config"], CLIPVisionConfig())
        _write(directory / "config.json", stored)
    tokenizer_config["model_max_length"] = config.text_config.max_position_embeddings
    _save_tokenizer(directory, tokenizer, tokenizer_config)
    _write(directory / "preprocessor_config.json", _clip_preprocessor(config.vision_config.image_size, eos_rule))
    return directory


def write_qwen2_vl(
    directory: Path,
    *,
    seed: int = 0,
    form: str = "conditional_generation",
    dtype: str = "float32",
    names: str = "hub",
    layout: str = "hub",
    vision: Mapping[str, object] | None = None,
    **changes: object,
) -> Path:
    """Write a Qwen2-VL like GME.

    Args:
        directory: Created if necessary.
        form: `conditional_generation` (a separate head), `tied` or `sharded`.
        names: `hub` (`model.layers…`, `visual.…`, `lm_head`) or `transformers` (`model.language_model.layers…`,
            `model.visual.…`).
        layout: Of config.json: `hub` (the keys of the text stack at the top level, `rope_scaling` of type mrope) or
            `transformers` (`text_config`, `rope_parameters`).
        vision: Changes to the config of the vision tower.
        changes: Changes to the config of the text stack.
    """
    tokenizer, tokenizer_config = qwen_tokenizer(_QWEN_SPECIALS, appends_end=False)
    ids = {token: tokenizer.token_to_id(token) for token in _QWEN_SPECIALS}
    text_config = {
        "vocab_size": _odd(tokenizer.get_vocab_size() + 3),
        "hidden_size": 96,
        "intermediate_size": 76,
        "num_hidden_layers": 3,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "rms_norm_eps": 1e-6,
        "initializer_range": 0.2,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 3, 3]},
        "bos_token_id": ids["<|endoftext|>"],
        "eos_token_id": ids["<|im_end|>"],
        **changes,
    }
    vision_config = {
        "depth": 2,
        "embed_dim": 64,
        "num_heads": 4,
        "mlp_ratio": 2,
        "hidden_size": text_config["hidden_size"],
        "initializer_range": 0.06,
        **(vision or {}),
    }
    special = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
    tokens = ("<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>")
    config = Qwen2VLConfig(
        text_config=text_config,
        vision_config=vision_config,
        tie_word_embeddings=form == "tied",
        **{name: ids[token] for name, token in zip(special, tokens, strict=True)},
    )
    network = _seeded(Qwen2VLForConditionalGeneration, config, seed)
    _save(network, directory, dtype, "40KB" if form == "sharded" else "50GB")
    _rename(directory, _to_hub_name if names == "hub" else _to_transformers_name)
    if layout == "hub":
        _move_text_config_to_top(directory / "config.json", ids["<|vision_pad|>"])
    _save_tokenizer(directory, tokenizer, tokenizer_config)
    _save_modules(directory, config.text_config.hidden_size, "last", _PROMPTS["qwen2_vl"])
    _write(
        directory / "preprocessor_config.json",
        {
            "do_convert_rgb": True,
            "do_normalize": True,
            "do_rescale": True,
            "do_resize": True,
            "image_mean": _CLIP_MEAN,
            "image_processor_type": "Qwen2VLImageProcessor",
            "image_std": _CLIP_STD,
            "max_pixels": 12845056,
            "merge_size": config.vision_config.spatial_merge_size,
            "min_pixels": 3136,
            "patch_size": config.vision_config.patch_size,
            "processor_class": "Qwen2VLProcessor",
            "resample": 3,
            "rescale_factor": 0.00392156862745098,
            "size": {"max_pixels": 12845056, "min_pixels": 3136},
            "temporal_patch_size": config.vision_config.temporal_patch_size,
        },
    )
    return directory


def write_xlm_roberta(
    directory: Path,
    *,
    seed: int = 0,
    pooling: str = "cls",
    form: str = "model",
    dtype: str = "float32",
    max_seq_length: int = 77,
    **changes: object,
) -> Path:
    """Write an XLM-RoBERTa like bge-m3 (CLS) and multilingual-e5 (mean): positions count from padding_idx + 1.

    Args:
        directory: Created if necessary.
        form: `model` (names without a prefix, plus the int64 `position_ids` of older files), `masked_lm` (prefix
            `roberta.`, plus a head) or `sharded`.
    """
    tokenizer, tokenizer_config = xlm_roberta_tokenizer()
    sizes = {
        "vocab_size": _odd(tokenizer.get_vocab_size() + 3),
        "hidden_size": 60,
        "num_hidden_layers": 3,
        "num_attention_heads": 6,
        "intermediate_size": 92,
        "max_position_embeddings": 79,
        "type_vocab_size": 1,
        "layer_norm_eps": 1e-5,
        "initializer_range": 0.2,
        "pad_token_id": 1,
    }
    config = XLMRobertaConfig(**{**sizes, **changes})
    network = _seeded(XLMRobertaForMaskedLM if form == "masked_lm" else XLMRobertaModel, config, seed)
    _save(network, directory, dtype, "40KB" if form == "sharded" else "50GB")
    if form == "model":
        _add_tensors(directory, {"embeddings.position_ids": torch.arange(config.max_position_embeddings)[None]})
    tokenizer_config["model_max_length"] = max_seq_length
    _save_tokenizer(directory, tokenizer, tokenizer_config)
    _save_modules(directory, config.hidden_size, pooling, _PROMPTS["bert"])
    _write(directory / "sentence_bert_config.json", {"max_seq_length": max_seq_length, "do_lower_case": False})
    return directory


def decoder_tokenizer(kind: str) -> tuple[Tokenizer, dict[str, Any]]:
    """Return (tokenizer, content of tokenizer_config.json) for a key of `KINDS`."""
    if kind == "mistral":
        return _mistral_tokenizer()
    if kind == "llama":
        return _llama_tokenizer()
    if kind == "qwen2":
        return qwen_tokenizer(_QWEN_SPECIALS[:3], appends_end=False)
    return qwen_tokenizer(_QWEN_SPECIALS, appends_end=True)


def _mistral_tokenizer() -> tuple[Tokenizer, dict[str, Any]]:
    """Build a character BPE with byte fallback.

    tokenizer.json prepends <s> and appends nothing, although e5-mistral's tokenizer_config.json requests </s>.
    """
    learned, merges = _train_bpe(pre_tokenizers.Metaspace(), alphabet=[])
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *learned]
    tokenizer = Tokenizer(models.BPE(_numbered(tokens), merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    _add_special(tokenizer, tokens[:3])
    return tokenizer, {
        "add_bos_token": True,
        "add_eos_token": True,
        "bos_token": "<s>",
        "clean_up_tokenization_spaces": False,
        "eos_token": "</s>",
        "legacy": True,
        "model_max_length": 1000000000000000019884624838656,
        "pad_token": "</s>",
        "tokenizer_class": "LlamaTokenizer",
        "unk_token": "<unk>",
        "use_default_system_prompt": False,
    }


def _llama_tokenizer() -> tuple[Tokenizer, dict[str, Any]]:
    """Build a byte-level BPE whose special tokens have the last ids, as in Llama 3. It does not append </s>."""
    tokens, merges = _train_bpe(pre_tokenizers.ByteLevel(add_prefix_space=False))
    tokenizer = Tokenizer(models.BPE(_numbered(tokens), merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    _add_special(tokenizer, ["<s>", "</s>"])
    tokenizer.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=False),
            processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", len(tokens))]),
        ]
    )
    return tokenizer, {
        "bos_token": "<s>",
        "clean_up_tokenization_spaces": True,
        "eos_token": "</s>",
        "model_input_names": ["input_ids", "attention_mask"],
        "model_max_length": 131072,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }


def qwen_tokenizer(specials: Sequence[str], appends_end: bool) -> tuple[Tokenizer, dict[str, Any]]:
    """Build Qwen's byte-level BPE.

    Args:
        specials: The special tokens, in the order of their ids.
        appends_end: Append <|endoftext|> although the config's eos_token is <|im_end|>, as in Qwen3-Embedding. The
            tokenizers of gte-Qwen2 and Qwen2-VL append nothing.
    """
    split = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_QWEN_SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokens, merges = _train_bpe(split)
    tokenizer = Tokenizer(models.BPE(_numbered(tokens), merges))
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = split
    tokenizer.decoder = decoders.ByteLevel()
    _add_special(tokenizer, specials)
    plain = processors.ByteLevel(add_prefix_space=False, trim_offsets=False, use_regex=False)
    template = processors.TemplateProcessing(single="$A <|endoftext|>", special_tokens=[("<|endoftext|>", len(tokens))])
    tokenizer.post_processor = processors.Sequence([plain, template]) if appends_end else plain
    gte = len(specials) == 3
    return tokenizer, {
        "add_prefix_space": False,
        "bos_token": None,
        "clean_up_tokenization_spaces": False,
        "eos_token": "<|endoftext|>" if gte else "<|im_end|>",
        "errors": "replace",
        "model_max_length": 131072 if appends_end else 32768,
        "pad_token": "<|endoftext|>",
        "split_special_tokens": False,
        "tokenizer_class": "Qwen2Tokenizer",
        "unk_token": None,
    }


def clip_tokenizer(extra_token: bool = False) -> tuple[Tokenizer, dict[str, Any]]:
    """Build CLIP's lower-casing byte-level BPE. Words end in </w>, and <|endoftext|> has the highest id.

    Args:
        extra_token: Add a token above <|endoftext|>.
    """
    normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    split = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_CLIP_SPLIT), "removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    alphabet = [*letters, *(f"{letter}</w>" for letter in letters)]
    learned, merges = _train_bpe(split, end_of_word="</w>")
    new_tokens = [token for token in learned if token not in set(alphabet)]
    tokens = [*alphabet, *new_tokens, "<|startoftext|>", "<|endoftext|>"]
    tokenizer = Tokenizer(
        models.BPE(
            _numbered(tokens),
            merges,
            unk_token="<|endoftext|>",
            continuing_subword_prefix="",
            end_of_word_suffix="</w>",
            fuse_unk=False,
        )
    )
    tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = split
    tokenizer.post_processor = processors.RobertaProcessing(
        ("<|endoftext|>", len(tokens) - 1), ("<|startoftext|>", len(tokens) - 2), False, False
    )
    tokenizer.decoder = decoders.ByteLevel()
    _add_special(tokenizer, tokens[-2:])
    if extra_token:
        tokenizer.add_tokens([AddedToken(EXTRA_TOKEN, normalized=False)])
    return tokenizer, {
        "add_prefix_space": False,
        "bos_token": "<|startoftext|>",
        "clean_up_tokenization_spaces": True,
        "do_lower_case": True,
        "eos_token": "<|endoftext|>",
        "errors": "replace",
        "pad_token": "<|endoftext|>",
        "tokenizer_class": "CLIPTokenizer",
        "unk_token": "<|endoftext|>",
    }


def xlm_roberta_tokenizer() -> tuple[Tokenizer, dict[str, Any]]:
    """Build a unigram tokenizer of the corpus's words, some prefixes and suffixes, and single characters."""
    words = sorted({f"▁{word}" for line in CORPUS for word in line.split()})
    parts = sorted({word[:i] for word in words for i in (3, 4)} | {word[-i:] for word in words for i in (2, 3)})
    characters = sorted({*"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.,:;!?'\"-", *"".join(words)})
    pieces: dict[str, float] = {}
    for group, score in ((words, -5.0), (parts, -8.0), (characters, -11.0)):
        for i, piece in enumerate(group):
            pieces.setdefault(piece, score - i / 256)
    specials = ["<s>", "<pad>", "</s>", "<unk>"]
    vocabulary = [*((token, 0.0) for token in specials), *pieces.items(), ("<mask>", 0.0)]
    tokenizer = Tokenizer(models.Unigram(vocabulary, unk_id=3))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace(prepend_scheme="always")]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> </s> $B </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    tokenizer.decoder = decoders.Metaspace()
    _add_special(tokenizer, [*specials, "<mask>"])
    return tokenizer, {
        "bos_token": "<s>",
        "clean_up_tokenization_spaces": True,
        "cls_token": "<s>",
        "eos_token": "</s>",
        "mask_token": "<mask>",
        "pad_token": "<pad>",
        "sep_token": "</s>",
        "tokenizer_class": "XLMRobertaTokenizer",
        "unk_token": "<unk>",
    }


_PROMPTS: dict[str, dict[str, str]] = {
    "mistral": {"web_search_query": f"Instruct: {TASK}\nQuery: ", "sts_query": "Instruct: Find the same.\nQuery: "},
    "llama": {"query": f"Instruct: {TASK}\nQuery: "},
    "qwen2": {"query": f"Instruct: {TASK}\nQuery: "},
    "qwen3": {"query": f"Instruct: {TASK}\nQuery:", "document": ""},
    "bert": {"query": "query: ", "passage": "passage: "},
    "qwen2_vl": {"query": "Find an image that matches the given text."},
}


@cache
def _trained_json(split: str, end_of_word: str, alphabet: str) -> str:
    """Return tokenizer.json of a BPE trained on the corpus. `split` is that of an untrained tokenizer."""
    tokenizer = Tokenizer(models.BPE(end_of_word_suffix=end_of_word) if end_of_word else models.BPE())
    tokenizer.pre_tokenizer = Tokenizer.from_str(split).pre_tokenizer
    trainer = trainers.BpeTrainer(
        vocab_size=len(alphabet) + 180,
        min_frequency=2,
        show_progress=False,
        initial_alphabet=list(alphabet),
        **({"end_of_word_suffix": end_of_word} if end_of_word else {}),
    )
    is_clip = bool(end_of_word)
    tokenizer.train_from_iterator([line.lower() if is_clip else line for line in CORPUS], trainer)
    serialized: str = tokenizer.to_str()
    return serialized


def _train_bpe(
    split: pre_tokenizers.PreTokenizer, end_of_word: str = "", alphabet: Sequence[str] | None = None
) -> tuple[list[str], list[tuple[str, str]]]:
    """Return (tokens in the order of their ids, merges) of a BPE trained on the corpus, equal on every machine."""
    untrained = Tokenizer(models.BPE())
    untrained.pre_tokenizer = split
    letters = pre_tokenizers.ByteLevel.alphabet() if alphabet is None else alphabet
    model = json.loads(_trained_json(untrained.to_str(), end_of_word, "".join(sorted(letters))))["model"]
    return sorted(model["vocab"], key=model["vocab"].get), [tuple(merge) for merge in model["merges"]]


def _numbered(tokens: Sequence[str]) -> dict[str, int]:
    return {token: i for i, token in enumerate(tokens)}


def _odd(size: int) -> int:
    """Return an odd vocabulary size that leaves room for ids the tokenizer does not use."""
    return size | 1


def _add_special(tokenizer: Tokenizer, tokens: Sequence[str]) -> None:
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in tokens])


def _seeded(network_class: Callable[[Any], PreTrainedModel], config: object, seed: int) -> PreTrainedModel:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network = network_class(config).eval()
        _randomize_vectors(network)
    return network


def _randomize_vectors(network: nn.Module) -> None:
    """Add noise to biases and norms, which transformers initializes to 0 and 1."""
    for parameter in network.parameters():
        if parameter.dim() == 1:
            parameter.data += 0.3 * torch.randn(parameter.shape)


def _save(network: nn.Module, directory: Path, dtype: str, shard: str) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    network.to(getattr(torch, dtype)).save_pretrained(directory, max_shard_size=shard)  # type: ignore[operator]


def _save_tokenizer(directory: Path, tokenizer: Tokenizer, config: Mapping[str, Any]) -> None:
    tokenizer.save(str(directory / "tokenizer.json"))
    _write(directory / "tokenizer_config.json", config)


def _save_modules(directory: Path, size: int, pooling: str, prompts: Mapping[str, str]) -> None:
    """Write modules.json, 1_Pooling and config_sentence_transformers.json like sentence-transformers 2 to 4."""
    kinds = (("", "Transformer"), ("1_Pooling", "Pooling"), ("2_Normalize", "Normalize"))
    _write(
        directory / "modules.json",
        [
            {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
            for i, (path, kind) in enumerate(kinds)
        ],
    )
    modes = {
        "cls_token": "cls",
        "mean_tokens": "mean",
        "max_tokens": "max",
        "mean_sqrt_len_tokens": "mean_sqrt",
        "weightedmean_tokens": "weighted",
        "lasttoken": "last",
    }
    (directory / "1_Pooling").mkdir()
    _write(
        directory / "1_Pooling" / "config.json",
        {
            "word_embedding_dimension": size,
            **{f"pooling_mode_{key}": mode == pooling for key, mode in modes.items()},
            "include_prompt": True,
        },
    )
    _write(
        directory / "config_sentence_transformers.json",
        {"prompts": dict(prompts), "default_prompt_name": None, "similarity_fn_name": "cosine"},
    )


def _rewrite_as_transformers_4(path: Path) -> None:
    config = json.loads(path.read_text())
    rope = config.pop("rope_parameters")
    config["rope_theta"] = rope.pop("rope_theta")
    kind = rope.pop("rope_type")
    # Files of Llama 3 use the newer key; linear, dynamic and yarn files the older one.
    scaling = {"rope_type" if kind == "llama3" else "type": kind, **rope}
    config["rope_scaling"] = None if kind == "default" else scaling
    config["torch_dtype"] = config.pop("dtype")
    config.pop("layer_types", None)
    if config.get("head_dim") == config["hidden_size"] // config["num_attention_heads"]:
        del config["head_dim"]
    if config["model_type"] == "qwen2":
        # The hub's files configure a window and disable it.
        config |= {"sliding_window": 5, "use_sliding_window": False, "max_window_layers": 1}
    _write(path, config)


def _move_text_config_to_top(path: Path, vision_pad: int) -> None:
    """Write config.json again like transformers 4.

    The keys of the text stack are at the top level, `rope_scaling` has type mrope, and the vision config contains only
    values that differ from the defaults of its class.
    """
    config = json.loads(path.read_text())
    text, vision = config.pop("text_config"), config.pop("vision_config")
    rope = text.pop("rope_parameters")
    config |= {key: value for key, value in text.items() if key not in {"model_type", "layer_types", "dtype"}}
    config |= {
        "model_type": "qwen2_vl",
        "rope_theta": rope["rope_theta"],
        "rope_scaling": {"type": "mrope", "mrope_section": rope["mrope_section"]},
        "sliding_window": 5,
        "use_sliding_window": False,
        "max_window_layers": 1,
        "torch_dtype": config.pop("dtype"),
        "vision_token_id": vision_pad,
    }
    config["vision_config"] = {
        **_without_defaults(vision, Qwen2VLVisionConfig()),
        "hidden_size": vision["hidden_size"],
        "in_chans": 3,
        "model_type": "qwen2_vl",
        "spatial_patch_size": vision["patch_size"],
    }
    _write(path, config)


def _without_defaults(config: Mapping[str, Any], default: PreTrainedConfig) -> dict[str, Any]:
    """Return a nested config like transformers 4 writes it: only values that differ from the defaults of its class."""
    defaults = default.to_dict()
    omitted = {"dtype", "rope_parameters"}
    return {k: v for k, v in config.items() if (k == "model_type" or defaults.get(k) != v) and k not in omitted}


def _to_hub_name(name: str) -> str:
    name = name.replace("model.visual.", "visual.")
    return name.replace("model.language_model.", "model.")


def _to_transformers_name(name: str) -> str:
    if name.startswith("visual."):
        return f"model.{name}"
    if name.startswith("model.") and not name.startswith(("model.language_model.", "model.visual.")):
        return name.replace("model.", "model.language_model.", 1)
    return name


def _rename(directory: Path, name_of: Callable[[str], str]) -> None:
    for file in directory.glob("*.safetensors"):
        save_file({name_of(name): tensor for name, tensor in load_file(file).items()}, file, {"format": "pt"})
    index = directory / "model.safetensors.index.json"
    if index.is_file():
        stored = json.loads(index.read_text())
        stored["weight_map"] = {name_of(name): file for name, file in stored["weight_map"].items()}
        _write(index, stored)


def _add_tensors(directory: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Add tensors to the weight file, or to the last shard."""
    file = max(directory.glob("*.safetensors"))
    save_file({**load_file(file), **tensors}, file, {"format": "pt"})
    index = directory / "model.safetensors.index.json"
    if index.is_file():
        stored = json.loads(index.read_text())
        stored["weight_map"] |= dict.fromkeys(tensors, file.name)
        _write(index, stored)


def _clip_preprocessor(size: int, eos_rule: str) -> dict[str, Any]:
    common = {
        "do_center_crop": True,
        "do_normalize": True,
        "do_resize": True,
        "image_mean": _CLIP_MEAN,
        "image_std": _CLIP_STD,
        "resample": 3,
    }
    if eos_rule == "old":
        return {**common, "crop_size": size, "feature_extractor_type": "CLIPFeatureExtractor", "size": size}
    return {
        **common,
        "crop_size": {"height": size, "width": size},
        "do_convert_rgb": True,
        "do_rescale": True,
        "image_processor_type": "CLIPImageProcessor",
        "rescale_factor": 0.00392156862745098,
        "size": {"shortest_edge": size},
    }


def _write(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


@dataclass(frozen=True)
class Case:
    """A tiny checkpoint that a family is tested with."""

    family: str  # a directory of model_repository
    id: str
    write: Callable[[Path], Path]
    limit: int  # tokens of the longest row that the model accepts
    parameters: Mapping[str, str] = field(default_factory=dict)  # set in config.pbtxt

    @property
    def name(self) -> str:
        """The name of its Triton model."""
        return f"{self.family}-{self.id}"


def _bert(directory: Path, pooling: str, **changes: object) -> Path:
    from conftest import write_bert  # conftest imports this file

    write_bert(directory, 7, pooling, **changes)
    network = BertModel.from_pretrained(directory)
    with torch.random.fork_rng():
        torch.manual_seed(8)
        _randomize_vectors(network)
    network.save_pretrained(directory)
    _write(directory / "config_sentence_transformers.json", {"prompts": _PROMPTS["bert"]})
    return directory


def _bge(id: str, pooling: str = "cls", limit: int = 77, **options: object) -> Case:
    write = partial(write_xlm_roberta, pooling=pooling, **options)
    return Case("bge", id, write, limit, {"pooling": pooling})


def _decoder(family: str, id: str, kind: str, limit: int = 100, **options: object) -> Case:
    return Case(family, id, partial(write_decoder, kind=kind, **options), limit)


def _clip(id: str, limit: int = 77, **options: object) -> Case:
    return Case("clip", id, partial(write_clip, **options), limit)


def _gme(id: str, positions: str = "mrope", tokens: tuple[int, int] = (4, 16), **options: object) -> Case:
    limits = {"min_image_tokens": str(tokens[0]), "max_image_tokens": str(tokens[1])}
    parameters = {"image_positions": positions, **limits}
    return Case("gme_qwen2_vl", id, partial(write_qwen2_vl, **options), 256, parameters)


_e5, _gte = partial(_decoder, "e5_mistral"), partial(_decoder, "gte_qwen2", kind="qwen2")
_qwen3 = partial(_decoder, "qwen3_embedding", kind="qwen3", limit=128)
_YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 32}
_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}

# The registry of tiny checkpoints. A family is tested once it has a case here, and every family must have one.
CASES: list[Case] = [
    Case("bge", "bert-cls", partial(_bert, pooling="cls"), 77),
    Case("bge", "bert-mean", partial(_bert, pooling="mean", hidden_size=36), 77, {"pooling": "mean"}),
    _bge("m3"),
    _bge("m3-masked-lm", form="masked_lm", seed=1, hidden_size=36, num_attention_heads=12),
    _bge("m3-sharded-bf16", form="sharded", dtype="bfloat16", seed=2, num_hidden_layers=1),
    _bge("e5-mean", pooling="mean", seed=3, hidden_act="gelu_new"),
    _bge("e5-mean-fp16", pooling="mean", dtype="float16", form="masked_lm", seed=4, layer_norm_eps=1e-3),
    _bge("short", limit=31, max_seq_length=31, seed=5, num_attention_heads=1, intermediate_size=61),
    _e5("mistral-window", kind="mistral", sliding_window=7),
    _e5("mistral-no-window", kind="mistral", sliding_window=None, form="causal_lm", old_rope=True, seed=1),
    _e5("mistral-bf16", kind="mistral", sliding_window=1, form="sharded", dtype="bfloat16", old_rope=True, seed=2),
    _e5(
        "mistral-tied-one-key-head",
        kind="mistral",
        sliding_window=16,
        form="tied",
        old_rope=True,
        seed=3,
        hidden_size=60,
        head_dim=10,  # hidden/heads, which old files omit
        num_key_value_heads=1,
    ),
    _e5("llama3", kind="llama", form="causal_lm", old_rope=True, seed=4, rope_parameters=_LLAMA3),
    _e5(
        "llama-linear-biased-fp16",
        kind="llama",
        dtype="float16",
        seed=5,
        attention_bias=True,
        mlp_bias=True,
        rope_parameters={"rope_type": "linear", "rope_theta": 1e4, "factor": 3.0},
    ),
    _e5(
        "llama-dynamic",
        kind="llama",
        limit=96,
        max_seq_length=None,
        old_rope=True,
        inv_freq=True,
        seed=6,
        max_position_embeddings=24,
        rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0},
    ),
    _e5(
        "llama-yarn",
        kind="llama",
        form="sharded",
        seed=7,
        num_key_value_heads=6,
        num_hidden_layers=2,
        rope_parameters=_YARN,
    ),
    _gte("bidirectional", is_causal=False, old_rope=True),
    _gte("bidirectional-bf16", is_causal=False, form="causal_lm", dtype="bfloat16", old_rope=True, seed=1),
    _gte("bidirectional-tied", is_causal=False, form="tied", seed=2, num_key_value_heads=1),
    _gte("bidirectional-one-layer", is_causal=False, form="sharded", seed=3, num_hidden_layers=1, head_dim=14),
    _gte("causal", is_causal=True, old_rope=True, form="causal_lm", seed=4),
    _gte("causal-fp16", is_causal=True, dtype="float16", seed=5, hidden_size=54, num_key_value_heads=3, head_dim=18),
    _gte("causal-yarn", is_causal=True, old_rope=True, seed=6, rope_parameters=_YARN),
    _qwen3("bare", old_rope=True),
    _qwen3("causal-lm", form="causal_lm", seed=1, rms_norm_eps=1e-3),
    _qwen3("tied-bf16", form="tied", dtype="bfloat16", old_rope=True, seed=2, num_key_value_heads=1),
    _qwen3("sharded-wide-heads", form="sharded", seed=3, hidden_size=36, head_dim=20),
    _qwen3("one-layer-fp16", dtype="float16", seed=4, num_hidden_layers=1, num_key_value_heads=6),
    _qwen3("yarn-biased", old_rope=True, seed=5, attention_bias=True, rope_parameters=_YARN),
    _qwen3("window", seed=6, use_sliding_window=True, sliding_window=5, max_window_layers=1),
    _clip("openai"),
    _clip("openai-sparse", sparse=True, seed=1, vision={"image_size": 64, "patch_size": 16, "num_attention_heads": 8}),
    _clip("openai-extra-token", extra_token=True, seed=2, hidden_act="gelu"),
    _clip("new-extra-token", extra_token=True, eos_rule="new", sparse=True, seed=3),
    _clip("new-bf16-sharded", eos_rule="new", form="sharded", dtype="bfloat16", seed=4, projection_dim=51),
    _clip("short-fp16", limit=17, dtype="float16", seed=5, text={"max_position_embeddings": 17, "hidden_size": 48}),
    _clip(
        "new-one-layer",
        eos_rule="new",
        seed=6,
        text={"num_hidden_layers": 1, "hidden_act": "gelu", "layer_norm_eps": 1e-3},
        vision={"num_hidden_layers": 1, "image_size": 42, "patch_size": 14},
    ),
    Case("minilm", "bert-mean", partial(_bert, pooling="mean", num_hidden_layers=2), 77),
    _gme("hub"),
    _gme("hub-sequential", positions="sequential", form="tied", seed=1),
    _gme("transformers-names", names="transformers", layout="transformers", seed=2),
    _gme("sharded-bf16", names="transformers", form="sharded", dtype="bfloat16", seed=3, num_key_value_heads=6),
    _gme(
        "wide-vision-heads",
        layout="transformers",
        form="tied",
        seed=4,
        vision={"embed_dim": 40, "num_heads": 2, "mlp_ratio": 4, "hidden_act": "gelu", "depth": 3},
    ),
    _gme(
        "sequential-fp16",
        positions="sequential",
        tokens=(1, 6),
        names="transformers",
        dtype="float16",
        seed=5,
        hidden_size=72,
        num_hidden_layers=1,
        rope_parameters={"rope_type": "default", "rope_theta": 1e4, "mrope_section": [3, 1, 2]},
    ),
]
