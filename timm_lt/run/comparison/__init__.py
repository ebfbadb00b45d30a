"""Comparisons: a grid of representations and heads, run over seeds, in a paper's own layout.

A grid is a YAML file: a recipe, named changes to it, and the rows and columns of a table. Every
representation and seed is one run of the main job; what rows share is trained once.
"""

from timm_lt.run.comparison.grid import Grid as Grid
from timm_lt.run.comparison.grid import find_grid as find_grid
from timm_lt.run.comparison.grid import load_grid as load_grid
from timm_lt.run.comparison.grid import shipped_grids as shipped_grids
from timm_lt.run.comparison.output import OUTPUTS as OUTPUTS
from timm_lt.run.comparison.output import check_output as check_output
from timm_lt.run.comparison.output import open_output as open_output
from timm_lt.run.comparison.output import write_results as write_results
from timm_lt.run.comparison.plan import Plan as Plan
from timm_lt.run.comparison.plan import make_plan as make_plan
from timm_lt.run.comparison.results import CellFigures as CellFigures
from timm_lt.run.comparison.results import collect as collect
from timm_lt.run.comparison.runs import Outcome as Outcome
from timm_lt.run.comparison.runs import run_all as run_all
from timm_lt.run.comparison.tables import markdown_table as markdown_table
from timm_lt.run.comparison.tables import rich_table as rich_table
