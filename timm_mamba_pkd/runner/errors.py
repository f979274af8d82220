"""What is wrong with a user's input, in words for the user."""

import difflib
import dis
import inspect
import re
from collections.abc import Callable, Iterable, Iterator
from types import FrameType, ModuleType, TracebackType
from typing import Any

import torch

from timm_mamba_pkd.distillation import unknown_name

Keys = tuple[str, ...]

LONGEST = 1000
NOT_FROM_CONFIGS = {"params", "optimizer", "student_model", "teacher_model", "device", "device_ids", "distributed"}


class ConfigError(ValueError):
    """A config, or what it names, cannot be used; the message is for the user, one line for each thing that is wrong.

    Args:
        message: what is wrong, and what to do.
        at: the keys that lead to the place in the config, as in ``("train", "stage2", "optimizer")``.
        line: the line of the config, where it is already known.
    """

    def __init__(self, message: str, at: Keys = (), line: int | None = None) -> None:
        super().__init__(message)
        self.at, self.line = at, line


def first_line(error: BaseException) -> str:
    """What an error says, in one line of at most `LONGEST` characters; never torch's and timm's advice to load a file
    unsafely."""
    line = next(iter(str(error).strip().splitlines()), type(error).__name__)
    if re.search("weights.only", line, re.IGNORECASE):
        return "the file holds more than tensors and plain values and was not loaded"
    return line[:LONGEST]


def unknown_key(key: str, where: str, known: Iterable[str]) -> str:
    """One line that says ``key`` is unknown and names the nearest known one, or all of them."""
    known = list(known)
    near = difflib.get_close_matches(key, known, n=1)
    hint = f"did you mean '{near[0]}'?" if near else f"known: {', '.join(known)}"
    return f"unknown key '{key}' in {where}; {hint}"


def explain(error: BaseException) -> str:
    """One line on an error that a config brought about somewhere in torchdistill, torch or timm.

    A call with wrong arguments and a name that is not registered are said in the config's terms, with the names that
    are there: they are looked up in the frame that failed.
    """
    message, cause = first_line(error), error.__cause__
    if isinstance(cause, TypeError):
        return message.replace(first_line(cause), explain(cause))
    frames = list(_frames(error.__traceback__))
    if isinstance(error, TypeError):
        message = _explain_call(message, frames)
        if message != first_line(error):
            return message
    if isinstance(error, KeyError):
        return f"{message} is missing or unknown"
    unregistered = re.fullmatch(r"No (.+) `(.*)` registered", message)
    if unregistered is not None:
        known = {name for frame in frames[-2:] for table in _tables(frame) for name in table}
        return unknown_name(unregistered[1], unregistered[2], known)
    return message if isinstance(error, ValueError) else f"{type(error).__name__}: {message}"


def no_parameter(name: str, parameter: str, known: Iterable[str]) -> str:
    """One line that says that what is called ``name`` lacks a parameter, and which ones it has."""
    known = ", ".join(name for name in known if name not in NOT_FROM_CONFIGS)
    return f"{name} has no parameter '{parameter}'" + (f"; it has {known}" if known else "")


def ignored_parameter(function: type, names: Iterable[str]) -> str | None:
    """The first of ``names`` that a class takes as ``**kwargs`` and never looks at: surely a typing error."""
    init: Any = function.__init__
    parameters = inspect.signature(init).parameters
    catch_all = [name for name, p in parameters.items() if p.kind is inspect.Parameter.VAR_KEYWORD]
    code = getattr(init, "__code__", None)
    if not catch_all or code is None or _reads(code, catch_all[0]):
        return None
    return next((name for name in names if name not in parameters), None)


def parameters(function: Callable[..., Any]) -> list[str]:
    """The parameters that can be given by name."""
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    try:
        return [name for name, p in inspect.signature(function).parameters.items() if p.kind in kinds]
    except (TypeError, ValueError):
        return []


def _explain_call(message: str, frames: list[FrameType]) -> str:
    """A TypeError of Python about the arguments of a call, in terms of what the config names; others as they are."""
    call = re.search(
        r"(?P<name>[\w.]+)\(\) (got an unexpected keyword argument '(?P<unknown>\w+)'"
        r"|missing \d+ required [\w-]+ arguments?: (?P<missing>.*))",
        message,
    )
    if call is None or not frames:
        return message
    called = call["name"].removesuffix(".__init__")
    known = parameters(_called(called, frames[-1]) or _nothing)
    for frame in frames:
        for name, function, given in _registered_calls(frame):
            own = parameters(function)
            strange = [argument for argument in given if argument not in own]
            if call["unknown"] in strange:
                return no_parameter(name, call["unknown"], dict.fromkeys([*own, *known]))
            near = difflib.get_close_matches(call["missing"].strip("'"), strange, n=1) if call["missing"] else []
            if near:
                return no_parameter(name, near[0], own)
    if call["unknown"]:
        return no_parameter(called, call["unknown"], known)
    return f"{called} needs {call['missing']}"


def _nothing() -> None:
    """Has no parameters."""


def _registered_calls(frame: FrameType) -> Iterator[tuple[str, Callable[..., Any], dict[str, Any]]]:
    """Name, callable and keyword arguments of what a function of torchdistill's registries was asked to build."""
    tables = _tables(frame)
    values = list(frame.f_locals.values())
    given = [value["kwargs"] for value in values if isinstance(value, dict) and isinstance(value.get("kwargs"), dict)]
    given += [frame.f_locals["kwargs"]] if isinstance(frame.f_locals.get("kwargs"), dict) else []
    for name in (value for value in values if isinstance(value, str)):
        for table in tables:
            if given and name in table and callable(table[name]):
                yield name, table[name], given[0]


def _reads(code: Any, name: str) -> bool:
    for instruction in dis.get_instructions(code):
        used = instruction.argval if isinstance(instruction.argval, tuple) else (instruction.argval,)
        if instruction.opname.startswith("LOAD") and name in used:
            return True
    return False


def _frames(traceback: TracebackType | None) -> Iterator[FrameType]:
    while traceback is not None:
        yield traceback.tb_frame
        traceback = traceback.tb_next


def _tables(frame: FrameType) -> list[dict[str, Any]]:
    """The tables, such as torchdistill's registries, that the code of a frame looks into."""
    tables = [frame.f_globals.get(name) for name in frame.f_code.co_names if name.isupper()]
    return [table for table in tables if isinstance(table, dict)]


def _called(name: str, frame: FrameType) -> Callable[..., Any] | None:
    """The callable named ``name`` that a frame has just called."""
    modules = [value for value in frame.f_globals.values() if isinstance(value, ModuleType)]
    places = [frame.f_locals, *_tables(frame), frame.f_globals, *map(vars, modules), vars(torch.optim)]
    values = (value for place in places for value in list(place.values()))
    return next((value for value in values if callable(value) and getattr(value, "__name__", None) == name), None)
