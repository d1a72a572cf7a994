"""The quantized model, made trainable for a while."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch

from mgptq_export.compute import computing_in
from mgptq_export.models import SourceModel
from mgptq_export.recovery.divergence import divergence
from mgptq_export.recovery.matrix import BlockMatrix
from mgptq_export.recovery.modules import BlockEmbedding, BlockLinear, RootMeanSquareNorm
from mgptq_export.recovery.optimizer import Trained
from mgptq_runtime.quantized_model import QuantizedLinear, QuantizedModel

__all__ = ["Student", "trainable"]

# Of norms and biases, numbers near zero move as if they were this share of the tensor's root mean square.
LEAST_UNIT = 0.1


@dataclass(frozen=True)
class Student:
    """A model whose linears and embedding compute with block matrices.

    Attributes:
        source: the model.
        quantized: what it started from.
        matrices: by the name of the linear, embedding and head included.
        vectors: norms and biases of the model by canonical name, as transformers holds them.
    """

    source: SourceModel
    quantized: QuantizedModel
    matrices: Mapping[str, BlockMatrix]
    vectors: Mapping[str, torch.Tensor]

    def loss(self, tokens: torch.Tensor, original: torch.Tensor, original_head: torch.Tensor) -> torch.Tensor:
        """KL divergence from the original, in nats per token.

        Args:
            tokens: int64 [sequences, length].
            original: what the original's head reads, [sequences, length, hidden].
            original_head: [vocabulary, hidden].
        """
        with computing_in(original_head.dtype, tokens.device):
            hidden = self.source.model.model(tokens, use_cache=False).last_hidden_state
        head = self.quantized.head or self.quantized.embedding
        matrix = self.matrices[head.name]
        return divergence(hidden.flatten(0, 1), matrix, original.flatten(0, 1), original_head)

    def trained(self) -> list[Trained]:
        """All that is trained."""
        scales = [one for matrix in self.matrices.values() for one in matrix.parameters()]
        return [
            *(Trained(one, one.detach().abs()) for one in scales),
            *(Trained(one, _unit(one.detach() + self._offset(name))) for name, one in self.vectors.items()),
        ]

    def round(self) -> None:
        """Make all scales what a file can hold."""
        for matrix in self.matrices.values():
            matrix.round()

    def result(self) -> QuantizedModel:
        """The quantized model with what has been trained, rounded."""

        def solved(linear: QuantizedLinear) -> QuantizedLinear:
            return self.matrices[linear.name].quantized()

        old = self.quantized
        vectors = {name: (one.detach() + self._offset(name)).cpu().numpy() for name, one in self.vectors.items()}
        return replace(
            old,
            groups=tuple(replace(group, linears=tuple(map(solved, group.linears))) for group in old.groups),
            embedding=solved(old.embedding),
            head=None if old.head is None else solved(old.head),
            tensors={**old.tensors, **vectors},
        )

    def _offset(self, name: str) -> float:
        return 0.0 if name.endswith("_bias") else self.source.family.norm_offset


def _unit(values: torch.Tensor) -> torch.Tensor:
    return values.abs().clamp_min(LEAST_UNIT * float(values.square().mean().sqrt()))


def _norms(source: SourceModel) -> dict[str, torch.Tensor]:
    """Weights of norms by the path of the module."""
    parameters = {path: one for path, one in source.model.named_parameters() if path.endswith(".weight")}
    norms = {path: one for path, one in parameters.items() if source.family.tensor_of_parameter(path) is not None}
    return {path.removesuffix(".weight"): one for path, one in norms.items()}


@contextmanager
def trainable(source: SourceModel, quantized: QuantizedModel, dtype: torch.dtype) -> Iterator[Student]:
    """Let a model compute with ``quantized``; afterwards all modules are the model's own again.

    Norms and biases are trained in place. The weights of linears and embedding are left as they are.
    """
    model = source.model
    packed = (*quantized.linears(), *quantized.tables())
    matrices = {linear.name: BlockMatrix(linear, model.device) for linear in packed}
    named = {source.family.tensor_of_parameter(name): one for name, one in model.named_parameters()}
    vectors = {name: one for name, one in named.items() if name is not None}
    paths = {id(module): path for path, module in model.named_modules()}
    linears = {name: module for group in source.groups() for name, module in group.modules.items()}
    own: dict[str, Any] = {paths[id(module)]: module for module in linears.values()}
    embedding: Any = model.model.embed_tokens
    own["model.embed_tokens"] = embedding
    norms = _norms(source)
    own |= {path: model.get_submodule(path) for path in norms}
    epsilon = float(model.config.rms_norm_eps)
    try:
        for name, module in linears.items():
            model.set_submodule(paths[id(module)], BlockLinear(matrices[name], module.bias, dtype))
        for path, weight in norms.items():
            model.set_submodule(path, RootMeanSquareNorm(weight, source.family.norm_offset, epsilon, dtype))
        # Gemma multiplies embeddings by a constant.
        multiplier = float(getattr(embedding, "embed_scale", 1.0))
        model.set_submodule("model.embed_tokens", BlockEmbedding(matrices[quantized.embedding.name], multiplier))
        for one in vectors.values():
            one.requires_grad_(True)
        yield Student(source, quantized, matrices, vectors)
    finally:
        for path, one in own.items():
            model.set_submodule(path, one)
        for one in vectors.values():
            one.requires_grad_(False)
            one.grad = None
