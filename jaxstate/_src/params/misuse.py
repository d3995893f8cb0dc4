"""What was meant by a call that failed: looked at when it has failed, and not before."""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxstate._src import _jax
from jaxstate._src.core.specs import NoArrayError
from jaxstate._src.streams.keys import is_a_key
from jaxstate.errors import StateError, does_not_fit, message

__all__ = [
    "BY_NAME",
    "LAZY",
    "about_call",
    "about_initializer",
    "also_by_name",
    "given_by_name",
    "has_taken_argument",
    "name_to_call",
    "no_such_attribute",
    "note_mistakes",
    "refuse_lazy",
    "taken_arguments",
]

# What ``init`` and ``apply`` take themselves.
_TAKEN = frozenset({"key", "params", "state", "reuse", "mutable"})

# The default of an argument that is given first, and may be given by name.
BY_NAME: Any = object()

# What runs when it is asked for values.
LAZY = frozenset({types.GeneratorType, types.CoroutineType, types.AsyncGeneratorType, map, filter})


# -- Calls of a network ----------------------------------------------------------------------


# What a network takes before the arguments of its function: in a call of itself, and of a method.
_FIRST = {
    "": "", "init": "key, ", "init_with_state": "key, ", "apply": "params, ",
    "apply_with_state": "params, state, ", "summary": "key, ", "metadata": "",
}  # fmt: skip


def name_to_call(net: Any) -> str:
    """How a program may call a network: a method by a name for its instance."""
    method = getattr(net, "_method", None)
    if method is None:
        return net.name
    called = getattr(net.fn, "__name__", net.name)
    return f"{type(net.fn.__self__).__name__.lower()}.{called}"


def about_call(net: Any, how: str, args: Any, kwargs: Any) -> Exception | None:
    """The error for arguments that the function of ``net`` does not take; None if it takes them.

    ``how`` says what was called: the network itself (``""``), or its ``init``, ``apply`` ...
    """
    try:
        signature = inspect.signature(net)
    except (TypeError, ValueError):
        return None
    problem = does_not_fit(signature, args, kwargs)
    if problem is None:
        return None
    name = name_to_call(net)
    takes = f"{name}({', '.join(_shown(signature))})"
    starts_with_dict = bool(args) and isinstance(args[0], Mapping)
    if not how and isinstance(kwargs.get("params"), Mapping):
        return TypeError(
            message(
                f"{takes} was called with params=. Did you mean {name}.apply?",
                fix=f"y = {name}.apply(params, x)",
                used=_jax.user_location(),
            )
        )
    if starts_with_dict and does_not_fit(signature, args[1:], kwargs) is None:
        if not how:
            return TypeError(
                message(
                    f"{takes} was called with a dict first. Did you mean {name}.apply?",
                    fix=f"y = {name}.apply(params, x)",
                    used=_jax.user_location(),
                )
            )
        return TypeError(
            message(
                f"{takes} was given two dicts first. Did you mean {name}.apply_with_state?",
                fix=f"""
                y, state = {name}.apply_with_state(params, state, x)    # reads and writes variables
                y = {name}.apply(params, x, state=state)                # only reads them
                """,
                used=_jax.user_location(),
            )
        )
    others = [p for p in signature.parameters.values() if p.name not in _TAKEN - kwargs.keys()]
    taken = _TAKEN & signature.parameters.keys() - kwargs.keys()
    if how and taken and not does_not_fit(signature.replace(parameters=others), args, kwargs):
        argument = min(taken)
        return TypeError(
            message(
                f"{takes} has an argument {argument!r}, and init and apply of a network take 'key',"
                " 'params', 'state', 'reuse' and 'mutable' for themselves.",
                fix=_another_place(signature, name, f"{name}.{how}", argument),
                used=_jax.user_location(),
            )
        )
    call = f"{name}.{how}" if how else name
    inputs = ", ".join(_as_given(signature))
    if how.startswith("apply"):
        given = "params, state" if how == "apply_with_state" else "params"
        keys = [k for k in kwargs if k in ("rng", "rngs", "prng_key", "random_key")]
        if any(is_a_key(x) for x in args) or keys:
            found = f"{keys[0]}=" if keys else "a random key among its inputs"
            return TypeError(
                message(
                    f"{takes} was given {found} in {call}, which takes the key as key=.",
                    fix=f"""
                    {call}({given}, {inputs}, key=key)
                    {call}({given}, {inputs}, key={{"dropout": key}})   # of streams by name
                    """,
                    used=_jax.user_location(),
                )
            )
        if how == "apply" and "mutable" in kwargs:
            return TypeError(
                message(
                    f"{name}.apply only reads variables, and was given mutable=.",
                    fix=f"""
                    y, state = {name}.apply_with_state(params, state, {inputs})   # writes all
                    y, state = {name}.apply_with_state(params, state, {inputs}, mutable="cache")
                    """,
                    used=_jax.user_location(),
                )
            )
    first = _FIRST[how]
    return TypeError(
        message(
            f"{takes} does not take the arguments of this call of {call}: {problem}.",
            fix=f"{call}({first}{inputs})",
            used=_jax.user_location(),
        )
    )


