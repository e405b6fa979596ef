"""Bridge: ComfyUI's operations, with a Linear that may be a 4-bit layer.

A 4-bit layer is ONE uint8 parameter `weight` that holds every tensor it needs, beside an ordinary `bias`. Hosts move,
count, pin and stream `weight` and `bias` of any layer; anything else a layer owns would stay on the GPU uncounted.
"""

from typing import Any

import comfy.ops
import torch

from ...kernels.layer import Layer, LayerSpec
from ...quantize.files.checkpoint import Checkpoint, CheckpointError
from ...quantize.files.dialects.native import encode_layer
from ...quantize.files.spelling import MARKER, SUFFIXES, own_names
from ...quantize.linear import PackedLinear
from ...quantize.lora.loras import LayerLoras, LoadedLoras
from . import training

# None where another pack has put its own in its place
HOSTS_CAST = comfy.ops.cast_bias_weight if comfy.ops.cast_bias_weight.__module__ == "comfy.ops" else None
SAVED = {MARKER, *SUFFIXES.values(), *own_names()} - {"weight"}  # state_dict names that are no attributes


class SVDQuantLinear(comfy.ops.manual_cast.Linear):
    """A linear layer of ComfyUI's own model: 4-bit when `packed` is set, else exactly ComfyUI's.

    packed      description of the bytes in `weight`, or None
    loras       the user's LoRAs on this layer
    loras_stay  whether they stay on the device of the activation when the weight does not
    """

    packed: PackedLinear | None = None
    loras: LayerLoras | None
    loras_stay = False
    _loaded: LoadedLoras | None
    _own: tuple[int, Layer] | None = None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        # not Linear's __init__: the dense weight of a layer that will be 4-bit is never allocated
        torch.nn.Module.__init__(self)
        self.in_features, self.out_features = in_features, out_features
        self.loras = self._loaded = None  # the object's own from the start: torch.compile tells where it found them
        empty = torch.empty(0, in_features, device=device, dtype=dtype)
        self.weight = torch.nn.Parameter(empty, requires_grad=False)
        self.bias = None
        if bias:
            zeros = torch.zeros(out_features, device=device, dtype=dtype)
            self.bias = torch.nn.Parameter(zeros, requires_grad=False)

    @property
    def four_bit(self) -> PackedLinear:
        """`packed` of a layer that is known to have it."""
        assert self.packed is not None, "this layer is 16-bit"
        return self.packed

    @property
    def blob(self) -> torch.Tensor:
        """The parameter `weight`, also while a tensor of its shape stands in front."""
        return self._parameters["weight"]

    def show_shape(self, shown: bool) -> None:
        """Whether `weight` reads as a tensor (N, K), without memory of its own, instead of as the bytes."""
        if shown:
            number = torch.zeros(1, device=self.blob.device)
            self.__dict__["weight"] = number.expand(self.out_features, self.in_features)
        else:
            self.__dict__.pop("weight", None)

    def take(self, packed: PackedLinear, blob: torch.Tensor) -> None:
        """Become the 4-bit layer in `blob`."""
        self.packed, self._own = packed, None
        self.weight = torch.nn.Parameter(blob, requires_grad=False)
        self.weight_comfy_model_dtype = torch.uint8  # else newer hosts stage the bytes as if they were floats

    def arrange(self, order: str, device: torch.device) -> None:
        """Put the bytes, where they lie, in an order of kernels/order.py; `device` moves them."""
        self.packed, self._own = self.four_bit.arrange(self.blob.detach(), order, device), None

    def kind(self) -> tuple[LayerSpec, dict[str, torch.dtype], bool]:
        """What decides which kernels run it: its numbers, the types of its tensors, whether there is a bias"""
        packed = self.four_bit
        return packed.spec, {view.name: view.dtype for view in packed.views}, self.bias is not None

    def set_loras(self, loras: LayerLoras | None) -> None:
        """Replace the user's LoRAs. Factors that are on the device already stay there: only their strength changes.

        Plain attributes, not buffers: hosts back buffers up and put old ones back.
        """
        self.__dict__["loras"], loaded = loras, self._loaded  # past Module's setter, whose checks cost more than this
        if loaded is None:
            return
        if loras is not None and loaded.fits(loras):
            loaded.follow(loras)
        else:
            self._loaded = None

    def place_loras(self, device: torch.device, dtype: torch.dtype) -> None:
        """Put the LoRAs where calls look for them, before the first: one that is compiled keeps nothing by itself.

        device, dtype  of the activation; LoRAs whose weight is elsewhere wait beside it
        """
        place = device if self.loras_stay else self.blob.device
        if self.loras is not None and (self._loaded is None or self._loaded.device != place):
            self._loaded = self.loras.on(place, dtype)

    def leave_device(self) -> None:
        """Drop what is kept for a device that the weight has left: the layer, and the LoRAs' copy."""
        self._own = None
        if not self.loras_stay and self._loaded is not None and self._loaded.device != self.blob.device:
            self._loaded = None

    def forward_comfy_cast_weights(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if self.packed is None:
            return super().forward_comfy_cast_weights(x, *args, **kwargs)
        if self.weight_function:
            return training.forward(self, x)
        if self._would_stay(x):
            return self._run(self.packed, x, self._own_layer(), self._parameters.get("bias"))
        blob, bias, stream = comfy.ops.cast_bias_weight(
            self, dtype=torch.uint8, device=x.device, bias_dtype=x.dtype, offloadable=True
        )
        try:
            # hosts stream offloaded weights through one buffer: its next bytes are another layer's. The parameter
            # itself, not its address: torch.compile traces none
            own = blob is self.blob
            if not own and torch.is_grad_enabled():  # a backward pass reads them again
                blob, bias = blob.clone(), None if bias is None else bias.clone()
            return self._run(self.packed if own else self.packed.passing(), x, blob, bias)
        finally:
            comfy.ops.uncast_bias_weight(self, blob, bias, stream)

    def _run(
        self, packed: PackedLinear, x: torch.Tensor, blob: torch.Tensor | Layer, bias: torch.Tensor | None
    ) -> torch.Tensor:
        loaded = self._loras_on(x)
        return packed.forward(x, blob, bias, None) if loaded is None else loaded.forward(packed, x, blob, bias)

    def _would_stay(self, x: torch.Tensor) -> bool:
        """Whether the host's cast would hand out weight and bias as they are, so that it need not be asked."""
        if torch.compiler.is_compiling() or torch.is_grad_enabled() or comfy.ops.cast_bias_weight is not HOSTS_CAST:
            return False
        device, own = x.device, self._parameters
        bias = own.get("bias")
        if own["weight"].device != device or "_v" in self.__dict__ or self.bias_function:  # _v: dynamic VRAM
            return False
        return bias is None or (bias.dtype == x.dtype and bias.device == device)

    def _own_layer(self) -> Layer:
        """The layer in its own bytes, taken apart once for as long as they lie there."""
        blob, own = self._parameters["weight"], self._own
        address = blob.data_ptr()
        if own is None or own[0] != address:
            own = self.__dict__["_own"] = address, self.four_bit.as_it_lies(blob)
        return own[1]

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        self._own = None  # the bytes move: what is kept of them would hold the old ones
        return super()._apply(*args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_own": None}

    def _loras_on(self, x: torch.Tensor) -> LoadedLoras | None:
        loras, loaded = self.loras, self._loaded
        if loras is None:
            return None
        if loaded is not None and loaded.device == x.device and loaded.dtype == x.dtype:
            return loaded
        if loaded is not None and torch.compiler.is_compiling():
            return loaded.beside(x)
        loaded = loras.on(x.device, x.dtype)
        if not torch.compiler.is_compiling() and (self.loras_stay or self.blob.device == x.device):
            self._loaded = loaded
        return loaded

    def _load_from_state_dict(
        self,
        state_dict: dict[str, torch.Tensor],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        shapes = {"weight": (self.out_features, self.in_features), "bias": (self.out_features,)}
        for name, shape in shapes.items():
            old, new = getattr(self, name), state_dict.get(prefix + name)
            if old is None or (name == "weight" and self.packed is not None):
                continue
            if new is None:
                missing_keys.append(prefix + name)
                new = torch.zeros(shape, dtype=old.dtype)
            elif tuple(new.shape) != shape:
                error_msgs.append(f"{prefix}{name} has shape {tuple(new.shape)}, this model needs {shape}")
                continue
            if not local_metadata.get("assign_to_params_buffers", False):
                new = new.to(device=old.device, dtype=old.dtype, copy=True)
            setattr(self, name, torch.nn.Parameter(new, requires_grad=False))

    def _save_to_state_dict(self, destination: dict[str, torch.Tensor], prefix: str, keep_vars: bool) -> None:
        """4-bit layers appear under their native checkpoint names, so that the host's save nodes write them so."""
        if self.packed is None:
            super()._save_to_state_dict(destination, prefix, keep_vars)
            return
        destination |= encode_layer(prefix.removesuffix("."), self.packed.listed(self.blob.detach()))
        if self.bias is not None:
            destination[f"{prefix}bias"] = self.bias if keep_vars else self.bias.detach()


def _saved(name: str) -> property:
    """A tensor of the native checkpoint: hosts look every state_dict key up as an attribute."""

    def get(self: SVDQuantLinear) -> torch.Tensor:
        saved = {} if self.packed is None else encode_layer("", self.packed.listed(self.blob.detach()))
        if f".{name}" not in saved:
            raise AttributeError(name)  # Module's own message follows
        return saved[f".{name}"]

    return property(get)


for _name in SAVED:  # not by __getattr__, which would stand before every weight that torch.compile looks up
    setattr(SVDQuantLinear, _name, _saved(_name))


def operations(checkpoint: Checkpoint, compute: str) -> type:
    """ComfyUI operations for one checkpoint: its 4-bit layers are read, one by one, while ComfyUI loads the weights.

    A layer's name is what ComfyUI passes as the prefix of its state_dict keys.
    """

    class Linear(SVDQuantLinear):
        def _load_from_state_dict(self, state_dict, prefix, *args: Any) -> None:
            name = prefix.removesuffix(".")
            if name in checkpoint.specs:
                layer = checkpoint.layer(name)
                wanted = (self.out_features, self.in_features)
                if (layer.spec.n, layer.spec.k) != wanted:
                    raise CheckpointError(
                        f"{checkpoint.path.name}: layer {name!r} is {(layer.spec.n, layer.spec.k)}, "
                        f"the model that ComfyUI built needs {wanted}"
                    )
                blob, packed = PackedLinear.pack(layer, compute)
                self.take(packed, blob.to(self.weight.device))
                if layer.spec.act_unsigned != (0, 0) and self.bias is None:
                    raise CheckpointError(
                        f"{checkpoint.path.name}: layer {name!r} keeps the shift of its unsigned activations in its "
                        "bias, and the model that ComfyUI built has none there. Make the file again, signed."
                    )
            super()._load_from_state_dict(state_dict, prefix, *args)

    return type("SVDQuantOperations", (comfy.ops.manual_cast,), {"Linear": Linear})
