"""Real objects whose arrays are slots: what `jaxstate.mutate` is made of.

Between the places where JAX calls functions of the program, nothing is intercepted: an assignment
just happens. In those places the objects are looked at, and compared with what they were.

* `objects`: where objects of Python keep their parts, and how one is made of given parts.
* `references`: functions that close over objects, weak references, and iterators.
* `graph`: what objects there are and where their arrays are, static and hashable.
* `node`: what was seen of one object.
* `looking`: the looking.
* `walk`: what was seen.
* `addresses`: the slots of arrays and of the structure, as they stand in a jaxpr.
* `equations`: the equations that read and write them.
* `one_level`: objects that may not be assigned to.
* `session`: the objects of one call of `mutate`, which answer for these addresses.
* `copies`: objects that JAX calls functions with, put together anew.
* `holding`: whether the program holds an object that a loop replaces.
* `frames`: what happens to the objects where a trace begins and ends.
* `operands`: an object that is passed to a loop, branch or jitted function goes by reference.
* `boundaries`: the places, and what is done there.
* `frozen`: assignments to objects of classes that refuse them.
* `mutate`: the function.
"""
