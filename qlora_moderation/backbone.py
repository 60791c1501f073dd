"""The backbone: opened from a checkpoint, in plain weights or NF4.

In: a directory or hub name. Out: a stock sequence classifier. Step 6 of the straight line.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.quantizers import AutoHfQuantizer

from qlora_moderation.attention import PACKED_ATTENTION
from qlora_moderation.batching import Layout
from qlora_moderation.errors import CheckpointError, ConfigError, brief
from qlora_moderation.memory import is_shortage
from qlora_moderation.metadata import Quantization

PACKED_MODEL_TYPES = {"llama", "mistral", "qwen2", "qwen3"}
"""Decoders whose attention is plain causal attention, checked packed against padded; others use the padded layout."""

ENCODER_MODEL_TYPES = {"bert", "roberta", "xlm-roberta", "camembert", "distilbert", "electra", "mpnet", "deberta-v2"}
_LAYER_NUMBER = re.compile(r"(?:^|\.)(?:layers?|h|blocks)\.(\d+)\.")
_MODELS_BELOW = [f"{deep}{file}" for deep in ("*/", "*/*/") for file in ("config.json", "adapter_config.json")]
_DROPOUTS = (
    "attention_dropout", "hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout", "hidden_dropout",
    "dropout", "embd_pdrop", "attn_pdrop", "resid_pdrop", "seq_classif_dropout",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class BackboneSpec:
    """What is known of a backbone before its weights are read."""

    name: str
    revision: str | None
    config: PreTrainedConfig
    kind: Literal["decoder", "encoder"]

    @property
    def head_names(self) -> tuple[str, ...]:
        """Names of the top-level modules of the stock classifier that are not the backbone."""
        return ("score",) if self.kind == "decoder" else ("classifier", "pre_classifier", "pooler")


def inspect_backbone(name: str, revision: str | None = None) -> BackboneSpec:
    """Read a backbone's configuration and decide how it is run.

    Raises:
        CheckpointError: no such checkpoint, an architecture that cannot be run, or weights that are already quantised.
    """
    if (Path(name) / "adapter_config.json").is_file() and not (Path(name) / "config.json").is_file():
        raise CheckpointError(f"{name}: is an adapter, not a backbone; merge it first (scripts/merge_adapter.py)")
    _refuse_place_without_model(name)
    try:
        config = AutoConfig.from_pretrained(name, revision=revision)
    except Exception as error:  # transformers and its checks of single fields raise many kinds here
        if "trust_remote_code" in str(error):
            raise CheckpointError(
                f"{name}: needs code of its own, which is never run here; use a model type that transformers knows itself"
            ) from None
        if (Path(name) / "config.json").is_file():
            raise CheckpointError(f"{name}: its config.json cannot be used ({brief(error)})") from None
        raise CheckpointError(f"{name}: is no readable model directory or hub name {_explain(name, error)}") from None
    if getattr(config, "quantization_config", None) is not None:
        raise CheckpointError(f"{name}: its weights are already quantised; give the unquantised base, NF4 is done here")
    if config.model_type in ENCODER_MODEL_TYPES:
        return BackboneSpec(name, revision, config, "encoder")
    try:
        with torch.device("meta"):
            head = getattr(AutoModelForSequenceClassification.from_config(config), "score", None)
    except ValueError:
        head = None
    except Exception as error:  # numbers that do not go together, such as widths and heads
        raise CheckpointError(
            f"{name}: its config.json describes no model that can be built ({brief(error)})"
        ) from None
    if not isinstance(head, nn.Linear):
        raise CheckpointError(
            f"{name}: model type {config.model_type} is neither a decoder that AutoModelForSequenceClassification knows "
            f"nor an encoder of the kinds {', '.join(sorted(ENCODER_MODEL_TYPES))}"
        )
    return BackboneSpec(name, revision, config, "decoder")


def _refuse_place_without_model(name: str) -> None:
    """Refuse a path of this machine at which no model lies, which a hub would be asked for in vain.

    Raises:
        CheckpointError: names models that lie below it, if any.
    """
    path = Path(name)
    if path.is_dir():
        if not (path / "config.json").is_file():
            below = sorted(found.parent for pattern in _MODELS_BELOW for found in path.glob(pattern))
            hint = f"; models lie in {', '.join(map(str, below[:3]))}" if below else ""
            raise CheckpointError(
                f"{name}: holds no model, config.json is missing{hint}; give the directory of a model"
            )
        return
    owner, slash, rest = name.partition("/")  # the hub's names are `name` or `owner/name`
    if path.is_absolute() or name.startswith((".", "~")) or "/" in rest or (slash and Path(owner).is_dir()):
        raise CheckpointError(f"{name}: no such directory; give the directory of a model, or a hub name as owner/name")


def _explain(name: str, error: BaseException) -> str:
    """Return why a part of a model could not be read, and what may help: transformers hides a lost connection behind advice."""
    cause: BaseException | None = error
    while cause is not None and not type(cause).__module__.startswith(("httpx", "httpcore")):
        cause = cause.__cause__ or cause.__context__
    if cause is not None:
        return f"({brief(cause)}); check the network, and give the same command again"
    if Path(name).is_dir():
        return f"({brief(error)}); copy the checkpoint again"
    return f"({brief(error)}); check name and network; damaged files are downloaded anew once $HF_HOME/hub lacks them"


def choose_layout(spec: BackboneSpec, requested: str, max_length: int, dropout: float = 0.0) -> tuple[Layout, str]:
    """Return (layout, reason).

    Raises:
        ConfigError: `packed` was asked for where it would compute something else.
    """
    window = getattr(spec.config, "sliding_window", None) if getattr(spec.config, "use_sliding_window", True) else None
    if spec.kind == "encoder":
        obstacle = "encoders attend both ways"
    elif spec.config.model_type not in PACKED_MODEL_TYPES:
        obstacle = f"packing is not checked for model type {spec.config.model_type}"
    elif window is not None and window < max_length:
        obstacle = f"the sliding window of {window} is shorter than max_length"
    elif dropout:
        obstacle = "attention dropout is on"
    else:
        return ("padded", "asked for") if requested == "padded" else ("packed", "causal attention, one row, no padding")
    if requested == "packed":
        raise ConfigError(f"--layout packed: {obstacle}; use --layout padded")
    return "padded", obstacle


def choose_dtype(requested: str, device: torch.device) -> torch.dtype:
    """Return the compute type; `auto` is bfloat16 on CUDA cards that have it, float32 elsewhere.

    Raises:
        ConfigError: bfloat16 on a device without it.
    """
    if device.type == "cuda":
        has_bfloat16 = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        has_bfloat16 = torch.ops.mkldnn._is_mkldnn_bf16_supported()
    if requested == "bfloat16" and not has_bfloat16:
        raise ConfigError(f"--dtype bfloat16: this {device.type} device has no bfloat16 units; use --dtype float32")
    if requested == "auto":
        return torch.bfloat16 if device.type == "cuda" and has_bfloat16 else torch.float32
    return getattr(torch, requested)


def load_tokenizer(name: str, revision: str | None = None) -> PreTrainedTokenizerBase:
    """Open a tokenizer.

    Raises:
        CheckpointError: there is none.
    """
    try:
        with quiet():
            return AutoTokenizer.from_pretrained(name, revision=revision)
    except Exception as error:  # transformers raises many kinds here
        raise CheckpointError(f"{name}: holds no readable tokenizer {_explain(name, error)}") from None


@dataclasses.dataclass(frozen=True)
class LoadedBackbone:
    """A stock classifier, and the modules that its checkpoint did not hold and that were made up."""

    model: PreTrainedModel
    new_modules: tuple[str, ...]


def load_backbone(
    spec: BackboneSpec,
    num_labels: int | None,
    dtype: torch.dtype,
    device: torch.device,
    layout: Layout,
    quantization: Quantization | None = None,
    dropout: float = 0.0,
    empty: bool = False,
) -> LoadedBackbone:
    """Open the weights as a stock sequence classifier on `device`.

    Args:
        spec: from `inspect_backbone`.
        num_labels: C; None: as many as the checkpoint's head has. A head of another size is made anew.
        dtype: compute type. Without quantisation also the type of the weights.
        device: where the weights go.
        layout: decides the attention function.
        quantization: NF4 settings; the weights are read in its `weights_dtype` before rounding.
        dropout: set for every dropout of the backbone.
        empty: build the same modules on the meta device and read no file.

    Raises:
        CheckpointError: weights are missing, unreadable or not finite.
    """
    changes: dict[str, Any] = {
        name: dropout for name in _DROPOUTS if isinstance(getattr(spec.config, name, None), float)
    }
    if num_labels is not None:
        changes["num_labels"] = num_labels
    config = copy.deepcopy(spec.config)
    for name, value in changes.items():
        setattr(config, name, value)
    arguments: dict[str, Any] = {"config": config, "dtype": dtype}
    if layout == "packed":
        arguments["attn_implementation"] = PACKED_ATTENTION
    settings = None if quantization is None else _describe_nf4(quantization, dtype)
    if quantization is not None:
        arguments["dtype"] = getattr(torch, quantization.weights_dtype)
    if empty:
        return LoadedBackbone(_build_empty(arguments, settings, dtype), ())
    arguments |= {"revision": spec.revision, "ignore_mismatched_sizes": True}
    if settings is not None:
        arguments |= {"device_map": {"": device}, "quantization_config": settings}
    try:
        with quiet():
            model, report = AutoModelForSequenceClassification.from_pretrained(
                spec.name, output_loading_info=True, **arguments
            )
    except Exception as error:  # safetensors, pickle, huggingface_hub and OS errors
        if is_shortage(error):
            raise
        raise CheckpointError(f"{spec.name}: its weights cannot be loaded {_explain(spec.name, error)}") from None
    _refuse_homeless_layers(spec, report["unexpected_keys"])
    missing = sorted({*report["missing_keys"], *(key for key, *_ in report["mismatched_keys"])})
    allowed = (*spec.head_names, f"{model.base_model_prefix}.pooler")
    lost = [key for key in missing if not key.startswith(allowed)]
    if lost:
        raise CheckpointError(
            f"{spec.name}: {len(lost)} weights are missing, the first is {lost[0]}; is this a whole checkpoint of model "
            f"type {spec.config.model_type}?"
        )
    if quantization is not None:
        if device.type == "cpu":
            _refuse_misread_widths(model, spec.name)
        _set_compute_dtype(model, dtype)
    else:
        model.to(device)
    _refuse_non_finite(model, spec.name)
    return LoadedBackbone(model, tuple(sorted({key.rpartition(".")[0] for key in missing})))


def _refuse_homeless_layers(spec: BackboneSpec, unexpected: Iterable[str]) -> None:
    """Refuse weights of layers that the configuration does not have: without them it is another model.

    Raises:
        CheckpointError: there are such weights.
    """
    layers = spec.config.num_hidden_layers
    found = [key for key in unexpected if (place := _LAYER_NUMBER.search(key)) and int(place[1]) >= layers]
    if found:
        raise CheckpointError(
            f"{spec.name}: config.json has {layers} layers and no place for {min(found)}; copy config.json again"
        )


def _describe_nf4(quantization: Quantization, dtype: torch.dtype) -> BitsAndBytesConfig:
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=quantization.double_quant,
        bnb_4bit_compute_dtype=dtype,
        # floating-point, so that fsdp can cut it, and never bfloat16: where all that fsdp gathers together has that type, CUDA
        # copies it through fp32 and rewrites every NaN among the payload's bits (pytorch#159333)
        bnb_4bit_quant_storage=torch.float32,
        llm_int8_skip_modules=["score"],
    )


def _build_empty(arguments: dict[str, Any], settings: BitsAndBytesConfig | None, dtype: torch.dtype) -> PreTrainedModel:
    with torch.device("meta"), quiet():
        model = AutoModelForSequenceClassification.from_config(**arguments)
        if settings is not None:
            AutoHfQuantizer.from_config(settings).preprocess_model(model=model, device_map={"": "meta"})
    if settings is not None:
        _set_compute_dtype(model, dtype)
    return model.eval()


def _set_compute_dtype(model: nn.Module, dtype: torch.dtype) -> None:
    """Compute in `dtype` without touching NF4 payloads: a cast would rewrite them.

    On a CPU with AVX512-BF16, bitsandbytes repacks the weights at the first forward in evaluation mode, for a kernel that
    rounds to bfloat16 and has no backward pass: training would go on without gradients below the last layer. Its flag is
    taken down here.
    """
    import bitsandbytes

    for module in model.modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            module.compute_dtype = dtype
            module.compute_type_is_set = True
            module.support_avx512bf16_for_cpu = False
            if module.bias is not None:  # read in the type that the weights had before rounding
                module.bias.data = module.bias.data.to(dtype)
            if module.weight.quant_state is not None:
                # bitsandbytes unpacks to this type with gradients and to the inputs' type without: make both the same
                module.weight.quant_state.dtype = dtype
                module.quant_state = module.weight.quant_state  # found here where sharding replaces the weight
        else:
            for parameter in module.parameters(recurse=False):
                parameter.data = parameter.data.to(dtype)


def _refuse_misread_widths(model: nn.Module, name: str) -> None:
    """Refuse what bitsandbytes' CPU kernel (0.50.2) unpacks wrongly: it starts a new block of 64 with every row."""
    import bitsandbytes

    for key, module in model.named_modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit) and module.in_features % 64:
            raise CheckpointError(
                f"{name}: {key} is {module.in_features} wide, no multiple of 64, which bitsandbytes misreads in NF4 on a CPU; "
                "use a GPU, or --method lora"
            )


