"""An encoded image file -> the resized picture a vision tower takes: transformers' rules for CLIP and Qwen2-VL.

Pictures are decoded on a pool of threads. What a caller sent is never trusted: every fault in it is a BadRequest.
"""

import io
import math
import re
import struct
import warnings
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError
from PIL.TiffImagePlugin import TILELENGTH, TILEWIDTH, TiffImageFile

from triton_embed.python_backend.errors import BadRequest, ConfigError
from triton_embed.python_backend.json_file import JsonFile
from triton_embed.python_backend.row import Channels, Pixels

MAX_PIXELS = 50_000_000
MIN_SIDE = 2  # a tracking pixel shows nothing
MAX_ASPECT = 200  # Qwen2-VL's rule; CLIP's shortest-edge rule would blow such a picture up to hundreds of megabytes
# Raster formats whose readers stay inside Pillow: none starts a program, as EPS does.
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "TIFF", "WEBP")

# What Pillow's readers raise on hostile bytes; LookupError covers IndexError and KeyError.
_WRONG_VALUES = (ValueError, TypeError, LookupError, ArithmeticError, AttributeError, AssertionError, RuntimeError)
_WRONG_BYTES = (OSError, EOFError, SyntaxError, MemoryError, struct.error, zlib.error, Image.DecompressionBombError)
_BROKEN = (*_WRONG_BYTES, *_WRONG_VALUES)
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_PILLOW = re.compile(r"PIL\.")

Image.init()  # otherwise the first pictures import Pillow's readers, from several threads at once


def decode(data: bytes, index: int) -> Image.Image:
    """The first frame of an image file, upright, as RGB.

    BadRequest: not one of FORMATS, truncated or broken, over MAX_PIXELS, a side under MIN_SIDE or sides further
    apart than MAX_ASPECT; sizes are judged by the header, before there are pixels.
    """
    where = f"Input at index {index} has an image"
    if not data:
        raise BadRequest(f"{where} that cannot be read: it is empty")
    _silence_pillow()
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
        pixels = _pixels_to_decode(image)
    except UnidentifiedImageError:
        known = f"{', '.join(FORMATS[:-1])} or {FORMATS[-1]}"
        raise BadRequest(f"{where} that cannot be read: it is no {known} file") from None
    except Image.DecompressionBombError:
        pixels = MAX_PIXELS + 1
    except _BROKEN:
        raise BadRequest(f"{where} that cannot be read: the file is truncated or broken") from None
    if pixels > MAX_PIXELS:
        raise BadRequest(f"{where} of more than {MAX_PIXELS:,} pixels")
    size = f"{image.width}x{image.height} pixels"
    if min(image.size) < MIN_SIDE:
        raise BadRequest(f"{where} of {size}; each side must have at least {MIN_SIDE}")
    if max(image.size) / min(image.size) > MAX_ASPECT:
        raise BadRequest(f"{where} of {size}; one side may be at most {MAX_ASPECT} times the other")
    try:
        rgb = _rgb(image)
        turn = _turn(image)
    except _BROKEN:
        raise BadRequest(f"{where} that cannot be read: the file is truncated or broken") from None
    return rgb if turn is None else rgb.transpose(turn)


def _silence_pillow() -> None:
    """Keep Pillow's warnings about odd metadata to itself.

    `warnings.catch_warnings` swaps the whole process's filters and back, which threads get wrong; this one lasts.
    """
    quiet = ("ignore", None, Warning, _PILLOW, 0)
    if not warnings.filters or warnings.filters[0] != quiet:
        warnings.filterwarnings("ignore", module=_PILLOW.pattern)


def _pixels_to_decode(image: Image.Image) -> int:
    """The picture's pixels, or those of one tile: a TIFF's may be far larger than its picture."""
    tile = [1, 1]
    if isinstance(image, TiffImageFile):
        tile = [image.tag_v2.get(tag, 1) for tag in (TILEWIDTH, TILELENGTH)]
        if not all(isinstance(side, int) for side in tile):
            raise ValueError("a tile's sides are whole numbers")
    return max(image.width * image.height, math.prod(tile))


