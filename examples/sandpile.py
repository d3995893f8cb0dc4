"""A sandpile: a program written like NumPy, with arrays that change, compiled into one loop.

Grains fall on the middle of a table. A place with four grains or more topples: it gives one to each
of its neighbours, which may topple in turn. What is left is a fractal. (P. Bak, C. Tang and K.
Wiesenfeld, Self-organized criticality, Physical Review Letters 59, 1987.) Run it with::

    python examples/sandpile.py

What to look at: `settle` changes the array that it is given, and `lax.while_loop` is JAX's own. It
is given functions that take nothing and return nothing; its condition reads the array that its body
changes. Outside of `jaxstate.inplace` the functions are pure: they can be jitted, and mapped over
several tables.
"""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

import jaxstate

SIZE = 121
GRAINS = 20_000
FRAMES = 80
OUTPUT = Path(__file__).parent / "output"


def settle(table):
    """Topples until no place has more than three grains; what falls off the edge is gone."""

    def topple(_):
        give = table // 4
        table[:] -= 4 * give
        table[1:] += give[:-1]
        table[:-1] += give[1:]
        table[:, 1:] += give[:, :-1]
        table[:, :-1] += give[:, 1:]

    jax.lax.while_loop(lambda _: table.max() > 3, topple, None)


@jax.jit
@jaxstate.inplace
def drop(table, grains):
    """The table after so many more grains fell on its middle."""
    middle = len(table) // 2
    table[middle, middle] += grains
    settle(table)
    return table


def animate(tables):
    import matplotlib.pyplot as plt
    from matplotlib.animation import FuncAnimation, PillowWriter

    plt.switch_backend("Agg")  # the figures go to files, so no display is needed
    OUTPUT.mkdir(exist_ok=True)
    figure = plt.figure(figsize=(3, 3))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_axis_off()
    picture = axes.imshow(tables[-1], cmap="magma", vmin=0, vmax=3)
    figure.savefig(OUTPUT / "sandpile.png", dpi=100)
    animation = FuncAnimation(figure, lambda i: picture.set_data(tables[i]), len(tables))
    animation.save(OUTPUT / "sandpile.gif", PillowWriter(fps=20))
    print(f"written: {OUTPUT / 'sandpile.gif'} and sandpile.png")


def main():
    tables = [jnp.zeros((SIZE, SIZE), int)]
    for _ in range(FRAMES):
        tables.append(drop(tables[-1], GRAINS // FRAMES))
    print("places with 0, 1, 2 and 3 grains:", np.bincount(tables[-1].ravel(), minlength=4))
    animate(tables)


if __name__ == "__main__":
    main()
