"""The value of a parameter or variable is a tree that is kept as its initializer made it."""

import collections
import copy
import dataclasses
import functools
import gc
import pickle
import types

import equinox as eqx
import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax

import jaxstate
from jaxstate_tests.sampling import part_of_product

KEY = jax.random.key(5)
normal = jax.nn.initializers.normal(1.0)


# -- Trees -----------------------------------------------------------------------------------


class Point(collections.namedtuple("Point", "x y")):
    __slots__ = ()


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["w", "rest"], meta_fields=["act", "n"]
)
@dataclasses.dataclass
class Record:
    w: object
    rest: object
    act: object = None
    n: int = 0


@flax.struct.dataclass
class Frozen:
    w: object
    name: str = flax.struct.field(pytree_node=False, default="")


class Module(eqx.Module):
    w: jax.Array
    act: object = eqx.field(static=True)

    def __call__(self, x):
        return self.act(self.w * x)


@jax.tree_util.register_pytree_node_class
class Strict:
    """A class of its own, which looks at what it is made of."""

    def __init__(self, parts, unhashable):
        self.parts, self.unhashable = tuple(parts), unhashable

    def tree_flatten(self):
        return self.parts, self.unhashable

    @classmethod
    def tree_unflatten(cls, aux, parts):
        return cls(parts, aux)

    def __repr__(self):
        return f"Strict{tuple(float(p.sum()) for p in self.parts)}"


def act(x):
    return jnp.tanh(x)


def w(key, n=2):
    return normal(key, (n,))


TREES = {
    "list": lambda key: [w(key), w(key, 1)],
    "tuple": lambda key: (w(key), (w(key, 1),), ()),
    "None parts": lambda key: {"w": w(key), "b": None, "c": [None, w(key, 3)]},
    "dict of dicts": lambda key: {"b": {"z": w(key)}, "a": {}},
    "integer keys": lambda key: {1: w(key), 10: w(key, 1), 2: w(key, 3)},
    "namedtuple": lambda key: Point(w(key), None),
    "OrderedDict": lambda key: collections.OrderedDict(z=w(key), a=w(key)),
    "defaultdict": lambda key: collections.defaultdict(list, z=[w(key)]),
    "dataclass": lambda key: Record(w(key), (w(key, 1), None), act=act, n=3),
    "made lambda": lambda key: Record(w(key), (), act=lambda x, by=2: by * x, n=3),
    "flax dataclass": lambda key: Frozen(w(key), name="frozen"),
    "flax box": lambda key: nn.Partitioned(w(key), names=("embed",)),
    "flax boxes": nn.with_partitioning(lambda key: {"w": w(key), "b": w(key, 1)}, ("mlp",)),
    "equinox": lambda key: Module(w(key), act=act),
    "equinox layer": lambda key: eqx.nn.Linear(2, 3, key=key),
    "class": lambda key: Strict([w(key), w(key, 1)], ["unhashable"]),
    "nested": lambda key: [Record(Point(w(key), [w(key)]), {"a": nn.Partitioned(w(key), ("x",))})],
    "dtypes": lambda key: [jnp.arange(3), w(key).astype(jnp.bfloat16), jnp.bool_(True), key],
    "one array": w,
}  # fmt: skip


def shape_of(tree):
    """What of a tree is kept: types and static parts (functions by their code), without arrays."""
    children, aux = jax.tree_util.default_registry.flatten_one_level(tree) or (None, None)
    if children is None:
        return None if tree is None else (jnp.shape(tree), jnp.result_type(tree))
    return type(tree), static(aux), [shape_of(child) for child in children]


def static(x):
    if isinstance(x, (tuple, list)):
        return [static(y) for y in x]
    return x.__code__ if isinstance(x, types.FunctionType) else x


def assert_equal(found, wanted):
    assert shape_of(found) == shape_of(wanted)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        assert (a == b).all()


def total(tree):
    arrays = [x for x in jax.tree.leaves(tree) if not jnp.issubdtype(x.dtype, jax.dtypes.prng_key)]
    return sum(jnp.sum(x).astype(float) for x in arrays)


WRAPS = {
    "plain": lambda f: f,
    "jit": jax.jit,
    "checkpoint": jax.checkpoint,
    "scan": lambda f: lambda x: lax.scan(lambda c, _: (f(x), None), x, None, length=2)[0],
    "while": lambda f: lambda x: lax.while_loop(
        lambda c: c[0] < 2, lambda c: (c[0] + 1, f(x)), (0, x)
    )[1],
    "cond": lambda f: lambda x: lax.cond(x > -1e9, f, lambda x: x, x),
    "vmap": lambda f: lambda x: jax.vmap(f)(x[None])[0],
    "grad": lambda f: lambda x: f(x) + 0 * jax.grad(f)(x),
}  # fmt: skip


