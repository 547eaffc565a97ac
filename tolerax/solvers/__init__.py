"""Solvers: what asks. Each talks to any problem through queries and evaluations."""

from tolerax.inner.levenberg_marquardt import BatchedLevenbergMarquardt as BatchedLevenbergMarquardt
from tolerax.solvers.attack import DirectionalAttack as DirectionalAttack
from tolerax.solvers.augmented_lagrangian import (
    ExactAugmentedLagrangian as ExactAugmentedLagrangian,
)
from tolerax.solvers.cbo import CBO as CBO
from tolerax.solvers.cdsm import CDSM as CDSM
from tolerax.solvers.consensus import Anisotropic as Anisotropic
from tolerax.solvers.consensus import Covariance as Covariance
from tolerax.solvers.consensus import EffectiveSampleSize as EffectiveSampleSize
from tolerax.solvers.consensus import HardMinimum as HardMinimum
from tolerax.solvers.consensus import Isotropic as Isotropic
from tolerax.solvers.consensus import Polarized as Polarized
from tolerax.solvers.consensus import Quantile as Quantile
from tolerax.solvers.consensus import RankWeights as RankWeights
from tolerax.solvers.consensus import SoftConsensus as SoftConsensus
from tolerax.solvers.freezing import ConsensusFreezing as ConsensusFreezing
from tolerax.solvers.hoag import HOAG as HOAG
from tolerax.solvers.hopping import ConsensusHopping as ConsensusHopping
from tolerax.solvers.kalman import EnsembleKalmanInversion as EnsembleKalmanInversion
from tolerax.solvers.line_search import InexactLineSearch as InexactLineSearch
from tolerax.solvers.maid import MAID as MAID
from tolerax.solvers.manifolds import Ball as Ball
from tolerax.solvers.manifolds import MirrorMap as MirrorMap
from tolerax.solvers.manifolds import Simplex as Simplex
from tolerax.solvers.manifolds import Sphere as Sphere
from tolerax.solvers.manifolds import Stiefel as Stiefel
from tolerax.solvers.model_trust_region import ModelTrustRegion as ModelTrustRegion
from tolerax.solvers.newton import InexactNewton as InexactNewton
from tolerax.solvers.sampling import ConsensusSampling as ConsensusSampling
