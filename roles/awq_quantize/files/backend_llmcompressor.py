"""AWQ by llm-compressor 0.14."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.quantization import QuantizationModifier
from llmcompressor.modifiers.transform.awq import AWQModifier
from llmcompressor.pipelines.cache import IntermediatesCache
from transformers import AutoModelForCausalLM, AutoTokenizer

Say = Callable[[str], None]


class ReportingAWQ(AWQModifier):
    """AWQ that says which part of the model it has done; the library calls this after each decoder layer."""

    _done: int = 0

    def on_sequential_epoch_end(self, state: Any, event: Any, **kwargs: Any) -> None:
        super().on_sequential_epoch_end(state, event, **kwargs)
        layers = state.model.config.num_hidden_layers
        self._done += 1
        if self._done <= layers:
            SAY[0](f"quantizing layer {self._done} of {layers}")


SAY: list[Say] = [lambda line: None]


def quantize(model: Path, out: Path, samples: list[list[int]], recipe: dict[str, Any], say: Say) -> None:
    """Write the quantized checkpoint of `model` to the folder `out`; samples: token ids of each calibration
    passage.
    """
    if not torch.accelerator.is_available():
        # 0.14 pins memory for the way to an accelerator, and pinning fails where there is none
        IntermediatesCache.pin_memory = lambda self, *args, **kwargs: None
    SAY[0] = say
    network = AutoModelForCausalLM.from_pretrained(
        model,
        # half precision has no fast kernels on a CPU; and on a GPU 0.14 sums the squared errors of a whole
        # sample in the model's own type, which passes float16's 65,504 ("No finite loss was found", H100,
        # SmolLM2) and never bfloat16's range
        dtype=torch.bfloat16 if torch.cuda.is_available() else torch.float32,
        trust_remote_code=False,
    )
    weights = {
        "num_bits": recipe["bits"],
        "type": "int",
        "symmetric": not recipe["zero_point"],
        "strategy": "group",
        "group_size": recipe["group_size"],
    }
    oneshot(
        model=network,
        dataset=Dataset.from_list([{"input_ids": ids, "attention_mask": [1] * len(ids)} for ids in samples]),
        recipe=[
            ReportingAWQ(),
            QuantizationModifier(
                ignore=["lm_head"], config_groups={"group_0": {"targets": ["Linear"], "weights": weights}}
            ),
        ],
        max_seq_length=recipe["sample_tokens"],
        num_calibration_samples=len(samples),
        shuffle_calibration_samples=False,
    )
    say("writing the quantized model")
    network.save_pretrained(out, save_compressed=True)
    AutoTokenizer.from_pretrained(model, trust_remote_code=False).save_pretrained(out)