@pytest.mark.parametrize("tree, wrap", part_of_product(2, TREES, WRAPS))
def test_a_tree_is_kept_by_init_and_apply(tree, wrap):
    make = TREES[tree]
    seen = []

    def use(x):
        with jaxstate.scope("a"):
            p = jaxstate.param("p", make)
        seen.append(shape_of(p))
        return x + total(p)

    net = jaxstate.parametrized(WRAPS[wrap](use), name="net")
    x = jnp.float32(1)
    params = net.init(KEY, x)
    made = make(KEY)
    assert shape_of(params["a"]["p"]) == shape_of(made)
    assert all(s == shape_of(made) for s in seen)
    for values in (params, {"a": {"p": made}}):
        np.testing.assert_allclose(net.apply(values, x), x + total(values), rtol=1e-5)
    if wrap not in ("plain", "scan"):
        return
    np.testing.assert_allclose(jax.jit(net.apply)(params, x), x + total(params), rtol=1e-5)
    assert jax.tree.leaves(jax.eval_shape(net.init, KEY, x)) == jax.tree.leaves(
        jax.eval_shape(lambda: params)
    )
    assert_equal(net.parameters_from({net: params}, x), params)
    assert_equal(net.init(jax.random.key(1), x, reuse={net: params}), params)
    paths = [jax.tree_util.keystr(p, simple=True, separator="/")
             for p, _ in jax.tree_util.tree_leaves_with_path(params)]  # fmt: skip
    for rows in (jaxstate.summary(params).rows, net.summary(KEY, x).rows):
        assert [row.path for row in rows] == paths
    assert_equal(copy.deepcopy(params), params)


@pytest.mark.parametrize(
    "tree, wrap",
    part_of_product(
        2,
        [name for name in TREES if name != "dtypes"],
        [name for name in WRAPS if name not in ("vmap", "grad")],
    ),
)
def test_a_tree_is_kept_by_variables(tree, wrap):
    make = TREES[tree]

    def write(x):
        v = jaxstate.variable("v", make, KEY)
        v.value = jax.tree.map(lambda a: 2 * a, v.value)
        return x

    net = jaxstate.parametrized(WRAPS[wrap](write), name="net")
    made = make(KEY)
    params, state = net.init_with_state(KEY, 1.0)
    assert params == {}
    assert_equal(state, {"v": made})
    times = 4 if wrap in ("scan", "while") else 2
    wanted = {"v": jax.tree.map(lambda a: times * a, made)}
    state["other"] = collections.OrderedDict(z=Point(jnp.ones(1), None), a=jnp.ones(2))
    _, new = net.apply_with_state({}, state, jnp.float32(1))
    assert_equal(new, {**wanted, "other": state["other"]})
    assert new["other"] is not state["other"]
    assert_equal(state["v"], made)


@pytest.mark.parametrize("tree", [name for name in TREES if name != "dtypes"])
def test_a_tree_is_kept_by_a_stack(tree):
    make = TREES[tree]
    block = jaxstate.parametrized(lambda x: x + total(jaxstate.param("p", make)), name="block")
    deep = jaxstate.stack(block, 3)
    params = deep.init(KEY, 1.0)
    stacked = jax.tree.map(lambda *xs: jnp.stack(xs), *[make(KEY)] * 3)
    assert shape_of(params["layers"]["p"]) == shape_of(stacked)
    np.testing.assert_allclose(deep.apply(params, 1.0), 1 + total(params), rtol=1e-5)
    assert_equal(deep.restack(deep.unstack(params)), params)
    assert shape_of(deep.unstack(params)[1]["p"]) == shape_of(make(KEY))


@pytest.mark.parametrize("tree", [name for name in TREES if name != "made lambda"])
def test_a_tree_is_kept_by_pickle_orbax_and_optax(tree, tmp_path):
    make = TREES[tree]
    net = jaxstate.parametrized(lambda x: x + total(jaxstate.param("p", make)), name="net")
    params = net.init(KEY, 1.0)
    if tree != "dtypes":  # a random key is no array for these
        assert_equal(pickle.loads(pickle.dumps(params)), params)
        optimizer = optax.adam(0.1)
        updates, _ = optimizer.update(params, optimizer.init(params), params)
        assert shape_of(optax.apply_updates(params, updates)) == shape_of(params)
    if tree not in ("dtypes", "class", "dataclass", "nested", "defaultdict"):  # unknown to orbax
        checkpointer = orbax.checkpoint.StandardCheckpointer()
        checkpointer.save(tmp_path / "params", params)
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(tmp_path / "params", jax.eval_shape(net.init, KEY, 1.0))
        assert_equal(restored, params)
        np.testing.assert_allclose(net.apply(restored, 1.0), net.apply(params, 1.0))


