"""The one place that decides whether the parts of a model may run fused, and that notices when they change.

A *part* is an image encoder, a prompt encoder, a mask decoder, or what tracking adds: a memory attention or a memory
encoder. :func:`look` returns what is known of one, a :class:`Snapshot`, and makes a new one with another ``generation``
when the part has changed since: a hook, a patched method, a module in the place of another, a weight that was replaced
or written, a constant, an optimiser's step. Values that were computed from the weights belong to a generation.
"""

from __future__ import annotations

import itertools
import types
from collections.abc import Callable, Iterable, Iterator
from operator import attrgetter, is_
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules import module as torch_module

from ..modeling import hiera, image_encoder, transformer
from ..modeling.common import MLP, DropPath, LayerNorm2d, MLPBlock, uncompiled
from ..modeling.feature_pyramid import FpnNeck, ImageEncoder
from ..modeling.image_encoder import ImageEncoderViT, PatchEmbed
from ..modeling.mask_decoder import MaskDecoder
from ..modeling.memory_attention import MemoryAttention, MemoryAttentionLayer
from ..modeling.memory_encoder import MemoryEncoder
from ..modeling.position_encoding import PositionEmbeddingSine
from ..modeling.prompt_encoder import PositionEmbeddingRandom, PromptEncoder
from ..modeling.quantized_linear import QuantizedLinear
from ..modeling.sam2_mask_decoder import Sam2MaskDecoder
from ..modeling.transformer import TwoWayAttentionBlock, TwoWayTransformer
from ..modeling.weight_cache import PACKING, Stale, WeightCache, finish, packing
from ..system.tensors import is_making_graph, is_ordinary
from .memory_places import MEMORY, places_of_attention, places_of_encoder, unusual_setting

T = TypeVar("T")

PARTS: dict[str, tuple[type[WeightCache], ...]] = {
    "image_encoder": (ImageEncoderViT, ImageEncoder),
    "prompt_encoder": (PromptEncoder,),
    "mask_decoder": (MaskDecoder, Sam2MaskDecoder),
    "memory_attention": (MemoryAttention,),
    "memory_encoder": (MemoryEncoder,),
}

_OURS = (
    *itertools.chain.from_iterable(PARTS.values()),
    *(image_encoder.Block, image_encoder.Attention, PatchEmbed),
    *(hiera.Hiera, hiera.MultiScaleBlock, hiera.MultiScaleAttention, FpnNeck, PositionEmbeddingSine),
    *(TwoWayTransformer, TwoWayAttentionBlock, transformer.Attention),
    *(PositionEmbeddingRandom, MLP, MLPBlock, LayerNorm2d, DropPath, QuantizedLinear, *MEMORY),
)
_TORCH = (
    *(nn.Linear, nn.LayerNorm, nn.Embedding, nn.Conv2d, nn.ConvTranspose2d, nn.GELU, nn.ReLU),
    *(nn.MaxPool2d, nn.Dropout, nn.Identity, nn.Sequential, nn.ModuleList),
)


_PATCHED_BEFORE = object()


def _methods(kind: type) -> list[tuple[type, str, Any]]:
    """List where the methods of a class of ours are written, and those of bases of ours; None where one is not."""

    def is_method(value: Any) -> bool:
        return callable(value) or (hasattr(value, "__get__") and not isinstance(value, types.GetSetDescriptorType))

    owners = [owner for owner in kind.__mro__ if owner in _OURS]
    names = {name for owner in owners for name, value in owner.__dict__.items() if is_method(value)}
    return [(owner, name, _as_written(owner, name)) for owner in owners for name in names]


def _as_written(owner: type, name: str) -> Any:
    """Return a method of a class as it is written; a mark that nothing equals where somebody was faster to patch it."""
    value = owner.__dict__.get(name)
    if value is None:
        return None
    function: Any = getattr(value, "fget", getattr(value, "__func__", value))
    own = getattr(function, "__globals__", {}).get("__name__") == owner.__module__
    return value if own and function.__code__.co_name == name else _PATCHED_BEFORE


# What else a module computes by, and that is no part of a model's hash.
_MORE_CONSTANTS: dict[type, str] = {
    nn.Dropout: "training",
    MemoryAttentionLayer: "activation",
    transformer.Attention: "dropout_p",
}
# The methods of each class as they are written, to notice that somebody patched one.
_WRITTEN = {kind: _methods(kind) for kind in _OURS} | {
    kind: [(kind, "forward", _as_written(kind, "forward"))] for kind in _TORCH[:-1]
}
_CALL = (nn.Module, "__call__", nn.Module._wrapped_call_impl)
for _kind, _functions in _WRITTEN.items():
    _functions += [(_kind, "__call__", None), _CALL]
