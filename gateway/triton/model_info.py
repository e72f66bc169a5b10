"""What a model reports about itself, and whether a request fits it: checked before anything is sent to Triton."""

from dataclasses import replace
from functools import partial

from pydantic import TypeAdapter

from triton_embed.gateway.api.inputs import NO_PROMPT, Prompt
from triton_embed.gateway.api.requests import EmbeddingRequest
from triton_embed.gateway.errors import invalid
from triton_embed.python_backend.wire import ModelInfo

_INFO = TypeAdapter(ModelInfo)


def read_info(data: bytes) -> ModelInfo:
    """Parse a model's INFO output.

    Raises:
        ValidationError: A field is missing or has the wrong type or an impossible value. Unknown fields are ignored.
    """
    return _INFO.validate_json(data)


def fit(request: EmbeddingRequest, model: ModelInfo) -> EmbeddingRequest:
    """Return the request as `model` understands it, with prompts by the names the model has for them.

    Raises:
        ApiError: 400 if the model cannot serve it, with the message the model itself would send.
    """
    for size in request.vector_format.sizes:
        _check_dimensions(size, model)
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
    """Return the instruction or prompt name for a prompt. Documents get none unless the model has a document prompt."""
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
    own = next((name for name in ("document", "passage") if name in model.prompt_names), None)
    return Prompt(prompt_name=own) if own else no_prompt


def _check_dimensions(dimensions: int, model: ModelInfo) -> None:
    """Refuse dimensions the model was not trained for, by SGLang's rules and in its words."""
    if dimensions == model.dimensions:
        return
    if dimensions < 1:
        raise invalid("Requested dimensions must be greater than 0", "dimensions")
    if dimensions > model.dimensions:
        message = f"Provided dimensions are greater than max embedding dimension: {model.dimensions}"
        raise invalid(message, "dimensions")
    if not model.matryoshka:
        message = f"Model '{model.name}' does not support matryoshka representation, changing output dimensions "
        raise invalid(message + "will lead to poor results.", "dimensions")
    if isinstance(model.matryoshka, tuple) and dimensions not in model.matryoshka:
        message = f"Model '{model.name}' only supports {list(model.matryoshka)} matryoshka dimensions, using other "
        raise invalid(message + "output dimensions will lead to poor results.", "dimensions")


def _check_ids(request: EmbeddingRequest, model: ModelInfo) -> None:
    truncates = request.truncate != "none" or request.long_text == "mean"
    for i, row in enumerate(request.ids):
        if not row:  # invalid already
            continue
        if min(row) < 0 or max(row) >= model.vocab_size:
            other = next(id_ for id_ in row if not 0 <= id_ < model.vocab_size)
            message = (
                f"Input at index {i} has token id {other}, which is outside the model's vocabulary "
                f"(0 to {model.vocab_size - 1}). Ids must come from the model's own tokenizer; "
                "LangChain's OpenAIEmbeddings needs check_embedding_ctx_length=False."
            )
            request.refuse(i, message)
        elif len(row) > model.max_model_len and not truncates:
            message = (
                f"The input ({len(row)} tokens) is longer than the model's context length "
                f"({model.max_model_len} tokens). (input at index {i})"
            )
            request.refuse(i, message)


def _check_images(request: EmbeddingRequest, model: ModelInfo) -> None:
    if "text+image" in model.modalities:
        return
    for i, (text, images) in enumerate(zip(request.texts, request.images, strict=True)):
        reason = ""
        if images and "image" not in model.modalities:
            reason = "takes no images"
        elif images and text:
            reason = "embeds a text or an image, not both together"
        elif len(images) > 1:
            reason = "embeds one image at a time"
        if reason:
            request.refuse(i, f"Model '{model.name}' {reason} (input at index {i})")
