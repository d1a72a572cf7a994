"""Loading the model to quantize: a Hugging Face folder or hub id, or a GGUF file."""

import copy
import json
import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import nn
from transformers import AutoConfig
from transformers.utils.logging import disable_progress_bar

from mgptq_export.families import Family, GroupModules, family_of
from mgptq_export.models import gguf_source
from mgptq_runtime.errors import BadInputError, NumericalError, UnsupportedModelError
from mgptq_runtime.progress import Advance, track
from mgptq_runtime.quantized_model import QuantizedModel
from mgptq_runtime.strict_json import parse_json_object

__all__ = ["SourceModel", "load_quantized_weights", "load_shape", "load_source"]

logger = logging.getLogger(__name__)

LOADING_STEPS = 4


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
    """

    name: str
    source: str
    family: Family
    model: Any
    config: Mapping[str, Any]
    tokenizer_folder: Path
    tokenizer: Tokenizer | None
    _temporary: TemporaryDirectory | None = None

    def copy(self) -> "SourceModel":
        """The same model with weights of its own."""
        return replace(self, model=copy.deepcopy(self.model))

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


def load_source(source: str, *, device: str = "cpu", trust_remote_code: bool = False) -> SourceModel:
    """Load a model.

    Args:
        source: a Hugging Face folder, a GGUF file or a hub id.
        device: where the model goes, a torch device.
        trust_remote_code: run code that the model's folder brings.

    Raises:
        BadInputError: no model there, or no such device.
        UnsupportedModelError: a model that is not supported.
        NumericalError: a weight holds NaN or infinity.
    """
    disable_progress_bar()
    if device.split(":")[0] == "meta":
        raise BadInputError("device 'meta' cannot be used: it holds no values; choose cpu or cuda")
    path = _model_path(source, weights=True)
    with track("Loading the model", LOADING_STEPS) as advance:
        if path.is_file():
            loaded = _load_gguf(path, source, advance)
        else:
            loaded = _load_hugging_face(path, source, trust_remote_code, advance)
        _check_finite(loaded.model)
        loaded.family.prepare(loaded.model)
        advance()
    try:
        loaded.model.requires_grad_(False).eval().to(device)
    except (RuntimeError, AssertionError) as error:
        raise BadInputError(f"device {device!r} cannot be used: {error}") from error
    return loaded


def load_shape(source: str, *, trust_remote_code: bool = False) -> SourceModel:
    """Load a model's configuration and tokenizer: as :func:`load_source`, the model on the ``meta`` device."""
    from transformers import AutoModelForCausalLM

    path = _model_path(source, weights=False)
    reader = gguf_source.open_gguf(path) if path.is_file() else None
    config = _read_config(path) if reader is None else gguf_source.read_gguf_config(reader)
    family = family_of(config)
    try:
        with torch.device("meta"):
            model: Any = AutoModelForCausalLM.from_config(
                AutoConfig.for_model(**config), trust_remote_code=trust_remote_code
            )
    except Exception as error:  # a broken configuration raises many kinds
        raise BadInputError(f"{source}: its configuration cannot be used: {error}") from error
    family.prepare(model)
    if reader is None:
        return SourceModel(_model_name(source), source, family, model, config, path, _read_tokenizer(path))
    temporary = TemporaryDirectory(prefix="mgptq-tokenizer-")
    folder = Path(temporary.name)
    gguf_source.write_gguf_tokenizer(path, reader, folder)
    tokenizer = _read_tokenizer(folder)
    return SourceModel(_model_name(source), source, family, model, config, folder, tokenizer, temporary)