_GLOBAL_HOOKS = [torch_module._global_forward_hooks, torch_module._global_forward_pre_hooks]
_CONTENTS = ("_modules", "_parameters", "_buffers")
_version = attrgetter("_version")
_generations = itertools.count(1)  # shared by all parts, so that no two of their generations are equal


class Snapshot(Stale):
    """The state of a part at one time, immutable except for the values that :meth:`packed` keeps.

    The part holds it, so it holds the modules in the part and not the part itself: what is dropped is freed at once.

    Attributes:
        generation: a number that no other snapshot has.
        intrusion: a sentence on the first hook, patched method or weight that is no plain tensor; None without any.
        why_not_fused: a sentence on what keeps the part from running fused; None where nothing does.
        weights: all parameters and buffers that are plain tensors.
    """

    __slots__ = (
        *("generation", "intrusion", "why_not_fused", "weights", "_values"),
        *("_hooks", "_modules", "_states", "_sizes", "_kinds", "_contents", "_members", "_addresses"),
        *("_versioned", "_versions", "_constants", "_constant_values", "_methods", "_functions"),
        *("_root_constants", "_root", "_root_contents"),
    )

    def __init__(self, part: WeightCache, name: str) -> None:
        self.generation = next(_generations)
        _, *self._modules = modules = list(part.modules())
        states = [module.__dict__ for module in modules]
        self._root_constants = [name for _, name in _constants([part])]
        self._root = self._present_root(part)
        self._root_contents = [part.__dict__[kind] for kind in _CONTENTS]
        self._states = states[1:]
        self._sizes = list(map(len, self._states))
        self._kinds = list(map(type, self._modules))
        self._hooks = [state[kind] for state in states for kind in ("_forward_hooks", "_forward_pre_hooks")]
        contents = (state[kind] for state in states for kind in _CONTENTS)
        self._contents = list(filter(None, contents))  # what joins an empty one has no part in what a stock module does
        self._members = self._present_members()
        self.weights = [member for member in self._members if isinstance(member, Tensor) and is_ordinary(member)]
        self.weights = [weight for weight in self.weights if weight.layout == torch.strided]
        self._addresses = list(map(Tensor.data_ptr, self.weights))
        self._versioned = [weight for weight in self.weights if not weight.is_inference()]
        self._versions = list(map(_version, self._versioned))
        self._constants = list(_constants(self._modules))
        self._constant_values = self._present_constants()
        written = [method for kind in {type(part), *self._kinds} & _WRITTEN.keys() for method in _WRITTEN[kind]]
        self._methods = [(kind.__dict__, name) for kind, name, _ in written]
        self._functions = [function for _, _, function in written]
        self._values: dict[Callable[..., Any], Any] = {}
        self.intrusion = find_intrusion(part, name)
        self.why_not_fused = self.intrusion or _find_stranger(part, name)
        super().__init__(self._addresses)

    def is_current(self, part: WeightCache) -> bool:
        """Return whether ``part`` is still as it was; every request asks."""
        hooked = any(self._hooks) or any(_GLOBAL_HOOKS)
        if hooked or self.intrusion is not None:
            return False  # looking anew costs less than the official modules, which run then
        members = self._present_members()
        return (
            not self.is_stale
            and all(map(is_, map(part.__dict__.get, _CONTENTS), self._root_contents))  # a copy has others
            and len(members) == len(self._members)
            and all(map(is_, members, self._members))
            and list(map(Tensor.data_ptr, self.weights)) == self._addresses
            and list(map(_version, self._versioned)) == self._versions
            and self._present_root(part) == self._root
            and list(map(len, self._states)) == self._sizes
            and list(map(type, self._modules)) == self._kinds
            and self._present_constants() == self._constant_values
            and [methods.get(name) for methods, name in self._methods] == self._functions
        )

    def packed(self, make: Callable[[Any, int], T], part: Any) -> T:
        """Return ``make(part, generation)``, computed once for this generation."""
        value = self._values.get(make)
        if value is None:
            with PACKING:
                value = self._values.get(make)
                if value is None:
                    with packing(self.weights):
                        value = make(part, self.generation)
                    finish(self.weights)
                    self._values[make] = value
        return value

    def _present_root(self, part: nn.Module) -> tuple[Any, ...]:
        """Return the class of a part, how many attributes it has, and its constants."""
        state = part.__dict__
        return type(part), len(state), list(map(state.get, self._root_constants))

    def _present_members(self) -> list[Any]:
        return list(itertools.chain.from_iterable(map(dict.values, self._contents)))

    def _present_constants(self) -> list[Any]:
        return [state.get(name) for state, name in self._constants]