@pytest.mark.parametrize("wrap", ["plain", "jit", "scan"])
def test_other_mappings_stand_for_dicts(wrap):
    make = TREES["dict of dicts"]

    def use(x):
        with jaxstate.scope("a"):
            p, v = jaxstate.param("p", make), jaxstate.variable("v", make, KEY)
        v.value = jax.tree.map(lambda a: 2 * a, v.value)
        return x + total(p) + total(v.value)

    net = jaxstate.parametrized(WRAPS[wrap](use), name="net")
    x = jnp.float32(1)
    params, state = net.init_with_state(KEY, x)
    wanted = net.apply_with_state(params, state, x)
    backwards = lambda d: dict(reversed(d.items())) if type(d) is dict else d  # noqa: E731
    kinds = [flax.core.freeze, types.MappingProxyType, collections.OrderedDict, backwards]
    for kind in kinds:

        def mapped(d, kind=kind):
            return kind({k: mapped(v) for k, v in d.items()}) if isinstance(d, dict) else d

        assert_equal(net.apply_with_state(mapped(params), mapped(state), x), wanted)
        assert_equal(net.parameters_from({net: mapped(params)}, x), params)


# -- What does not fit -----------------------------------------------------------------------

# What a function makes, what it is given, and what of both the error shows.
WRONG = {
    "list for tuple": (lambda key: (w(key), w(key)), lambda: [jnp.ones(2)] * 2,
                       r"\[float32\[2\], float32\[2\]\].* wants \(float32\[2\], float32\[2\]\)"),
    "one too few": (lambda key: [w(key), w(key)], lambda: [jnp.ones(2)],
                    r"\[float32\[2\]\].* wants \[float32\[2\], float32\[2\]\]"),
    "other keys": (lambda key: {"a": w(key)}, lambda: {"b": jnp.ones(2)},
                   r"{'b': float32\[2\]}.* wants {'a': float32\[2\]}"),
    "key of other type": (lambda key: {1: w(key)}, lambda: {"1": jnp.ones(2)},
                          r"{'1': float32\[2\]}.* wants {1: float32\[2\]}"),
    "None for an array": (lambda key: [w(key), w(key)], lambda: [jnp.ones(2), None],
                          r"\[float32\[2\], None\].* wants \[float32\[2\], float32\[2\]\]"),
    "array for None": (lambda key: [w(key), None], lambda: [jnp.ones(2), jnp.ones(2)],
                       r"\[float32\[2\], float32\[2\]\].* wants \[float32\[2\], None\]"),
    "tree for an array": (w, lambda: {"w": jnp.ones(2)},
                          r"{'w': float32\[2\]}.* wants float32\[2\]"),
    "array for a tree": (lambda key: [w(key)], lambda: jnp.ones(2),
                         r"is float32\[2\].* wants \[float32\[2\]\]"),
    "dict for a dataclass": (TREES["flax dataclass"], lambda: {"w": jnp.ones(2)},
                             r"{'w': float32\[2\]}.* wants Frozen\(w=float32\[2\]"),
    "box unboxed": (TREES["flax box"], lambda: jnp.ones(2),
                    r"is float32\[2\].* wants Partitioned\(value=float32\[2\]"),
    "other static part": (TREES["flax box"], lambda: nn.Partitioned(jnp.ones(2), ("mlp",)),
                          r"\('mlp',\).* wants .*\('embed',\)"),
    "other function": (lambda key: Module(w(key), lambda x: x + 1),
                       lambda: Module(jnp.ones(2), lambda x: x + 2), "lambda.* wants .*lambda"),
    "shape of a part": (lambda key: [w(key), w(key)], lambda: [jnp.ones(2), jnp.ones(3)],
                        r"\[float32\[2\], float32\[3\]\].* wants \[float32\[2\], float32\[2\]\]"),
    "no array": (lambda key: [w(key)], lambda: ["text"], r"\[\*\].* wants"),
}  # fmt: skip


@pytest.mark.parametrize("wrap", ["plain", "jit", "scan"])
@pytest.mark.parametrize("case", WRONG)
def test_another_structure_is_an_error_that_shows_both(case, wrap):
    make, other, shown = WRONG[case]
    net = jaxstate.parametrized(
        WRAPS[wrap](lambda x: x + total(jaxstate.param("p", make))), name="net"
    )
    var = jaxstate.parametrized(
        WRAPS[wrap](lambda x: x + total(jaxstate.variable("p", make, KEY).value)), name="net"
    )
    x = jnp.float32(1)
    with pytest.raises(jaxstate.ParameterMismatchError, match=f"(?s)'p.*{shown}"):
        net.apply({"p": other()}, x)
    with pytest.raises(jaxstate.ParameterMismatchError, match=r"'p.*wants"):
        net.parameters_from({net: {"p": other()}}, x)
    with pytest.raises(jaxstate.VariableMismatchError, match=f"(?s)'p.*{shown}"):
        var.apply_with_state({}, {"p": other()}, x)
    if case != "no array":
        made = net.init(KEY, x)  # and after an error it is as before
        np.testing.assert_allclose(net.apply(made, x), x + total(made), rtol=1e-6)


