"""The tensors of a text model: names, datatypes and shapes, and which of them are refused.

The union of what Triton's vLLM backend and the TensorRT-LLM ensemble take and give. How they are
read and filled is `core.text_tensors`.
"""

from __future__ import annotations

from collections.abc import Mapping

from naiad.core.model import ModelMetadata, TensorSpec
from naiad.core.refusals import (
    NO_BEAMS,
    NO_GRAMMAR,
    NO_IMAGES,
    NO_LORA,
    REFUSED_SAMPLING,
    Refusal,
)
from naiad.core.tensor import DataType

SCALARS: Mapping[str, DataType] = {
    "text_input": DataType.BYTES,
    "stream": DataType.BOOL,
    "sampling_parameters": DataType.BYTES,
    "exclude_input_in_output": DataType.BOOL,
    "return_finish_reason": DataType.BOOL,
    "return_cumulative_logprob": DataType.BOOL,
    "return_logprobs": DataType.BOOL,
    "return_num_input_tokens": DataType.BOOL,
    "return_num_output_tokens": DataType.BOOL,
    "return_log_probs": DataType.BOOL,
    "return_perf_metrics": DataType.BOOL,
    "max_tokens": DataType.INT32,
    "min_tokens": DataType.INT32,
    "num_return_sequences": DataType.INT32,
    "end_id": DataType.INT32,
    "pad_id": DataType.INT32,
    "top_k": DataType.INT32,
    "top_p": DataType.FP32,
    "temperature": DataType.FP32,
    "length_penalty": DataType.FP32,
    "repetition_penalty": DataType.FP32,
    "presence_penalty": DataType.FP32,
    "frequency_penalty": DataType.FP32,
    "seed": DataType.UINT64,
    # Refused unless neutral, from here on.
    "beam_width": DataType.INT32,
    "return_context_logits": DataType.BOOL,
    "return_generation_logits": DataType.BOOL,
    "embedding_request": DataType.BYTES,
    "decoder_text_input": DataType.BYTES,
    "guided_decoding_guide_type": DataType.BYTES,
    "guided_decoding_guide": DataType.BYTES,
    "lora_task_id": DataType.UINT64,
    "num_draft_tokens": DataType.INT32,
    "prompt_table_extra_id": DataType.UINT64,
    "prompt_vocab_size": DataType.INT32,
}
"""Inputs of exactly one element."""

LISTS: Mapping[str, DataType] = {
    "stop_words": DataType.BYTES,
    "bad_words": DataType.BYTES,
    "image": DataType.BYTES,
    "image_url_input": DataType.BYTES,
    "image_bytes_input": DataType.UINT8,
    "video_bytes_input": DataType.UINT8,
    "embedding_bias_words": DataType.BYTES,
    "embedding_bias_weights": DataType.FP32,
    "prompt_embedding_table": DataType.FP16,
    "lora_weights": DataType.FP16,
    "lora_config": DataType.INT32,
}
"""Inputs of any number of elements."""

OUTPUTS: Mapping[str, tuple[DataType, tuple[int, ...]]] = {
    "text_output": (DataType.BYTES, (-1,)),
    "finish_reason": (DataType.BYTES, (-1,)),
    "cumulative_logprob": (DataType.FP32, (-1,)),
    "logprobs": (DataType.BYTES, (-1,)),
    "num_input_tokens": (DataType.UINT32, (1,)),
    "num_output_tokens": (DataType.UINT32, (-1,)),
    "cum_log_probs": (DataType.FP32, (-1,)),
    "output_log_probs": (DataType.FP32, (-1, -1)),
    "arrival_time_ns": (DataType.INT64, (1,)),
    "first_scheduled_time_ns": (DataType.INT64, (1,)),
    "first_token_time_ns": (DataType.INT64, (1,)),
    "last_token_time_ns": (DataType.INT64, (1,)),
}
"""Datatype and shape of each output."""

SWITCHES: Mapping[str, tuple[str, ...]] = {
    "return_finish_reason": ("finish_reason",),
    "return_cumulative_logprob": ("cumulative_logprob",),
    "return_logprobs": ("logprobs",),
    "return_num_input_tokens": ("num_input_tokens",),
    "return_num_output_tokens": ("num_output_tokens",),
    "return_log_probs": ("cum_log_probs", "output_log_probs"),
    "return_perf_metrics": (
        "arrival_time_ns",
        "first_scheduled_time_ns",
        "first_token_time_ns",
        "last_token_time_ns",
    ),
}
"""Which outputs an input asks for."""

NEED_LOGPROBS = {"cumulative_logprob", "logprobs", "cum_log_probs", "output_log_probs"}

REFUSED: Mapping[str, Refusal] = {
    "beam_width": NO_BEAMS,
    "bad_words": REFUSED_SAMPLING["bad_words"],
    "return_context_logits": Refusal("logits do not leave the engine", (False,)),
    "return_generation_logits": Refusal("logits do not leave the engine", (False,)),
    "embedding_request": Refusal("the model generates text only"),
    "decoder_text_input": Refusal("the model has no encoder"),
    "guided_decoding_guide_type": NO_GRAMMAR,
    "guided_decoding_guide": NO_GRAMMAR,
    "image": NO_IMAGES,
    "image_url_input": NO_IMAGES,
    "image_bytes_input": NO_IMAGES,
    "video_bytes_input": NO_IMAGES,
    "lora_task_id": NO_LORA,
    "lora_weights": NO_LORA,
    "lora_config": NO_LORA,
    "num_draft_tokens": Refusal("there is no draft model", (0,)),
    "embedding_bias_words": Refusal("use logit_bias in sampling_parameters"),
    "embedding_bias_weights": Refusal("use logit_bias in sampling_parameters"),
    "prompt_embedding_table": Refusal("prompts are text"),
    "prompt_table_extra_id": Refusal("prompts are text"),
    "prompt_vocab_size": Refusal("prompts are text"),
    "sequence_id": Refusal("the model is not a sequence model", (0,)),
    "sequence_start": Refusal("the model is not a sequence model", (False,)),
    "sequence_end": Refusal("the model is not a sequence model", (False,)),
    "timeout": Refusal("requests have no deadline of their own; close the connection", (0,)),
}
"""Inputs and parameters that must ask for nothing."""

WITHOUT_OUTPUT: Mapping[str, Refusal] = {
    "prompt_logprobs": Refusal("no output carries them; /v1/completions does"),
}
"""Sampling parameters whose result no output holds."""

SAME_NAME = (
    "max_tokens",
    "min_tokens",
    "temperature",
    "top_k",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "seed",
)
"""Inputs that are sampling parameters by the same name."""

RESERVED = {"sequence_id", "sequence_start", "sequence_end", "timeout", "priority"}
"""Request parameters of the protocol that are the model's business."""

TRANSPORT = {"binary_data_output", "headers"}  # of the protocol, not of the model


def text_metadata(
    name: str, *, platform: str, aliases: tuple[str, ...] = (), version: str = "1"
) -> ModelMetadata:
    """What a text model says of itself, whoever generates the text."""
    scalars = [
        TensorSpec(key, datatype, (1,), optional=key != "text_input")
        for key, datatype in SCALARS.items()
    ]
    lists = [TensorSpec(key, datatype, (-1,), optional=True) for key, datatype in LISTS.items()]
    return ModelMetadata(
        name=name,
        versions=(version,),
        platform=platform,
        inputs=(*scalars, *lists),
        outputs=tuple(TensorSpec(key, *spec) for key, spec in OUTPUTS.items()),
        decoupled=True,
        aliases=aliases,
    )
