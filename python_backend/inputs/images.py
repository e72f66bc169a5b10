"""Image processors of CLIP and Qwen2-VL: decode an image file and resize it by the rules of transformers.

Images are decoded on several threads at once. Image files are untrusted: every error in one becomes a BadInput.
"""

import io
import math
import re
import struct
import warnings
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError
from PIL.TiffImagePlugin import TILELENGTH, TILEWIDTH, TiffImageFile

from triton_embed.python_backend.checkpoint.class_defaults import Settings, read_with_defaults
from triton_embed.python_backend.checkpoint.json_file import JsonFile
from triton_embed.python_backend.errors import BadInput, ConfigError
from triton_embed.python_backend.inputs.row import Channels, Pixels

MAX_PIXELS = 50_000_000
MIN_SIDE = 2  # pixels; rejects tracking pixels, which have no content
# Limit of Qwen2-VL. CLIP's shortest-edge rule would enlarge a more extreme image to hundreds of megabytes.
MAX_ASPECT = 200
# Of a progressive JPEG: each takes a walk through all pixels, of a few bytes if need be. Encoders write about 10.
MAX_SCANS = 40
_SCAN_MARKER = b"\xff\xda"  # not in a scan's data, where 0xFF is followed by zero
# Raster formats that Pillow decodes in this process; EPS, for example, would start another program.
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "TIFF", "WEBP")

# Exceptions that Pillow's decoders raise on malformed bytes; LookupError covers IndexError and KeyError.
_VALUE_ERRORS = (ValueError, TypeError, LookupError, ArithmeticError, AttributeError, AssertionError, RuntimeError)
_FORMAT_ERRORS = (OSError, EOFError, SyntaxError, MemoryError, struct.error, zlib.error, Image.DecompressionBombError)
_DECODE_ERRORS = (*_FORMAT_ERRORS, *_VALUE_ERRORS)
# EXIF orientation -> the operation that turns the image upright
_TRANSPOSE_BY_ORIENTATION = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_PILLOW_MODULES = re.compile(r"PIL\.")

Image.init()  # import Pillow's plugins now; otherwise the first images import them from several threads at once


def decode(data: bytes, index: int) -> Image.Image:
    """Decode the first frame of an image file, upright, as RGB.

    Sizes are checked from the header, before the pixels are decoded.

    Args:
        index: The index of the input in the request, for error messages.

    Raises:
        BadInput: The file is not one of FORMATS, is truncated or broken, has more than MAX_PIXELS pixels, a side
            below MIN_SIDE, an aspect ratio above MAX_ASPECT, or more than MAX_SCANS scans.
    """
    refuse = partial(BadInput, index, "invalid_image")
    if not data:
        raise refuse("Input has an image that cannot be read: it is empty")
    _silence_pillow()
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
        pixels = _pixels_to_decode(image)
    except UnidentifiedImageError:
        formats = f"{', '.join(FORMATS[:-1])} or {FORMATS[-1]}"
        raise refuse(f"Input has an image that cannot be read: it is not a {formats} file") from None
    except Image.DecompressionBombError:
        pixels = MAX_PIXELS + 1
    except _DECODE_ERRORS:
        raise refuse("Input has an image that cannot be read: the file is truncated or broken") from None
    if pixels > MAX_PIXELS:
        raise refuse(f"Input has an image of more than {MAX_PIXELS:,} pixels")
    size = f"{image.width}x{image.height} pixels"
    if min(image.size) < MIN_SIDE:
        raise refuse(f"Input has an image of {size}; each side must have at least {MIN_SIDE}")
    if max(image.size) / min(image.size) > MAX_ASPECT:
        raise refuse(f"Input has an image of {size}; one side may be at most {MAX_ASPECT} times the other")
    if image.format in ("JPEG", "MPO") and data.count(_SCAN_MARKER) > MAX_SCANS:
        raise refuse(f"Input has an image of more than {MAX_SCANS} progressive scans")
    try:
        rgb = _to_rgb(image)
        transpose = _upright_transpose(image)
    except _DECODE_ERRORS:
        raise refuse("Input has an image that cannot be read: the file is truncated or broken") from None
    return rgb if transpose is None else rgb.transpose(transpose)


def _silence_pillow() -> None:
    """Ignore Pillow's warnings about unusual metadata, permanently.

    `warnings.catch_warnings` replaces and restores the filters of the whole process, which is not thread-safe.
    """
    ignore_pillow = ("ignore", None, Warning, _PILLOW_MODULES, 0)
    if not warnings.filters or warnings.filters[0] != ignore_pillow:
        warnings.filterwarnings("ignore", module=_PILLOW_MODULES.pattern)


