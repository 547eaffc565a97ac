"""Ready-made problems, held in memory from installed packages: nothing is downloaded.

Bilevel problems:

| function | x | y | constants |
|---|---|---|---|
| [`quadratic`][] | 10 numbers | 10 numbers | proved; closed form |
| [`digits_penalties`][] | 640 log-penalties | softmax weights | proved but for the upper level |
| [`tv_denoising`][] | log weight, log smoothing | 10 pictures | proved |
| [`field_of_experts`][] | 217: filters, weights, smoothings | 10 pictures | proved |
| [`hyper_cleaning`][] | a weight a sample | softmax weights | proved |

Each returns a [`LibraryProblem`][] with `problem`, `x0`, `description` and what reporting needs.

PDE-constrained, on grids of any size and with optima that are known, as a [`PDEExample`][] each:

| function | x | y | equation |
|---|---|---|---|
| [`poisson_control`][] | n x n source | state | `A y = u`; constants proved |
| [`semilinear_control`][] | n x n source | state | `A y + y^3 = u + s`, or with `exp(y)` |
| [`coefficient_inversion`][] | coefficient | state | `-div(exp(m) grad y) = f` |

Evolving in time, likewise, as an [`EvolutionExample`][] each:

| function | x | y | equation |
|---|---|---|---|
| [`heat_initial_condition`][] | n x n, at time 0 | n x n | `dy/dt = -kappa A y` |
| [`burgers_control`][] | steps x n | n | `dy/dt + (y^2 / 2)_s = nu y_ss + u + s` |

Trained networks, as a [`LibrarySurrogate`][] each; the networks are trained when called:

| function | x | network | constraints |
|---|---|---|---|
| [`image_mixture`][] | 100 weights of pictures | convolutional classifier | bounds |
| [`digits_counterfactual`][] | 64 latent variables | decoder and classifier | class, shell |
| [`reactor`][] | coolant, duration | trajectories of a reactor | temperature, conversion, purity |

Families of equations for networks that end in [`HardConstrained`][], with a reference solver whose
fields can be kept on disk and a network each (a [`FourierOperator`][]):

| family | network | equation |
|---|---|---|
| [`DiffusionSorption`][] | [`SorptionBasis`][] | `m(u)_t = D u_xx` |
| [`NavierStokes`][] | [`VorticityBasis`][] | `w_t + u w_x + v w_y = nu (w_xx + w_yy) + f` |

`seed` draws splits, crops, noise and label flips: tune on some seeds and report on others.

>>> from tolerax.problems.library import quadratic
>>> print(quadratic(n=50, d=3).description)
Quadratic, closed form: y and x in R^3, 50 rows, noise 0.01, seed 0...
"""

from tolerax.problems.library.base import LibraryProblem as LibraryProblem
from tolerax.problems.library.cleaning import HyperCleaning as HyperCleaning
from tolerax.problems.library.cleaning import hyper_cleaning as hyper_cleaning
from tolerax.problems.library.closed_form import Quadratic as Quadratic
from tolerax.problems.library.closed_form import quadratic as quadratic
from tolerax.problems.library.diffusion_sorption import DiffusionSorption as DiffusionSorption
from tolerax.problems.library.diffusion_sorption import Soil as Soil
from tolerax.problems.library.diffusion_sorption import SorptionBasis as SorptionBasis
from tolerax.problems.library.evolution import EvolutionExample as EvolutionExample
from tolerax.problems.library.evolution import burgers_control as burgers_control
from tolerax.problems.library.evolution import heat_initial_condition as heat_initial_condition
from tolerax.problems.library.experts import field_of_experts as field_of_experts
from tolerax.problems.library.navier_stokes import Flow as Flow
from tolerax.problems.library.navier_stokes import NavierStokes as NavierStokes
from tolerax.problems.library.navier_stokes import VorticityBasis as VorticityBasis
from tolerax.problems.library.operators import FourierOperator as FourierOperator
from tolerax.problems.library.pde import PDEExample as PDEExample
from tolerax.problems.library.pde import coefficient_inversion as coefficient_inversion
from tolerax.problems.library.pde import poisson_control as poisson_control
from tolerax.problems.library.pde import semilinear_control as semilinear_control
from tolerax.problems.library.penalties import DigitsPenalties as DigitsPenalties
from tolerax.problems.library.penalties import digits_penalties as digits_penalties
from tolerax.problems.library.pictures import Denoising as Denoising
from tolerax.problems.library.surrogates import LibrarySurrogate as LibrarySurrogate
from tolerax.problems.library.surrogates import digits_counterfactual as digits_counterfactual
from tolerax.problems.library.surrogates import image_mixture as image_mixture
from tolerax.problems.library.surrogates import reactor as reactor
from tolerax.problems.library.total_variation import tv_denoising as tv_denoising
