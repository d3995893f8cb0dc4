"""A network with the types that it is used with: `net.shaped(*args)`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Generic, TypeVar

from jaxstate._src.handles import Handle

__all__ = ["Shaped"]

R = TypeVar("R")


class Shaped(Generic[R], metaclass=Handle, made_by="shaped = net.shaped(x)"):
    """A parametrized object with example inputs: see `Parametrized.shaped`.

    As a key of ``reuse`` it says with which arguments its parameters were made.
    """

    def __init__(self, net: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.net = net
        self.args = args
        self.kwargs = kwargs

    def init(self, key: Any, *, reuse: Mapping[Any, Any] | None = None) -> dict[str, Any]:
        """The initial parameters for the example inputs; see `Parametrized.init`."""
        return self.net.init(key, *self.args, reuse=reuse, **self.kwargs)

    def parameters_from(self, reuse: Mapping[Any, Any]) -> dict[str, Any]:
        """See `Parametrized.parameters_from`."""
        return self.net.parameters_from(reuse, *self.args, **self.kwargs)

    def init_with_state(
        self, key: Any, *, reuse: Mapping[Any, Any] | None = None
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """The same with the variables; see `Parametrized.init_with_state`."""
        return self.net.init_with_state(key, *self.args, reuse=reuse, **self.kwargs)

    def metadata(self) -> dict[str, Any]:
        """The metadata of the parameters; see `Parametrized.metadata`."""
        return self.net.metadata(*self.args, **self.kwargs)

    def metadata_with_state(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """The same with the variables; see `Parametrized.metadata_with_state`."""
        return self.net.metadata_with_state(*self.args, **self.kwargs)

    def apply(
        self,
        params: Mapping[str, Any],
        *args: Any,
        key: Any = None,
        state: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> R:
        """See `Parametrized.apply`; the inputs are those given here, not the example."""
        return self.net.apply(params, *args, key=key, state=state, **kwargs)

    def apply_from(
        self,
        reuse: Mapping[Any, Any],
        *args: Any,
        key: Any = None,
        state: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> R:
        """See `Parametrized.apply_from`: the parts are found with the example inputs, and the
        function is called with the inputs given here."""
        return self.apply(self.parameters_from(reuse), *args, key=key, state=state, **kwargs)

    def __repr__(self) -> str:
        return f"<shaped {self.net!r}>"
