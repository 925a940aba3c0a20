"""Which rank every layer gets: spectra, candidates, budgets, selectors and plans."""

from lowrank_jax.planning.budget import Budget as Budget
from lowrank_jax.planning.candidates import Candidate as Candidate
from lowrank_jax.planning.candidates import Candidates as Candidates
from lowrank_jax.planning.plans import Choice as Choice
from lowrank_jax.planning.plans import Plan as Plan
from lowrank_jax.planning.plans import Rest as Rest
from lowrank_jax.planning.selectors import energy as energy
from lowrank_jax.planning.selectors import evbmf as evbmf
from lowrank_jax.planning.selectors import fixed as fixed
from lowrank_jax.planning.selectors import latency as latency
from lowrank_jax.planning.selectors import log_energy as log_energy
from lowrank_jax.planning.selectors import minmax as minmax
from lowrank_jax.planning.selectors import ratio as ratio
from lowrank_jax.planning.selectors import sensitivity as sensitivity
from lowrank_jax.planning.selectors import total_energy as total_energy
from lowrank_jax.planning.spectra import Spectra as Spectra
