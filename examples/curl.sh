#!/usr/bin/env bash
# The embeddings API from a shell. Start the server first: make serve
set -euo pipefail
url=${EMBED_URL:-http://127.0.0.1:30000}

echo "one text"
curl --fail-with-body -sS "$url/v1/embeddings" -d '{"model": "minilm", "input": "Once upon a time"}' | cut -c1-120

echo "several texts, as base64 of little-endian float32"
curl --fail-with-body -sS "$url/v1/embeddings" -H 'Content-Type: application/json' \
    -d '{"model": "minilm", "input": ["Once upon a time", "The end"], "encoding_format": "base64"}' | cut -c1-120

echo "token ids of the model's own tokenizer"
curl --fail-with-body -sS "$url/tokenize" -d '{"model": "minilm", "input": "Once upon a time"}'
echo
curl --fail-with-body -sS "$url/v1/embeddings" -d '{"model": "minilm", "input": [101, 2320, 2588, 1037, 2051, 102]}' | cut -c1-120

echo "documents ordered by similarity to a query"
curl --fail-with-body -sS "$url/v1/rerank" \
    -d '{"model": "minilm", "query": "What is the capital of France?", "documents": ["Cats sleep a lot.", "Paris is in France."]}'
echo
