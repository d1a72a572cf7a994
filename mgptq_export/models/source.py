"""Loading the model to quantize: a Hugging Face folder or hub id, or a GGUF file."""

import logging
import math
import textwrap
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import nn
from transformers import AutoConfig
from transformers.utils.logging import disable_progress_bar

from mgptq_export.distributed import ALONE, World
from mgptq_export.families import Family, GroupModules, family_of
from mgptq_export.memory import IN_MEMORY, Memory
from mgptq_export.models.folder import check_folder, check_small_files, read_config
from mgptq_export.models.gguf_file import read_gguf_file
from mgptq_export.models.gguf_source import read_gguf_config, read_gguf_weights
from mgptq_export.models.gguf_tokenizer import write_gguf_tokenizer
from mgptq_export.models.hyperparameters import COUNTS, check_hyperparameters
from mgptq_export.models.origin import hub_reference, model_name, origin_of_folder, origin_of_gguf
from mgptq_export.models.weight_files import count_weights, read_weights
from mgptq_runtime.errors import BadInputError, NumericalError, UnsupportedModelError
from mgptq_runtime.quantized_model import QuantizedLinear, QuantizedModel, Segment
from mgptq_runtime.signals import signals_held_back
from mgptq_runtime.tokenizer import parse_tokenizer

__all__ = [
    "SourceModel",
    "check_local",
    "count_model_weights",
    "load_dequantized",
    "load_quantized_weights",
    "load_shape",
    "load_source",
]

logger = logging.getLogger(__name__)

DEQUANTIZED_ROWS = 4096
MAX_TOKENS = COUNTS["vocab_size"]


@dataclass
class SourceModel:
    """A model to quantize, in float32 and evaluation mode.

    Attributes:
        name: for file names and titles.
        source: what the user named.
        family: of the model.
        model: a transformers causal language model, each linear of the family's groups a module of its own.
        config: its ``config.json``.
        tokenizer_folder: holds ``tokenizer.json`` and its companions.
        tokenizer: the same, loaded; None where the source has none.
        memory: keeps the weights, and what is as large.
        origin: ``source`` by name, ``base_model`` on the hub and the license, where known.
        world: the processes that work on it together, each with all of its weights.
        tokens_at_once: that go through it; None for as many as are quick.
    """

    name: str
    source: str
    family: Family
    model: Any
    config: Mapping[str, Any]
    tokenizer_folder: Path
    tokenizer: Tokenizer | None
    memory: Memory = IN_MEMORY
    origin: Mapping[str, str] = field(default_factory=dict)
    world: World = ALONE
    tokens_at_once: int | None = None
    _temporary: TemporaryDirectory | None = None

    def copy(self) -> "SourceModel":
        """The same model with weights of its own."""
        return replace(self, model=self.memory.copy_of(self.model))

    def head_in(self, dtype: torch.dtype) -> nn.Linear:
        """The head as it is computed in ``dtype``: a copy that is converted once, or itself."""
        head: nn.Linear = self.model.lm_head
        return head if head.weight.dtype == dtype else self.memory.copy_of(head, dtype)

    def shape(self) -> "SourceModel":
        """The same model without values, on the ``meta`` device."""
        with torch.device("meta"):
            model = type(self.model)(self.model.config)
        self.family.prepare(model)
        return replace(self, model=model)

    @property
    def layers(self) -> list[nn.Module]:
        """The decoder layers."""
        return list(self.model.model.layers)

    def layer_groups(self, index: int) -> list[GroupModules]:
        """Input groups of decoder layer ``index`` in forward order."""
        return self.family.layer_groups(self.model.model.layers[index], index)

    def groups(self) -> list[GroupModules]:
        """Input groups of all layers in forward order."""
        return [group for index in range(len(self.model.model.layers)) for group in self.layer_groups(index)]

    def linear_kinds(self) -> list[str]:
        """``attn_q`` and the like, in forward order."""
        return [name.split(".")[-1] for group in self.layer_groups(0) for name in group.modules]

    @property
    def tied(self) -> bool:
        """Whether embedding and head are one matrix."""
        return self.model.lm_head.weight is self.model.model.embed_tokens.weight

    def tables(self) -> dict[str, torch.Tensor]:
        """``token_embd``, and ``output`` where the head is another matrix: [vocabulary, hidden]."""
        embedding = {"token_embd": self.model.model.embed_tokens.weight}
        return embedding if self.tied else {**embedding, "output": self.model.lm_head.weight}


