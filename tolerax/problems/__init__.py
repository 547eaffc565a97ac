"""Problems: what answers queries. Ready-made instances are in `tolerax.problems.library`."""

from tolerax.problems.adaptive_steps import AdaptiveSteps as AdaptiveSteps
from tolerax.problems.bilevel import Bilevel as Bilevel
from tolerax.problems.bilevel import SumOver as SumOver
from tolerax.problems.constants import proved as proved
from tolerax.problems.energy import Energy as Energy
from tolerax.problems.energy import Euclidean as Euclidean
from tolerax.problems.full_space import FullSpace as FullSpace
from tolerax.problems.full_space import MatchedSchur as MatchedSchur
from tolerax.problems.implicit import BackwardReport as BackwardReport
from tolerax.problems.implicit import Implicit as Implicit
from tolerax.problems.implicit_euler import ImplicitEuler as ImplicitEuler
from tolerax.problems.lanes import InLanes as InLanes
from tolerax.problems.lanes import batched_least_squares as batched_least_squares
from tolerax.problems.least_squares import LeastSquares as LeastSquares
from tolerax.problems.norms import CrossBounds as CrossBounds
from tolerax.problems.objective import Objective as Objective
from tolerax.problems.onnx import read_onnx as read_onnx
from tolerax.problems.pde import PDEConstrained as PDEConstrained
from tolerax.problems.stability import Stability as Stability
from tolerax.problems.surrogate import NeuralSurrogate as NeuralSurrogate
from tolerax.problems.time_dependent import TimeDependent as TimeDependent
from tolerax.problems.workers import Workers as Workers
