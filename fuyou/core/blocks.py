"""Finding blocks: the units of a model whose parameters move together.

[Note: blocks]
A block is a module whose own forward is called: its parameters are fetched before that call and released after it.
The walk starts at the root and stops at the first module that can be a unit:

- The elements of the outermost list of layers are blocks. A list is a ModuleList or ModuleDict, which nobody calls,
  or a Sequential (or a list class with a forward of its own) that repeats a class of layer. Lists of lists are
  descended.
- Any other child that contains a list is walked.
- Any other child with parameters is one block.
- A parameter owned by a walked module itself is in no block: it is *loose*, and stays on the device.

Blocks never nest, and a module registered under two names is one block. Order is that of registration.
"""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import nn
from torch.nn.utils import parametrize

from fuyou.core.errors import ConfigError


@dataclass(frozen=True)
class Block:
    """One unit of the model: a transformer layer, the embedding, the head."""

    name: str  # qualified module name, e.g. "model.layers.3"; "" is the model itself
    module: nn.Module


def find_blocks(model: nn.Module, names: Sequence[str] | None = None) -> list[Block]:
    """The blocks of `model`, in registration order: found by [Note: blocks], or the modules that `names` lists.

    Raises ConfigError for a name that is no module of the model, has no parameters, has no forward of its own, or
    lies inside another named one.
    """
    if names is not None:
        return _named_blocks(model, names)
    if not _has_parameters(model):
        return []
    if _is_single_unit(model):
        return [Block("", model)]
    split: set[int] = set()  # modules that must be walked because another block is also registered inside them
    while True:
        blocks = list(_walk(model, "", seen=set(), split=split))
        outer = _nesting(blocks)
        if not outer:
            return blocks
        split |= outer


def loose_parameters(model: nn.Module, blocks: Sequence[Block]) -> list[tuple[str, nn.Parameter]]:
    """The parameters that no block contains, each once, under its first name."""
    owned = {id(parameter) for block in blocks for parameter in block.module.parameters()}
    return [(name, parameter) for name, parameter in model.named_parameters() if id(parameter) not in owned]


def owners(model: nn.Module, blocks: Sequence[Block]) -> dict[int, tuple[int, ...]]:
    """For the id of every distinct parameter, the sorted indices of the blocks that contain it.

    A tied weight has several; a loose one has none.
    """
    indices: dict[int, list[int]] = {id(parameter): [] for parameter in model.parameters()}
    for index, block in enumerate(blocks):
        for parameter in block.module.parameters():  # each distinct parameter of the block once
            indices[id(parameter)].append(index)
    return {key: tuple(value) for key, value in indices.items()}


# --- the walk -----------------------------------------------------------------------------------------------------


def _walk(module: nn.Module, name: str, *, seen: set[int], split: set[int]) -> Iterator[Block]:
    """The blocks below `module`, which itself is none."""
    layers = _layers_of_list(module)
    for child_name, child in _children(module):
        if id(child) in seen or not _has_parameters(child):
            continue
        seen.add(id(child))
        qualified = f"{name}.{child_name}" if name else child_name
        is_layer = id(child) in layers and _has_forward(child) and not _is_list(child)
        if id(child) in split or not (is_layer or _is_unit(child)):
            yield from _walk(child, qualified, seen=seen, split=split)
        else:
            yield Block(qualified, child)


def _is_unit(module: nn.Module) -> bool:
    """Whether a child that is no layer of a list is one block: it is called, and contains no list of layers."""
    return _has_forward(module) and not _is_list(module) and not _contains_list(module)


def _is_single_unit(model: nn.Module) -> bool:
    """Whether the whole model is one block: it has nothing below it to walk to, or is one of torch's own layers.

    (torch's attention and transformer layers read the weights of their children without calling them.)
    """
    if not _has_forward(model) or _is_list(model):
        return False
    if not any(_has_parameters(child) for _, child in _children(model)):
        return True
    own_layer = type(model).__module__.startswith("torch.nn.modules.") and not isinstance(model, nn.Sequential)
    return own_layer and not _contains_list(model)


