"""The only folder that imports ``jax._src`` or looks at a JAX version.

Everything jaxstate needs from JAX beyond the public API has a name here, with one meaning on
every supported version (`versions.SUPPORTED`). Where versions differ, the difference ends in
this folder.

JAX changed most at 0.11: there a jaxpr carries its own constants (before, only a ``ClosedJaxpr``
did), and scan describes its operands with trees. Both came with the module ``flattree``.
"""

# ruff: noqa: E402
from jaxstate._src._jax.versions import *
from jaxstate._src._jax.versions import check

check()  # before anything takes what may not be there

from jaxstate._src._jax.building import *
from jaxstate._src._jax.calls import *
from jaxstate._src._jax.context import *
from jaxstate._src._jax.custom_rules import *
from jaxstate._src._jax.frames import *
from jaxstate._src._jax.hooks import *
from jaxstate._src._jax.jaxprs import *
from jaxstate._src._jax.meshes import *
from jaxstate._src._jax.names import *
from jaxstate._src._jax.params import *
from jaxstate._src._jax.registries import *
from jaxstate._src._jax.solves import *
from jaxstate._src._jax.tracers import *
from jaxstate._src._jax.traces import *
from jaxstate._src._jax.types import *
from jaxstate._src._jax.wrappers import *
from jaxstate._src._jax.wrappers_in_place import *
from jaxstate._src._jax.wrappers_of_calls import *
