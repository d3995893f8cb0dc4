"""A module that a call of an object makes is, in every call of that object, the same one.

The references thread two weights by hand.
"""

import copy
import functools
import gc

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jaxstate
from jaxstate_tests.sampling import part_of_product

KEY = jax.random.key(3)
X = jnp.float32(0.7)


def scale(name="scale"):
    """A new module."""

    @jaxstate.parametrized(name=name)
    def module(x):
        return x * jaxstate.param("s", jax.nn.initializers.uniform(2.0), ())

    return module


class Scale:
    @jaxstate.parametrized(name="scale")
    def __call__(self, x):
        return x * jaxstate.param("s", jax.nn.initializers.uniform(2.0), ())


class Pair:
    """An instance that makes an instance, and asks for one method by another."""

    def __init__(self):
        self.part = Scale()

    @jaxstate.parametrized(name="scale")
    def __call__(self, x):
        return self.part(x)


def in_loop(x):
    return lax.fori_loop(0, 1, lambda i, x: scale()(x), x)


# What makes a module and uses it.
MAKERS = {
    "function": lambda x: scale()(x),
    "instance": lambda x: Scale()(x),
    "instance in an instance": lambda x: Pair()(x),
    "in jit": lambda x: jax.jit(lambda x: scale()(x))(x),
    "in one cached jit": jax.jit(lambda x: scale()(x)),
    "in one cached jit, an instance": jax.jit(lambda x: Scale()(x)),
    "in one cached jit in another": jax.jit(lambda x: CACHED(x)),
    "in checkpoint": jax.checkpoint(lambda x: scale()(x)),
    "in a loop": in_loop,
    "in a module that is made": lambda x: jaxstate.parametrized(
        lambda x: scale()(x), name="scale"
    )(x),
    "in a vmap": lambda x: jax.vmap(lambda x: scale()(x))(x[None])[0],
    "in a branch": lambda x: lax.cond(x > -100, lambda x: scale()(x), lambda x: x, x),
    "copied": lambda x: copy.copy(OUTSIDE)(x),
}  # fmt: skip
CACHED = jax.jit(lambda x: scale()(x))
OUTSIDE = scale()


def calls(f, x):
    """Four calls, which differ in what stands around them."""
    x = f(x)
    x = jax.jit(f)(x)
    return lax.cond(x > 0, f, lambda x: x, f(x))


def scanned(f, x):
    return lax.scan(lambda x, _: (f(x), f(x)), x, None, length=3)[0]


def until(f, x):
    return lax.while_loop(lambda c: c[0] < 3, lambda c: (c[0] + 1, f(c[1])), (0, x))[1]


# What calls an object three or four times.
CALLERS = {
    "Python loop": lambda f, x: functools.reduce(lambda x, _: f(x), range(3), x),
    "fori_loop": lambda f, x: lax.fori_loop(0, 3, lambda i, x: f(x), x),
    "scan": scanned,
    "while_loop": until,
    "one jitted, called twice": lambda f, x: (lambda g: g(g(x)))(jax.jit(f)),
    "jit, then plain": lambda f, x: f(jax.jit(f)(f(x))),
    "checkpoint": lambda f, x: (lambda g: g(g(x)))(jax.checkpoint(f)),
    "branches and others": calls,
    "vmap": lambda f, x: jax.vmap(f)(jnp.stack([x, f(x)])).sum(),
    "grad": lambda f, x: f(x) + jax.grad(lambda x: f(f(x)))(x),
    "loop in loop": lambda f, x: lax.fori_loop(
        0, 2, lambda i, x: lax.fori_loop(0, 2, lambda j, x: f(x), f(x)), x
    ),
}  # fmt: skip


def twice(make):
    """An object with two modules, made whenever it is called."""

    @jaxstate.parametrized
    def enc(x):
        return jnp.sin(make(x)) + make(x)

    return enc


