"""Export a checkpoint to ONNX for ONNX Runtime and OpenVINO: `python -m benchmarks.rivals.export CHECKPOINT FOLDER`.

model.onnx is the network as exported by torch; fp32.onnx is the same after ONNX Runtime's optimizer (attention, GELU
and norms fused); int8.onnx adds quantized linears (weights per channel, inputs dynamically).
"""

import sys
from pathlib import Path

import onnx
import torch
from onnxruntime.quantization import QuantType, quantize_dynamic
from onnxruntime.transformers import optimizer
from transformers import BertModel

INPUTS = ("input_ids", "attention_mask", "token_type_ids")


def main() -> None:
    checkpoint, folder = map(Path, sys.argv[1:])
    folder.mkdir(parents=True, exist_ok=True)
    # The optimizer recognizes attention by its separate matrix products, which only "eager" has.
    network = BertModel.from_pretrained(checkpoint, attn_implementation="eager", add_pooling_layer=False).eval()
    ids = torch.ones(2, 8, dtype=torch.long)
    torch.onnx.export(
        network,
        (ids, torch.ones_like(ids), torch.zeros_like(ids)),
        folder / "model.onnx",
        input_names=list(INPUTS),
        output_names=["states"],
        dynamic_axes={name: {0: "texts", 1: "tokens"} for name in (*INPUTS, "states")},
        opset_version=17,
        dynamo=False,  # the optimizer recognizes only the output of the older exporter
    )
    config = network.config
    heads, width = config.num_attention_heads, config.hidden_size
    fused = optimizer.optimize_model(str(folder / "model.onnx"), "bert", num_heads=heads, hidden_size=width)
    counts = fused.get_fused_operator_statistics()
    if counts["Attention"] != config.num_hidden_layers:
        raise RuntimeError(f"attention was not fused in all {config.num_hidden_layers} layers: {counts}")
    fused.save_model_to_file(str(folder / "fp32.onnx"))
    quantize_dynamic(
        folder / "fp32.onnx",
        folder / "int8.onnx",
        weight_type=QuantType.QInt8,
        per_channel=True,
        # The quantizer has no type information for the fused operators.
        extra_options={"DefaultTensorType": onnx.TensorProto.FLOAT},
    )


if __name__ == "__main__":
    main()
