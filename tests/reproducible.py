"""Fixtures under which every machine computes the same; a conftest imports them for all tests beside it."""

from collections.abc import Iterator

import pytest
import torch

__all__ = ["_exact_products", "_one_thread"]


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def _exact_products() -> Iterator[None]:
    """What machines with bfloat16 compute differs from others in the third digit."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mgptq_export.compute._multiplies_bfloat16", lambda device: False)
        yield