def _another_place(signature: inspect.Signature, name: str, call: str, argument: str) -> str:
    """How a function gets an argument whose name is taken."""
    renamed = [
        p.replace(name=f"my_{p.name}") if p.name == argument else p
        for p in signature.parameters.values()
    ]
    other = signature.replace(parameters=renamed)
    fix = f"def {name.split('.')[-1]}({', '.join(_shown(other))}): ..."
    if signature.parameters[argument].kind is inspect.Parameter.KEYWORD_ONLY:
        return fix + "      # another name"
    first = "key" if call.endswith(("init", "init_with_state")) else "params"
    first = "params, state" if call.endswith("apply_with_state") else first
    inputs = ", ".join(_as_given(other, by_position=True))
    return f"{fix}      # another name\n{call}({first}, {inputs})      # or by position"


def taken_arguments(fn: Any) -> dict[str, int]:
    """The arguments of a function that have a name which ``apply`` takes too: their positions.

    An argument that has no position is the last of all.
    """
    code = getattr(getattr(fn, "__func__", fn), "__code__", None)
    if code is None or _TAKEN.isdisjoint(code.co_varnames):
        return {}
    try:
        parameters = inspect.signature(fn).parameters.values()
    except (TypeError, ValueError):
        return {}
    return {
        p.name: n if p.kind is not p.KEYWORD_ONLY else len(parameters)
        for n, p in enumerate(parameters)
        if p.name in _TAKEN
    }


def has_taken_argument(net: Any, how: str, argument: str) -> Exception:
    """A method was given a keyword that the function has an argument for too."""
    signature, name = inspect.signature(net), name_to_call(net)
    return TypeError(
        message(
            f"{name} has an argument {argument!r}, and {how} takes {argument}= for itself: the"
            " function would not get it.",
            fix=_another_place(signature, name, f"{name}.{how}", argument),
            used=_jax.user_location(),
        )
    )


# `init` and `apply` take their first arguments by position, or the function could have none of
# that name. They may be given by name too, and tools are shown that.


def given_by_name(net: Any, how: str, argument: str, kwargs: dict[str, Any]) -> Any:
    """The value of a first argument that was not given by position."""
    if argument in kwargs:
        return kwargs.pop(argument)
    first = {"init": "key", "init_with_state": "key", "apply": "params"}.get(how, "params, state")
    raise TypeError(
        message(
            f"{name_to_call(net)}.{how} was called without {argument}.",
            fix=f"{name_to_call(net)}.{how}({first}, x)",
            used=_jax.user_location(),
        )
    )


def also_by_name(method: Callable[..., Any]) -> Callable[..., Any]:
    """Shows the first arguments of a method as what may be given by name, and has no default."""
    signature = inspect.signature(method)
    shown = [
        p.replace(kind=p.POSITIONAL_OR_KEYWORD, default=p.empty) if p.default is BY_NAME else p
        for p in signature.parameters.values()
    ]
    me = shown[0].replace(kind=inspect.Parameter.POSITIONAL_OR_KEYWORD)
    method.__signature__ = signature.replace(parameters=[me, *shown[1:]])  # type: ignore
    return method


def _shown(signature: inspect.Signature) -> list[str]:
    """The parameters of a function, without types."""
    plain = [p.replace(annotation=inspect.Parameter.empty) for p in signature.parameters.values()]
    text = str(signature.replace(parameters=plain, return_annotation=inspect.Signature.empty))
    return [text[1:-1]] if len(text) > 2 else []


