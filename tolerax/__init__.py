"""Optimization in JAX for problems whose evaluations are never exact."""

from tolerax.check import check_gradient as check_gradient
from tolerax.contracts import Accuracy as Accuracy
from tolerax.contracts import Evaluation as Evaluation
from tolerax.contracts import Problem as Problem
from tolerax.contracts import Provenance as Provenance
from tolerax.contracts import Query as Query
from tolerax.contracts import Solver as Solver
from tolerax.contracts import Start as Start
from tolerax.contracts import Work as Work
from tolerax.driver import solve as solve
from tolerax.minimize import minimize as minimize
from tolerax.minimize import scipy_method as scipy_method
from tolerax.problems import AdaptiveSteps as AdaptiveSteps
from tolerax.problems import Bilevel as Bilevel
from tolerax.problems import Boxes as Boxes
from tolerax.problems import Equation as Equation
from tolerax.problems import HardConstrained as HardConstrained
from tolerax.problems import Implicit as Implicit
from tolerax.problems import ImplicitEuler as ImplicitEuler
from tolerax.problems import LeastSquares as LeastSquares
from tolerax.problems import NeuralSurrogate as NeuralSurrogate
from tolerax.problems import Objective as Objective
from tolerax.problems import PDEConstrained as PDEConstrained
from tolerax.problems import TimeDependent as TimeDependent
from tolerax.problems import Workers as Workers
from tolerax.problems import batched_least_squares as batched_least_squares
from tolerax.problems import proved as proved
from tolerax.restarts import solve_with_restarts as solve_with_restarts
from tolerax.solution import Solution as Solution
from tolerax.solvers import CBO as CBO
from tolerax.solvers import CDSM as CDSM
from tolerax.solvers import HOAG as HOAG
from tolerax.solvers import MAID as MAID
from tolerax.solvers import BatchedLevenbergMarquardt as BatchedLevenbergMarquardt
from tolerax.solvers import DirectionalAttack as DirectionalAttack
from tolerax.solvers import ExactAugmentedLagrangian as ExactAugmentedLagrangian
from tolerax.solvers import InexactLineSearch as InexactLineSearch
from tolerax.solvers import InexactNewton as InexactNewton
from tolerax.solvers import ModelTrustRegion as ModelTrustRegion
from tolerax.status import PointStatus as PointStatus
from tolerax.status import Status as Status
from tolerax.training import Forcing as Forcing
from tolerax.training import train as train

__version__ = "0.1.0"