def _layers_of_list(module: nn.Module) -> set[int]:
    """The ids of the elements of a list that are its layers; empty for a module that is no list.

    Layers are the elements of a class that occurs at least twice, or the only element. An element of another class is
    a layer too (hybrid models mix them), unless it holds a list of its own and outweighs the repeated layers together:
    then it is a model between two layers, and is walked.
    """
    if not _is_list(module):
        return set()
    elements = {id(child): child for _, child in _children(module) if _has_parameters(child)}
    if len(elements) == 1:
        return set(elements)
    classes = Counter(type(element) for element in elements.values())
    repeated = {key for key, element in elements.items() if classes[type(element)] > 1}
    repeated_numel = sum(_numel(elements[key]) for key in repeated)
    return {
        key
        for key, element in elements.items()
        if key in repeated or (_numel(element) <= repeated_numel or not _contains_list(element))
    }


def _is_list(module: nn.Module) -> bool:
    if not isinstance(module, (nn.ModuleList, nn.ModuleDict, nn.Sequential, parametrize.ParametrizationList)):
        return False
    if isinstance(module, parametrize.ParametrizationList):
        return False  # a ModuleList by inheritance only: its forward computes one weight
    if not _has_forward(module):
        return _has_parameters(module)
    return _is_repeated(module)


def _is_repeated(module: nn.Module) -> bool:
    """Whether at least two distinct elements with parameters are of the same class."""
    classes = Counter(type(child) for _, child in _children(module) if _has_parameters(child))
    return any(count > 1 for count in classes.values())


def _contains_list(module: nn.Module) -> bool:
    return any(_is_list(inner) for inner in _descendants(module))


def _children(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Direct children, without the ones that torch's parametrizations hang below the module they belong to."""
    hidden = module.parametrizations if parametrize.is_parametrized(module) else None
    for name, child in module.named_children():
        if child is not hidden:
            yield name, child


def _descendants(module: nn.Module) -> Iterator[nn.Module]:
    for _, child in _children(module):
        yield child
        yield from _descendants(child)


def _has_forward(module: nn.Module) -> bool:
    """Whether calling `module` runs something: containers, ParameterList and bare namespaces have no forward."""
    return "forward" in vars(module) or type(module).forward is not nn.Module.forward


def _has_parameters(module: nn.Module) -> bool:
    return next(module.parameters(), None) is not None


def _numel(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _nesting(blocks: Sequence[Block]) -> set[int]:
    """The ids of the blocks that have another block somewhere inside them."""
    ids = {id(block.module) for block in blocks}
    return {
        id(block.module)
        for block in blocks
        if any(id(inner) in ids for inner in block.module.modules() if inner is not block.module)
    }


# --- blocks that the user names -----------------------------------------------------------------------------------


def _named_blocks(model: nn.Module, names: Sequence[str]) -> list[Block]:
    if isinstance(names, str):
        raise ConfigError(f"blocks is the string {names!r}; give a list of module names, e.g. [{names!r}].")
    if not names:
        raise ConfigError("blocks is an empty list; name at least one module, or leave it out to have them found.")
    modules = dict(model.named_modules(remove_duplicate=False))
    wanted: dict[int, str] = {}
    for name in names:
        module = _named_module(modules, name)
        if id(module) in wanted:
            raise ConfigError(f"blocks names one module twice: {wanted[id(module)]!r} and {name!r}; keep one of them.")
        wanted[id(module)] = name
    for outer_key, outer in wanted.items():
        for inner in modules[outer].modules():
            if id(inner) in wanted and id(inner) != outer_key:
                raise ConfigError(
                    f"blocks names {wanted[id(inner)]!r}, which lies inside {outer!r}, also named; "
                    "parameters move with one block, so name either the outer module or its parts."
                )
    order = (module for module in model.modules() if id(module) in wanted)  # registration order, each once
    return [Block(wanted[id(module)], module) for module in order]


def _named_module(modules: dict[str, nn.Module], name: str) -> nn.Module:
    """The module called `name`, checked to be usable as a block."""
    if name not in modules:
        near = difflib.get_close_matches(str(name), [known for known in modules if known], n=1, cutoff=0.0)
        hint = f"; the nearest name is {near[0]!r}" if near else ""
        raise ConfigError(f"blocks names {name!r}, but the model has no module of that name{hint}.")
    module = modules[name]
    if not _has_parameters(module):
        raise ConfigError(f"blocks names {name!r}, a {type(module).__name__} without parameters; leave it out.")
    if not _has_forward(module):
        first = next((f"{name}.{child}" if name else child for child, _ in module.named_children()), None)
        hint = f"; name its elements, e.g. {first!r}" if first else ""
        raise ConfigError(
            f"blocks names {name!r}, a {type(module).__name__} that is never called itself, so that there is no "
            f"moment to fetch its parameters{hint}."
        )
    return module
