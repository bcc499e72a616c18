"""Packed checkpoints through transformers' own `from_pretrained`: importing this module registers them.

    import ctp_kernels.checkpoints.transformers_plugin
    model = AutoModelForCausalLM.from_pretrained(folder)  # as `ctp compress -o folder` or `save_packed` wrote it

It must be asked for by name: `import ctp_kernels` would have to import transformers for it (0.7 s), or to watch for
other code that does. Without it `from_pretrained` raises, for it finds no weights (see manifest.py).

transformers gives the model, its dtype and its devices; what the model then holds is what `load_packed` reads, after
the same checks. transformers reads the file a second time on its way.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from ..errors import CTPError
from ..linear import PackedLinear
from ..memory import in_huge_pages
from .layer import Layer
from .load import cast_model, fill, find_folder
from .manifest import MANIFEST, METHOD, OWN_WEIGHTS, read_own, save_as_packed


@register_quantization_config(METHOD)
class PackedConfig(QuantizationConfigMixin):
    """`{"quant_method": "ctp_kernels"}`: the manifest says the rest."""

    def __init__(self, **_: Any) -> None:
        self.quant_method: Any = METHOD


@register_quantizer(METHOD)
class PackedQuantizer(HfQuantizer):
    """What transformers asks, in this order, on its way through `from_pretrained`; and `Trainer`, later."""

    requires_calibration = True  # so from_pretrained refuses to pack a dense model: patch_model does
    is_trainable: Any = True  # with a prompt or an adapter; without, Trainer refuses
    is_compileable: Any = True
    _layers: dict[str, Layer]

    def update_attn_implementation(self, config: Any) -> Any:
        """The last call with the config before transformers looks for its weights."""
        config.transformers_weights = OWN_WEIGHTS
        return config

    update_tp_plan = update_attn_implementation  # in transformers 5.0, which has no call of that name

    def _process_model_before_weight_loading(
        self, model: Any, checkpoint_files: list[str] | None = None, **_: Any
    ) -> None:
        """Fill the model, on the meta device, with the checked contents of the folder, cast to the dtype asked for.

        What transformers loads over it is cast to the dtypes that it finds.
        """
        if not checkpoint_files:
            raise CTPError("a packed model is loaded from a folder or from the hub, not from a state_dict")
        dtype, name, folder = model.dtype, model.config.name_or_path, Path(checkpoint_files[0]).parent
        if not (folder / MANIFEST).is_file() and not Path(name).is_dir():
            # From the hub transformers fetched what it knows of, to <cache>/models--<name>/snapshots/<revision>.
            folder = find_folder(name, revision=folder.name, cache_dir=folder.parents[2])
        with torch.device("cpu"):  # transformers has made "meta" the default
            contents = read_own(folder)
            fill(model, contents, folder)
            cast_model(model, dtype)
        self._layers = contents.layers

    def _process_model_after_weight_loading(self, model: Any, **_: Any) -> Any:
        """The packed bytes once more: transformers left what is in no file (`tile_offsets`, addresses) undefined."""
        for name, layer in self._layers.items():
            model.get_submodule(name).load_state_dict(layer.weight.buffers, strict=False)
        del self._layers, model.config.transformers_weights  # saved with the config, it would lead there without this
        in_huge_pages(m._buffers for m in model.modules() if isinstance(m, PackedLinear))
        save_as_packed(model)
        return model.requires_grad_(False)

    def is_serializable(self) -> bool:
        """By `save_packed`, which `save_as_packed` has put in the place of `save_pretrained`."""
        return True
