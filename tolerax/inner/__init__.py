"""Inner solves: each takes a tolerance and returns its achieved residual and an error bound. And
where to look without derivatives: positive bases and points far from all others."""

from tolerax.inner.bicgstab import BiCGStab as BiCGStab
from tolerax.inner.covering import Cover as Cover
from tolerax.inner.covering import farthest_points as farthest_points
from tolerax.inner.direct import Direct as Direct
from tolerax.inner.flexible import FlexibleCG as FlexibleCG
from tolerax.inner.gmres import FGMRES as FGMRES
from tolerax.inner.gmres import GMRES as GMRES
from tolerax.inner.kkt import DenseKKT as DenseKKT
from tolerax.inner.kkt import KKTResult as KKTResult
from tolerax.inner.kkt import KKTSolver as KKTSolver
from tolerax.inner.kkt import KKTSystem as KKTSystem
from tolerax.inner.kkt import KrylovKKT as KrylovKKT
from tolerax.inner.kkt import SketchAndProject as SketchAndProject
from tolerax.inner.krylov import CG as CG
from tolerax.inner.levenberg_marquardt import BatchedLevenbergMarquardt as BatchedLevenbergMarquardt
from tolerax.inner.levenberg_marquardt import LeastSquaresResult as LeastSquaresResult
from tolerax.inner.lines import AlternatingLines as AlternatingLines
from tolerax.inner.matrix_free import GaussNewtonCG as GaussNewtonCG
from tolerax.inner.metric import Metric as Metric
from tolerax.inner.minimizers import LBFGS as LBFGS
from tolerax.inner.minimizers import AcceleratedGradient as AcceleratedGradient
from tolerax.inner.minimizers import NewtonCG as NewtonCG
from tolerax.inner.minres import MINRES as MINRES
from tolerax.inner.multigrid import Diffusion as Diffusion
from tolerax.inner.multigrid import Multigrid as Multigrid
from tolerax.inner.nystrom import Nystrom as Nystrom
from tolerax.inner.positive_bases import cosine_measure as cosine_measure
from tolerax.inner.positive_bases import positive_basis as positive_basis
from tolerax.inner.positive_bases import rotation as rotation
from tolerax.inner.recycled import Recycled as Recycled
from tolerax.inner.refinement import refine as refine
from tolerax.inner.residuals import Pointwise as Pointwise
from tolerax.inner.roots import NewtonKrylov as NewtonKrylov
from tolerax.inner.spectral import Laplacian as Laplacian