def _model_path(source: str, *, weights: bool) -> Path:
    """The file or folder that a source names, fetched from the hub where it is an id."""
    path = Path(source)
    if path.is_file() or path.is_dir():
        return path
    if not _looks_like_hub_id(source):
        raise BadInputError(
            f"{source} is no model: give a folder with config.json and safetensors, a .gguf file, "
            "or a hub id such as HuggingFaceTB/SmolLM2-135M-Instruct"
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    patterns = ["*.json", "*.jinja", *(["*.safetensors"] if weights else [])]
    try:
        return Path(snapshot_download(source, allow_patterns=patterns))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        raise BadInputError(
            f"{source} is neither a folder or file here nor a model that the hub can give ({error})"
        ) from error


def _model_name(source: str) -> str:
    """The last part of the path; of a GGUF file without its type: ``Llama-3.2-1B`` of ``Llama-3.2-1B.Q4_K_M.gguf``."""
    name = Path(source).resolve().name
    return re.sub(r"(\.(I?Q\d\w*|B?F16|F32))?\.gguf$", "", name, flags=re.IGNORECASE)


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
        module.weight.data.copy_(torch.from_numpy(linears[name].dequantize()))
    source.family.load_tensors(source.model, quantized.tensors)
    source.model.model.embed_tokens.weight.data.copy_(torch.from_numpy(quantized.embedding.dequantize()))
    if quantized.head is not None:
        source.model.lm_head.weight.data.copy_(torch.from_numpy(quantized.head.dequantize()))


def _looks_like_hub_id(source: str) -> bool:
    parts = source.split("/")
    return len(parts) == 2 and all(part and not part.startswith(".") for part in parts) and "\\" not in source


def _check_finite(model: nn.Module) -> None:
    for name, tensor in model.state_dict().items():
        if not torch.isfinite(tensor).all():
            raise NumericalError(f"weight {name} holds NaN or infinity; the model is damaged, download it again")


def _check_complete(found: Mapping[str, Any], source: str) -> None:
    """Weights that are missing would silently be random ones."""
    missing = sorted(found["missing_keys"]) + sorted(str(key) for key in found["mismatched_keys"])
    if missing:
        raise BadInputError(f"{source} lacks weights, or has them in other shapes: {', '.join(missing[:5])}")


def _load_gguf(path: Path, source: str, advance: Advance) -> SourceModel:
    import transformers

    reader = gguf_source.open_gguf(path)
    config = gguf_source.read_gguf_config(reader)
    family = family_of(config)
    temporary = TemporaryDirectory(prefix="mgptq-tokenizer-")
    folder = Path(temporary.name)
    gguf_source.write_gguf_tokenizer(path, reader, folder)
    advance()
    state = gguf_source.read_gguf_weights(reader, config)
    advance()
    try:
        result: Any = getattr(transformers, family.architecture).from_pretrained(
            None,
            config=AutoConfig.for_model(**config),
            state_dict=state,
            dtype=torch.float32,
            output_loading_info=True,
        )
    except Exception as error:  # broken hyper-parameters raise many kinds
        raise BadInputError(f"{path}: the weights do not fit the hyper-parameters ({error})") from error
    model, found = result
    _check_complete(found, source)
    if found["unexpected_keys"]:
        # Weights that transformers' model has no place for would silently be left out: biases, mostly.
        extra = ", ".join(sorted(found["unexpected_keys"])[:5])
        raise UnsupportedModelError(f"{path} holds weights that a {family.name} model does not have: {extra}")
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    advance()
    return SourceModel(_model_name(source), source, family, model, model.config.to_dict(), folder, tokenizer, temporary)


def _load_hugging_face(folder: Path, source: str, trust_remote_code: bool, advance: Advance) -> SourceModel:
    from transformers import AutoModelForCausalLM

    config = _read_config(folder)
    family = family_of(config)
    if not list(folder.glob("*.safetensors")):
        raise BadInputError(f"{folder} holds no .safetensors weights; pickled weights are not read, convert them first")
    try:
        result: Any = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=torch.float32,
            use_safetensors=True,
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
        )
    except Exception as error:  # a broken configuration or weight file raises many kinds
        raise BadInputError(f"{folder} cannot be loaded: {error}") from error
    model, found = result
    _check_complete(found, source)
    advance()
    return SourceModel(_model_name(source), source, family, model, config, folder, _read_tokenizer(folder))


def _read_tokenizer(folder: Path) -> Tokenizer | None:
    for name in ("tokenizer_config.json", "generation_config.json"):
        _check_json_object(folder / name)
    _check_text(folder / "chat_template.jinja")
    tokenizer_file = folder / "tokenizer.json"
    if not tokenizer_file.is_file():
        logger.warning("%s has no tokenizer.json: packages will only take token ids", folder)
        return None
    try:
        return Tokenizer.from_file(str(tokenizer_file))
    except Exception as error:  # the tokenizers library raises bare Exception
        raise BadInputError(f"{tokenizer_file} cannot be read: {error}") from error


def _check_text(path: Path) -> None:
    if not path.exists():
        return
    try:
        path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise BadInputError(f"{path} cannot be read: {error}; mend or remove it") from error


def _check_json_object(path: Path) -> None:
    if not path.exists():
        return
    try:
        parse_json_object(path.read_bytes())
    except (OSError, ValueError) as error:
        raise BadInputError(f"{path} cannot be read: {error}; mend or remove it") from error


def _read_config(folder: Path) -> dict[str, Any]:
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise BadInputError(f"{folder} holds no config.json: not a Hugging Face model folder") from error
    except OSError as error:
        raise BadInputError(f"{folder / 'config.json'} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise BadInputError(f"{folder / 'config.json'} is not JSON: {error}") from error
    if not isinstance(config, dict):
        raise BadInputError(f"{folder / 'config.json'} is not a JSON object")
    if "quantization_config" in config:
        raise BadInputError(f"{folder} is quantized already; start from the original model")
    return config
