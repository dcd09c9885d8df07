"""Decides, by name only, which calls in a pickle just make a value; nothing is looked up.

A value type is an enum, a `datetime`, a `partial`, or any class of a package outside the standard
library. A call to `os.system`, to an unknown function, or to a class that opens files is never made
here; the error warns about `torch.load(weights_only=False)`, which would make that call. Some types
call their arguments (`map`, `starmap`), so their arguments are checked in the same way.
"""

from __future__ import annotations

import builtins
import re
import sys
from typing import Any

from fastguard.checkpoints.errors import UnsafeFile
from fastguard.checkpoints.reading.inert_values import Name, StandIn, kind_of

# Standard library modules whose classes, recognized by a capital letter, hold values.
_VALUE_MODULES = frozenset(
    """
    collections datetime decimal _decimal fractions uuid ipaddress zoneinfo enum numbers statistics
    typing dataclasses random _random
    """.split()
)
_VALUE_TYPES = frozenset(
    """
    builtins.range builtins.slice builtins.list builtins.tuple builtins.dict builtins.int
    builtins.float builtins.str builtins.bool builtins.object builtins.reversed builtins.enumerate
    builtins.zip builtins.memoryview
    datetime.datetime datetime.date datetime.time datetime.timedelta datetime.timezone
    datetime.tzinfo collections.deque
    functools.partial functools.partialmethod re._compile re.RegexFlag argparse.Namespace
    types.SimpleNamespace types.MappingProxyType types.GenericAlias types.MethodType
    types.UnionType copyreg.__newobj__ copyreg.__newobj_ex__ logging.getLogger time.struct_time
    string.Template struct.Struct _struct.Struct inspect.Parameter inspect.Signature
    inspect._ParameterKind signal.Signals signal.Handlers http.HTTPStatus http.HTTPMethod
    operator.getitem operator.or_ operator.and_ operator.itemgetter operator.attrgetter
    operator.methodcaller itertools.count itertools.chain itertools.cycle itertools.repeat
    itertools.islice itertools.product itertools.permutations itertools.combinations
    itertools.combinations_with_replacement itertools.compress itertools.zip_longest
    itertools.pairwise itertools.batched
    pandas.core.indexes.base._new_Index
    """.split()
) | {
    f"builtins.{name}"
    for name, kind in vars(builtins).items()
    if isinstance(kind, type) and issubclass(kind, BaseException)
}
# Types that call their arguments.
_CALLERS = frozenset(
    """
    builtins.map builtins.filter builtins.iter functools.reduce itertools.starmap
    itertools.accumulate itertools.dropwhile itertools.takewhile itertools.filterfalse
    itertools.groupby
    """.split()
)
_ALIASES = {"_operator": "operator", "_functools": "functools", "_datetime": "datetime"}
# Functions that packages write into pickles to recreate an object.
_MAKERS = re.compile(r"\w*(unpickle|reconstruct|rebuild)\w*|__\w+_ctor")
# Class methods that create an instance.
_CONSTRUCTORS = re.compile(
    r"__new__|from_\w+|_*(un)?pickle\w*|_*(make|create|new|build|construct|rebuild)(_\w+)?"
)
# Names that, within a package, may refer to an imported module or class.
_ELSEWHERE = frozenset(
    """
    os posix nt sys subprocess shutil builtins importlib runpy ctypes socket pty code io Popen CDLL
    __builtins__ __globals__ __dict__ __init__ __subclasses__
    """.split()
)
# Classes of torch that hold numbers, which torch allows a file to create from a list.
_TENSORS = re.compile(r"torch\.(\w+\.)*\w*(Tensor|Storage)|torch\._C\._TensorBase")
_DEEPEST = 100  # nested partials; a partial that occurs twice counts once


def check_call(function: Any, arguments: tuple[Any, ...]) -> str:
    """Returns the qualified name of the value type that a call creates.

    Raises:
        UnsafeFile: The call may do more than create a value.
    """
    called: list[str] = []
    seen: set[int] = set()
    waiting = [function]
    while waiting:
        function = waiting.pop()
        if isinstance(function, StandIn) and function.qualified_name == "functools.partial":
            # The function of a partial is its first argument, or the first item of its pickled
            # state.
            if id(function) in seen:
                continue
            functions = [part[0] for part in function.parts if isinstance(part, tuple) and part]
            if functions and len(seen) < _DEEPEST:
                seen.add(id(function))
                waiting += functions
                continue
        if not isinstance(function, Name) or not _makes_a_value(function.qualified_name, arguments):
            raise _refused(function)
        called.append(function.qualified_name)
    # the default covers partials that only contain each other
    return called[0] if called else "functools.partial"


def _makes_a_value(qualified: str, arguments: tuple[Any, ...]) -> bool:
    module, _, name = qualified.rpartition(".")
    if (alias := _ALIASES.get(module)) is not None:
        module, qualified = alias, f"{alias}.{name}"
    if qualified in _CALLERS:
        for argument in {id(argument): argument for argument in arguments}.values():
            if isinstance(argument, Name | StandIn) and not _is_iterator(argument):
                check_call(argument, ())
        return True
    if qualified in _VALUE_TYPES:
        return True
    # `type(None)` is a value; with three arguments, `type` creates a class
    if qualified == "builtins.type":
        return len(arguments) == 1
    root, _, _ = module.partition(".")
    _, _, above = module.rpartition(".")
    if root in sys.stdlib_module_names:
        return (module in _VALUE_MODULES and _is_class(name)) or (
            root in _VALUE_MODULES and _is_class(above) and _is_constructor(name)
        )
    if not _ELSEWHERE.isdisjoint(qualified.split(".")[1:]) or _TENSORS.fullmatch(qualified):
        return False
    if _is_class(name) or (_is_class(above) and _is_constructor(name)):
        return True
    if root == "torch":  # an unknown function that makes a tensor may hide its values
        return False
    only_numbers = all(isinstance(argument, int | float) for argument in arguments)
    return bool(_MAKERS.fullmatch(name)) or (bool(arguments) and only_numbers)


def _is_class(name: str) -> bool:
    """Whether a name is a class name by convention; exceptions are `dtype` and `datetime`."""
    return name.lstrip("_")[:1].isupper()


def _is_constructor(name: str) -> bool:
    return _CONSTRUCTORS.fullmatch(name) is not None


def _is_iterator(value: Name | StandIn) -> bool:
    """Whether a value is an iterator, which `map` and the like iterate over and do not call."""
    if isinstance(value, Name):
        return False
    root, _, _ = value.qualified_name.partition(".")
    return value.qualified_name != "functools.partial" and root in ("builtins", "itertools")


def check_object(kind: Name) -> None:
    """Raises an UnsafeFile for objects, such as tensors, whose values would go unread."""
    if _TENSORS.fullmatch(kind.qualified_name):
        raise _refused(kind)


def _refused(function: Any) -> UnsafeFile:
    return UnsafeFile(
        f"the file would call {kind_of(function)}, which no checkpoint needs; nothing was "
        "executed. Do not load the file unless you trust its author"
    )


def attribute(owner: Any, name: Any = "", *default: Any) -> Name | StandIn:
    """Returns the placeholder for `getattr(owner, name)`, used for nested classes and methods."""
    if isinstance(owner, Name) and isinstance(name, str):
        qualified = f"{owner.qualified_name}.{name}"
        if len(qualified) <= 1000 and name.isidentifier():
            return Name(qualified)
    return StandIn("builtins.getattr", (owner, name, *default))