def look(part: WeightCache) -> Snapshot:
    """Return the current snapshot of ``part``."""
    snapshot: Snapshot | None = part._snapshot
    if snapshot is None or not snapshot.is_current(part):
        with PACKING:
            snapshot = part._snapshot
            if snapshot is None or not snapshot.is_current(part):
                snapshot = Snapshot(part, _name_of(part))
                part._snapshot = snapshot
    return snapshot


def why_not_fused(**parts: nn.Module) -> str | None:
    """Return a sentence on what keeps ``parts``, by the names of :data:`PARTS`, from running fused; None if nothing.

    It names the module: "mask_decoder.transformer.layers.1 has a forward hook".
    """
    for name, part in parts.items():
        part = uncompiled(part)
        if type(part) not in PARTS[name]:
            return f"{name} is {_a(part)}, not {' or '.join(map(_a, PARTS[name]))} of this package"
        reason = look(part).why_not_fused
        if reason is not None:
            return reason
    return None


def why_not_now(*inputs: Tensor, part: nn.Module | None = None, takes_autocast: bool = False) -> str | None:
    """Return a sentence on why this call of a module, whatever the module, needs the official operations."""
    if is_making_graph():
        return "the call is traced, exported or compiled"
    if forward_ad._current_level >= 0:
        return "forward-mode derivatives are computed"
    weights = () if part is None else part.parameters()
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (*inputs, *weights)):
        return "autograd records the call"
    if not all(map(is_ordinary, inputs)):
        return "an input is no plain tensor"
    if not takes_autocast and torch.is_autocast_enabled(inputs[0].device.type):
        return "autocast is enabled"
    return None


