"""The example that needs LangChain. tests/test_examples.py runs the other examples."""

import os
import subprocess
import sys

from conftest import ROOT, Stack

CLIENT, PACKAGE = "LangChain `OpenAIEmbeddings`", "langchain-openai"


def test_langchain_search(stack: Stack) -> None:
    """Run `examples/langchain_search.py`."""
    command = [sys.executable, ROOT / "examples" / "langchain_search.py"]
    environment = {**os.environ, "EMBED_URL": stack.url}
    output = subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=100).stdout
    assert output == "Paris is the capital of France.\n"
