"""Inner solves: each takes a tolerance and returns its achieved residual and an error bound."""

from tolerax.inner.flexible import FGMRES as FGMRES
from tolerax.inner.flexible import FlexibleCG as FlexibleCG
from tolerax.inner.general import GMRES as GMRES
from tolerax.inner.general import BiCGStab as BiCGStab
from tolerax.inner.krylov import CG as CG
from tolerax.inner.minimizers import LBFGS as LBFGS
from tolerax.inner.minimizers import AcceleratedGradient as AcceleratedGradient
from tolerax.inner.minimizers import NewtonCG as NewtonCG
from tolerax.inner.minres import MINRES as MINRES
from tolerax.inner.multigrid import Diffusion as Diffusion
from tolerax.inner.multigrid import Multigrid as Multigrid
from tolerax.inner.roots import NewtonKrylov as NewtonKrylov
from tolerax.inner.spectral import Laplacian as Laplacian
