"""The graph network: column graphs in, a correction of every block's cost in every format out."""

import torch
from torch import nn
from torch_geometric.nn import GraphConv
from torch_geometric.utils import scatter

from mgptq_export.allocation.column_graph import FEATURES, ColumnGraph

__all__ = ["AllocatorNetwork"]

LARGEST_CORRECTION = 2.0


class AllocatorNetwork(nn.Module):
    """Graph perceptual module and bit-width allocator.

    Two graph convolutions over the weighted column graph embed every column. The allocator reads each column's
    embedding together with what its unit is estimated to lose in each format, and answers with a logit per
    format; a unit's logits are the mean of its columns'. They correct the logarithm of the estimate, so an
    untrained network allocates as the estimate says.
    """

    def __init__(self, formats: int, hidden: int = 32) -> None:
        super().__init__()
        self.first = GraphConv(FEATURES, hidden, aggr="mean")
        self.second = GraphConv(hidden, hidden, aggr="mean")
        inner, last = nn.Linear(hidden + formats, hidden), nn.Linear(hidden, formats)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        self.allocator = nn.Sequential(inner, nn.SiLU(), last)

    def forward(self, graph: ColumnGraph, log_costs: torch.Tensor) -> torch.Tensor:
        """Corrections to add to ``log_costs``.

        Args:
            log_costs: float32 [units, formats], normalized estimates.

        Returns:
            float32 [units, formats], within +-LARGEST_CORRECTION.
        """
        columns = torch.nn.functional.silu(self.first(graph.features, graph.edge_index, graph.edge_weight))
        columns = torch.nn.functional.silu(self.second(columns, graph.edge_index, graph.edge_weight))
        columns = torch.cat([columns, log_costs[graph.unit_of_node]], dim=1)
        logits = scatter(self.allocator(columns), graph.unit_of_node, dim=0, dim_size=graph.units, reduce="mean")
        return LARGEST_CORRECTION * torch.tanh(logits / LARGEST_CORRECTION)