@pytest.mark.parametrize("make, call", part_of_product(2, MAKERS, CALLERS))
def test_every_call_of_an_object_has_the_modules_of_the_first(make, call):
    enc, run = twice(MAKERS[make]), CALLERS[call]
    net = jaxstate.parametrized(lambda x: run(enc, x), name="net")
    params = net.init(KEY, X)
    assert list(params) == ["enc"] and list(params["enc"]) == ["scale", "scale_1"]
    a, b = jax.tree.leaves(params)

    def by_hand(x):
        return jnp.sin(x * a) + x * b

    wanted = run(by_hand, X)
    gc.collect()
    np.testing.assert_allclose(net.apply(params, X), wanted, rtol=1e-5)


@pytest.mark.parametrize("make, call", part_of_product(2, MAKERS, CALLERS))
def test_without_jit_it_is_the_same(make, call):
    enc, run = twice(MAKERS[make]), CALLERS[call]
    if (make, call) == ("in a branch", "vmap"):
        return  # JAX runs this branch as Python in the plain call, and traces it under vmap
    net = jaxstate.parametrized(lambda x: run(enc, x), name="net")
    tree = jax.tree.structure(jax.eval_shape(net.init, KEY, X))
    params = tree.unflatten([0.5, 1.5])
    with jax.disable_jit():
        found = net.apply(params, X)
    np.testing.assert_allclose(found, run(lambda x: jnp.sin(x * 0.5) + x * 1.5, X), rtol=1e-5)


def test_without_jit_a_branch_that_is_not_run_is_an_error():
    @jaxstate.parametrized
    def net(x):
        return lax.cond(x > 0, lambda x: scale()(x), lambda x: scale()(2 * x), x)

    params = net.init(KEY, X)
    with jax.disable_jit(), pytest.raises(jaxstate.NameClashError, match="2 modules 'scale' when"):
        net.apply(params, -X)
    s = params["scale_1"]["s"]
    np.testing.assert_allclose(net.apply(params, -X), -2 * X * s, rtol=1e-6)


@pytest.mark.parametrize("call", CALLERS)
def test_what_the_branches_and_the_condition_of_a_loop_make_are_others(call):
    enc = jaxstate.parametrized(
        lambda x: lax.while_loop(
            lambda x: scale()(x) > 100,
            lambda x: scale()(x),
            lax.cond(x > 0, lambda x: scale()(x), lambda x: -scale()(x), x),
        ),
        name="enc",
    )
    run = CALLERS[call]
    net = jaxstate.parametrized(lambda x: run(enc, x), name="net")
    if call == "grad":
        return  # JAX has no reverse mode for while_loop
    assert list(net.init(KEY, X)["enc"]) == ["scale", "scale_1", "scale_2", "scale_3"]
    params = {"scale": 3.0, "scale_1": 5.0, "scale_2": 0.0, "scale_3": 0.0}
    params = {"enc": {name: {"s": s} for name, s in params.items()}}
    wanted = run(lambda x: jnp.where(x > 0, 3.0, -5.0) * x, -X)
    np.testing.assert_allclose(net.apply(params, -X), wanted, rtol=1e-6)


def test_which_one_is_said_by_the_order_in_which_they_are_made():
    """Not by that in which they are used."""

    @jaxstate.parametrized
    def enc(x, backwards):
        first, second = scale(), scale()
        return first(second(x) + 1) if backwards else second(first(x) + 1)

    net = jaxstate.parametrized(lambda x: enc(enc(x, True), False), name="net")
    # The first that is used, and gets the name without suffix, is the second that is made.
    params = {"enc": {"scale": {"s": 2.0}, "scale_1": {"s": 5.0}}}
    x = 5 * (2 * X + 1)
    np.testing.assert_allclose(net.apply(params, X), 2 * (5 * x + 1), rtol=1e-6)