def _as_given(signature: inspect.Signature, by_position: bool = False) -> list[str]:
    """The arguments of a call of a function, as they may be written."""
    stars = {inspect.Parameter.VAR_POSITIONAL: "*", inspect.Parameter.VAR_KEYWORD: "**"}
    shown = []
    for p in signature.parameters.values():
        text = f"{stars.get(p.kind, '')}{p.name}"
        if p.default is not p.empty and not (by_position and p.kind is not p.KEYWORD_ONLY):
            text += f"={p.default!r}"
        elif p.kind is p.KEYWORD_ONLY:
            text += f"={p.name}"
        shown.append(text)
    return shown


def note_mistakes(net: Any, error: Exception, how: str, args: Any, kwargs: Any) -> None:
    """Adds to an error of Python or JAX what the program may have meant."""
    text = str(error)
    notes = []
    if isinstance(error, AttributeError) and text.startswith("'Variable' object has no attribute"):
        notes.append(_NO_SUCH_ATTRIBUTE)
    if "'jaxstate.Variable'" in text or "<variable '" in text:
        notes.append(_HANDLE_FOR_VALUE)
    dict_first = bool(args) and isinstance(args[0], Mapping)
    if not how and dict_first and "Did you mean" not in text:
        notes.append(_NETWORK_WITH_DICT)
    if how == "apply" and dict_first and isinstance(error, (AttributeError, TypeError, ValueError)):
        notes.append(_TWO_DICTS)
    if isinstance(error, _NOT_KNOWN) and how.startswith("apply"):
        notes += [_traced_option(net, how, name) for name in _traced_options(net, args, kwargs)]
    if how.startswith("apply") and any(x is None or _is_typed_key(x) for x in args):
        notes.append(_KEY_BY_POSITION)
    for note in notes:
        if note not in getattr(error, "__notes__", ()):
            error.add_note(note)


_NOT_KNOWN = (jax.errors.TracerBoolConversionError, jax.errors.TracerIntegerConversionError)


def _traced_options(net: Any, args: Any, kwargs: Any) -> list[str]:
    """The arguments that may be meant for Python: one bool or integer of the program."""
    try:
        given = inspect.signature(net).bind(*args, **kwargs).arguments
    except (TypeError, ValueError):
        return []
    return [
        name
        for name, x in given.items()
        if _jax.is_tracer(x)
        and x.shape == ()
        and any(jnp.issubdtype(x.dtype, kind) for kind in (jnp.bool_, jnp.integer))
    ]


def _traced_option(net: Any, how: str, option: str) -> str:
    call = f"{name_to_call(net)}.{how}"
    return f"""\
{option!r} is an array of the program here. If Python is to know its value, bind it before.
To mend it:
    jax.jit(functools.partial({call}, {option}=value))
    jax.jit({call}, static_argnames={option!r})     # called with {option}=value"""


_NO_SUCH_ATTRIBUTE = """\
A variable has one attribute to read and to assign: its value.
To mend it:
    v.value = v.value + 1"""

_HANDLE_FOR_VALUE = """\
A variable was given where its value is wanted.
To mend it:
    jnp.sin(v.value)"""

_NETWORK_WITH_DICT = """\
The network itself was called, with a dict first. If these are the parameters, did you mean apply?
    y = net.apply(params, x)"""

_KEY_BY_POSITION = """\
A random key, or None, was given by position, as an input of the function. If it is for the streams:
    y = net.apply(params, x, key=key)      # or without a key"""

_TWO_DICTS = """\
apply was given a dict as the first input of the function. If that is the variables:
    y, state = net.apply_with_state(params, state, x)    # reads and writes variables
    y = net.apply(params, x, state=state)                # only reads them"""


def _is_typed_key(x: Any) -> bool:
    return isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jax.dtypes.prng_key)


_HOLDS_NOTHING = """
params = net.init(key, x)      # a network holds no parameters: they are a dict
y = net.apply(params, x)
"""

# What other libraries have on a network, and what it is here.
_ELSEWHERE = {
    **dict.fromkeys(("params", "parameters", "state_dict", "variables", "weights"), _HOLDS_NOTHING),
    "tabulate": "print(net.summary(key, x))",
    "forward": "y = net.apply(params, x)",
    **dict.fromkeys(("train", "eval"), "y = net.apply(params, x, train=False)      # an argument"),
}


def no_such_attribute(net: Any, name: str) -> AttributeError:
    """With what another library would have there, and it is here."""
    kind = type(net).__name__
    if name not in _ELSEWHERE:
        return AttributeError(f"{kind!r} object has no attribute {name!r}", name=name, obj=net)
    return AttributeError(
        message(
            f"{kind!r} object has no attribute {name!r}.",
            fix=_ELSEWHERE[name],
            used=_jax.user_location(),
        )
    )


