"""What a model says about itself, and whether a request fits it: checked before anything is sent to Triton."""

from pydantic import BaseModel, ConfigDict, PositiveInt

from triton_embed.gateway.errors import invalid
from triton_embed.gateway.schemas import EmbeddingRequest


class ModelInfo(BaseModel):
    """What a model says about itself (its INFO output)."""

    model_config = ConfigDict(frozen=True)

    name: str
    family: str
    checkpoint: str | None  # a Hugging Face id
    dimensions: PositiveInt
    max_model_len: PositiveInt  # tokens
    vocab_size: PositiveInt
    pooling: str
    modalities: list[str]  # text, image, and text+image: all of one input's texts and images in one vector
    matryoshka: bool | list[int] | None  # true: any size up to `dimensions`
    instructions: bool
    prompt_names: list[str]
    dtype: str
    device: str
    kernels: str


def check(request: EmbeddingRequest, model: ModelInfo) -> None:
    """ApiError 400 if `model` cannot do what `request` asks, with the texts the model itself would answer."""
    _check_dimensions(request.dimensions, model)
    if request.instruction and not model.instructions:
        message = f"Model '{model.name}' takes no instruction: it was trained without one"
        raise invalid(message, "instruction")
    if request.instruction and request.prompt_name:
        raise invalid("Send either instruction or prompt_name", "prompt_name")
    if request.ids:
        _check_ids(request, model)
    if request.images:
        _check_images(request, model)


def _check_dimensions(asked: int | None, model: ModelInfo) -> None:
    """SGLang's rules and texts for an output size the model was not trained to give."""
    if asked is None or asked == model.dimensions:
        return
    if asked < 1:
        raise invalid("Requested dimensions must be greater than 0", "dimensions")
    if asked > model.dimensions:
        message = f"Provided dimensions are greater than max embedding dimension: {model.dimensions}"
        raise invalid(message, "dimensions")
    if not model.matryoshka:
        message = f"Model '{model.name}' does not support matryoshka representation, changing output dimensions "
        raise invalid(message + "will lead to poor results.", "dimensions")
    if model.matryoshka is not True and asked not in model.matryoshka:
        message = f"Model '{model.name}' only supports {model.matryoshka} matryoshka dimensions, using other "
        raise invalid(message + "output dimensions will lead to poor results.", "dimensions")


def _check_ids(request: EmbeddingRequest, model: ModelInfo) -> None:
    if request.instruction or request.prompt_name:
        field = "instruction" if request.instruction else "prompt_name"
        raise invalid(f"{field} needs text: token ids are used as they are", field)
    for i, row in enumerate(request.ids):
        if min(row) < 0 or max(row) >= model.vocab_size:
            foreign = next(id_ for id_ in row if not 0 <= id_ < model.vocab_size)
            message = (
                f"Input at index {i} has token id {foreign}, which is outside the model's vocabulary "
                f"(0 to {model.vocab_size - 1}). Ids must come from the model's own tokenizer; "
                "LangChain's OpenAIEmbeddings needs check_embedding_ctx_length=False."
            )
            raise invalid(message, request.param)
        if request.truncate == "none" and len(row) > model.max_model_len:
            message = (
                f"The input ({len(row)} tokens) is longer than the model's context length "
                f"({model.max_model_len} tokens). (input at index {i})"
            )
            raise invalid(message, request.param)


def _check_images(request: EmbeddingRequest, model: ModelInfo) -> None:
    if "text+image" in model.modalities:
        return
    for i, (text, images) in enumerate(zip(request.texts, request.images, strict=True)):
        fault = ""
        if images and "image" not in model.modalities:
            fault = f"takes no images: input at index {i} has one"
        elif images and text:
            fault = f"embeds a text or an image, not both together: input at index {i} has both"
        elif len(images) > 1:
            fault = f"embeds one image at a time: input at index {i} has {len(images)}"
        if fault:
            raise invalid(f"Model '{model.name}' {fault}", request.param)
