"""AWQ by AutoAWQ 0.2.9 (archived; the last release)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from awq import AutoAWQForCausalLM
from awq.quantize.quantizer import AwqQuantizer
from transformers import AutoTokenizer

Say = Callable[[str], None]


def quantizer(say: Say) -> type[AwqQuantizer]:
    """AutoAWQ's quantizer, mended for the CPU and reporting each layer."""

    class Quantizer(AwqQuantizer):
        done = 0

        def _get_input_feat(self, layer: torch.nn.Module, named_linears: dict[str, Any]) -> Any:
            Quantizer.done += 1
            say(f"quantizing layer {Quantizer.done} of {len(self.modules)}")
            return super()._get_input_feat(layer, named_linears)

        def _compute_best_scale(
            self, x: Any, w_mean: Any, x_mean: Any, module2inspect: torch.nn.Module, *args: Any, **kwargs: Any
        ) -> Any:
            # 0.2.9 keeps the weights it is about to change with `.cpu()`. On a CPU that is no copy, the
            # search then works on weights it has already spoiled, and the model comes out as noise.
            original = module2inspect.state_dict
            module2inspect.state_dict = lambda *a, **k: {
                name: tensor.clone() for name, tensor in original(*a, **k).items()
            }
            try:
                return super()._compute_best_scale(x, w_mean, x_mean, module2inspect, *args, **kwargs)
            finally:
                del module2inspect.state_dict

    return Quantizer


def quantize(model: Path, out: Path, samples: list[list[int]], recipe: dict[str, Any], say: Say) -> None:
    """Write the quantized checkpoint of `model` to the folder `out`.

    samples: token ids of each calibration passage, none longer than recipe["sample_tokens"].
    """
    on_gpu = torch.cuda.is_available()
    awq = AutoAWQForCausalLM.from_pretrained(
        str(model),
        # half precision has no fast kernels on a CPU
        torch_dtype=torch.float16 if on_gpu else torch.float32,
        device_map="cpu",
        safetensors=True,
        trust_remote_code=False,
    )
    tokenizer = AutoTokenizer.from_pretrained(model, trust_remote_code=False)
    awq.quantize(
        tokenizer,
        quant_config={
            "w_bit": recipe["bits"],
            "q_group_size": recipe["group_size"],
            "zero_point": recipe["zero_point"],
            "version": "GEMM",
        },
        calib_data=samples,
        max_calib_samples=len(samples),
        max_calib_seq_len=recipe["sample_tokens"],
        apply_clip=recipe["clip"],
        n_parallel_calib_samples=8 if on_gpu else None,
        quantizer_cls=quantizer(say),
    )
    say("writing the quantized model")
    awq.model.half()
    awq.save_quantized(str(out))
    tokenizer.save_pretrained(out)