def refuse_lazy(net: Any, out: Any) -> None:
    """A generator or coroutine runs when its parameters are gone."""
    parts = out.values() if type(out) is dict else out if type(out) in (tuple, list) else [out]
    for part in parts:
        if type(part) not in LAZY:
            continue
        kind = f"a {type(part).__name__}"
        if inspect.iscoroutine(part):
            part.close()  # or Python warns that nobody has run it
        raise TypeError(
            message(
                f"{net.name} returned {kind}, which runs when init or apply is over.",
                fix="""
                return [f(x) for x in xs]      # return what it makes, and no yield or await
                """,
                used=_jax.user_location(),
            )
        )


# -- Initializers ----------------------------------------------------------------------------


def about_initializer(
    address: Any, init: Callable[..., Any], init_args: Any, error: Exception
) -> Exception:
    """The error for an initializer that failed: another one, if it is known what was meant."""
    if isinstance(error, StateError):
        return error
    if isinstance(error, NoArrayError):
        return _no_array(address, init, error)
    takes_key = address.takes_key
    function = "param" if address.kind == "parameter" else "variable"
    wanted = "init(key, *init_args)" if takes_key else "init(*init_args), without a key"
    name, called = address.name, _name_of(init)
    if takes_key and _makes_no_use_of_keys(init):
        values = ", ".join(map(repr, init_args)) if _are_short(init_args) else "shape"
        fix = f'jaxstate.{function}("{name}", lambda key: {called}({values}))'
        if init.__name__ in ("zeros", "ones"):
            shape = values or "shape"
            other = f'jaxstate.{function}("{name}", jax.nn.initializers.{init.__name__}, {shape})'
            fix = f"{other}\n{fix}      # or any function of a key"
        return TypeError(
            message(
                f"The initializer of {address} is {called}, which takes no key: it was called as"
                f" {wanted}.",
                fix=fix,
                used=address.used,
            )
        )
    try:
        problem = does_not_fit(
            inspect.signature(init), (None, *init_args) if takes_key else init_args, {}
        )
    except (TypeError, ValueError):
        problem = None
    if problem is not None:
        example = "lambda key: value" if takes_key else "jnp.zeros, (3,)"
        if problem.startswith("missing a required argument: 'shape'") and takes_key:
            example = f"{called}, shape"
        return TypeError(
            message(
                f"The initializer of {address} cannot be called as {wanted}: {problem}.",
                fix=f'jaxstate.{function}("{name}", {example})',
                used=address.used,
            )
        )
    where = getattr(init, "in_words", f"the initializer of {address}")
    error.add_note(f"It happened in {where}, used: {address.used}")
    return error


def _no_array(address: Any, init: Callable[..., Any], error: NoArrayError) -> Exception:
    found = error.found
    function = "param" if address.kind == "parameter" else "variable"
    called = _name_of(init)
    if callable(found) and not error.is_part:
        what = f"made a function, {found!r}. Is {called} to be called first?"
        fix = f'jaxstate.{function}("{address.name}", {called}(), shape)'
    elif found is None:
        what = "made None. Does it lack a return?"
        fix = f'jaxstate.{function}("{address.name}", lambda key: value)'
    else:
        what = f"made {found!r}, which is no array. A {address.kind} is a tree of arrays."
        fix = f"""
        jaxstate.{function}("{address.name}", lambda key: arrays)    # keep outside what is none
        arrays, rest = equinox.partition(module, equinox.is_array)   # for example
        """
    if not address.takes_key:
        fix = fix.replace("lambda key:", "lambda:")
    return TypeError(message(f"The initializer of {address} {what}", fix=fix, used=address.used))


def _makes_no_use_of_keys(init: Any) -> bool:
    """Whether it is a function of `jax.numpy` or of NumPy."""
    name = getattr(init, "__name__", "")
    return any(getattr(module, name, None) is init for module in (jnp, np)) if name else False


def _are_short(values: Any) -> bool:
    return all(isinstance(x, (int, float, str, tuple, type)) for x in values)


def _name_of(init: Any) -> str:
    name = getattr(init, "__name__", "<")
    if "<" in name:
        return "init"
    for module, prefix in ((jnp, "jnp."), (np, "np.")):
        if getattr(module, name, None) is init:
            return prefix + name
    return name
