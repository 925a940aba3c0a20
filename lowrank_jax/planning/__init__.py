"""Which rank every layer gets: spectra, candidates, budgets, selectors and plans."""

from lowrank_jax.planning.budget import Budget
from lowrank_jax.planning.candidates import Candidate, Candidates
from lowrank_jax.planning.plans import Choice, Plan, Rest
from lowrank_jax.planning.selectors import (
    energy,
    evbmf,
    fixed,
    latency,
    log_energy,
    minmax,
    ratio,
    sensitivity,
    total_energy,
)
from lowrank_jax.planning.spectra import Spectra

__all__ = [
    "Budget",
    "Candidate",
    "Candidates",
    "Choice",
    "Plan",
    "Rest",
    "Spectra",
    "energy",
    "evbmf",
    "fixed",
    "latency",
    "log_energy",
    "minmax",
    "ratio",
    "sensitivity",
    "total_energy",
]
