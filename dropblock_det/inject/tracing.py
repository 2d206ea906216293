"""What the forward of a block that is not torchvision's does, read from a symbolic trace of it.

The trace is of the block's own forward, with its children closed. The result has the form of an entry in
torchvision's table, see :class:`~dropblock_det.inject.blocks.Block`. A block is understood when each of its
convolutions lies beside a norm or an activation, and its one sum, if any, adds a branch to the block's input
or to what one module makes of it. For any other block the reason is raised.
"""

import inspect
import operator
import weakref
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import fx, nn
from torch.nn import functional

from dropblock_det.inject.blocks import Block, has_convolution, is_norm_or_activation, stock_class

SKIP_SLOTS = ("downsample", "shortcut", "skip", "proj")
"""Attributes that blocks keep at ``None`` on an identity skip."""

_SUMS = {operator.add, operator.iadd, torch.add, "add", "add_"}
_PRODUCTS = {operator.mul, operator.imul, torch.mul, "mul", "mul_"}
_ACTIVATIONS = {
    torch.relu,
    functional.relu,
    functional.relu6,
    functional.leaky_relu,
    functional.silu,
    functional.gelu,
    functional.hardswish,
    functional.elu,
    functional.mish,
    "relu",
    "relu_",
}
_HARMLESS = {
    functional.dropout,
    functional.dropout2d,
    functional.max_pool2d,
    functional.avg_pool2d,
    torch.cat,
}


class NotUnderstoodError(Exception):
    """Why a block's forward could not be followed."""


class _OwnForward(fx.Tracer):
    """Traces a module's own forward; its children stay closed."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True


_memory: weakref.WeakKeyDictionary[nn.Module, tuple[object, Block | str]] = weakref.WeakKeyDictionary()


def read_block(module: nn.Module) -> Block:
    """Reads a block's forward.

    Raises:
        NotUnderstoodError: It cannot be traced, or does something that is not known here.
    """
    # Tracing takes about a millisecond, and one search asks several times for a block.
    signature = [(name, type(child)) for name, child in module._modules.items()]
    known_signature, found = _memory.get(module, (None, ""))
    if known_signature != signature:
        try:
            found = _read(module)
        except NotUnderstoodError as why:
            found = str(why)
        _memory[module] = (signature, found)
    if isinstance(found, str):
        raise NotUnderstoodError(found)
    return found


def has_empty_skip_slot(module: nn.Module) -> bool:
    """Whether a block may keep ``None`` on an identity skip, so that reading its forward is worthwhile."""
    return any(getattr(module, slot, 0) is None for slot in SKIP_SLOTS) and has_convolution(module)


def _read(module: nn.Module) -> Block:
    graph = _trace(module, {})
    calls = Counter(node.target for node in graph.nodes if node.op == "call_module")
    kinds = {node: _kind(module, node) for node in graph.nodes}
    (output,) = (node for node in graph.nodes if node.op == "output")
    if _is_gate(output.args[0]):
        return Block(units=())  # squeeze and excitation: it scales the map that it was given
    for node, kind in kinds.items():
        if kind == "unknown":
            raise NotUnderstoodError(f"its forward uses {getattr(node.target, '__name__', node.target)}")
    units: dict[str, None] = {}
    for node, kind in kinds.items():
        if kind == "part":
            units[str(node.target)] = None
        elif kind == "convolution":
            units.update(dict.fromkeys(_unit_ends(module, node, kinds, calls)))
    sums = [node for node, kind in kinds.items() if kind == "sum"]
    if not sums:
        return Block(units=tuple(units))
    if len(sums) > 1:
        raise NotUnderstoodError(f"its forward adds {len(sums)} times")
    return _residual(module, sums[0], kinds, units)


def _trace(module: nn.Module, replaced: dict[str, nn.Module]) -> fx.Graph:
    """The graph of the module's forward in training mode, with children put in for some attributes."""
    cls = stock_class(module)
    twin = cls.__new__(cls)
    twin.__dict__.update(vars(module), _modules=dict(module._modules), training=True)
    for name, child in replaced.items():
        twin.__dict__.pop(name, None)
        setattr(twin, name, child)
    defaults = {
        name: parameter.default
        for name, parameter in inspect.signature(cls.forward).parameters.items()
        if parameter.default is not parameter.empty
    }
    try:
        graph = _OwnForward().trace(twin, concrete_args=defaults or None)
    except Exception as error:  # whatever somebody's forward raises when its input is a proxy
        reason = " ".join(str(error).split())[:120]
        raise NotUnderstoodError(f"its forward cannot be traced ({reason or type(error).__name__})") from None
    if sum(node.op == "placeholder" and node.target not in defaults for node in graph.nodes) != 1:
        raise NotUnderstoodError("its forward takes several inputs")
    return graph


