"""Tests of the image processors: pixels must equal those of transformers, and malformed files must be rejected.

transformers' processors get the image as its `load_image` opens it (upright); ours get the bytes of the file.
"""

import io
import json
import re
import struct
import tracemalloc
import warnings
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps
from tokenizers import Tokenizer, models
from transformers import AutoImageProcessor, CLIPProcessor, PreTrainedTokenizerFast
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil, smart_resize

from triton_embed.kernels.ops import Ops
from triton_embed.python_backend.errors import BadRequest, ConfigError
from triton_embed.python_backend.inputs import images
from triton_embed.python_backend.inputs.images import ClipImageProcessor, Pixels, Qwen2VLImageProcessor, decode

ops = Ops.on("cpu", torch.float32)

MEAN, STD = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]
# preprocessor_config.json of openai/clip-vit-large-patch14 and Qwen/Qwen2-VL-2B-Instruct on the Hugging Face Hub.
OPENAI = {
    "crop_size": 224,
    "do_center_crop": True,
    "do_normalize": True,
    "do_resize": True,
    "feature_extractor_type": "CLIPFeatureExtractor",
    "image_mean": MEAN,
    "image_std": STD,
    "resample": 3,
    "size": 224,
}
QWEN = {
    "min_pixels": 3136,
    "max_pixels": 12845056,
    "patch_size": 14,
    "temporal_patch_size": 2,
    "merge_size": 2,
    "image_mean": MEAN,
    "image_std": STD,
    "image_processor_type": "Qwen2VLImageProcessor",
    "processor_class": "Qwen2VLProcessor",
}
CLIP_SETTINGS: dict[str, dict[str, Any]] = {
    "hub": OPENAI,
    "odd": {**OPENAI, "size": {"shortest_edge": 31}, "crop_size": {"height": 22, "width": 22}, "resample": 2},
    "wide": {**OPENAI, "size": 40, "crop_size": {"height": 21, "width": 40}, "image_std": [0.5, 1, 2.0]},
    "exact": {
        **OPENAI,
        "size": {"height": 40, "width": 24},
        "crop_size": {"height": 33, "width": 24},
        "resample": 1,
        "rescale_factor": 0.00392156862745098,
    },
}
LIMITS = [(1, 4), (4, 16), (7, 7), (16, 40), (1, 1280)]  # the official limits (256, 1280) have a separate test
SIZES = [  # width, height
    (37, 53),
    (53, 37),
    (48, 48),
    (28, 28),
    (2, 3),
    (3, 500),
    (500, 3),
    (400, 2),
    (300, 200),
    (42, 70),  # 1.5 and 2.5 blocks: halves round to even
    (70, 42),
    (98, 126),
    (20, 600),  # thinner than a block after resizing
    (600, 20),
    (14, 13),
    (139, 141),
]
INDEX = 3


def make_image(width: int, height: int, mode: str = "RGB") -> Image.Image:
    """Create an image of gradients and noise, which exposes every wrong filter and every shift."""
    random = np.random.default_rng(width * 1000 + height)
    x, y = np.linspace(0, 200, width), np.linspace(0, 200, height)[:, None]
    channels = [x + 0 * y, y + 0 * x, (x + y) / 2, 250 - x + 0 * y]
    noisy = np.stack(channels, axis=-1) + random.integers(-50, 55, (height, width, 4))
    return Image.fromarray(noisy.clip(0, 255).astype(np.uint8)[..., : 4 if mode == "RGBA" else 3]).convert(mode)


