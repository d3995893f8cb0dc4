"""Shadows of dicts, lists and tuples, and the class of the shadows of any class.

The methods of a dict or list look at items that are not there: those of a shadow are in its record.
So all methods that read or write have another definition here.
"""

from __future__ import annotations

import weakref
from collections import defaultdict
from collections.abc import Iterator, MutableMapping, MutableSequence
from typing import Any

import jax

from jaxstate.objects import builtin_of, slots_of
from jaxstate.shadows import NamedItem, Shadow, add_field, plain, record_of, set_record


class _Items:
    """What dicts, lists and tuples have in common."""

    def __len__(self) -> int:
        return len(record_of(self).items)

    def __eq__(self, other: object) -> Any:
        return plain(self) == plain(other)

    def __ne__(self, other: object) -> Any:
        return plain(self) != plain(other)

    def __repr__(self) -> str:
        return repr(plain(self))

    def copy(self) -> Any:
        return plain(self)

    def __contains__(self, value: Any) -> bool:
        return any(value is x or bool(value == x) for x in self)  # type: ignore[attr-defined]

    def _put(self, key: Any, value: Any) -> None:
        """Assigns to an item that exists."""
        record = record_of(self)
        record.items[key] = record.assign(record.items[key], value, f"{record.label}[{key!r}]")

    def _new(self, key: Any, value: Any) -> Any:
        """The entry of an item that does not exist yet."""
        record = record_of(self)
        return record.assign(None, value, f"{record.label}[{key!r}]")


class DictShadow(_Items):
    def __getitem__(self, key: Any) -> Any:
        record = record_of(self)
        if key in record.items:
            return record.value(record.items[key])
        if issubclass(record.cls, defaultdict):
            factory = self.default_factory  # type: ignore[attr-defined]
            if factory is not None:
                self[key] = factory()
                return self[key]
        elif hasattr(record.cls, "__missing__"):
            return record.cls.__missing__(self, key)  # type: ignore[attr-defined]
        raise KeyError(key)

    def __setitem__(self, key: Any, value: Any) -> None:
        record = record_of(self)
        if key in record.items:
            self._put(key, value)
        else:
            record.items[key] = self._new(key, value)

    def __delitem__(self, key: Any) -> None:
        record = record_of(self)
        record.check_structure_may_change(f"{record.label}[{key!r}]")
        del record.items[key]

    def __iter__(self) -> Iterator[Any]:
        return iter(record_of(self).items)

    def __reversed__(self) -> Iterator[Any]:
        return reversed(record_of(self).items)

    def __contains__(self, key: Any) -> bool:
        return key in record_of(self).items

    def __or__(self, other: Any) -> Any:
        return plain(self) | plain(other)

    def __ror__(self, other: Any) -> Any:
        return plain(other) | plain(self)

    def __ior__(self, other: Any) -> Any:
        self.update(other)
        return self

    def move_to_end(self, key: Any, last: bool = True) -> None:
        record = record_of(self)
        record.check_structure_may_change(f"{record.label}[{key!r}]")
        entry = record.items.pop(key)
        rest = {} if last else dict(record.items)
        for other in rest:
            del record.items[other]
        record.items.update({key: entry, **rest})

    keys: Any = MutableMapping.keys
    values: Any = MutableMapping.values
    items: Any = MutableMapping.items
    get: Any = MutableMapping.get
    clear: Any = MutableMapping.clear
    update: Any = MutableMapping.update
    setdefault: Any = MutableMapping.setdefault

    def pop(self, key: Any, *default: Any) -> Any:
        if default and key not in self:
            return default[0]
        value = self[key]
        del self[key]
        return value

    def popitem(self) -> Any:
        key = next(reversed(record_of(self).items))
        return key, self.pop(key)


