"""Texts and model names that the clients send; expected.py computes the expected vectors."""

TEXT = "Once upon a time"
TEXTS = [
    "The cat sat on the mat.",
    "苹果是一种水果",
    "Python is a programming language",
    TEXT,
    "the quick brown fox " * 30,
]
# LlamaIndex replaces line breaks with spaces before it sends a text.
PARAGRAPHS = ["First line\nsecond line", "one paragraph"]

# A search query, and the documents of the collection.
QUESTION = "How do I reset my password?"
DOCUMENTS = [
    "Our office is closed on public holidays.",
    "To choose a new password, follow the link in the mail we send you.",
    "The invoice is due within thirty days.",
    "Cats sleep for most of the day.",
]

# Longer than all-MiniLM-L6-v2's limit of 256 tokens.
LONG = "many words in a row " * 100

# Model names used in the clients' documentation; Triton's names are the folders of model_repository.
QWEN3 = "Qwen/Qwen3-Embedding-0.6B"
GTE = "Alibaba-NLP/gte-Qwen2-1.5B-instruct"
# Some clients accept only OpenAI's model names and send `dimensions` only for some of them.
NAMES = {
    "minilm": "text-embedding-ada-002",
    "qwen3_embedding": f"{QWEN3}, Qwen3-Embedding-0.6B, Qwen/Qwen3-Embedding-4B, text-embedding-3-small",
    "gte_qwen2": GTE,
    "gme_qwen2_vl": "gme-qwen2-vl, Alibaba-NLP/gme-Qwen2-VL-2B-Instruct",
}

CHINESE = ["法国的首都是什么?", "今天天气真好,适合出门散步"]
FRUIT = ["苹果是一种水果", "香蕉也是一种水果", "Python 是一种编程语言", "Java 也是一种编程语言"]
MATRYOSHKA = "简单解释一下扩散模型。"
QUERY, TASK = "如何修复 Python 中的 ModuleNotFoundError?", "将该问题转为用于搜索引擎召回的向量"
IMAGE_TASK = "在嵌入空间中表示此图像。"
