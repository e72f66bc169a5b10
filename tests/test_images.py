"""Image files to pictures against transformers' own processors, and everything a hostile file can try.

Theirs get the picture as transformers' `load_image` opens it, upright; ours get the bytes.
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

from triton_embed.kernels import ops
from triton_embed.python_backend import images
from triton_embed.python_backend.errors import BadRequest, ConfigError
from triton_embed.python_backend.images import ClipImages, Pixels, Qwen2VLImages, decode

MEAN, STD = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]
# preprocessor_config.json as openai/clip-vit-large-patch14 and Qwen/Qwen2-VL-2B-Instruct have it on the hub.
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
CLIP_RULES: dict[str, dict[str, Any]] = {
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
LIMITS = [(1, 4), (4, 16), (7, 7), (16, 40), (1, 1280)]  # (256, 1280), the official ones, in a test of their own
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
    (42, 70),  # 1.5 and 2.5 blocks: halves go to the even neighbour
    (70, 42),
    (98, 126),
    (20, 600),  # thinner than a block once it fits
    (600, 20),
    (14, 13),
    (139, 141),
]
INDEX = 3


def picture(width: int, height: int, mode: str = "RGB") -> Image.Image:
    """Slopes and noise, so that every filter and every shift shows."""
    random = np.random.default_rng(width * 1000 + height)
    x, y = np.linspace(0, 200, width), np.linspace(0, 200, height)[:, None]
    channels = [x + 0 * y, y + 0 * x, (x + y) / 2, 250 - x + 0 * y]
    noisy = np.stack(channels, axis=-1) + random.integers(-50, 55, (height, width, 4))
    return Image.fromarray(noisy.clip(0, 255).astype(np.uint8)[..., : 4 if mode == "RGBA" else 3]).convert(mode)


def file(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    written = io.BytesIO()
    image.save(written, kind, **options)
    return written.getvalue()


def upright(data: bytes) -> Image.Image:
    return ImageOps.exif_transpose(Image.open(io.BytesIO(data)))


def checkpoint(directory: Path, config: dict[str, Any], name: str = "preprocessor_config.json") -> Path:
    directory.mkdir(exist_ok=True)
    (directory / name).write_text(json.dumps(config))
    return directory


def normalised(pixels: Pixels, rule: ClipImages | Qwen2VLImages, patch: int, merge: int, frames: int) -> torch.Tensor:
    assert pixels.dtype == np.uint8
    mean, std = torch.tensor(rule.mean), torch.tensor(rule.std)
    return ops.patchify(torch.from_numpy(pixels), patch, merge, frames, mean, std)


def same_as_clip(directory: Path, data: bytes, shown: Image.Image | None = None) -> None:
    """`shown`: what theirs get, where it is not the file itself."""
    rule = ClipImages.from_checkpoint(directory)
    theirs = CLIPImageProcessorPil.from_pretrained(directory)(shown or upright(data), return_tensors="pt").pixel_values[
        0
    ]
    pixels = rule.read(data, INDEX)
    assert pixels.shape == (*theirs.shape[1:], 3)
    assert pixels.shape[:2] == rule.crop
    ours = normalised(pixels, rule, patch=1, merge=1, frames=1).T.reshape(theirs.shape)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


def same_as_qwen(
    directory: Path, data: bytes, limits: tuple[int, int], shown: Image.Image | None = None, block: int = 28
) -> None:
    rule = Qwen2VLImages.from_checkpoint(directory, *limits)
    pixels = {"min_pixels": limits[0] * block**2, "max_pixels": limits[1] * block**2}
    processor = Qwen2VLImageProcessorPil.from_pretrained(directory, **pixels)  # how GME's code sets its limits
    theirs = processor(shown or upright(data), return_tensors="pt")
    ours = rule.read(data, INDEX)
    grid = [1, ours.shape[0] // rule.patch_size, ours.shape[1] // rule.patch_size]
    assert [grid] == theirs.image_grid_thw.tolist()
    found = normalised(ours, rule, rule.patch_size, rule.merge_size, rule.frames)
    torch.testing.assert_close(found, theirs.pixel_values, rtol=0, atol=1e-5)


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoint(tmp_path_factory.mktemp("clip"), CLIP_RULES["odd"])


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoint(tmp_path_factory.mktemp("qwen"), QWEN)


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("rule", CLIP_RULES)
def test_clip_pictures_of_any_size_are_transformers_own(rule: str, size: tuple[int, int], tmp_path: Path) -> None:
    same_as_clip(checkpoint(tmp_path, CLIP_RULES[rule]), file(picture(*size)))


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_qwen_pictures_of_any_size_are_transformers_own(size: tuple[int, int], qwen: Path) -> None:
    for limits in LIMITS:
        same_as_qwen(qwen, file(picture(*size)), limits)


@pytest.mark.parametrize("size", [(1500, 900), (900, 1500), (60, 40), (3, 500)], ids=str)
def test_large_and_small_pictures_under_the_official_limits(size: tuple[int, int], qwen: Path, tmp_path: Path) -> None:
    same_as_qwen(qwen, file(picture(*size)), (256, 1280))
    same_as_clip(checkpoint(tmp_path, OPENAI), file(picture(*size)))


def test_patch_and_block_sizes_are_the_checkpoints(tmp_path: Path) -> None:
    other = {**QWEN, "patch_size": 6, "merge_size": 3, "temporal_patch_size": 1, "resample": 2}
    same_as_qwen(checkpoint(tmp_path, other), file(picture(71, 100)), (2, 30), block=18)


SIDES = st.integers(2, 6000) | st.integers(1, 400).map(lambda halves: halves * 14)
TOKENS = st.integers(1, 20) | st.integers(1, 1500)


@settings(deadline=None, max_examples=500)
@given(
    height=SIDES,
    width=SIDES,
    patch=st.sampled_from([(14, 2), (8, 1), (6, 3)]),
    limits=st.tuples(TOKENS, TOKENS).map(sorted),
)
def test_sizes_are_transformers_smart_resize(
    height: int, width: int, patch: tuple[int, int], limits: list[int]
) -> None:
    assume(max(height, width) / min(height, width) <= 200)
    rule = Qwen2VLImages((0, 0, 0), (1, 1, 1), *patch, 2, limits[0], limits[1], Image.Resampling.BICUBIC)
    block = patch[0] * patch[1]
    theirs = smart_resize(height, width, block, limits[0] * block**2, limits[1] * block**2)
    assert rule.resized(height, width) == theirs


def with_clear(mode: str, clear: int | bytes | tuple[int, ...]) -> bytes:
    """A PNG whose transparent colours stand beside its pixels."""
    image = picture(53, 37)
    return file(image.quantize(16) if mode == "P" else image.convert(mode), transparency=clear)


def animation(kind: str) -> bytes:
    others = [picture(53, 37).rotate(180), picture(53, 37).convert("L").convert("RGB")]
    return file(picture(53, 37), kind, save_all=True, append_images=others)


WIDE = picture(53, 37)
FILES: dict[str, Callable[[], bytes]] = {
    "rgb": lambda: file(WIDE),
    "rgba": lambda: file(picture(53, 37, "RGBA")),
    "palette": lambda: file(WIDE.quantize(16)),
    "palette, one colour clear": lambda: with_clear("P", 3),
    "palette, colours half clear": lambda: with_clear("P", bytes(range(0, 256, 16))),
    "grey": lambda: file(WIDE.convert("L")),
    "grey, one clear": lambda: with_clear("L", 100),
    "rgb, one clear": lambda: with_clear("RGB", WIDE.getpixel((0, 0))),  # type: ignore[arg-type]
    "grey and alpha": lambda: file(picture(53, 37, "RGBA").convert("LA")),
    "one bit": lambda: file(WIDE.convert("1")),
    "one bit, black clear": lambda: with_clear("1", 0),
    "jpeg": lambda: file(WIDE, "JPEG"),
    "progressive grey jpeg": lambda: file(WIDE.convert("L"), "JPEG", progressive=True),
    "cmyk jpeg": lambda: file(WIDE.convert("CMYK"), "JPEG"),
    "several pictures in a jpeg": lambda: animation("MPO"),
    "gif": lambda: file(WIDE, "GIF"),
    "clear gif": lambda: file(WIDE.quantize(16), "GIF", transparency=2),
    "animated gif": lambda: animation("GIF"),
    "animated png": lambda: animation("PNG"),
    "animated webp": lambda: animation("WEBP"),
    "webp": lambda: file(WIDE, "WEBP"),
    "clear webp": lambda: file(picture(53, 37, "RGBA"), "WEBP", lossless=True),
    "bmp": lambda: file(WIDE, "BMP"),
    "tiff": lambda: file(WIDE, "TIFF"),
    "packed tiff": lambda: file(WIDE, "TIFF", compression="tiff_lzw"),
    "clear tiff": lambda: file(picture(53, 37, "RGBA"), "TIFF"),
}


@pytest.mark.parametrize("name", FILES)
def test_every_kind_of_file_is_read_as_transformers_reads_it(name: str, clip: Path, qwen: Path) -> None:
    data = FILES[name]()
    same_as_clip(clip, data)
    same_as_qwen(qwen, data, (1, 16))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP"])
def test_pictures_are_turned_upright(kind: str, orientation: int, clip: Path, qwen: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = file(WIDE, kind, exif=exif)
    assert upright(data).size == (WIDE.size if orientation < 5 else WIDE.size[::-1])
    same_as_clip(clip, data)
    same_as_qwen(qwen, data, (1, 16))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_broken_exif_is_no_reason_to_refuse_a_picture(kind: str, clip: Path) -> None:
    whole = upright(file(WIDE, kind))
    for exif in (b"Exif\0\0garbage", b"Exif\0\0II*\0\x08\0\0\0\xff\xff", b"Exif\0\0"):
        same_as_clip(clip, file(WIDE, kind, exif=exif), shown=whole)


FULL = ImageOps.autocontrast(picture(53, 37, "L"))  # from 0 to 255
DEEP: dict[str, tuple[Callable[[Any], Any], str]] = {
    "16 bits": (lambda grey: (grey * 257).astype(np.uint16), "PNG"),
    "16 bits, rounded": (lambda grey: (grey * 257 - np.sign(grey - 127.5) * 128).astype(np.uint16), "PNG"),
    "16 bits, big-endian": (lambda grey: (grey * 257).astype(">u2"), "TIFF"),
    "32 bits": (lambda grey: (grey * 7_000_000 - 900_000_000).astype(np.int32), "TIFF"),
    "floats of 1": (lambda grey: (grey / 255).astype(np.float32), "TIFF"),
    "floats of 255": (lambda grey: grey.astype(np.float32), "TIFF"),
    "large floats": (lambda grey: ((grey - 128) * 2e36).astype(np.float32), "TIFF"),
}


@pytest.mark.parametrize("name", DEEP)
def test_deep_greys_are_scaled_not_clipped(name: str, clip: Path, qwen: Path) -> None:
    """transformers clips them at 255, so it gets the same picture in 8 bits."""
    deepened, kind = DEEP[name]
    data = file(Image.fromarray(deepened(np.asarray(FULL).astype(np.float64))), kind)
    assert Image.open(io.BytesIO(data)).mode not in {"L", "RGB"}
    same_as_clip(clip, data, shown=FULL)
    same_as_qwen(qwen, data, (1, 16), shown=FULL)


def test_a_flat_deep_grey_is_black() -> None:
    assert np.asarray(decode(file(Image.new("F", (4, 5), 0.5), "TIFF"), 0)).max() == 0


def png(width: int, height: int, *chunks: tuple[bytes, bytes]) -> bytes:
    """A PNG of 8-bit RGB with these chunks after its header, and no pixels but theirs."""
    header = (b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    parts = [
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        for kind, body in (header, *chunks, (b"IEND", b""))
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def tiled_tiff(tile: int, kind: int = 4) -> bytes:
    """A TIFF of 10x10 grey pixels inside one packed tile of `tile` x `tile`; `kind` is the type of the tile's sides."""
    rows = zlib.compressobj(9)
    packed = b"".join(rows.compress(bytes(tile)) for _ in range(tile)) + rows.flush()
    where = 8 + 2 + 12 * 10 + 4
    tags = [(256, 4, 10), (257, 4, 10), (258, 3, 8), (259, 3, 8), (262, 3, 1), (277, 3, 1)]
    tags += [(322, kind, tile), (323, kind, tile), (324, 4, where), (325, 4, len(packed))]
    directory = b"".join(struct.pack("<HHII", tag, form, 1, value) for tag, form, value in tags)
    return b"II*\0" + struct.pack("<IH", 8, len(tags)) + directory + bytes(4) + packed


