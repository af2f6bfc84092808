"""From files to a pipeline on the host, in one dtype, ready to be shared."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from core.errors import ModelFailed
from core.hearsay import hearsay
from models.diffusion.qwen_processor import load_processor
from models.diffusion.sources import Source, configuration, find

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def dtype_of(options: Mapping[str, Any], device: torch.device) -> torch.dtype:
    """The option `dtype`; "auto": bfloat16 on a GPU that has it, else float16, float32 on a CPU."""
    named = str(options.get("dtype") or "auto")
    if named in DTYPES:
        return DTYPES[named]
    if named != "auto":
        raise ModelFailed(f"the model's option 'dtype' is '{named}'; it must be auto or one of {', '.join(DTYPES)}")
    if device.type != "cuda":
        return torch.float32
    return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16


def as_path(folder: str) -> Path:
    """A folder of the options, with ~ for the home folder."""
    return Path(folder).expanduser()


def load_pipeline(source: Source, options: Mapping[str, Any], dtype: torch.dtype) -> Any:
    """The diffusers pipeline of a source, on the host. Raises `ModelFailed`."""
    kind = _class(_named_class(source, options))
    given: dict[str, Any] = {"dtype": dtype, "use_safetensors": None if options.get("trust_pickle") else True}
    if options.get("safety_checker") is False:
        given |= {"safety_checker": None, "requires_safety_checker": False}
    try:
        if source.single_file:
            # With a folder for it nothing is asked of the hub; diffusers itself would do so in spite of `offline`.
            config = str(configuration(source, options))
            pipeline = kind.from_single_file(str(source.path), config=config, local_files_only=True, **given)
        else:
            if (source.path / "processor").is_dir() and "Qwen" in kind.__name__:
                given["processor"] = load_processor(source.path)
            pipeline = kind.from_pretrained(source.path, variant=source.variant, local_files_only=True, **given)
    except ImportError as fault:
        raise ModelFailed(f"a package is missing for {kind.__name__}: {hearsay(fault)}") from None
    except (ModelFailed, MemoryError):
        raise
    except Exception as fault:  # diffusers, transformers and safetensors have trees of their own
        raise ModelFailed(f"'{source.path.name}' cannot be loaded as {kind.__name__}: {hearsay(fault)}") from fault
    _set_up(pipeline, options)
    return pipeline


def load_control_nets(options: Mapping[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """By control type the networks of the option `controlnets`. Raises `ModelFailed`."""
    nets = {}
    for kind, named in dict(options.get("controlnets") or {}).items():
        source = find({**options, "source": named, "variant": None, "revision": None}, one_network=True)
        try:
            nets[str(kind).lower()] = net = _load_control_net(source, dtype, bool(options.get("offline")))
            _lay_out(net, options)
        except MemoryError:
            raise
        except Exception as fault:
            raise ModelFailed(f"the ControlNet for '{kind}' cannot be loaded: {hearsay(fault)}") from fault
    return nets


def multiple_of(pipeline: Any, options: Mapping[str, Any]) -> int:
    """What heights and widths must be multiples of: the option `multiple`, or a pixel of the latents; transformers
    take these two by two."""
    scale = int(getattr(pipeline, "vae_scale_factor", 8))
    return int(options.get("multiple") or scale * (2 if getattr(pipeline, "transformer", None) is not None else 1))


def only_masks(pipeline: Any) -> bool:
    """Whether the network takes a mask and the masked picture as channels beside the latents."""
    network = getattr(pipeline, "unet", None)
    latent = getattr(getattr(getattr(pipeline, "vae", None), "config", None), "latent_channels", None)
    return bool(network is not None and latent and network.config.in_channels == 2 * latent + 1)


def _named_class(source: Source, options: Mapping[str, Any]) -> str:
    named = str(options.get("pipeline") or "auto")
    if named != "auto":
        return named
    if source.single_file and not options.get("config"):
        raise ModelFailed(
            f"the file {source.path.name} does not tell which pipeline it is for; name diffusers' class as the model's "
            "option 'pipeline', as in pipeline = \"StableDiffusionXLPipeline\", or a folder as 'config'"
        )
    told = Source(configuration(source, options)) if source.single_file else source
    entry = told.index()["_class_name"]
    return str(entry[-1] if isinstance(entry, list) else entry)


def _class(name: str) -> Any:
    import diffusers

    kind = getattr(diffusers, name, None)
    if not (isinstance(kind, type) and issubclass(kind, diffusers.DiffusionPipeline)):
        raise ModelFailed(
            f"diffusers {diffusers.__version__} has no pipeline '{name[:100]}'; check the model's option 'pipeline', "
            "or bring a version that has it"
        )
    return kind


def _load_control_net(source: Source, dtype: torch.dtype, offline: bool) -> Any:
    import json

    import diffusers

    if source.single_file:
        loaded = diffusers.ControlNetModel.from_single_file(str(source.path), dtype=dtype, local_files_only=offline)
        return loaded.eval()
    config = json.loads((source.path / "config.json").read_text("utf-8"))
    kind = getattr(diffusers, str(config.get("_class_name")), diffusers.ControlNetModel)
    return kind.from_pretrained(source.path, dtype=dtype, use_safetensors=True, local_files_only=True).eval()


def _set_up(pipeline: Any, options: Mapping[str, Any]) -> None:
    pipeline.set_progress_bar_config(disable=True)
    vae = getattr(pipeline, "vae", None)
    for option, method in (("vae_tiling", "enable_tiling"), ("vae_slicing", "enable_slicing")):
        if options.get(option) and hasattr(vae, method):
            getattr(vae, method)()
    for name in ("unet", "controlnet"):
        _lay_out(getattr(pipeline, name, None), options)


def _lay_out(network: Any, options: Mapping[str, Any]) -> None:
    if options.get("channels_last") and network is not None:
        network.to(memory_format=torch.channels_last)