def _refuse_non_finite(model: nn.Module, name: str) -> None:
    for key, parameter in model.named_parameters():
        state = getattr(parameter, "quant_state", None)
        # an NF4 payload holds bits of any pattern; what was not finite shows in its constants
        values = (
            [parameter.detach()]
            if state is None
            else [state.absmax, state.offset, getattr(state.state2, "absmax", None)]
        )
        numbers = [value for value in values if value is not None and value.is_floating_point()]
        if not all(bool(torch.isfinite(value.abs().max())) for value in numbers):
            raise CheckpointError(f"{name}: weight {key} is not finite; download the checkpoint again")


def fit_pad_token(model: PreTrainedModel, pad_id: int) -> int | None:
    """Set the pad id; where it lies beyond the embedding, grow it by zero rows and return its new size."""
    embedding = model.get_input_embeddings()
    grows = pad_id >= embedding.num_embeddings
    if grows:
        with quiet():
            model.resize_token_embeddings(pad_id + 1, mean_resizing=False)
        with torch.no_grad():
            model.get_input_embeddings().weight[pad_id].zero_()
    model.config.pad_token_id = pad_id
    return pad_id + 1 if grows else None


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence transformers' own warnings: what matters of them is checked and said by us."""
    level = transformers.logging.get_verbosity()
    bars = transformers.utils.logging.is_progress_bar_enabled()
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers.logging.set_verbosity(level)
        if bars:
            transformers.utils.logging.enable_progress_bar()
