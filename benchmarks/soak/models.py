"""The model repository of the soak: minilm with its real weights, and a tiny Qwen3 and GME with random weights.

The models are tiny so that the soak exercises the server around them, and random so that a wrong token or layer changes
the vector.
"""

import json
from collections.abc import Sequence
from pathlib import Path

import torch
import transformers
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedModel, Qwen2VLConfig, Qwen2VLForConditionalGeneration, Qwen3Config, Qwen3Model

from benchmarks.processes import MODEL
from benchmarks.report import ROOT
from triton_embed.python_backend.checkpoint.repository import write_model

QWEN3, GME = "qwen3_embedding", "gme_qwen2_vl"
NAMES = (MODEL, QWEN3, GME)
QWEN3_TOKENS = 256  # context length
GME_TOKENS = 512
IMAGE_TOKENS = (4, 16)  # minimum and maximum tokens per image
END = "<|endoftext|>"
CHAT = (END, "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
QUERY = "Given a web search query, retrieve relevant passages that answer the query"  # the default in config.pbtxt


def write_repository(folder: Path, texts: Sequence[str]) -> Path:
    """Write the repository and the checkpoints of the tiny models; return its path. `texts` train the tokenizers."""
    transformers.utils.logging.disable_progress_bar()
    _write_qwen3(folder / QWEN3, texts)
    _write_gme(folder / GME, texts)
    source, target = ROOT / "model_repository", folder / "models"
    write_model(source, MODEL, target, MODEL, {})
    write_model(source, QWEN3, target, QWEN3, {"checkpoint": str(folder / QWEN3), "threads": "1"})
    min_tokens, max_tokens = map(str, IMAGE_TOKENS)
    parameters = {"checkpoint": str(folder / GME), "threads": "1", "max_tokens": ""}
    write_model(
        source,
        GME,
        target,
        GME,
        parameters | {"min_image_tokens": min_tokens, "max_image_tokens": max_tokens, "aliases": "gme"},
    )
    return target


def _write_qwen3(directory: Path, texts: Sequence[str]) -> None:
    tokenizer = _tokenizer(texts, (END,))
    end = tokenizer.token_to_id(END)
    tokenizer.post_processor = processors.TemplateProcessing(single=f"$A {END}", special_tokens=[(END, end)])
    config = Qwen3Config(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=QWEN3_TOKENS,
        initializer_range=0.1,
        tie_word_embeddings=False,
        bos_token_id=end,
        eos_token_id=end,
    )
    _save(Qwen3Model, config, tokenizer, directory)


def _write_gme(directory: Path, texts: Sequence[str]) -> None:
    tokenizer = _tokenizer(texts, CHAT)
    ids = {token: tokenizer.token_to_id(token) for token in CHAT}
    text = {
        "vocab_size": tokenizer.get_vocab_size(),
        "hidden_size": 96,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "max_position_embeddings": GME_TOKENS,
        "initializer_range": 0.1,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 3, 3]},
        "bos_token_id": ids[END],
        "eos_token_id": ids["<|im_end|>"],
    }
    vision = {"depth": 2, "embed_dim": 64, "num_heads": 4, "mlp_ratio": 2, "hidden_size": 96, "initializer_range": 0.06}
    config = Qwen2VLConfig(
        text_config=text,
        vision_config=vision,
        tie_word_embeddings=False,
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
    )
    _save(Qwen2VLForConditionalGeneration, config, tokenizer, directory)
    preprocessor = {
        **dict.fromkeys(("do_convert_rgb", "do_normalize", "do_rescale", "do_resize"), True),
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
        "image_processor_type": "Qwen2VLImageProcessor",
        "max_pixels": 12_845_056,
        "min_pixels": 3_136,
        "merge_size": config.vision_config.spatial_merge_size,
        "patch_size": config.vision_config.patch_size,
        "temporal_patch_size": config.vision_config.temporal_patch_size,
        "resample": 3,
        "rescale_factor": 1 / 255,
    }
    (directory / "preprocessor_config.json").write_text(json.dumps(preprocessor))


def _tokenizer(texts: Sequence[str], specials: Sequence[str]) -> Tokenizer:
    """Train a byte-level BPE tokenizer on `texts`. Its offsets include leading spaces."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=2_000, show_progress=False, initial_alphabet=alphabet)
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in specials])
    return tokenizer


def _save(
    network: type[PreTrainedModel], config: Qwen3Config | Qwen2VLConfig, tokenizer: Tokenizer, directory: Path
) -> None:
    torch.manual_seed(0)
    network(config).eval().save_pretrained(directory)
    tokenizer.save(str(directory / "tokenizer.json"))