def encode(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def upright(data: bytes) -> Image.Image:
    return ImageOps.exif_transpose(Image.open(io.BytesIO(data)))


def write_settings(directory: Path, config: dict[str, Any], name: str = "preprocessor_config.json") -> Path:
    directory.mkdir(exist_ok=True)
    (directory / name).write_text(json.dumps(config))
    return directory


def normalized_patches(
    pixels: Pixels, processor: ClipImageProcessor | Qwen2VLImageProcessor, patch: int, merge: int, frames: int
) -> torch.Tensor:
    assert pixels.dtype == np.uint8
    mean, std = torch.tensor(processor.mean), torch.tensor(processor.std)
    return ops.patchify(torch.from_numpy(pixels), patch, merge, frames, mean, std)


def assert_same_as_clip(directory: Path, data: bytes, expected: Image.Image | None = None) -> None:
    """Compare with transformers' CLIP processor, which gets `expected` or else the decoded file."""
    processor = ClipImageProcessor.from_checkpoint(directory)
    theirs = CLIPImageProcessorPil.from_pretrained(directory)(
        expected or upright(data), return_tensors="pt"
    ).pixel_values[0]
    pixels = processor.read(data, INDEX)
    assert pixels.shape == (*theirs.shape[1:], 3)
    assert pixels.shape[:2] == processor.crop
    ours = normalized_patches(pixels, processor, patch=1, merge=1, frames=1).T.reshape(theirs.shape)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


def assert_same_as_qwen(
    directory: Path, data: bytes, limits: tuple[int, int], expected: Image.Image | None = None, block: int = 28
) -> None:
    processor = Qwen2VLImageProcessor.from_checkpoint(directory, *limits)
    pixel_limits = {"min_pixels": limits[0] * block**2, "max_pixels": limits[1] * block**2}
    transformers_processor = Qwen2VLImageProcessorPil.from_pretrained(directory, **pixel_limits)  # like GME's code
    theirs = transformers_processor(expected or upright(data), return_tensors="pt")
    pixels = processor.read(data, INDEX)
    patch_grid = [1, pixels.shape[0] // processor.patch_size, pixels.shape[1] // processor.patch_size]
    assert [patch_grid] == theirs.image_grid_thw.tolist()
    patches = normalized_patches(pixels, processor, processor.patch_size, processor.merge_size, processor.frames)
    torch.testing.assert_close(patches, theirs.pixel_values, rtol=0, atol=1e-5)


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_settings(tmp_path_factory.mktemp("clip"), CLIP_SETTINGS["odd"])


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_settings(tmp_path_factory.mktemp("qwen"), QWEN)


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("name", CLIP_SETTINGS)
def test_clip_images_of_any_size_equal_those_of_transformers(name: str, size: tuple[int, int], tmp_path: Path) -> None:
    assert_same_as_clip(write_settings(tmp_path, CLIP_SETTINGS[name]), encode(make_image(*size)))


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_qwen_images_of_any_size_equal_those_of_transformers(size: tuple[int, int], qwen: Path) -> None:
    for limits in LIMITS:
        assert_same_as_qwen(qwen, encode(make_image(*size)), limits)


@pytest.mark.parametrize("size", [(1500, 900), (900, 1500), (60, 40), (3, 500)], ids=str)
def test_large_and_small_images_with_the_official_limits(size: tuple[int, int], qwen: Path, tmp_path: Path) -> None:
    assert_same_as_qwen(qwen, encode(make_image(*size)), (256, 1280))
    assert_same_as_clip(write_settings(tmp_path, OPENAI), encode(make_image(*size)))


def test_patch_and_block_sizes_come_from_the_checkpoint(tmp_path: Path) -> None:
    config = {**QWEN, "patch_size": 6, "merge_size": 3, "temporal_patch_size": 1, "resample": 2}
    assert_same_as_qwen(write_settings(tmp_path, config), encode(make_image(71, 100)), (2, 30), block=18)


SIDES = st.integers(2, 6000) | st.integers(1, 400).map(lambda halves: halves * 14)
TOKENS = st.integers(1, 20) | st.integers(1, 1500)


@settings(deadline=None, max_examples=500)
@given(
    height=SIDES,
    width=SIDES,
    patch=st.sampled_from([(14, 2), (8, 1), (6, 3)]),
    limits=st.tuples(TOKENS, TOKENS).map(sorted),
)
def test_target_sizes_equal_smart_resize_of_transformers(
    height: int, width: int, patch: tuple[int, int], limits: list[int]
) -> None:
    assume(max(height, width) / min(height, width) <= 200)
    processor = Qwen2VLImageProcessor((0, 0, 0), (1, 1, 1), *patch, 2, limits[0], limits[1], Image.Resampling.BICUBIC)
    block = patch[0] * patch[1]
    theirs = smart_resize(height, width, block, limits[0] * block**2, limits[1] * block**2)
    assert processor.target_size(height, width) == theirs


def png_with_transparency(mode: str, transparency: int | bytes | tuple[int, ...]) -> bytes:
    """Create a PNG with a tRNS chunk, which lists the transparent colors separately from the pixels."""
    image = make_image(53, 37)
    return encode(image.quantize(16) if mode == "P" else image.convert(mode), transparency=transparency)


def animation(kind: str) -> bytes:
    more_frames = [make_image(53, 37).rotate(180), make_image(53, 37).convert("L").convert("RGB")]
    return encode(make_image(53, 37), kind, save_all=True, append_images=more_frames)


WIDE = make_image(53, 37)
FILES: dict[str, Callable[[], bytes]] = {
    "rgb": lambda: encode(WIDE),
    "rgba": lambda: encode(make_image(53, 37, "RGBA")),
    "palette": lambda: encode(WIDE.quantize(16)),
    "palette, one transparent color": lambda: png_with_transparency("P", 3),
    "palette, half-transparent colors": lambda: png_with_transparency("P", bytes(range(0, 256, 16))),
    "gray": lambda: encode(WIDE.convert("L")),
    "gray, one transparent level": lambda: png_with_transparency("L", 100),
    "rgb, one transparent color": lambda: png_with_transparency("RGB", WIDE.getpixel((0, 0))),  # type: ignore[arg-type]
    "gray and alpha": lambda: encode(make_image(53, 37, "RGBA").convert("LA")),
    "one bit": lambda: encode(WIDE.convert("1")),
    "one bit, transparent black": lambda: png_with_transparency("1", 0),
    "jpeg": lambda: encode(WIDE, "JPEG"),
    "progressive gray jpeg": lambda: encode(WIDE.convert("L"), "JPEG", progressive=True),
    "cmyk jpeg": lambda: encode(WIDE.convert("CMYK"), "JPEG"),
    "several images in a jpeg": lambda: animation("MPO"),
    "gif": lambda: encode(WIDE, "GIF"),
    "transparent gif": lambda: encode(WIDE.quantize(16), "GIF", transparency=2),
    "animated gif": lambda: animation("GIF"),
    "animated png": lambda: animation("PNG"),
    "animated webp": lambda: animation("WEBP"),
    "webp": lambda: encode(WIDE, "WEBP"),
    "transparent webp": lambda: encode(make_image(53, 37, "RGBA"), "WEBP", lossless=True),
    "bmp": lambda: encode(WIDE, "BMP"),
    "tiff": lambda: encode(WIDE, "TIFF"),
    "compressed tiff": lambda: encode(WIDE, "TIFF", compression="tiff_lzw"),
    "transparent tiff": lambda: encode(make_image(53, 37, "RGBA"), "TIFF"),
}


@pytest.mark.parametrize("name", FILES)
def test_every_file_format_is_decoded_like_transformers(name: str, clip: Path, qwen: Path) -> None:
    data = FILES[name]()
    assert_same_as_clip(clip, data)
    assert_same_as_qwen(qwen, data, (1, 16))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP"])
def test_exif_orientation_is_applied(kind: str, orientation: int, clip: Path, qwen: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encode(WIDE, kind, exif=exif)
    assert upright(data).size == (WIDE.size if orientation < 5 else WIDE.size[::-1])
    assert_same_as_clip(clip, data)
    assert_same_as_qwen(qwen, data, (1, 16))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_broken_exif_is_ignored(kind: str, clip: Path) -> None:
    image = upright(encode(WIDE, kind))
    for exif in (b"Exif\0\0garbage", b"Exif\0\0II*\0\x08\0\0\0\xff\xff", b"Exif\0\0"):
        assert_same_as_clip(clip, encode(WIDE, kind, exif=exif), expected=image)


GRAY = ImageOps.autocontrast(make_image(53, 37, "L"))  # from 0 to 255
HIGH_DEPTH: dict[str, tuple[Callable[[Any], Any], str]] = {
    "16 bits": (lambda gray: (gray * 257).astype(np.uint16), "PNG"),
    "16 bits, rounded": (lambda gray: (gray * 257 - np.sign(gray - 127.5) * 128).astype(np.uint16), "PNG"),
    "16 bits, big-endian": (lambda gray: (gray * 257).astype(">u2"), "TIFF"),
    "32 bits": (lambda gray: (gray * 7_000_000 - 900_000_000).astype(np.int32), "TIFF"),
    "floats of 1": (lambda gray: (gray / 255).astype(np.float32), "TIFF"),
    "floats of 255": (lambda gray: gray.astype(np.float32), "TIFF"),
    "large floats": (lambda gray: ((gray - 128) * 2e36).astype(np.float32), "TIFF"),
}


@pytest.mark.parametrize("name", HIGH_DEPTH)
def test_high_depth_gray_images_are_scaled_not_clipped(name: str, clip: Path, qwen: Path) -> None:
    """Compare with the 8-bit version of the image, because transformers clips levels above 255."""
    to_high_depth, kind = HIGH_DEPTH[name]
    data = encode(Image.fromarray(to_high_depth(np.asarray(GRAY).astype(np.float64))), kind)
    assert Image.open(io.BytesIO(data)).mode not in {"L", "RGB"}
    assert_same_as_clip(clip, data, expected=GRAY)
    assert_same_as_qwen(qwen, data, (1, 16), expected=GRAY)


def test_uniform_float_image_becomes_black() -> None:
    assert np.asarray(decode(encode(Image.new("F", (4, 5), 0.5), "TIFF"), 0)).max() == 0


def png(width: int, height: int, *chunks: tuple[bytes, bytes]) -> bytes:
    """Create an 8-bit RGB PNG of a header and the given chunks; only the chunks contain pixels."""
    header = (b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    parts = [
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        for kind, body in (header, *chunks, (b"IEND", b""))
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def tiled_tiff(tile: int, kind: int = 4) -> bytes:
    """Create a TIFF of 10x10 gray pixels in one compressed tile.

    The tile has `tile` x `tile` pixels; `kind` is the TIFF type of the tags that declare its sides.
    """
    compressor = zlib.compressobj(9)
    packed = b"".join(compressor.compress(bytes(tile)) for _ in range(tile)) + compressor.flush()
    tile_offset = 8 + 2 + 12 * 10 + 4
    tags = [(256, 4, 10), (257, 4, 10), (258, 3, 8), (259, 3, 8), (262, 3, 1), (277, 3, 1)]
    tags += [(322, kind, tile), (323, kind, tile), (324, 4, tile_offset), (325, 4, len(packed))]
    directory = b"".join(struct.pack("<HHII", tag, value_type, 1, value) for tag, value_type, value in tags)
    return b"II*\0" + struct.pack("<IH", 8, len(tags)) + directory + bytes(4) + packed


def scans_repeated(count: int) -> bytes:
    """Create a progressive JPEG whose last scan is repeated until it has `count` scans."""
    data = encode(WIDE, "JPEG", progressive=True)
    last = data.rindex(b"\xff\xda")
    return data[:-2] + data[last:-2] * (count - data.count(b"\xff\xda")) + data[-2:]


EXACTLY_50_MEGAPIXELS = png(10_000, 5_000)
TOO_MANY = "of more than 50,000,000 pixels"
UNREADABLE = "that cannot be read: the file is truncated or broken"
UNKNOWN = "that cannot be read: it is not a BMP, GIF, JPEG, PNG, TIFF or WEBP file"
REJECTED: dict[str, tuple[Callable[[], bytes], str]] = {
    "zero bytes": (lambda: b"", "that cannot be read: it is empty"),
    "text named .png": (lambda: b"this is not an image\n", UNKNOWN),
    "svg": (lambda: b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>', UNKNOWN),
    "eps": (lambda: encode(WIDE, "EPS"), UNKNOWN),
    "pdf": (lambda: encode(WIDE, "PDF"), UNKNOWN),
    "an unsupported format": (lambda: encode(WIDE, "PPM"), UNKNOWN),
    "only a signature": (lambda: b"\x89PNG\r\n\x1a\n", UNKNOWN),
    "pixels cut off by a chunk without a name": (
        lambda: png(9, 9, (b"IDAT", zlib.compress(bytes(252))[:5]), (b"\0\0\0\0", b"")),
        UNREADABLE,
    ),
    "no pixels at all": (lambda: EXACTLY_50_MEGAPIXELS, UNREADABLE),
    "60 megapixels": (lambda: png(10_000, 6_000), TOO_MANY),
    "one row of pixels too many": (lambda: png(10_000, 5_001), TOO_MANY),
    "100 megapixels, above Pillow's warning limit": (lambda: png(10_000, 10_000), TOO_MANY),
    "400 megapixels, above Pillow's error limit": (lambda: png(20_000, 20_000), TOO_MANY),
    "a tile of 64 megapixels": (lambda: tiled_tiff(8_000), TOO_MANY),
    "a tile with sides of type BYTE": (lambda: tiled_tiff(200, kind=1), UNREADABLE),
    "1x1": (lambda: encode(make_image(1, 1)), "of 1x1 pixels; each side must have at least 2"),
    "1x5000": (lambda: encode(Image.new("RGB", (1, 5000))), "of 1x5000 pixels; each side must have at least 2"),
    "width of 0": (lambda: png(0, 9), UNKNOWN),
    "2x401": (lambda: encode(Image.new("L", (2, 401))), "of 2x401 pixels; one side may be at most 200 times the other"),
    "41 scans": (lambda: scans_repeated(41), "of more than 40 progressive scans"),
    "NaN pixels": (lambda: encode(Image.fromarray(np.full((4, 4), np.nan, np.float32)), "TIFF"), UNREADABLE),
    **{
        f"half a {kind.lower()}": (lambda kind=kind: encode(WIDE, kind)[: len(encode(WIDE, kind)) // 2], UNREADABLE)  # type: ignore[misc]
        for kind in images.FORMATS
    },
}


@pytest.mark.parametrize("name", REJECTED)
def test_rejected_image_error_names_the_index(name: str, clip: Path, qwen: Path) -> None:
    make_file, reason = REJECTED[name]
    for processor in (ClipImageProcessor.from_checkpoint(clip), Qwen2VLImageProcessor.from_checkpoint(qwen, 256, 1280)):
        with pytest.raises(BadRequest) as error:
            processor.read(make_file(), 7)
        assert str(error.value) == f"Input at index 7 has an image {reason}"
        assert error.value.__cause__ is None


def test_size_limits_are_checked_before_decoding(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        pytest.fail("decoded")

    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", fail)
    for name in ("60 megapixels", "a tile of 64 megapixels", "1x1", "1x5000", "2x401", "41 scans"):
        with pytest.raises(BadRequest):
            decode(REJECTED[name][0](), INDEX)


def test_ordinary_progressive_jpeg_is_decoded(clip: Path) -> None:
    assert encode(WIDE, "JPEG", progressive=True).count(b"\xff\xda") > 5
    assert_same_as_clip(clip, encode(WIDE, "JPEG", progressive=True))
    assert decode(scans_repeated(40), INDEX).size == WIDE.size


def test_tile_with_byte_sides_allocates_no_memory() -> None:
    """Test a tile side that Pillow returns as bytes: multiplied by the other side it would fill the memory."""
    byte_tag, long_tag = struct.pack("<HHII", 323, 1, 1, 200), struct.pack("<HHII", 323, 4, 1, 300_000_000)
    data = tiled_tiff(200, kind=1).replace(byte_tag, long_tag)
    tracemalloc.start()
    with pytest.raises(BadRequest, match=UNREADABLE):
        decode(data, INDEX)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 10_000_000


READABLE_WITH_WARNING = {  # text of Pillow's warning -> file
    "Invalid APNG": png(2, 2, (b"acTL", bytes(8)), (b"IDAT", zlib.compress(bytes(14)))),
    "Corrupt EXIF": encode(WIDE, "JPEG", exif=b"Exif\0\0II*\0\x08\0\0\0\x01\0"),
}


@pytest.mark.parametrize("warning", READABLE_WITH_WARNING)
def test_only_pillow_warnings_are_suppressed(warning: str) -> None:
    with pytest.warns(UserWarning, match=warning):
        upright(READABLE_WITH_WARNING[warning])
    decode(READABLE_WITH_WARNING[warning], INDEX)
    with pytest.raises(UserWarning, match="from other code"):
        warnings.warn("from other code", stacklevel=1)


def test_concurrent_reads_equal_sequential_reads(clip: Path) -> None:
    processor = ClipImageProcessor.from_checkpoint(clip)
    files = [make_file() for make_file in FILES.values()] + list(READABLE_WITH_WARNING.values())
    sequential = [processor.read(data, 0) for data in files]
    with ThreadPoolExecutor(8) as pool:
        concurrent = list(pool.map(lambda data: processor.read(data, 0), files * 8))
    assert all(np.array_equal(pixels, sequential[i % len(files)]) for i, pixels in enumerate(concurrent))


@cache
def fuzz_seeds() -> list[bytes]:
    """Create small files of every format, with metadata, for the fuzzer to corrupt."""
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "a description"
    small = make_image(11, 9)
    formats: list[tuple[str, dict[str, Any]]] = [(kind, {"exif": exif}) for kind in ("JPEG", "PNG", "TIFF", "WEBP")]
    formats += [("JPEG", {"progressive": True}), ("TIFF", {"compression": "tiff_lzw"}), ("BMP", {}), ("GIF", {})]
    formats += [("TIFF", {"compression": "jpeg"}), ("MPO", {"save_all": True, "append_images": [small]})]
    transparent = [encode(make_image(11, 9, "RGBA"), kind) for kind in ("PNG", "WEBP", "TIFF")]
    high_depth = [encode(small.convert(mode), "TIFF") for mode in ("F", "I", "I;16")]
    return [
        *(encode(small, kind, **options) for kind, options in formats),
        *transparent,
        *high_depth,
        encode(small.quantize(9)),
    ]


REJECTION = re.compile(rf"Input at index {INDEX} has an image (that cannot be read: [^:]+|of [^:]+)")


@settings(deadline=None, max_examples=1000)
@given(
    seed_index=st.integers(0, 100),
    flips=st.lists(st.tuples(st.integers(-300, 300), st.integers(0, 255)), max_size=6),
    cut=st.none() | st.integers(0, 3000),
)
def test_corrupted_file_is_decoded_or_rejected(seed_index: int, flips: list[tuple[int, int]], cut: int | None) -> None:
    """Replace bytes near either end of the file, where formats store their structure."""
    data = bytearray(fuzz_seeds()[seed_index % len(fuzz_seeds())])
    for offset, value in flips:
        data[offset % len(data)] = value
    try:
        image = decode(bytes(data[:cut]), INDEX)
    except BadRequest as error:
        assert REJECTION.fullmatch(str(error))  # noqa: PT017 - decoding and rejection are both correct
    else:
        assert image.mode == "RGB"
        assert min(image.size) >= 2


@settings(deadline=None, max_examples=200)
@given(
    st.binary(max_size=60), st.sampled_from([b"", b"\x89PNG\r\n\x1a\n", b"GIF89a", b"BM", b"II*\0", b"\xff\xd8\xff"])
)
def test_random_bytes_are_rejected(noise: bytes, signature: bytes) -> None:
    with pytest.raises(BadRequest, match=REJECTION):
        decode(signature + noise, INDEX)


def test_settings_are_located_like_transformers(tmp_path: Path) -> None:
    """Check processor_config.json first, where transformers 5 saves the settings, then the older file."""
    saved, with_both_files = tmp_path / "saved", tmp_path / "both"
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0}, unk_token="a")))
    CLIPProcessor(CLIPImageProcessorPil(size={"shortest_edge": 30}, crop_size=30), tokenizer).save_pretrained(saved)
    assert not (saved / "preprocessor_config.json").exists()
    assert ClipImageProcessor.from_checkpoint(saved).size == 30
    assert_same_as_clip(saved, encode(WIDE))

    CLIPProcessor(CLIPImageProcessorPil(size={"shortest_edge": 30}, crop_size=30), tokenizer).save_pretrained(
        with_both_files
    )
    write_settings(with_both_files, OPENAI)
    assert AutoImageProcessor.from_pretrained(with_both_files, backend="pil").size["shortest_edge"] == 30
    assert ClipImageProcessor.from_checkpoint(with_both_files).size == 30

    with_name_only = write_settings(tmp_path / "named", {"processor_class": "CLIPProcessor"}, "processor_config.json")
    assert ClipImageProcessor.from_checkpoint(write_settings(with_name_only, OPENAI)).size == 224


def test_settings_saved_by_transformers_are_accepted(tmp_path: Path) -> None:
    CLIPImageProcessorPil().save_pretrained(tmp_path / "clip")
    assert_same_as_clip(tmp_path / "clip", encode(WIDE))
    Qwen2VLImageProcessorPil().save_pretrained(tmp_path / "qwen")
    assert_same_as_qwen(tmp_path / "qwen", encode(WIDE), (4, 16))


@pytest.mark.parametrize("key", ["size", "crop_size", "image_mean", "image_std", "resample", "do_center_crop"])
def test_missing_clip_setting_has_the_default_of_its_class(key: str, tmp_path: Path) -> None:
    assert_same_as_clip(write_settings(tmp_path, {k: v for k, v in OPENAI.items() if k != key}), encode(WIDE))


@pytest.mark.parametrize("key", ["patch_size", "merge_size", "temporal_patch_size", "image_mean", "image_std"])
def test_missing_qwen_setting_has_the_default_of_its_class(key: str, tmp_path: Path) -> None:
    assert_same_as_qwen(write_settings(tmp_path, {k: v for k, v in QWEN.items() if k != key}), encode(WIDE), (4, 16))


@pytest.mark.parametrize(
    "changes",
    [{"rescale_factor": 0.01}, {"do_rescale": False}, {"do_normalize": False}, {"do_normalize": False, "size": 300}],
    ids=str,
)
def test_scale_and_normalization_equal_those_of_transformers(changes: dict[str, Any], tmp_path: Path) -> None:
    directory = write_settings(tmp_path, {**OPENAI, **changes})
    theirs = CLIPImageProcessorPil.from_pretrained(directory)(upright(encode(WIDE)), return_tensors="pt").pixel_values
    processor = ClipImageProcessor.from_checkpoint(directory)
    patches = normalized_patches(processor.read(encode(WIDE), INDEX), processor, patch=1, merge=1, frames=1)
    torch.testing.assert_close(patches.T.reshape(theirs.shape), theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("size", [224, {"shortest_edge": 224}], ids=str)
def test_one_length_may_be_that_of_a_square(size: Any, tmp_path: Path) -> None:
    assert_same_as_clip(write_settings(tmp_path, {**OPENAI, "size": size, "default_to_square": True}), encode(WIDE))


INVALID_CLIP: list[tuple[str, Any, str]] = [
    ("size", "224", "size is '224'; expected type int or dict"),
    ("size", 0, "size is 0; must consist of whole numbers above 0"),
    ("size", {"shortest_edge": 2.5}, "size is {'shortest_edge': 2.5}; must consist of whole numbers above 0"),
    ("size", {"longest_edge": 224}, "size is {'longest_edge': 224}; must be one length, or height and width"),
    ("size", {}, "size is {}; must be one length, or height and width"),
    ("crop_size", {"shortest_edge": 9}, "crop_size is {'shortest_edge': 9}; must be one length, or height and width"),
    ("crop_size", 225, "crop_size is 225; must not be larger than size 224"),
    (
        "crop_size",
        {"height": 9, "width": 300},
        "crop_size is {'height': 9, 'width': 300}; must not be larger than size 224",
    ),
    ("image_mean", 0.5, "image_mean is 0.5; expected type list"),
    ("image_mean", [0.5, 0.5], "image_mean is [0.5, 0.5]; must be three finite numbers"),
    ("image_mean", [0.5, 0.5, "0"], "image_mean is [0.5, 0.5, '0']; must be three finite numbers"),
    ("image_std", [0.5, 0.5, float("nan")], "image_std is [0.5, 0.5, nan]; must be three finite numbers"),
    ("image_std", [0.5, 0.5, 0], "image_std is [0.5, 0.5, 0]; must be above 0"),
    ("resample", 9, "resample is 9; must be the number of a Pillow resampling filter"),
    ("resample", "bicubic", "resample is 'bicubic'; expected type int"),
    ("rescale_factor", 0, "rescale_factor is 0; must be above 0"),
    ("image_processor_type", "ViTImageProcessor", "is 'ViTImageProcessor'; only CLIPImageProcessor is implemented"),
    ("do_resize", False, "do_resize is False; only true is implemented"),
    ("do_center_crop", False, "do_center_crop is False; only true is implemented"),
    ("do_pad", True, "do_pad is True; only false is implemented"),
]
INVALID_QWEN: list[tuple[str, Any, str]] = [
    ("patch_size", 0, "patch_size is 0; must be above 0"),
    ("merge_size", 2.0, "merge_size is 2.0; expected type int"),
    ("do_resize", False, "do_resize is False; only true is implemented"),
    ("resample", -1, "resample is -1; must be the number of a Pillow resampling filter"),
]


@pytest.mark.parametrize(("key", "value", "reason"), INVALID_CLIP)
def test_invalid_clip_settings_are_rejected(key: str, value: Any, reason: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as error:
        ClipImageProcessor.from_checkpoint(write_settings(tmp_path, {**OPENAI, key: value}))
    message = str(error.value)
    assert message.startswith(str(tmp_path / "preprocessor_config.json"))
    assert message.endswith(reason)


@pytest.mark.parametrize(("key", "value", "reason"), INVALID_QWEN)
def test_invalid_qwen_settings_are_rejected(key: str, value: Any, reason: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"preprocessor_config\.json") as error:
        Qwen2VLImageProcessor.from_checkpoint(write_settings(tmp_path, {**QWEN, key: value}), 256, 1280)
    assert str(error.value).endswith(reason)


def test_missing_settings_and_invalid_limits_are_rejected(tmp_path: Path, qwen: Path) -> None:
    for load in (
        ClipImageProcessor.from_checkpoint,
        lambda directory: Qwen2VLImageProcessor.from_checkpoint(directory, 256, 1280),
    ):
        with pytest.raises(ConfigError, match=r"preprocessor_config\.json is missing"):
            load(tmp_path)
    for limits in ((0, 5), (6, 5)):
        with pytest.raises(ConfigError, match=f"min_image_tokens is {limits[0]}, max_image_tokens is {limits[1]};"):
            Qwen2VLImageProcessor.from_checkpoint(qwen, *limits)
