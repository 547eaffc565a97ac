"""Solvers: what asks. Each talks to any problem through queries and evaluations."""

from tolerax.solvers.hoag import HOAG as HOAG
from tolerax.solvers.line_search import InexactLineSearch as InexactLineSearch
from tolerax.solvers.maid import MAID as MAID