EXACTLY_50_MEGAPIXELS = png(10_000, 5_000)
TOO_MANY = "of more than 50,000,000 pixels"
UNREADABLE = "that cannot be read: the file is truncated or broken"
UNKNOWN = "that cannot be read: it is no BMP, GIF, JPEG, PNG, TIFF or WEBP file"
REFUSED: dict[str, tuple[Callable[[], bytes], str]] = {
    "zero bytes": (lambda: b"", "that cannot be read: it is empty"),
    "text named .png": (lambda: b"this is no picture\n", UNKNOWN),
    "svg": (lambda: b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>', UNKNOWN),
    "eps": (lambda: file(WIDE, "EPS"), UNKNOWN),
    "pdf": (lambda: file(WIDE, "PDF"), UNKNOWN),
    "a format left out": (lambda: file(WIDE, "PPM"), UNKNOWN),
    "a signature alone": (lambda: b"\x89PNG\r\n\x1a\n", UNKNOWN),
    "pixels that a nameless chunk ends": (
        lambda: png(9, 9, (b"IDAT", zlib.compress(bytes(252))[:5]), (b"\0\0\0\0", b"")),
        UNREADABLE,
    ),
    "no pixels at all": (lambda: EXACTLY_50_MEGAPIXELS, UNREADABLE),
    "60 megapixels": (lambda: png(10_000, 6_000), TOO_MANY),
    "a pixel too many": (lambda: png(10_000, 5_001), TOO_MANY),
    "100 megapixels, where Pillow warns": (lambda: png(10_000, 10_000), TOO_MANY),
    "400 megapixels, where Pillow refuses": (lambda: png(20_000, 20_000), TOO_MANY),
    "a tile of 64 megapixels": (lambda: tiled_tiff(8_000), TOO_MANY),
    "a tile measured in bytes": (lambda: tiled_tiff(200, kind=1), UNREADABLE),
    "1x1": (lambda: file(picture(1, 1)), "of 1x1 pixels; each side must have at least 2"),
    "1x5000": (lambda: file(Image.new("RGB", (1, 5000))), "of 1x5000 pixels; each side must have at least 2"),
    "no width": (lambda: png(0, 9), UNKNOWN),
    "2x401": (lambda: file(Image.new("L", (2, 401))), "of 2x401 pixels; one side may be at most 200 times the other"),
    "not a number": (lambda: file(Image.fromarray(np.full((4, 4), np.nan, np.float32)), "TIFF"), UNREADABLE),
    **{
        f"half a {kind.lower()}": (lambda kind=kind: file(WIDE, kind)[: len(file(WIDE, kind)) // 2], UNREADABLE)  # type: ignore[misc]
        for kind in images.FORMATS
    },
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_bad_picture_is_refused_by_its_index(name: str, clip: Path, qwen: Path) -> None:
    data, why = REFUSED[name]
    for rule in (ClipImages.from_checkpoint(clip), Qwen2VLImages.from_checkpoint(qwen, 256, 1280)):
        with pytest.raises(BadRequest) as refused:
            rule.read(data(), 7)
        assert str(refused.value) == f"Input at index 7 has an image {why}"
        assert refused.value.__cause__ is None


def test_sizes_are_judged_before_there_are_pixels(monkeypatch: pytest.MonkeyPatch) -> None:
    def decoded(*_: object) -> None:
        pytest.fail("decoded")

    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", decoded)
    for name in ("60 megapixels", "a tile of 64 megapixels", "1x1", "1x5000", "2x401"):
        with pytest.raises(BadRequest):
            decode(REFUSED[name][0](), INDEX)


def test_a_tile_of_odd_sides_costs_no_memory() -> None:
    """Pillow gives a side of type BYTE as bytes, and bytes times a number are that many more."""
    short, long = struct.pack("<HHII", 323, 1, 1, 200), struct.pack("<HHII", 323, 4, 1, 300_000_000)
    data = tiled_tiff(200, kind=1).replace(short, long)
    tracemalloc.start()
    with pytest.raises(BadRequest, match=UNREADABLE):
        decode(data, INDEX)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 10_000_000


ODD_BUT_READABLE = {  # each with what Pillow warns of
    "Invalid APNG": png(2, 2, (b"acTL", bytes(8)), (b"IDAT", zlib.compress(bytes(14)))),
    "Corrupt EXIF": file(WIDE, "JPEG", exif=b"Exif\0\0II*\0\x08\0\0\0\x01\0"),
}


@pytest.mark.parametrize("warned", ODD_BUT_READABLE)
def test_pillows_warnings_stay_inside_and_no_others_do(warned: str) -> None:
    with pytest.warns(UserWarning, match=warned):
        upright(ODD_BUT_READABLE[warned])
    decode(ODD_BUT_READABLE[warned], INDEX)
    with pytest.raises(UserWarning, match="somebody else's"):
        warnings.warn("somebody else's", stacklevel=1)


def test_threads_read_what_one_reads(clip: Path) -> None:
    rule = ClipImages.from_checkpoint(clip)
    files = [make() for make in FILES.values()] + list(ODD_BUT_READABLE.values())
    alone = [rule.read(data, 0) for data in files]
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(lambda data: rule.read(data, 0), files * 8))
    assert all(np.array_equal(found, alone[i % len(files)]) for i, found in enumerate(together))


@cache
def victims() -> list[bytes]:
    """Small files of every format, with metadata, for the fuzzer to break."""
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "a description"
    small = picture(11, 9)
    kinds: list[tuple[str, dict[str, Any]]] = [(kind, {"exif": exif}) for kind in ("JPEG", "PNG", "TIFF", "WEBP")]
    kinds += [("JPEG", {"progressive": True}), ("TIFF", {"compression": "tiff_lzw"}), ("BMP", {}), ("GIF", {})]
    kinds += [("TIFF", {"compression": "jpeg"}), ("MPO", {"save_all": True, "append_images": [small]})]
    clear = [file(picture(11, 9, "RGBA"), kind) for kind in ("PNG", "WEBP", "TIFF")]
    deep = [file(small.convert(mode), "TIFF") for mode in ("F", "I", "I;16")]
    return [*(file(small, kind, **options) for kind, options in kinds), *clear, *deep, file(small.quantize(9))]


SAID = re.compile(rf"Input at index {INDEX} has an image (that cannot be read: [^:]+|of [^:]+)")


@settings(deadline=None, max_examples=1000)
@given(
    which=st.integers(0, 100),
    flips=st.lists(st.tuples(st.integers(-300, 300), st.integers(0, 255)), max_size=6),
    cut=st.none() | st.integers(0, 3000),
)
def test_broken_bytes_are_read_or_refused(which: int, flips: list[tuple[int, int]], cut: int | None) -> None:
    """Flips near either end, where the formats keep their structure."""
    data = bytearray(victims()[which % len(victims())])
    for where, value in flips:
        data[where % len(data)] = value
    try:
        image = decode(bytes(data[:cut]), INDEX)
    except BadRequest as refused:
        assert SAID.fullmatch(str(refused))  # noqa: PT017 - both endings are right
    else:
        assert image.mode == "RGB"
        assert min(image.size) >= 2


@settings(deadline=None, max_examples=200)
@given(
    st.binary(max_size=60), st.sampled_from([b"", b"\x89PNG\r\n\x1a\n", b"GIF89a", b"BM", b"II*\0", b"\xff\xd8\xff"])
)
def test_noise_is_refused(noise: bytes, signature: bytes) -> None:
    with pytest.raises(BadRequest, match=SAID):
        decode(signature + noise, INDEX)


def test_settings_are_found_where_transformers_finds_them(tmp_path: Path) -> None:
    """transformers 5 saves a processor's settings inside processor_config.json, and looks there first."""
    saved, both = tmp_path / "saved", tmp_path / "both"
    words = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0}, unk_token="a")))
    CLIPProcessor(CLIPImageProcessorPil(size={"shortest_edge": 30}, crop_size=30), words).save_pretrained(saved)
    assert not (saved / "preprocessor_config.json").exists()
    assert ClipImages.from_checkpoint(saved).size == 30
    same_as_clip(saved, file(WIDE))

    CLIPProcessor(CLIPImageProcessorPil(size={"shortest_edge": 30}, crop_size=30), words).save_pretrained(both)
    checkpoint(both, OPENAI)
    assert AutoImageProcessor.from_pretrained(both, backend="pil").size["shortest_edge"] == 30
    assert ClipImages.from_checkpoint(both).size == 30

    named = checkpoint(tmp_path / "named", {"processor_class": "CLIPProcessor"}, "processor_config.json")
    assert ClipImages.from_checkpoint(checkpoint(named, OPENAI)).size == 224


