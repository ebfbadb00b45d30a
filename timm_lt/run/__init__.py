"""Runs: a recipe and its execution, ``rebalance``, and comparisons of many runs.

Only this package, ``timm_lt/cli`` and ``train_lt.py`` know recipes.
"""

from timm_lt.run.execution import evaluate as evaluate
from timm_lt.run.execution import extract as extract
from timm_lt.run.execution import fit as fit
from timm_lt.run.execution import main as main
from timm_lt.run.execution import open_run as open_run
from timm_lt.run.execution import push as push
from timm_lt.run.execution import run_to_exit as run_to_exit
from timm_lt.run.execution import save as save
from timm_lt.run.execution import show as show
from timm_lt.run.execution import train as train
from timm_lt.run.parse import parse_command_line as parse_command_line
from timm_lt.run.rebalancing import Rebalanced as Rebalanced
from timm_lt.run.rebalancing import rebalance as rebalance
from timm_lt.run.recipe import Recipe as Recipe
