"""Parse what a model reports about itself, and check that a request fits it, before anything is sent to Triton."""

from dataclasses import replace
from functools import partial

from pydantic import TypeAdapter

from triton_embed.gateway.api.inputs import NO_PROMPT, Prompt
from triton_embed.gateway.api.requests import EmbeddingRequest
from triton_embed.gateway.errors import invalid
from triton_embed.python_backend import wire
from triton_embed.python_backend.wire import InputError, ModelInfo

FOREIGN_IDS = (
    "Ids must come from the model's own tokenizer; LangChain's OpenAIEmbeddings needs check_embedding_ctx_length=False."
)
_INFO = TypeAdapter(ModelInfo)


def read_info(data: bytes) -> ModelInfo:
    """Parse a model's INFO output.

    Raises:
        ValidationError: if a field is missing, has the wrong type or an impossible value. Unknown fields are ignored.
    """
    return _INFO.validate_json(data)


def fit(request: EmbeddingRequest, model: ModelInfo) -> EmbeddingRequest:
    """Return the request for `model`, with each prompt as the instruction or prompt name that the model knows.

    Raises:
        ApiError: 400 if the model cannot serve it, with the message the model itself would send.
    """
    for size in request.vector_format.sizes:
        if message := wire.dimensions_error(size, model):
            raise invalid(message, "dimensions")
    if request.prompt or request.prompts:
        request = _resolve_prompts(request, model)
    if request.ids:
        _check_ids(request, model)
    if request.images:
        _check_images(request, model)
    return request


def _resolve_prompts(request: EmbeddingRequest, model: ModelInfo) -> EmbeddingRequest:
    if not request.prompts:
        prompt = _prompt(request.prompt, model)
        if request.ids and (parameters := prompt.parameters()):
            field = next(iter(parameters))
            raise invalid(f"{field} needs text: token ids are used as they are", field)
        return replace(request, prompt=prompt)
    prompts = [
        request.errors.attempt(i, partial(_prompt, prompt, model, f"Input at index {i}: "), NO_PROMPT)
        for i, prompt in enumerate(request.prompts)
    ]
    return replace(request, prompts=prompts)


def _prompt(prompt: Prompt, model: ModelInfo, where: str = "") -> Prompt:
    """Return a prompt as an instruction or prompt name of the model, or as no prompt.

    A document gets no prompt, not even the default one, unless the model has a prompt for documents.
    """
    instruction, name, side = prompt.instruction, prompt.prompt_name, prompt.input_type
    if instruction and not model.instructions:
        message = f"{where}Model '{model.name}' takes no instruction: it was trained without one"
        raise invalid(message, "instruction")
    if name and name not in model.prompt_names:
        names = ", ".join(model.prompt_names) or "none"
        raise invalid(f"{where}Model '{model.name}' has no prompt_name '{name[:100]}'; it has: {names}", "prompt_name")
    # An empty name disables the default prompt.
    no_prompt = Prompt(prompt_name="") if model.default_prompt_name else NO_PROMPT
    if name == "":
        return no_prompt
    if instruction or name or not side:
        return replace(prompt, input_type=None)
    if side == "query":
        if "query" in model.prompt_names:
            return Prompt(prompt_name="query")
        if model.instructions:
            message = f"{where}Model '{model.name}' has no query prompt: send an instruction"
            raise invalid(message, "input_type")
        return NO_PROMPT
    document_name = next((name for name in ("document", "passage") if name in model.prompt_names), None)
    return Prompt(prompt_name=document_name) if document_name else no_prompt


def _check_ids(request: EmbeddingRequest, model: ModelInfo) -> None:
    truncates = request.truncate != "none" or request.long_text == "mean"
    for i, row in enumerate(request.ids):
        if not row:  # an error of this input is already recorded
            continue
        if message := wire.vocabulary_error(row, min(row), max(row), model.vocab_size):
            request.refuse(i, f"{InputError(i, 'invalid_token_id', message).text}. {FOREIGN_IDS}")
        elif not truncates and (message := wire.length_error(len(row), model.max_model_len)):
            request.refuse(i, InputError(i, "too_long", message).text)


def _check_images(request: EmbeddingRequest, model: ModelInfo) -> None:
    for i, (text, images) in enumerate(zip(request.texts, request.images, strict=True)):
        if message := wire.modality_error(model.name, model.modalities, bool(text), len(images)):
            request.refuse(i, InputError(i, "unsupported_input", message).text)
