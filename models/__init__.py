"""Learned dynamics: neural ensembles, their training and how their uncertainty is propagated."""

from mbrl.models.bayesian import BayesianConfig, BayesianModel, BayesianTrainer
from mbrl.models.calibration import (
    Calibration,
    HorizonError,
    calibrate,
    disagreement_and_error,
    horizon_error,
    recalibrate,
)
from mbrl.models.casadi_export import casadi_expression, casadi_function, casadi_weights
from mbrl.models.disagreement import DisagreementCost, WithDisagreement
from mbrl.models.ensemble import Ensemble, Prediction
from mbrl.models.exported import Exported, scenarios
from mbrl.models.heads import HeadsCost, WithHeads, from_heads
from mbrl.models.linear import LinearGaussian, LinearModel
from mbrl.models.networks import EnsembleMLP
from mbrl.models.propagation import TS1, MeanDynamics, MomentMatching, Propagation, Thompson, TSInf
from mbrl.models.storage import load_ensemble, save_ensemble
from mbrl.models.training import Epoch, Fit, FitConfig, Trainer
from mbrl.models.trust_region import TrustRegion, trust_region

__all__ = [
    "TS1",
    "BayesianConfig",
    "BayesianModel",
    "BayesianTrainer",
    "Calibration",
    "DisagreementCost",
    "Ensemble",
    "EnsembleMLP",
    "Epoch",
    "Exported",
    "Fit",
    "FitConfig",
    "HeadsCost",
    "HorizonError",
    "LinearGaussian",
    "LinearModel",
    "MeanDynamics",
    "MomentMatching",
    "Prediction",
    "Propagation",
    "TSInf",
    "Thompson",
    "Trainer",
    "TrustRegion",
    "WithDisagreement",
    "WithHeads",
    "calibrate",
    "casadi_expression",
    "casadi_function",
    "casadi_weights",
    "disagreement_and_error",
    "from_heads",
    "horizon_error",
    "load_ensemble",
    "recalibrate",
    "save_ensemble",
    "scenarios",
    "trust_region",
]