def test_modules_of_other_names_or_functions_and_in_other_scopes_are_others():
    @jaxstate.parametrized
    def enc(x, which):
        if which == "a":
            return scale("a")(x)
        if which == "twice":
            return jaxstate.parametrized(lambda x: 2 * scale()(x), name="b")(x)
        with jaxstate.scope(which):
            return scale("b")(x)

    net = jaxstate.parametrized(
        lambda x: [enc(x, w) for w in ("a", "b", "c", "b", "twice", "a")], name="net"
    )
    params = net.init(KEY, X)["enc"]
    assert jax.tree.map(jnp.shape, params) == {
        "a": {"s": ()},
        "b": {"b": {"s": ()}},
        "c": {"b": {"s": ()}},
        "b_1": {"scale": {"s": ()}},
    }
    a, b, c, d = (params["a"], params["b"]["b"], params["c"]["b"], params["b_1"]["scale"])
    wanted = [X * a["s"], X * b["s"], X * c["s"], X * b["s"], 2 * X * d["s"], X * a["s"]]
    np.testing.assert_allclose(net.apply({"enc": params}, X), wanted, rtol=1e-6)


def test_recursion():
    @jaxstate.parametrized
    def power(x, n):
        return scale()(x if n == 0 else power(x, n - 1))

    params = power.init(KEY, X, 3)
    assert jax.tree.map(jnp.shape, params) == {"scale": {"s": ()}}
    s = params["scale"]["s"]
    np.testing.assert_allclose(power.apply(params, X, 3), X * s**4, rtol=1e-5)
    net = jaxstate.parametrized(lambda x: power(power(x, 1), 2), name="net")
    np.testing.assert_allclose(net.apply({"power": params}, X), X * s**5, rtol=1e-5)


@pytest.mark.parametrize("make", MAKERS)
def test_reuse(make):
    enc = twice(MAKERS[make])
    small = jaxstate.parametrized(lambda x: enc(x), name="small")
    large = jaxstate.parametrized(
        lambda x: lax.fori_loop(0, 2, lambda i, x: enc(x), scale()(enc(x))), name="large"
    )
    trained = small.init(KEY, X)
    params = large.init(jax.random.key(1), X, reuse={small: trained})
    assert jax.tree.leaves(params["enc"]) == jax.tree.leaves(trained["enc"])
    own = enc.init(KEY, X)
    params = large.parameters_from({large: params, enc: own}, X)
    assert jax.tree.leaves(params["enc"]) == jax.tree.leaves(own)


def test_stacks():
    block = twice(MAKERS["function"])

    @jaxstate.parametrized
    def enc(x):
        return jaxstate.stack(block, 2)(x)

    net = jaxstate.parametrized(
        lambda x: lax.fori_loop(0, 2, lambda i, x: enc(x), enc(x)), name="n"
    )
    params = net.init(KEY, X)
    layers = params["enc"]["stack"]["layers"]
    x, (a, b) = X, jax.tree.leaves(layers)
    for _ in range(3):
        for i in range(2):
            x = jnp.sin(x * a[i]) + x * b[i]
    np.testing.assert_allclose(net.apply(params, X), x, rtol=1e-5)


def test_variables_are_those_of_the_same_module():
    def counter():
        @jaxstate.parametrized
        def count(x):
            n = jaxstate.variable("n", jnp.zeros, ())
            n.value += 1
            return x + n.value

        return count

    enc = jaxstate.parametrized(lambda x: counter()(x), name="enc")
    times = {"Python loop": 3, "fori_loop": 3, "scan": 6, "while_loop": 3, "jit, then plain": 3}
    times |= {"one jitted, called twice": 2, "checkpoint": 2, "loop in loop": 6}
    for name, n in times.items():
        run = CALLERS[name]
        net = jaxstate.parametrized(lambda x, run=run: run(enc, x), name="net")
        state = net.init_with_state(KEY, X)[1]
        assert jax.tree.structure(state) == jax.tree.structure({"enc": {"count": {"n": 0}}})
        assert net.apply_with_state({}, state, X)[1]["enc"]["count"]["n"] == n