def load_source(
    source: str, *, device: str = "cpu", trust_remote_code: bool = False, memory: Memory = IN_MEMORY
) -> SourceModel:
    """Load a model.

    Args:
        source: a Hugging Face folder, a GGUF file or a hub id, ``OWNER/NAME`` or ``OWNER/NAME@REVISION``.
        device: where the model goes, a torch device.
        trust_remote_code: run code that the model's folder brings.
        memory: keeps the weights.

    Raises:
        BadInputError: no model there, or no such device.
        UnsupportedModelError: a model that is not supported.
        NumericalError: a weight holds NaN or infinity.
    """
    disable_progress_bar()
    if device.split(":")[0] == "meta":
        raise BadInputError("device 'meta' cannot be used: it holds no values; choose cpu or cuda")
    path = _model_path(source, weights=True, code=trust_remote_code)
    if path.is_file():
        loaded = _load_gguf(path, source, memory)
    else:
        loaded = _load_hugging_face(path, source, trust_remote_code, memory)
    loaded.memory = memory
    _check_finite(loaded.model, memory, source)
    loaded.family.prepare(loaded.model)
    memory.release_after_use(loaded.model)
    try:
        loaded.model.requires_grad_(False).eval().to(device)
    except (RuntimeError, AssertionError) as error:
        raise BadInputError(f"device {device!r} cannot be used: {error}") from error
    return loaded


def load_shape(source: str, *, trust_remote_code: bool = False) -> SourceModel:
    """Load a model's configuration and tokenizer: as :func:`load_source`, the model on the ``meta`` device."""
    path = _model_path(source, weights=False, code=trust_remote_code)
    if path.is_dir():
        config, family = _read_hugging_face(path)
        model = _shape_of(config, path, trust_remote_code)
        family.prepare(model)
        return SourceModel(model_name(source), source, family, model, config, path, _read_tokenizer(path))
    file = read_gguf_file(path)
    config = read_gguf_config(file)
    family = family_of(config)
    model = _shape_of(config, path, trust_remote_code)
    family.prepare(model)
    temporary = TemporaryDirectory(prefix="mgptq-tokenizer-")
    folder = Path(temporary.name)
    write_gguf_tokenizer(file, folder)
    tokenizer = _read_tokenizer(folder)
    return SourceModel(model_name(source), source, family, model, config, folder, tokenizer, _temporary=temporary)


def check_local(source: str) -> None:
    """Refuse a source, as for :func:`load_source`, that cannot be opened; of a hub id nothing is asked or fetched.

    Raises:
        BadInputError: no file or folder with a model's configuration and weights, and no hub id.
    """
    if Path(source).is_file() or Path(source).is_dir() or hub_reference(source) is None:
        count_model_weights(source)


def count_model_weights(source: str) -> int:
    """How many weights a model's files hold, the source being as for :func:`load_source`."""
    path = _model_path(source, weights=True, code=False)
    if path.is_dir():
        check_folder(path)
        read_config(path)  # says of quantized weights what they are
        return count_weights(path)
    return sum(math.prod(tensor.shape) for tensor in read_gguf_file(path).tensors.values())


