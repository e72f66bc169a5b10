"""tritonclient over gRPC, straight to tritonserver: no gateway, no JSON."""

import os

import numpy as np
import tritonclient.grpc as triton

client = triton.InferenceServerClient(os.environ.get("TRITON_GRPC", "127.0.0.1:8001"))
texts = np.array([["Once upon a time"], ["The end"]], dtype=np.object_)  # one text per row
tensor = triton.InferInput("TEXT", list(texts.shape), "BYTES").set_data_from_numpy(texts)
outputs = [triton.InferRequestedOutput(name) for name in ("EMBEDDING", "TOKENS")]
result = client.infer("minilm", [tensor], outputs=outputs)
vectors, tokens = result.as_numpy("EMBEDDING"), result.as_numpy("TOKENS")
print(f"vectors {vectors.shape}, tokens {tokens.ravel().tolist()}, cosine {vectors[0] @ vectors[1]:.3f}")