def _kind(module: nn.Module, node: fx.Node) -> str:
    if node.op == "call_module":
        child = module.get_submodule(str(node.target))
        if isinstance(child, nn.Conv2d):
            return "convolution"
        if is_norm_or_activation(child):
            return "activation"
        if not has_convolution(child):
            return "harmless"
        try:
            return "harmless" if read_block(child).units == () else "part"
        except NotUnderstoodError:
            return "part"  # the reason is raised when its own units are asked for
    if node.op in ("call_function", "call_method"):
        tables: dict[str, set[Any]] = {
            "sum": _SUMS,
            "product": _PRODUCTS,
            "activation": _ACTIVATIONS,
            "harmless": _HARMLESS,
        }
        return next((kind for kind, table in tables.items() if node.target in table), "unknown")
    return node.op


def _is_gate(result: Any) -> bool:
    return (
        isinstance(result, fx.Node)
        and result.target in _PRODUCTS
        and any(isinstance(factor, fx.Node) and factor.op == "placeholder" for factor in result.args)
    )


def _unit_ends(
    module: nn.Module, convolution: fx.Node, kinds: dict[fx.Node, str], calls: Counter[Any]
) -> list[str]:
    """The modules that end the units beside a convolution: its own, and one that stands before it."""

    def run(step: Callable[[fx.Node], fx.Node | None]) -> list[fx.Node]:
        node, chain = step(convolution), []
        while node is not None and kinds[node] == "activation":
            chain.append(node)
            node = step(node)
        return chain

    after, before = run(_only_user), run(_only_source)[::-1]
    ends = []
    # Behind another convolution, what stands before this one is that one's unit. Else it is pre-activation.
    source = before[0].args[0] if before else None
    if isinstance(source, fx.Node) and kinds[source] not in ("convolution", "part"):
        ends.append(_last_called_once(module, before, calls))
    if after:
        ends.append(_last_called_once(module, [convolution, *after], calls))
    if "" in ends or not (before or after):
        raise NotUnderstoodError(f"no norm or activation stands beside {convolution.target} alone")
    return ends


def _only_user(node: fx.Node) -> fx.Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def _only_source(node: fx.Node) -> fx.Node | None:
    source = node.args[0] if node.args else None
    return source if isinstance(source, fx.Node) and len(source.users) == 1 else None


def _last_called_once(module: nn.Module, chain: list[fx.Node], calls: Counter[Any]) -> str:
    # A module that is called several times is no site: an activation that blocks share, for one.
    ends = [str(node.target) for node in chain if node.op == "call_module" and calls[node.target] == 1]
    named = [end for end in ends if not isinstance(module.get_submodule(end), nn.Identity)]
    return (named or ends or [""])[-1]


def _residual(module: nn.Module, total: fx.Node, kinds: dict[fx.Node, str], units: dict[str, None]) -> Block:
    """The block that adds once: which of the two is the skip, and what is on it."""

    def source(value: Any) -> fx.Node:
        """What a summand is made of, behind dropouts, gates and scales."""
        node = value
        while isinstance(node, fx.Node) and kinds[node] in ("harmless", "product"):
            inputs = [n for n in node.args if isinstance(n, fx.Node) and n.op != "get_attr"]
            node = inputs[0] if len(inputs) == 1 else None
        if not isinstance(node, fx.Node) or kinds[node] in ("sum", "get_attr"):
            raise NotUnderstoodError("what its forward adds is not known")
        return node

    summands: list[Any] = list(total.args)
    identity = [node for node in summands if source(node).op == "placeholder"]
    called_on_input = [node for node in summands if _takes_input(node)]
    if len(identity) == 1:
        skip, slot = identity[0], _skip_slot(module) if identity[0].op == "placeholder" else ""
    elif not identity and called_on_input:
        names = {str(node.target): node for node in called_on_input}
        slot = next((name for name in SKIP_SLOTS if name in names), str(called_on_input[-1].target))
        skip = names[slot]
    else:
        raise NotUnderstoodError("which of the two that its forward adds is the skip is not known")
    branch = next(node for node in summands if node is not skip)
    units.pop(slot, None)
    return Block(
        units=tuple(units),
        skip=slot,
        joins_input=lambda block: not slot,
        branch=str(branch.target) if isinstance(branch, fx.Node) and branch.op == "call_module" else "",
    )


def _takes_input(node: Any) -> bool:
    """Whether a node is a module called on the block's input."""
    called = isinstance(node, fx.Node) and node.op == "call_module"
    return called and isinstance(node.args[0], fx.Node) and node.args[0].op == "placeholder"


def _skip_slot(module: nn.Module) -> str:
    """The attribute that is ``None`` now and, were it a module, would be called on the skip."""
    for slot in SKIP_SLOTS:
        if getattr(module, slot, 0) is None:
            for node in _trace(module, {slot: nn.Identity()}).nodes:
                if node.target == slot and _takes_input(node):
                    return slot
    return ""