@pytest.mark.leaks_allowed("the checker turns JAX's caches off")
def test_a_cached_jaxpr_in_other_runs_and_networks():
    """It was traced in a call of an object, and is used when that was called before, or not yet."""
    enc = twice(MAKERS["in one cached jit"])
    traced = []

    @jax.jit
    def f(x):
        traced.append(1)
        return enc(x)

    runs = {
        1: lambda x: f(x),
        3: lambda x: enc(f(enc(x))),
        2: lambda x: f(enc(x)),
        4: lambda x: f(f(enc(f(x)))),
    }
    for n, run in runs.items():
        net = jaxstate.parametrized(run, name="net")
        for a, b in ((2.0, 3.0), (5.0, 7.0)):
            params, wanted = {"enc": {"scale": {"s": a}, "scale_1": {"s": b}}}, X
            for _ in range(n):
                wanted = jnp.sin(wanted * a) + wanted * b
            np.testing.assert_allclose(net.apply(params, X), wanted, rtol=1e-5)
    assert len(traced) == 1


# -- Modules that a call makes and an object keeps -------------------------------------------

KEPT = {
    "plain": lambda self: self.kept,
    "in a new jit": lambda self: jax.jit(self.kept),
    "in one jit": lambda self: self.__dict__.setdefault("jitted", jax.jit(self.kept)),
    "in checkpoint": lambda self: jax.checkpoint(self.kept),
    "in a loop": lambda self: lambda x: lax.fori_loop(0, 1, lambda i, x: self.kept(x), x),
    "in lanes": lambda self: lambda x: jax.vmap(self.kept)(x[None])[0],
}


def keeping(use, make):
    """An object that makes a module in its first call, and another one in each."""

    class Keeping:
        kept = None

        @jaxstate.parametrized(name="part")
        def __call__(self, x):
            if self.kept is None:
                self.kept = make()
            y = use(self)(x)
            return make()(y) + 5 * use(self)(x)

    return Keeping()


@pytest.mark.parametrize("make", [scale, Scale], ids=["function", "instance"])
@pytest.mark.parametrize("use", KEPT.values(), ids=KEPT)
def test_what_an_object_keeps_is_another_module_than_it_makes(use, make):
    """Also in the second ``apply``, which finds it."""
    params = {"part": {"scale": {"s": jnp.float32(2)}, "scale_1": {"s": jnp.float32(3)}}}

    def by_hand(x):
        return 3 * (2 * x) + 5 * (2 * x)

    def net(part):
        return jaxstate.parametrized(lambda x: part(part(x)), name="net")

    first, fresh = net(keeping(use, make)), net(keeping(use, make))
    assert jax.tree.structure(first.init(KEY, X)) == jax.tree.structure(params)
    for apply in (first.apply, fresh.apply, fresh.apply, jax.jit(fresh.apply)):
        np.testing.assert_allclose(apply(params, X), by_hand(by_hand(X)), rtol=1e-6)


@pytest.mark.parametrize("make", [scale, Scale], ids=["function", "instance"])
def test_a_kept_module_that_could_be_one_that_was_made_is_an_error(make):
    class Keeping:
        kept = None

        @jaxstate.parametrized
        def __call__(self, x):
            new = make()
            if self.kept is None:
                self.kept, new = new, make()
            return new(self.kept(x))

    part = Keeping()
    net = jaxstate.parametrized(lambda x: part(part(x)), name="net")
    with pytest.raises(jaxstate.NameClashError, match=r"'scale' that an earlier call .* is kept"):
        net.init(KEY, X)


def test_a_module_that_calls_itself_may_use_its_parts_after_that():
    """An inner call makes the same ones."""

    @jaxstate.parametrized
    def nest(x, depth=2):
        part = scale()
        return part(nest(x, depth - 1)) if depth else part(x)

    params = nest.init(KEY, X)
    assert jax.tree.structure(params) == jax.tree.structure({"scale": {"s": 0}})
    np.testing.assert_allclose(nest.apply({"scale": {"s": 2.0}}, X), 8 * X)
