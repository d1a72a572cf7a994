"""What calibration text tells about a model: Hessians of the inputs, sensitivity of the outputs."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn

from mgptq_export.calibration.flow import LayerFlow
from mgptq_export.calibration.head import backward_through_head
from mgptq_export.calibration.text import drawn, skip_drawing
from mgptq_export.compute import compute_dtype, computing_in
from mgptq_export.hooks import hooked
from mgptq_export.journal import FORGETFUL, Journal, Record
from mgptq_export.models import SourceModel
from mgptq_export.recompute import recomputing
from mgptq_runtime.errors import NumericalError
from mgptq_runtime.progress import track

__all__ = ["EmbeddingStatistics", "GroupStatistics", "ModelStatistics", "collect_statistics"]

HEAD = "head"
OUTPUT, EMBEDDING = "output", "token_embd"


@dataclass(frozen=True)
class GroupStatistics:
    """Attributes:
    name: of the input group.
    measured: float32 [columns, columns], the Hessian in the numbering in which it was measured.
    order: int64 [columns], the old number of each of the model's columns.
    sensitivity: for every linear, float32 [rows]: mean over tokens of the squared gradient of the model's loss
        with respect to the linear's output, labels drawn from the model (the diagonal of the Fisher information).
    """

    name: str
    measured: torch.Tensor
    order: torch.Tensor
    sensitivity: dict[str, torch.Tensor]

    @property
    def hessian(self) -> torch.Tensor:
        """float32 [columns, columns], in the model's numbering; made anew each time."""
        return self.measured[self.order][:, self.order]

    @property
    def diagonal(self) -> torch.Tensor:
        """The Hessian's, float32 [columns]."""
        return self.measured.diagonal()[self.order]


@dataclass(frozen=True)
class EmbeddingStatistics:
    """What an error of the embedding's weights costs.

    Attributes:
        frequency: share of all tokens, float32 [vocabulary].
        sensitivity: float32 [hidden]: mean over tokens of the squared gradient of the model's loss with respect to
            what a token's row has for each channel, in the model's numbering, labels drawn from the model.
    """

    frequency: torch.Tensor
    sensitivity: torch.Tensor


@dataclass(frozen=True)
class ModelStatistics:
    """Attributes:
    groups: by group name.
    head: of the head's input; the sensitivity of ``output`` is the variance of what the model draws its tokens by.
    embedding: of the embedding.
    """

    groups: dict[str, GroupStatistics]
    head: GroupStatistics
    embedding: EmbeddingStatistics


def collect_statistics(
    source: SourceModel,
    tokens: torch.Tensor,
    sensitivity_samples: int,
    generator: torch.Generator,
    journal: Journal = FORGETFUL,
) -> ModelStatistics:
    """Run the calibration set through the model, layer after layer, and some of it back.

    Args:
        tokens: int64 [samples, sequence].
        sensitivity_samples: how many of the sequences to run backward as well.
        generator: draws the labels.
        journal: what has been measured before, and where to keep what is now.

    Raises:
        NumericalError: an activation or a gradient is NaN or infinite.
    """
    measured = _measure_hessians(source, tokens, journal)
    gradients = journal.once(
        "sensitivity", lambda: Record(_arrays(_measure_gradients(source, tokens[:sensitivity_samples], generator)))
    )
    device = source.model.device
    gradient_of = {name: torch.from_numpy(values).to(device) for name, values in gradients.arrays.items()}

    def in_order(name: str, sensitivity: dict[str, torch.Tensor]) -> GroupStatistics:
        order = torch.arange(len(measured[name]), device=device)
        return GroupStatistics(name, measured[name], order, sensitivity)

    groups = {}
    for group in source.groups():
        groups[group.name] = in_order(group.name, {name: gradient_of[name] for name in group.modules})
    head = in_order(HEAD, {OUTPUT: gradient_of[OUTPUT]})
    counts = torch.bincount(tokens.flatten(), minlength=len(gradient_of[OUTPUT])).to(device)
    return ModelStatistics(groups, head, EmbeddingStatistics(counts / tokens.numel(), gradient_of[EMBEDDING]))