def _model_path(source: str, *, weights: bool, code: bool) -> Path:
    """The file or folder that a source names, fetched from the hub where it is an id."""
    path = Path(source)
    if path.is_file() or path.is_dir():
        return path
    reference = hub_reference(source)
    if reference is None:
        raise BadInputError(
            f"{source} is no model: give a folder with config.json and safetensors, a .gguf file, "
            "or a hub id such as HuggingFaceTB/SmolLM2-135M-Instruct, with @ and a revision behind it if need be"
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    patterns = ["*.json", "*.jinja", "README.md", *(["*.safetensors"] if weights else []), *(["*.py"] if code else [])]
    try:
        return Path(snapshot_download(reference.id, revision=reference.revision, allow_patterns=patterns))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        raise BadInputError(
            f"{source} is neither a folder or file here nor a model that the hub can give ({error})"
        ) from error


def load_quantized_weights(source: SourceModel, quantized: QuantizedModel) -> None:
    """Replace the model's weights by a quantized model's, dequantized; norms and biases too, as all is renumbered.

    Raises:
        BadInputError: the quantized model is of another shape.
    """
    linears = {linear.name: linear for linear in quantized.linears()}
    modules = {name: module for group in source.groups() for name, module in group.modules.items()}
    shapes = {name: (module.out_features, module.in_features) for name, module in modules.items()}
    shapes["token_embd"] = tuple(source.model.get_input_embeddings().weight.shape)
    found = {linear.name: (linear.rows, linear.columns) for linear in (*linears.values(), quantized.embedding)}
    if shapes != found or source.tied != (quantized.head is None):
        raise BadInputError(f"{source.source} is not the model that was quantized: its layers have other shapes")
    for name, module in modules.items():
        load_dequantized(source, module, linears[name])
    source.family.load_tensors(source.model, quantized.tensors)
    load_dequantized(source, source.model.model.embed_tokens, quantized.embedding)
    if quantized.head is not None:
        load_dequantized(source, source.model.lm_head, quantized.head)


def load_dequantized(source: SourceModel, module: Any, linear: QuantizedLinear) -> None:
    """Replace a module's weight by a quantized one, some rows at a time."""
    weight = module.weight.data
    for start in range(0, linear.rows, DEQUANTIZED_ROWS):
        rows = slice(start, min(start + DEQUANTIZED_ROWS, linear.rows))
        segments = tuple(Segment(one.format, one.data[rows]) for one in linear.segments)
        part = replace(linear, rows=rows.stop - rows.start, segments=segments)
        weight[rows] = torch.from_numpy(part.dequantize()).to(weight.device)
    source.memory.release(weight)


def _check_finite(model: nn.Module, memory: Memory, source: str) -> None:
    for name, tensor in model.state_dict().items():
        if not (tensor.amax() < math.inf and tensor.amin() > -math.inf):
            raise NumericalError(
                f"{source}: weight {name} holds NaN or infinity; the model is damaged, download it again"
            )
        memory.release(tensor)


def _check_complete(found: Mapping[str, Any], source: str) -> None:
    """Weights that are missing would silently be random ones."""
    missing = sorted(found["missing_keys"]) + sorted(str(key) for key in found["mismatched_keys"])
    if missing:
        raise BadInputError(
            f"{source} cannot be loaded: it lacks weights, or has them in other shapes: {', '.join(missing[:5])}; "
            "download the model again"
        )


def _check_size(shape: nn.Module, held: int, source: str) -> None:
    """Memory is taken for missing weights too, before :func:`_check_complete` can name them."""
    needed = sum(parameter.numel() for parameter in shape.parameters())
    if needed > 2 * held:
        raise BadInputError(
            f"{source} cannot be loaded: its configuration describes {needed} weights, its files hold {held}; "
            "download the model again"
        )


def _check_unused(names: Iterable[str], config: Any, source: str) -> None:
    """Weights of a layer that transformers' model has no place for would silently be left out: biases, mostly."""
    layers = tuple(f"model.layers.{index}." for index in range(config.num_hidden_layers))
    extra = sorted(name for name in names if name.startswith(layers))
    if extra:
        raise UnsupportedModelError(
            f"{source} holds weights that a {config.model_type} model does not have: {', '.join(extra[:5])}"
        )


def _load_gguf(path: Path, source: str, memory: Memory) -> SourceModel:
    import transformers

    file = read_gguf_file(path)
    config = read_gguf_config(file)
    family = family_of(config)
    temporary = TemporaryDirectory(prefix="mgptq-tokenizer-")
    folder = Path(temporary.name)
    write_gguf_tokenizer(file, folder)
    tokenizer = _read_tokenizer(folder)
    state = read_gguf_weights(file, config, memory)
    _check_size(_shape_of(config, path, False), sum(weight.numel() for weight in state.values()), source)
    try:
        result: Any = getattr(transformers, family.architecture).from_pretrained(
            None,
            config=AutoConfig.for_model(**config),
            state_dict=state,
            dtype=torch.float32,
            output_loading_info=True,
        )
    except Exception as error:  # broken hyper-parameters raise many kinds
        raise BadInputError(f"{path}: the weights do not fit the hyper-parameters ({_one_line(error)})") from error
    model, found = result
    _check_complete(found, source)
    if found["unexpected_keys"]:
        # Weights that transformers' model has no place for would silently be left out: biases, mostly.
        extra = ", ".join(sorted(found["unexpected_keys"])[:5])
        raise UnsupportedModelError(f"{path} holds weights that a {family.name} model does not have: {extra}")
    return SourceModel(
        model_name(source),
        source,
        family,
        model,
        model.config.to_dict(),
        folder,
        tokenizer,
        origin=origin_of_gguf(path, file.metadata),
        _temporary=temporary,
    )


def _load_hugging_face(folder: Path, source: str, trust_remote_code: bool, memory: Memory) -> SourceModel:
    config, family = _read_hugging_face(folder)
    if "auto_map" in config and not trust_remote_code:
        logger.warning("%s brings code of its own, which is not run: transformers' own %s is", source, family.name)
    tokenizer = _read_tokenizer(folder)
    shape = _shape_of(config, folder, trust_remote_code)
    _check_size(shape, count_weights(folder), source)
    state = read_weights(folder, memory)
    try:
        result: Any = type(shape).from_pretrained(
            None,
            config=shape.config,
            state_dict=state,
            dtype=torch.float32,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    except Exception as error:  # a broken configuration or weight file raises many kinds
        raise BadInputError(f"{folder} cannot be loaded: {_one_line(error)}") from error
    model, found = result
    _check_complete(found, source)
    _check_unused(found["unexpected_keys"], model.config, source)
    origin = origin_of_folder(source, folder)
    return SourceModel(model_name(source), source, family, model, config, folder, tokenizer, origin=origin)


def _read_hugging_face(folder: Path) -> tuple[dict[str, Any], Family]:
    """The configuration of a folder, and the family that it names."""
    check_folder(folder)
    config = read_config(folder)
    family = family_of(config)
    check_hyperparameters(config, family, str(folder / "config.json"))
    return config, family


def _shape_of(config: Mapping[str, Any], path: Path, trust_remote_code: bool) -> Any:
    """The model of a configuration on the ``meta`` device.

    Args:
        path: of the model, whose code is taken if it is trusted.
    """
    try:
        with signals_held_back(), torch.device("meta"):
            from transformers import AutoModelForCausalLM

            return AutoModelForCausalLM.from_config(
                AutoConfig.for_model(**config, name_or_path=str(path)), trust_remote_code=trust_remote_code
            )
    except Exception as error:  # a broken configuration raises many kinds
        raise BadInputError(f"{path}: its configuration cannot be used: {_one_line(error)}") from error


def _one_line(error: Exception) -> str:
    """What a library says, without line breaks and its inner stack."""
    return textwrap.shorten(str(error), 300, placeholder=" ...")


def _read_tokenizer(folder: Path) -> Tokenizer | None:
    check_small_files(folder)
    tokenizer_file = folder / "tokenizer.json"
    if not tokenizer_file.is_file():
        logger.warning("%s has no tokenizer.json: packages will only take token ids", folder)
        return None
    try:
        tokenizer = parse_tokenizer(tokenizer_file.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as error:
        raise BadInputError(f"{tokenizer_file} cannot be read: {error}; mend or remove it") from error
    highest = max(tokenizer.get_vocab().values(), default=0)
    if highest >= MAX_TOKENS:  # the library takes time and memory for every id below it
        raise BadInputError(
            f"{tokenizer_file} has token id {highest}, ids end at {MAX_TOKENS - 1}; take the tokenizer of this model"
        )
    return tokenizer
