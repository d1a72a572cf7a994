"""What the workstation has to know of a model family: its input groups and its hyper-parameters."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import nn

from mgptq_export.models import llama
from mgptq_runtime.errors import UnsupportedModelError

__all__ = ["FAMILIES", "Family", "GroupModules", "family_of"]


@dataclass(frozen=True)
class GroupModules:
    """Linears of a decoder layer that read the same activation.

    Attributes:
        name: ``blk.0.attn_qkv``.
        modules: linear modules by name (``blk.0.attn_q``), in the family's order.
    """

    name: str
    modules: Mapping[str, nn.Linear]

    @property
    def columns(self) -> int:
        """Inputs of every linear of the group."""
        return next(iter(self.modules.values())).in_features


class Family(Protocol):
    """A module of this package that describes one family."""

    MODEL_TYPES: tuple[str, ...]

    def layer_groups(self, layer: nn.Module, index: int) -> Mapping[str, Mapping[str, nn.Linear]]:
        """Linear modules of decoder layer ``index`` by group name and linear name."""
        ...

    def hyperparameters(self, model: nn.Module) -> dict[str, int | float | bool | str]:
        """Values for :attr:`mgptq_runtime.quantized_model.QuantizedModel.hyperparameters`."""
        ...

    def other_tensors(self, model: nn.Module) -> dict[str, np.ndarray]:
        """Everything that is not quantized, float32 by name."""
        ...

    def reorder_intermediate(self, layer: nn.Module, order: torch.Tensor) -> None:
        """Renumber the neurons between gate/up and down, in place."""
        ...

    def check_config(self, config: Mapping[str, Any]) -> None:
        """Raise UnsupportedModelError for a variant that the runtime cannot run."""
        ...


FAMILIES: dict[str, Family] = {"llama": llama}


def family_of(config: Mapping[str, Any]) -> str:
    """The family's name of a Hugging Face configuration.

    Raises:
        UnsupportedModelError: not among the supported families.
    """
    model_type = config.get("model_type")
    for name, family in FAMILIES.items():
        if model_type in family.MODEL_TYPES:
            family.check_config(config)
            return name
    supported = ", ".join(sorted(t for family in FAMILIES.values() for t in family.MODEL_TYPES))
    raise UnsupportedModelError(f"model type {model_type!r} is not supported; supported: {supported}")


def groups_of(family: str, layer: nn.Module, index: int) -> list[GroupModules]:
    """Input groups of a decoder layer in forward order."""
    groups = FAMILIES[family].layer_groups(layer, index)
    return [GroupModules(name, modules) for name, modules in groups.items()]