def _pixels_to_decode(image: Image.Image) -> int:
    """Return the number of pixels of the image or of one TIFF tile, which may be far larger than its image."""
    tile = [1, 1]
    if isinstance(image, TiffImageFile):
        tile = [image.tag_v2.get(tag, 1) for tag in (TILEWIDTH, TILELENGTH)]
        if not all(isinstance(side, int) for side in tile):
            raise ValueError("the sides of a TIFF tile must be whole numbers")
    return max(image.width * image.height, math.prod(tile))


def _to_rgb(image: Image.Image) -> Image.Image:
    """Convert an image to RGB like transformers' convert_to_rgb: transparent pixels become white.

    Unlike transformers, this scales gray levels of more than 8 bits to 0..255: 16-bit images by their full range, and
    32-bit and float images, which declare no white level, from their darkest to their brightest pixel.
    """
    if image.mode.startswith("I;16"):
        image = Image.fromarray(((np.asarray(image).astype(np.uint32) + 128) // 257).astype(np.uint8))
    elif image.mode in ("I", "F"):
        if not np.isfinite(np.asarray(image)).all():
            raise ValueError("a pixel is not a finite number")
        levels = np.asarray(image).astype(np.float64)
        levels -= levels.min()
        image = Image.fromarray(np.rint(levels * (255 / (levels.max() or 1))).astype(np.uint8))
    elif "A" in image.getbands() or image.info.get("transparency") is not None:
        rgba = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba)
    return image.convert("RGB")


def _upright_transpose(image: Image.Image) -> Image.Transpose | None:
    """Return the operation that turns a loaded image upright, by its EXIF orientation; None if there is none.

    `ImageOps.exif_transpose` also rewrites the EXIF block, and fails if the block is broken.
    """
    try:
        return _TRANSPOSE_BY_ORIENTATION.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    except _DECODE_ERRORS:
        return None


@dataclass(frozen=True)
class ClipImageProcessor:
    """The image processor of CLIP: resizes the shortest edge or both sides to `size`, then crops the center."""

    mean: Channels
    std: Channels
    size: int | tuple[int, int]  # the shortest edge, or height and width (which ignore the aspect ratio)
    crop: tuple[int, int]  # height and width of the image that `read` returns
    resample: Image.Resampling

    @classmethod
    def from_checkpoint(cls, directory: Path) -> "ClipImageProcessor":
        """Read the settings of the checkpoint's image processor.

        Raises:
            ConfigError: A value is missing or not implemented.
        """
        return _read_settings(cls._read, directory, "CLIPImageProcessor")

    @classmethod
    def _read(cls, file: JsonFile) -> "ClipImageProcessor":
        if not file.get("do_center_crop", bool, True):
            raise file.error("do_center_crop", "only true is implemented")
        if file.get("do_pad", bool, False):
            raise file.error("do_pad", "only false is implemented")
        size, crop = _size(file, "size"), _square(_size(file, "crop_size"))
        if any(inner > outer for inner, outer in zip(crop, _square(size), strict=True)):
            raise file.error("crop_size", f"must not be larger than size {file.values['size']!r}")
        if isinstance(file.values["size"], int) and file.get("default_to_square", bool, False):
            size = _square(size)
        return cls(*_normalization(file), size, crop, _resample(file))

    def read(self, data: bytes, index: int) -> Pixels:
        """Decode, resize and crop one image file to [*crop, 3].

        Raises:
            BadInput: The image is rejected by `decode`.
        """
        image = decode(data, index)
        height, width = _square(self.size)
        if isinstance(self.size, int):
            long_side = int(self.size * max(image.size) / min(image.size))
            height, width = (height, long_side) if image.height < image.width else (long_side, width)
        top, left = (height - self.crop[0]) // 2, (width - self.crop[1]) // 2
        resized = image.resize((width, height), self.resample)
        return np.array(resized.crop((left, top, left + self.crop[1], top + self.crop[0])), dtype=np.uint8)


@dataclass(frozen=True)
class Qwen2VLImageProcessor:
    """The image processor of Qwen2-VL: keeps the aspect ratio approximately and bounds the number of tokens.

    Both sides become multiples of patch_size * merge_size; one token is a block of merge_size x merge_size patches.
    The checkpoint's min_pixels and max_pixels are ignored, because GME's official code overrides them.
    """

    mean: Channels
    std: Channels
    patch_size: int
    merge_size: int
    frames: int
    min_tokens: int
    max_tokens: int
    resample: Image.Resampling

    @classmethod
    def from_checkpoint(cls, directory: Path, min_tokens: int, max_tokens: int) -> "Qwen2VLImageProcessor":
        """Read the settings of the checkpoint's image processor.

        Args:
            min_tokens: The minimum number of tokens of one image.
            max_tokens: The maximum number of tokens of one image.

        Raises:
            ConfigError: A value is missing or not implemented, or the token limits are invalid.
        """
        if not 1 <= min_tokens <= max_tokens:
            raise ConfigError(
                f"min_image_tokens is {min_tokens}, max_image_tokens is {max_tokens}; "
                "the minimum must be at least 1 and at most the maximum"
            )

        def read(file: JsonFile) -> "Qwen2VLImageProcessor":
            return cls._read(file, min_tokens, max_tokens)

        return _read_settings(read, directory, "Qwen2VLImageProcessor")

    @classmethod
    def _read(cls, file: JsonFile, min_tokens: int, max_tokens: int) -> "Qwen2VLImageProcessor":
        mean, std = _normalization(file)
        return cls(
            mean=mean,
            std=std,
            patch_size=file.positive_int("patch_size"),
            merge_size=file.positive_int("merge_size"),
            frames=file.positive_int("temporal_patch_size"),
            min_tokens=min_tokens,
            max_tokens=max_tokens,
            resample=_resample(file),
        )

    def read(self, data: bytes, index: int) -> Pixels:
        """Decode and resize one image file to uint8 [height, width, 3].

        Raises:
            BadInput: The image is rejected by `decode`.
        """
        image = decode(data, index)
        height, width = self.target_size(image.height, image.width)
        return np.array(image.resize((width, height), self.resample), dtype=np.uint8)

    def target_size(self, height: int, width: int) -> tuple[int, int]:
        """Return the height and width after resizing, by transformers' smart_resize.

        As in transformers, a long and thin image may exceed a small max_tokens.
        """
        factor = self.patch_size * self.merge_size
        max_pixels, min_pixels = self.max_tokens * factor**2, self.min_tokens * factor**2
        new_height, new_width = round(height / factor) * factor, round(width / factor) * factor
        if new_height * new_width > max_pixels:
            shrink = math.sqrt(height * width / max_pixels)
            new_height = max(factor, math.floor(height / shrink / factor) * factor)
            new_width = max(factor, math.floor(width / shrink / factor) * factor)
        elif new_height * new_width < min_pixels:
            grow = math.sqrt(min_pixels / (height * width))
            new_height = math.ceil(height * grow / factor) * factor
            new_width = math.ceil(width * grow / factor) * factor
        return new_height, new_width


def _read_settings(read: Callable[[JsonFile], Settings], directory: Path, kind: str) -> Settings:
    """Read the image processor's settings from processor_config.json, or from preprocessor_config.json if it has none.

    Args:
        read: Reads the settings of one class.
        kind: The name of that class in transformers.

    Raises:
        ConfigError: Both files lack the settings, or a setting is not implemented.
    """
    file = JsonFile(directory / "processor_config.json")
    if file.has("image_processor"):
        file.values = file.get("image_processor", dict, {})
    else:
        file = JsonFile(directory / "preprocessor_config.json", required=True)
    if not file.get("image_processor_type", str, kind).startswith(kind):
        raise file.error("image_processor_type", f"only {kind} is implemented")
    if not file.get("do_resize", bool, True):
        raise file.error("do_resize", "only true is implemented")
    return read_with_defaults(read, file, kind)


def _normalization(file: JsonFile) -> tuple[Channels, Channels]:
    """Return the mean and the standard deviation of each channel, of pixels that are scaled to 0..1."""
    mean, std = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
    if file.get("do_normalize", bool, True):
        mean, std = _channels(file, "image_mean"), _channels(file, "image_std")
    factor = file.positive_float("rescale_factor", 1 / 255) if file.get("do_rescale", bool, True) else 1.0
    scale = 1.0 if math.isclose(factor, 1 / 255, rel_tol=1e-6) else 255 * factor
    return _divided(mean, scale), _divided(std, scale)


def _divided(channels: Channels, scale: float) -> Channels:
    red, green, blue = channels
    return red / scale, green / scale, blue / scale


def _channels(file: JsonFile, key: str) -> Channels:
    values = file.require(key, list)
    if len(values) != 3 or not all(type(value) in (int, float) and math.isfinite(value) for value in values):
        raise file.error(key, "must be three finite numbers")
    if key == "image_std" and min(values) <= 0:
        raise file.error(key, "must be above 0")
    red, green, blue = map(float, values)
    return red, green, blue


def _resample(file: JsonFile) -> Image.Resampling:
    code = file.get("resample", int, Image.Resampling.BICUBIC)
    try:
        return Image.Resampling(code)
    except ValueError:
        raise file.error("resample", "must be the number of a Pillow resampling filter") from None


def _size(file: JsonFile, key: str) -> int | tuple[int, int]:
    """Read a size: one length (of the shortest edge), or height and width."""
    value = file.require(key, (int, dict))
    sides = value if isinstance(value, dict) else {"shortest_edge": value}
    if not all(type(side) is int and side > 0 for side in sides.values()):
        raise file.error(key, "must consist of whole numbers above 0")
    if sides.keys() == {"height", "width"}:
        return sides["height"], sides["width"]
    if sides.keys() != {"shortest_edge"} or (key == "crop_size" and sides is value):
        raise file.error(key, "must be one length, or height and width")
    return int(sides["shortest_edge"])


def _square(size: int | tuple[int, int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else size