def test_settings_saved_by_transformers_are_read(tmp_path: Path) -> None:
    CLIPImageProcessorPil().save_pretrained(tmp_path / "clip")
    same_as_clip(tmp_path / "clip", file(WIDE))
    Qwen2VLImageProcessorPil().save_pretrained(tmp_path / "qwen")
    same_as_qwen(tmp_path / "qwen", file(WIDE), (4, 16))


BAD_CLIP: list[tuple[str, Any, str]] = [
    ("size", None, "'size' is missing"),
    ("crop_size", None, "'crop_size' is missing"),
    ("image_mean", None, "'image_mean' is missing"),
    ("image_std", None, "'image_std' is missing"),
    ("size", "224", "size is '224', not of type int or dict"),
    ("size", 0, "size is 0, not made of whole numbers above 0"),
    ("size", {"shortest_edge": 2.5}, "size is {'shortest_edge': 2.5}, not made of whole numbers above 0"),
    ("size", {"longest_edge": 224}, "size is {'longest_edge': 224}, neither one length nor height and width"),
    ("size", {}, "size is {}, neither one length nor height and width"),
    ("crop_size", {"shortest_edge": 9}, "crop_size is {'shortest_edge': 9}, neither one length nor height and width"),
    ("crop_size", 225, "crop_size is 225, larger than size, 224"),
    ("crop_size", {"height": 9, "width": 300}, "crop_size is {'height': 9, 'width': 300}, larger than size, 224"),
    ("image_mean", 0.5, "image_mean is 0.5, not of type list"),
    ("image_mean", [0.5, 0.5], "image_mean is [0.5, 0.5], not three numbers"),
    ("image_mean", [0.5, 0.5, "0"], "image_mean is [0.5, 0.5, '0'], not three numbers"),
    ("image_std", [0.5, 0.5, float("nan")], "image_std is [0.5, 0.5, nan], not three numbers"),
    ("image_std", [0.5, 0.5, 0], "image_std is [0.5, 0.5, 0], not above 0"),
    ("resample", 9, "resample is 9, not one of Pillow's filters"),
    ("resample", "bicubic", "resample is 'bicubic', not of type int"),
    ("rescale_factor", 0.5, "rescale_factor is 0.5, only 1/255 is implemented"),
    ("do_resize", False, "do_resize is False, only true is implemented"),
    ("do_rescale", False, "do_rescale is False, only true is implemented"),
    ("do_normalize", False, "do_normalize is False, only true is implemented"),
    ("do_convert_rgb", False, "do_convert_rgb is False, only true is implemented"),
    ("do_center_crop", False, "do_center_crop is False, only true is implemented"),
    ("do_pad", True, "do_pad is True, only false is implemented"),
]
BAD_QWEN: list[tuple[str, Any, str]] = [
    ("patch_size", None, "'patch_size' is missing"),
    ("merge_size", None, "'merge_size' is missing"),
    ("temporal_patch_size", None, "'temporal_patch_size' is missing"),
    ("image_mean", None, "'image_mean' is missing"),
    ("image_std", None, "'image_std' is missing"),
    ("patch_size", 0, "patch_size is 0, not above 0"),
    ("merge_size", 2.0, "merge_size is 2.0, not of type int"),
    ("do_resize", False, "do_resize is False, only true is implemented"),
    ("resample", -1, "resample is -1, not one of Pillow's filters"),
]


