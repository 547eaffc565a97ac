"""Solvers: what asks. Each talks to any problem through queries and evaluations."""

from tolerax.solvers.line_search import InexactLineSearch as InexactLineSearch