def _measure_hessians(source: SourceModel, tokens: torch.Tensor, journal: Journal) -> dict[str, torch.Tensor]:
    """Hessians by group, and of the head's input: float32 [columns, columns]."""
    names = [f"hessians-{index}" for index in range(len(source.layers))]
    hessians: dict[str, torch.Tensor] = {}

    def take(name: str, measure: Callable[[], dict[str, torch.Tensor]]) -> None:
        record = journal.once(name, lambda: Record(_arrays(measure())))
        for key, values in record.arrays.items():
            hessians[key] = torch.from_numpy(values).to(source.model.device)

    known = {name for name in (*names, HEAD) if name in journal}
    flow = LayerFlow(source, source.world.share(tokens)) if len(known) <= len(names) else None
    with track("Measuring activations", len(names)) as advance:
        for index, name in enumerate(names):
            if flow and name in known:
                flow.advance(index)
            take(name, partial(flow.advance_measuring, index) if flow else dict)
            advance()
    take(HEAD, lambda: {HEAD: flow.head_hessian()} if flow else {})
    return hessians


def _arrays(tensors: Mapping[str, torch.Tensor]) -> dict[str, np.ndarray]:
    return {name: tensor.cpu().numpy() for name, tensor in tensors.items()}


def _measure_gradients(
    source: SourceModel, tokens: torch.Tensor, generator: torch.Generator
) -> dict[str, torch.Tensor]:
    """The sensitivity of every linear's and the head's outputs, float32 [rows], and of the embedding's channels."""
    modules = {name: module for group in source.groups() for name, module in group.modules.items()}
    device, embedding = source.model.device, source.model.get_input_embeddings()
    totals = {name: torch.zeros(module.out_features, device=device) for name, module in modules.items()}
    handles = [module.register_forward_hook(_watch_gradient(totals[name])) for name, module in modules.items()]
    totals |= {OUTPUT: torch.zeros(embedding.num_embeddings, device=device)}
    totals |= {EMBEDDING: torch.zeros(embedding.embedding_dim, device=device)}
    mine = set(source.world.share(range(len(tokens))))
    head = source.head_in(compute_dtype(device))
    with hooked(handles), recomputing(source), track("Measuring sensitivity", len(tokens)) as advance:
        for place, sequence in enumerate(tokens.split(1)):
            if place in mine:
                loss_of = partial(_drawn_loss, generator, totals[OUTPUT])
                totals[EMBEDDING] += _run_backward(source.model, head, sequence.to(device), loss_of)
            else:
                skip_drawing(sequence.numel(), generator)  # every sequence has the same labels on any rank
            advance()
    source.world.sum_(*totals.values())
    for name, total in totals.items():
        if not torch.isfinite(total).all():
            raise NumericalError(f"{name}: the loss gradient is NaN or infinite on the calibration text")
    return {name: total / tokens.numel() for name, total in totals.items()}


def _watch_gradient(total: torch.Tensor) -> Callable[[nn.Module, object, torch.Tensor], None]:
    def accumulate(gradient: torch.Tensor) -> None:
        total.add_(gradient.float().flatten(0, -2).square().sum(0))

    def watch(module: nn.Module, inputs: object, output: torch.Tensor) -> None:
        if output.requires_grad:
            output.register_hook(accumulate)

    return watch


def _run_backward(
    model: Any, head: nn.Linear, batch: torch.Tensor, loss_of: Callable[[torch.Tensor], torch.Tensor]
) -> torch.Tensor:
    """Go back through the model, and return the sum over tokens of squared gradients in the embedding's channels."""
    # Gradients flow through activations only: weights are frozen, so their gradients are never formed.
    embedding = model.get_input_embeddings()
    embedded = embedding(batch).requires_grad_(True)
    with computing_in(compute_dtype(model.device), model.device):
        hidden: torch.Tensor = model.model(inputs_embeds=embedded, use_cache=False).last_hidden_state
        backward_through_head(hidden.flatten(0, 1), head, loss_of)
    assert embedded.grad is not None
    in_weights = embedded.grad.float() * getattr(embedding, "embed_scale", 1.0)
    return in_weights.flatten(0, -2).square_().sum(0)


def _drawn_loss(generator: torch.Generator, variances: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    """The loss of labels that the model's own predictions draw; ``variances``, [vocabulary], grow by theirs."""
    if not torch.isfinite(logits).all():
        raise NumericalError("the model's logits are NaN or infinite on the calibration text; check the model")
    probabilities = torch.softmax(logits.detach(), -1)
    variances += (probabilities * (1 - probabilities)).sum(0)
    labels = drawn(probabilities.cpu(), generator).squeeze(1).to(logits.device)
    return torch.nn.functional.cross_entropy(logits, labels, reduction="sum")