def is_stock(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Return whether ``module`` is of class ``kind`` as it is written, unhooked, unpatched and of plain weights."""
    module = uncompiled(module)
    return type(module) is kind and not any(_GLOBAL_HOOKS) and _intrusion_on(module, "it") is None


def has_no_hooks(module: nn.Module) -> bool:
    """Return whether ``module`` and all modules in it are unhooked, unpatched and of plain weights."""
    return find_intrusion(module, "it") is None


def find_intrusion(root: nn.Module, name: str) -> str | None:
    """Return a sentence on the first hook, patched method or non-plain weight in ``root``, called ``name`` in it."""
    if any(_GLOBAL_HOOKS):
        return "a forward hook is registered for all modules"
    for path, module in root.named_modules(prefix=name):
        reason = _intrusion_on(module, path)
        if reason is not None:
            return reason
    return None


def _intrusion_on(module: nn.Module, name: str) -> str | None:
    state, kind = module.__dict__, type(module)
    if state["_forward_hooks"] or state["_forward_pre_hooks"]:
        return f"{name} has a forward hook"
    written = _WRITTEN.get(kind, [])
    for method in state.keys() & {"forward", *(method for _, method, _ in written)}:
        return f"{name} has a {method} of its own, set on the instance"
    for owner, method, function in written:
        if owner.__dict__.get(method) is not function:
            return f"{method} of {owner.__name__}, the class of {name}, was replaced"
    for weight, tensor in (*state["_parameters"].items(), *state["_buffers"].items()):
        if tensor is not None and not is_ordinary(tensor):
            return f"{name}.{weight} is {_a(tensor)}, no plain tensor"
    return None


def _find_stranger(part: nn.Module, name: str) -> str | None:
    """Return a sentence on the first module in ``part`` that its fused form cannot stand for."""
    for path, module in part.named_modules(prefix=name):
        if type(module) not in _OURS and isinstance(module, _OURS):
            return f"{path} is {_a(module)}, a subclass"
    for path, kind in _places(part):
        module = part.get_submodule(path)
        if type(module) is not kind:
            if type(module).__name__ == kind.__name__:  # as of a quantised layer
                return f"{name}.{path} is {_whole_name(type(module))}, not {_whole_name(kind)}"
            return f"{name}.{path} is {_a(module)}, not {_a(kind)}"
    if isinstance(part, (MemoryAttention, MemoryEncoder)):
        return unusual_setting(part, name)
    if isinstance(part, MaskDecoder):
        for path, module in part.named_modules(prefix=name):
            if isinstance(module, transformer.Attention) and module.dropout_p:
                return f"{path} has a dropout"
        for index, mlp in enumerate(part.output_hypernetworks_mlps):
            if mlp.sigmoid_output:
                return f"{name}.output_hypernetworks_mlps.{index} ends in a sigmoid"
            if "act" in mlp._modules and type(mlp.act) is not nn.ReLU:
                return f"{name}.output_hypernetworks_mlps.{index}.act is {_a(mlp.act)}, not a ReLU"
            if any(linear.bias is None for linear in mlp.layers):  # type: ignore[union-attr]
                return f"{name}.output_hypernetworks_mlps.{index} has a layer without a bias"
            if _widths(mlp) != _widths(part.output_hypernetworks_mlps[0]):
                return f"{name}.output_hypernetworks_mlps.{index} has other widths than output_hypernetworks_mlps.0"
    return None


def _widths(mlp: Any) -> list[torch.Size]:
    return [linear.weight.shape for linear in mlp.layers]


def _places(part: nn.Module) -> Iterator[tuple[str, type[nn.Module]]]:
    """Yield the modules of a part that its fused form replaces, and the classes that it knows for them."""
    if isinstance(part, PromptEncoder):
        yield "pe_layer", PositionEmbeddingRandom
        yield from ((f"point_embeddings.{index}", nn.Embedding) for index in range(len(part.point_embeddings)))
        yield from ((name, nn.Embedding) for name in ("not_a_point_embed", "no_mask_embed"))
    elif isinstance(part, MaskDecoder):
        tokens = ("obj_score_token",) * part.pred_obj_scores + ("iou_token", "mask_tokens")
        yield from ((name, nn.Embedding) for name in tokens)
        yield "transformer", TwoWayTransformer
        yield "output_upscaling", nn.Sequential
        for block in range(len(part.transformer.layers)):
            path = f"transformer.layers.{block}"
            yield path, TwoWayAttentionBlock
            for attention in ("self_attn", "cross_attn_token_to_image", "cross_attn_image_to_token"):
                yield f"{path}.{attention}", transformer.Attention
        yield "transformer.final_attn_token_to_image", transformer.Attention
        for index, mlp in enumerate(part.output_hypernetworks_mlps):
            yield f"output_hypernetworks_mlps.{index}", MLP
            for layer in range(len(mlp.layers)):  # type: ignore[arg-type]
                yield f"output_hypernetworks_mlps.{index}.layers.{layer}", nn.Linear
    elif isinstance(part, ImageEncoderViT):
        for block in range(len(part.blocks)):
            yield f"blocks.{block}", image_encoder.Block
            yield f"blocks.{block}.attn", image_encoder.Attention
    elif isinstance(part, MemoryAttention):
        yield from places_of_attention(part)
    elif isinstance(part, MemoryEncoder):
        yield from places_of_encoder(part)
    elif isinstance(part, ImageEncoder):
        yield from (("trunk", hiera.Hiera), ("neck", FpnNeck), ("neck.position_encoding", PositionEmbeddingSine))
        if isinstance(part.trunk, hiera.Hiera):
            for block in range(len(part.trunk.blocks)):
                yield f"trunk.blocks.{block}", hiera.MultiScaleBlock
                yield f"trunk.blocks.{block}.attn", hiera.MultiScaleAttention


def _constants(modules: Iterable[nn.Module]) -> Iterator[tuple[dict[str, Any], str]]:
    """Yield (state, name) of the constants that modules compute with besides weights, and of cache generations."""
    for module in modules:
        state = module.__dict__
        if isinstance(module, WeightCache):
            yield state, "generation"
        if type(module) in _MORE_CONSTANTS:
            yield state, _MORE_CONSTANTS[type(module)]
        if type(module) in (*_OURS, nn.LayerNorm, nn.GELU, nn.MaxPool2d, nn.ConvTranspose2d):
            yield from ((state, name) for name in getattr(module, "__constants__", ()))


def _name_of(part: nn.Module) -> str:
    return next((name for name, kinds in PARTS.items() if isinstance(part, kinds)), type(part).__name__)


def _whole_name(kind: type) -> str:
    return f"a {kind.__module__}.{kind.__qualname__}"


def _a(thing: Any) -> str:
    name = thing.__name__ if isinstance(thing, type) else type(thing).__name__
    return f"{'an' if name[0] in 'AEIOU' else 'a'} {name}"
