"""How documents are laid out in rows, and which models keep the documents of one row apart."""

from __future__ import annotations

import ast
import functools
import inspect
import random
import sys
from bisect import bisect_left, insort
from collections.abc import Iterator, Sequence
from typing import Any

_MASKS = {"create_causal_mask", "create_sliding_window_causal_mask", "create_chunked_causal_mask"}
_STATES = {"create_recurrent_attention_mask"}  # of layers whose state runs through the whole row
_ATTENTION = (None, "eager", "sdpa")  # flash attention finds documents in a batch of one row only


def best_fit(lengths: Sequence[int], row_length: int, seed: int) -> list[list[int]]:
    """Rows of document numbers, whole documents only: the longest first, each into the fullest row that takes it.

    Best-fit decreasing (arXiv 2404.10830), in O(documents x log(row_length)). `seed` shuffles documents of one length.
    """
    order = list(range(len(lengths)))
    random.Random(seed).shuffle(order)
    order.sort(key=lambda document: -lengths[document])  # stable: equal lengths stay shuffled
    rows: list[list[int]] = []
    open_rows: dict[int, list[int]] = {}  # space left: row numbers
    spaces: list[int] = []  # its keys, sorted
    for document in order:
        length = lengths[document]
        place = bisect_left(spaces, length)
        if place == len(spaces):
            row = len(rows)
            rows.append([])
            left = row_length - length
        else:
            space = spaces[place]
            row = open_rows[space].pop()
            if not open_rows[space]:
                del open_rows[space], spaces[place]
            left = space - length
        rows[row].append(document)
        if left > 0:
            if left not in open_rows:
                open_rows[left] = []
                insort(spaces, left)
            open_rows[left].append(row)
    return rows


def allows_packing(model: Any) -> tuple[bool, str]:
    """(whether documents of one row can be kept apart, why not): for a transformers configuration or model class.

    Positions that start again at 0 are how a row says where a document begins. transformers makes a mask of them where
    the model's code gives `position_ids` to every function of `masking_utils` that makes its masks, no cache is in
    use, and no layer carries a state from token to token. This reads the model's source for exactly that; a source
    that cannot be read is a no. tests/test_packing.py compares the answer with the logits of tiny models.
    """
    kind = _class_of(model)
    if kind is None:
        return False, f"no causal language model belongs to {type(model).__name__}"
    name = kind.__name__
    attention = getattr(model, "_attn_implementation", None)
    if attention not in _ATTENTION:
        return False, f"{name} runs with {attention}, which is not known to keep documents apart in every batch"
    for each in (model, getattr(model, "text_config", None)):
        if getattr(each, "is_causal", True) is False or getattr(each, "use_bidirectional_attention", None):
            return False, f"{name} attends to later tokens too"
    parameters = inspect.signature(kind.forward).parameters
    for parameter in ("position_ids", "use_cache"):
        if parameter not in parameters:
            return False, f"{name}.forward takes no {parameter}"
    if getattr(kind, "_is_stateful", False):
        return False, f"{name} carries a state from token to token"
    reason = _of_source(kind.__module__)
    return not reason, reason and f"{name} {reason}"


def _class_of(model: Any) -> Any:
    if inspect.isclass(model):
        return model
    from transformers import AutoModelForCausalLM

    if type(model) not in AutoModelForCausalLM._model_mapping:
        return None
    kind = AutoModelForCausalLM._model_mapping[type(model)]
    return kind[0] if isinstance(kind, (tuple, list)) else kind


@functools.cache
def _of_source(module: str) -> str:
    """Why the models of this module mix the documents of a row; empty where they do not."""
    try:
        tree = ast.parse(inspect.getsource(sys.modules[module]))
    except (OSError, TypeError, KeyError, SyntaxError):
        return "is defined where its source cannot be read"
    given = []
    for function in ast.walk(tree):
        # create_masks_for_generate serves generation, with a cache.
        if isinstance(function, ast.FunctionDef) and function.name != "create_masks_for_generate":
            for name, call in _mask_calls(function):
                if name in _STATES:
                    return "has layers whose state runs through the whole row"
                given.append(_gives_positions(call, function))
    if not given:
        return "makes its masks by itself"
    return "" if all(given) else "makes its masks without the positions of the tokens"


def _mask_calls(function: ast.FunctionDef) -> Iterator[tuple[str, ast.Call]]:
    """Calls of the functions that make masks, also by another name: f = create_causal_mask if … else …"""
    known = {name: name for name in _MASKS | _STATES}
    for node in ast.walk(function):
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            named = [each.id for each in ast.walk(node.value) if isinstance(each, ast.Name) and each.id in known]
            if named and not any(isinstance(each, ast.Call) for each in ast.walk(node.value)):
                known[node.targets[0].id] = min(named, key=lambda name: known[name] in _MASKS)
    for node in ast.walk(function):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in known:
            yield known[node.func.id], node


def _gives_positions(call: ast.Call, function: ast.FunctionDef) -> bool:
    """position_ids=… in the call, or in the dict literal that it unpacks; None is not one."""
    value = None
    for keyword in call.keywords:
        if keyword.arg == "position_ids":
            value = keyword.value
        elif keyword.arg is None and isinstance(keyword.value, ast.Name):
            value = _in_dict(keyword.value.id, function) or value
    return value is not None and not (isinstance(value, ast.Constant) and value.value is None)


def _in_dict(name: str, function: ast.FunctionDef) -> ast.expr | None:
    """The value under "position_ids" in the dict literal of this name, or in the one that it is a copy of."""
    for node in ast.walk(function):
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and node.targets[0].id == name:
            if isinstance(node.value, ast.Dict):
                for key, value in zip(node.value.keys, node.value.values, strict=True):
                    if isinstance(key, ast.Constant) and key.value == "position_ids":
                        return value
                    if key is None and isinstance(value, ast.Name) and value.id != name:
                        return _in_dict(value.id, function)
            elif isinstance(node.value, ast.Call) and isinstance(node.value.func, ast.Attribute):
                copied = node.value.func
                if copied.attr == "copy" and isinstance(copied.value, ast.Name) and copied.value.id != name:
                    return _in_dict(copied.value.id, function)
    return None