class _SequenceShadow(_Items):
    def __getitem__(self, index: Any) -> Any:
        record = record_of(self)
        found = record.items[index]
        if isinstance(index, slice):
            return (list if issubclass(record.cls, list) else tuple)(map(record.value, found))
        return record.value(found)

    def __setitem__(self, index: Any, value: Any) -> None:
        n = len(self)
        if not isinstance(index, slice):
            return self._put(range(n)[index], value)
        values, places = list(value), range(n)[index]
        if len(values) == len(places):
            for i, x in zip(places, values, strict=True):
                self._put(i, x)
        elif places.step != 1 or not isinstance(record_of(self).items, list):
            raise ValueError(f"{len(values)} values for {len(places)} items")
        else:
            self._splice(places.start, places.start + len(places), values)

    def _splice(self, start: int, stop: int, values: list[Any]) -> None:
        record = record_of(self)
        if issubclass(record.cls, tuple):
            raise TypeError("a tuple has a fixed length")
        record.check_structure_may_change(f"{record.label}[{start}:{stop}]")
        record.items[start:stop] = [self._new(start + i, x) for i, x in enumerate(values)]

    def __iter__(self) -> Iterator[Any]:
        record = record_of(self)
        i = 0
        while i < len(record.items):
            yield record.value(record.items[i])
            i += 1

    def __reversed__(self) -> Iterator[Any]:
        return (self[i] for i in reversed(range(len(self))))

    def index(self, value: Any, *where: Any) -> int:
        return list(self).index(value, *where)

    def count(self, value: Any) -> int:
        return list(self).count(value)

    def __add__(self, other: Any) -> Any:
        return plain(self) + plain(other)

    def __radd__(self, other: Any) -> Any:
        return plain(other) + plain(self)

    def __mul__(self, n: Any) -> Any:
        return plain(self) * n

    __rmul__ = __mul__

    def __lt__(self, other: Any) -> Any:
        return plain(self) < plain(other)

    def __le__(self, other: Any) -> Any:
        return plain(self) <= plain(other)

    def __gt__(self, other: Any) -> Any:
        return plain(self) > plain(other)

    def __ge__(self, other: Any) -> Any:
        return plain(self) >= plain(other)


class ListShadow(_SequenceShadow):
    def __delitem__(self, index: Any) -> None:
        record = record_of(self)
        record.check_structure_may_change(f"{record.label}[{index!r}]")
        del record.items[index]

    def insert(self, index: int, value: Any) -> None:
        start = slice(index, None).indices(len(self))[0]
        self._splice(start, start, [value])

    def sort(self, **how: Any) -> None:
        self[:] = sorted(map(plain, self), **how)

    def reverse(self) -> None:
        self[:] = list(map(plain, self))[::-1]

    def __imul__(self, n: int) -> Any:
        self[:] = plain(self) * n
        return self

    append: Any = MutableSequence.append
    extend: Any = MutableSequence.extend
    pop: Any = MutableSequence.pop
    remove: Any = MutableSequence.remove
    clear: Any = MutableSequence.clear
    __iadd__: Any = MutableSequence.__iadd__


class TupleShadow(_SequenceShadow):
    def __hash__(self) -> int:
        return hash(plain(self))

    @classmethod
    def _make(cls, values: Any) -> Any:
        return cls._jaxstate_class._make(values)  # type: ignore[attr-defined]


# -- The class of the shadows of a class -----------------------------------------------------


_classes: weakref.WeakKeyDictionary[type, Any] = weakref.WeakKeyDictionary()


def with_record(record: Any) -> Any:
    """A new shadow with the attributes and items of a record."""
    cls = _shadow_class(record.cls)
    for name in record.attributes:
        add_field(cls, name)
    shadow = builtin_of(record.cls).__new__(cls)
    set_record(shadow, record)
    return shadow


def _shadow_class(cls: type) -> Any:
    """The class of shadows of objects of class ``cls``."""
    made = _classes.get(cls)
    if made is not None:
        return made
    kinds = {dict: DictShadow, list: ListShadow, tuple: TupleShadow}
    operations = [kind for builtin, kind in kinds.items() if issubclass(cls, builtin)]
    namespace = dict(
        _jaxstate_class=cls, __module__=cls.__module__, __qualname__=cls.__qualname__,
        __doc__=cls.__doc__,
    )  # fmt: skip
    # Not by calling the metaclass, which may do something with every class that it makes.
    made = type.__new__(type(cls), cls.__name__, (Shadow, *operations, cls), namespace)
    for name in slots_of(cls):
        add_field(made, name)
    if issubclass(cls, tuple):
        for i, name in enumerate(getattr(cls, "_fields", ())):
            type.__setattr__(made, name, NamedItem(name, i))
    jax.tree_util.register_pytree_node(
        made,
        lambda shadow: record_of(shadow).flatten(shadow),
        lambda way, leaves: way.unflatten(leaves),
    )
    _classes[cls] = made
    return made