@pytest.mark.parametrize(("key", "value", "why"), BAD_CLIP)
def test_clip_settings_that_are_not_implemented_are_refused(key: str, value: Any, why: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as refused:
        ClipImages.from_checkpoint(checkpoint(tmp_path, {**OPENAI, key: value}))
    found = str(refused.value)
    assert found.startswith(str(tmp_path / "preprocessor_config.json"))
    assert found.endswith(why)


@pytest.mark.parametrize(("key", "value", "why"), BAD_QWEN)
def test_qwen_settings_that_are_not_implemented_are_refused(key: str, value: Any, why: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"preprocessor_config\.json") as refused:
        Qwen2VLImages.from_checkpoint(checkpoint(tmp_path, {**QWEN, key: value}), 256, 1280)
    assert str(refused.value).endswith(why)


def test_no_settings_and_no_limits_are_refused(tmp_path: Path, qwen: Path) -> None:
    for load in (ClipImages.from_checkpoint, lambda directory: Qwen2VLImages.from_checkpoint(directory, 256, 1280)):
        with pytest.raises(ConfigError, match=r"preprocessor_config\.json is missing"):
            load(tmp_path)
    for limits in ((0, 5), (6, 5)):
        with pytest.raises(ConfigError, match=f"{limits[0]} to {limits[1]} tokens"):
            Qwen2VLImages.from_checkpoint(qwen, *limits)
