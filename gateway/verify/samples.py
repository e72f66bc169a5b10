"""Texts and images that `verify` embeds with a model and with transformers."""

import io
from collections.abc import Iterator

import numpy as np
from PIL import Image

_LONG = (
    "Embedding models turn a text into a point in space, so that texts of similar meaning lie close together. "
    "A search engine computes the points of its documents once, and that of a query when it is asked; the nearest "
    "documents are the answer. How well this works depends on details that are easy to get wrong: which token is "
    "pooled, whether the last one is there at all, and what is kept when a text is longer than the model can read. "
)

# From one token to many hundred, in many scripts. None begins or ends with a space, which some tokenizers strip.
TEXTS = (
    "a",
    "7",
    "?",
    "Hello world",
    "hello world",
    "HELLO WORLD",
    "The weather is lovely today.",
    "He drove to the stadium.",
    "The capital of France is Paris; the capital of China is Beijing.",
    "a photo of a cat",
    "a photo of a dog on a skateboard, in the rain",
    "What is the definition of a summit?",
    "Instruct: Given a question, retrieve passages that answer it\nQuery: how tall is Mont Blanc",
    "It's 3.14159, not 22/7 - isn't it?",
    "E = mc², ∑ᵢ xᵢ ≤ √2, 20 °C, 5 µm, 1 €, ½",
    "1234567890 1,234.56 -0.001 1e-9 0xDEADBEEF 2024-02-29T23:59:59Z",
    "antidisestablishmentarianism Donaudampfschifffahrtsgesellschaft",
    "naïve café, façade, Ångström, Łódź, ﬁnancial",
    "Die Straße nach Köln führt über die Brücke.",
    "¿Dónde está la biblioteca más cercana?",
    "Où est passée la clé de l'hôtel ?",
    "Съешь ещё этих мягких французских булок, да выпей чаю.",
    "Η θάλασσα ήταν ήρεμη το πρωί.",
    "你好，世界。中国的首都是北京。",
    "南瓜的家常做法：将南瓜去皮，切成片，油锅八成热后放入蒜末。",
    "吾輩は猫である。名前はまだ無い。",
    "오늘 서울의 날씨는 맑고 따뜻합니다.",
    "السلام عليكم، كيف حالك اليوم؟",
    "שלום עולם, מה שלומך?",
    "नमस्ते दुनिया, आज मौसम अच्छा है।",
    "สวัสดีชาวโลก วันนี้อากาศดี",
    "Xin chào thế giới, hôm nay trời đẹp.",
    "👍",
    "I ❤️ this 😀👩‍👩‍👧‍👦🇫🇷, really 🚀🚀🚀",
    "def add(a: int, b: int) -> int:\n    return a + b  # the sum\n\n\nassert add(2, 3) == 5",
    'SELECT name, COUNT(*) FROM users WHERE age >= 18 GROUP BY name ORDER BY 2 DESC;\n{"a": [1, 2.5, null, "x\\n"]}',
    "https://example.org/search?q=vector%20database&page=2#results",
    "tab\tseparated\tvalues,  two spaces,\r\na line of Windows,\n\n\nand three of Unix",
    "the quick brown fox jumps over the lazy dog " * 8 + "again",
    _LONG + "That is all.",
    _LONG * 7 + "That is all, seven times over.",
)

_SIZES = ((336, 336), (480, 272), (150, 600))  # width, height


def images() -> Iterator[bytes]:
    """Yield PNG files of three shapes with slow color gradients and rings finer than a pixel."""
    for number, (width, height) in enumerate(_SIZES):
        x, y = np.meshgrid(np.linspace(-1, 1, width), np.linspace(-1, 1, height))
        rings = np.sin((40 + 30 * number) * (x * x + y * y))
        channels = [x, y, x * y] if number % 2 else [y * y, -x, -y]
        pixels = 127.5 + 80 * np.stack(channels, axis=-1) + 47 * rings[..., None]
        file = io.BytesIO()
        Image.fromarray(pixels.round().clip(0, 255).astype(np.uint8)).save(file, "PNG")
        yield file.getvalue()