def test_one_name_for_two_structures_is_an_error_that_shows_both():
    def net(first, second, wrap):
        def use(make):
            return lambda x: x + total(jaxstate.param("p", make))

        return jaxstate.parametrized(lambda x: WRAPS[wrap](use(second))(use(first)(x)), name="net")

    for wrap in WRAPS:
        for case, (make, other, _) in WRONG.items():
            if case in ("no array", "shape of a part"):
                continue
            both = net(make, lambda key, other=other: other(), wrap)
            with pytest.raises(jaxstate.ParameterConflictError, match="'p' is used twice"):
                both.init(KEY, jnp.float32(1))


def test_a_write_of_another_structure_shows_both():
    @jaxstate.parametrized
    def net(other):
        v = jaxstate.variable("v", lambda: (jnp.zeros(2), None))
        v.value = other

    state = {"v": (jnp.zeros(2), None)}
    for other in ([jnp.zeros(2), None], (jnp.zeros(2), jnp.zeros(2)), jnp.zeros(2)):
        with pytest.raises(jaxstate.SlotTypeError, match=r"is \(float32\[2\], None\), and was"):
            net.apply_with_state({}, state, other)


def test_a_misspelt_attribute_of_a_variable_is_an_error():
    @jaxstate.parametrized
    def net(x):
        v = jaxstate.variable("v", jnp.zeros, ())
        v.vaule = x

    with pytest.raises(AttributeError, match="vaule"):
        net.apply_with_state({}, {"v": 0.0}, 1.0)


@pytest.mark.parametrize("bad", ["text", jnp.sin, object()])
def test_an_initializer_that_makes_no_arrays_is_named(bad):
    net = jaxstate.parametrized(lambda: jaxstate.param("p", lambda key: [w(key), bad]), name="net")
    match = r"initializer of parameter 'p' made (a function|.* no array)"
    for run in (lambda: net.init(KEY), lambda: net.apply({"p": jnp.ones(2)})):
        with pytest.raises(TypeError, match=match):
            run()


@given(st.recursive(
    st.sampled_from([None, ()]) | st.integers(1, 3),
    lambda parts: st.lists(parts, max_size=3)
    | st.lists(parts, max_size=3).map(tuple)
    | st.dictionaries(st.sampled_from("abc"), parts, max_size=3)
    | st.tuples(parts, parts).map(lambda p: Point(*p))
    | st.tuples(parts, parts).map(lambda p: Record(*p, n=1)),
).filter(lambda tree: tree is not None))  # fmt: skip
@settings(max_examples=30, deadline=None)
def test_any_tree(tree):
    """A number stands for an array of that length."""

    def make(key):
        return jax.tree.map(lambda n: normal(key, (n,)), tree)

    def use(x):
        return x + total(jaxstate.param("p", make)) + total(jaxstate.variable("v", make, KEY).value)

    net = jaxstate.parametrized(jax.jit(use), name="net")
    params, state = net.init_with_state(KEY, jnp.float32(0))
    if jax.tree.leaves(tree):
        assert shape_of(params) == shape_of({"p": make(KEY)})
        assert shape_of(state) == shape_of({"v": make(KEY)})
    else:  # nothing to be kept
        assert params == state == {}
    found, new = net.apply_with_state(params, state, jnp.float32(0))
    np.testing.assert_allclose(found, total((params, state)), rtol=1e-5, atol=1e-6)
    assert_equal(new, state)


# -- What keeps classes and instances alive --------------------------------------------------


class Slotted:
    __slots__ = ("size",)  # no weak references

    def __init__(self, size):
        self.size = size

    @jaxstate.parametrized
    def __call__(self, x):
        return x * jaxstate.param("w", jax.nn.initializers.ones, (self.size,)).sum()


def test_instances_are_not_kept():
    notes = Slotted.__call__._instances
    for _ in range(200):
        assert Slotted(2).__call__.init(KEY, 1.0).keys() == {"w"}
    gc.collect()
    assert len(notes._tokens) < 60
    kept = [Slotted(1) for _ in range(100)]
    first = [layer.__call__ for layer in kept]
    again = [layer.__call__ for layer in kept]
    assert [a._token for a in first] == [a._token for a in again]
