"""What a run will cost on hardware that is not here: memory, collectives, time."""

from latent_loop.planner.plan import Plan, plan, summary
from latent_loop.planner.table import describe

__all__ = ['Plan', 'describe', 'plan', 'summary']