def _rgb(image: Image.Image) -> Image.Image:
    """transformers' convert_to_rgb: what is transparent shows white.

    Unlike there, deep greys are scaled: 16 bits by their full range, 32-bit and float ones, which state no white,
    from their darkest to their brightest pixel.
    """
    if image.mode.startswith("I;16"):
        image = Image.fromarray(((np.asarray(image).astype(np.uint32) + 128) // 257).astype(np.uint8))
    elif image.mode in ("I", "F"):
        if not np.isfinite(np.asarray(image)).all():
            raise ValueError("a pixel is no number")
        deep = np.asarray(image).astype(np.float64)
        deep -= deep.min()
        image = Image.fromarray(np.rint(deep * (255 / (deep.max() or 1))).astype(np.uint8))
    elif "A" in image.getbands() or image.info.get("transparency") is not None:
        rgba = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba)
    return image.convert("RGB")


def _turn(image: Image.Image) -> Image.Transpose | None:
    """EXIF's, of a loaded image. `ImageOps.exif_transpose` rewrites the block too, and trips over a broken one."""
    try:
        return _UPRIGHT.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    except _BROKEN:
        return None


@dataclass(frozen=True)
class ClipImages:
    """CLIP's rule: the shortest edge to a stated length, or both sides to a stated size, then a centre crop."""

    mean: Channels
    std: Channels
    size: int | tuple[int, int]  # the shortest edge, or height and width whatever the aspect
    crop: tuple[int, int]  # height and width of what `read` returns
    resample: Image.Resampling

    @classmethod
    def from_checkpoint(cls, directory: Path) -> "ClipImages":
        """Read the checkpoint's image processor. ConfigError: a value that is missing or not implemented."""
        file = _processor(directory)
        if not file.get("do_center_crop", bool, True):
            raise file.refuse("do_center_crop", "only true is implemented")
        if file.get("do_pad", bool, False):
            raise file.refuse("do_pad", "only false is implemented")
        size, crop = _size(file, "size"), _square(_size(file, "crop_size"))
        if any(inner > outer for inner, outer in zip(crop, _square(size), strict=True)):
            raise file.refuse("crop_size", f"larger than size, {file.values['size']!r}")
        return cls(_channels(file, "image_mean"), _channels(file, "image_std"), size, crop, _resample(file))

    def read(self, data: bytes, index: int) -> Pixels:
        """The picture of one image file, [*crop, 3]. BadRequest names the index of its input."""
        image = decode(data, index)
        height, width = _square(self.size)
        if isinstance(self.size, int):
            long = int(self.size * max(image.size) / min(image.size))
            height, width = (height, long) if image.height < image.width else (long, width)
        top, left = (height - self.crop[0]) // 2, (width - self.crop[1]) // 2
        resized = image.resize((width, height), self.resample)
        return np.array(resized.crop((left, top, left + self.crop[1], top + self.crop[0])), dtype=np.uint8)


@dataclass(frozen=True)
class Qwen2VLImages:
    """Qwen2-VL's rule: about the same aspect, both sides multiples of patch_size * merge_size, bounded in tokens.

    One token is a block of merge_size x merge_size patches. The checkpoint's own limits are left aside: GME's official
    code overrides them.
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
    def from_checkpoint(cls, directory: Path, min_tokens: int, max_tokens: int) -> "Qwen2VLImages":
        """Read the checkpoint's image processor. ConfigError: a value that is missing or not implemented."""
        if not 1 <= min_tokens <= max_tokens:
            raise ConfigError(f"an image cannot have {min_tokens} to {max_tokens} tokens")
        file = _processor(directory)
        return cls(
            mean=_channels(file, "image_mean"),
            std=_channels(file, "image_std"),
            patch_size=file.size("patch_size"),
            merge_size=file.size("merge_size"),
            frames=file.size("temporal_patch_size"),
            min_tokens=min_tokens,
            max_tokens=max_tokens,
            resample=_resample(file),
        )

    def read(self, data: bytes, index: int) -> Pixels:
        """The picture of one image file. BadRequest names the index of its input."""
        image = decode(data, index)
        height, width = self.resized(image.height, image.width)
        return np.array(image.resize((width, height), self.resample), dtype=np.uint8)

    def resized(self, height: int, width: int) -> tuple[int, int]:
        """transformers' smart_resize. A long and thin picture may exceed a small max_tokens, as it does there."""
        factor = self.patch_size * self.merge_size
        most, least = self.max_tokens * factor**2, self.min_tokens * factor**2
        high, wide = round(height / factor) * factor, round(width / factor) * factor
        if high * wide > most:
            shrink = math.sqrt(height * width / most)
            high = max(factor, math.floor(height / shrink / factor) * factor)
            wide = max(factor, math.floor(width / shrink / factor) * factor)
        elif high * wide < least:
            grow = math.sqrt(least / (height * width))
            high, wide = math.ceil(height * grow / factor) * factor, math.ceil(width * grow / factor) * factor
        return high, wide


def _processor(directory: Path) -> JsonFile:
    """The image processor's settings, where transformers looks: inside processor_config.json, or in its own file."""
    file = JsonFile(directory / "processor_config.json")
    if file.has("image_processor"):
        file.values = file.get("image_processor", dict, {})
    else:
        file = JsonFile(directory / "preprocessor_config.json", required=True)
    for switch in ("do_resize", "do_rescale", "do_normalize", "do_convert_rgb"):
        if not file.get(switch, bool, True):
            raise file.refuse(switch, "only true is implemented")
    if not math.isclose(file.get("rescale_factor", (int, float), 1 / 255), 1 / 255, rel_tol=1e-6):
        raise file.refuse("rescale_factor", "only 1/255 is implemented")
    return file


def _channels(file: JsonFile, key: str) -> Channels:
    values = file.need(key, list)
    if len(values) != 3 or not all(type(value) in (int, float) and math.isfinite(value) for value in values):
        raise file.refuse(key, "not three numbers")
    if key == "image_std" and min(values) <= 0:
        raise file.refuse(key, "not above 0")
    red, green, blue = map(float, values)
    return red, green, blue


def _resample(file: JsonFile) -> Image.Resampling:
    stated = file.get("resample", int, Image.Resampling.BICUBIC)
    try:
        return Image.Resampling(stated)
    except ValueError:
        raise file.refuse("resample", "not one of Pillow's filters") from None


def _size(file: JsonFile, key: str) -> int | tuple[int, int]:
    """One length, or height and width."""
    value = file.get(key, (int, dict), None)
    if value is None:
        raise ConfigError(f"{file.path}: '{key}' is missing")
    sides = value if isinstance(value, dict) else {"shortest_edge": value}
    if not all(type(side) is int and side > 0 for side in sides.values()):
        raise file.refuse(key, "not made of whole numbers above 0")
    if sides.keys() == {"height", "width"}:
        return sides["height"], sides["width"]
    if sides.keys() != {"shortest_edge"} or (key == "crop_size" and sides is value):
        raise file.refuse(key, "neither one length nor height and width")
    return int(sides["shortest_edge"])


def _square(size: int | tuple[int, int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else size
