"""The seam between protocols and whatever continues text: `LanguageModel.generate`.

OpenAI's routes, KServe's `generate` and gRPC are on one side; the engine, a scripted model in tests or
a user's Python on the other. The records are in `core.generation`. `infer` is implemented here, once, on
top of `generate`.
"""

from __future__ import annotations

import abc
from collections.abc import AsyncIterator

from naiad.core.generation import GenerateDelta, GenerateRequest
from naiad.core.model import InferRequest, InferResponse, Model
from naiad.core.text_tensors import infer_text


class LanguageModel(Model):
    """A model that continues text."""

    @property
    @abc.abstractmethod
    def max_model_len(self) -> int:
        """Most tokens of prompt and answer together."""

    @property
    @abc.abstractmethod
    def created_s(self) -> int:
        """When the model was loaded, Unix seconds."""

    @abc.abstractmethod
    def generate(self, request: GenerateRequest) -> AsyncIterator[GenerateDelta]:
        """Continue the prompt, `sampling.n` times, deltas interleaved as they come.

        Each answer ends with exactly one delta that has a `finish_reason`; then the iterator ends.
        Closing the iterator cancels every answer and frees its memory within one step.

        Raises:
            InvalidRequest: an empty or too long prompt, token ids outside the vocabulary.
            QueueFull: the bound on waiting requests is reached; raised before the first delta.
            Unavailable: the engine died or is draining; possibly after some deltas.
        """

    def infer(self, request: InferRequest) -> AsyncIterator[InferResponse]:
        """`generate` in tensors: the text models of the vLLM and TensorRT-LLM backends."""
        return infer_text(self, request)
