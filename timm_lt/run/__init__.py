"""Runs: a recipe and its execution, ``rebalance``, and comparisons of many runs.

Only this package, ``timm_lt/cli`` and ``train_lt.py`` know recipes.
"""

from timm_lt.fitting import DEFAULT_HEADS as DEFAULT_HEADS
from timm_lt.run.execution import main as main
from timm_lt.run.execution import run_recipe as run_recipe
from timm_lt.run.parse import DEFAULT_RECIPE as DEFAULT_RECIPE
from timm_lt.run.parse import create_parser as create_parser
from timm_lt.run.parse import find_recipe as find_recipe
from timm_lt.run.parse import load_recipe as load_recipe
from timm_lt.run.parse import parse_command_line as parse_command_line
from timm_lt.run.parse import parse_recipe as parse_recipe
from timm_lt.run.parse import recipe_choices as recipe_choices
from timm_lt.run.parse import shipped_recipes as shipped_recipes
from timm_lt.run.rebalancing import Rebalanced as Rebalanced
from timm_lt.run.rebalancing import rebalance as rebalance
from timm_lt.run.recipe import DataRecipe as DataRecipe
from timm_lt.run.recipe import FeaturesRecipe as FeaturesRecipe
from timm_lt.run.recipe import LossRecipe as LossRecipe
from timm_lt.run.recipe import ModelRecipe as ModelRecipe
from timm_lt.run.recipe import OptimizerRecipe as OptimizerRecipe
from timm_lt.run.recipe import Recipe as Recipe
from timm_lt.run.recipe import RunOptions as RunOptions
from timm_lt.run.recipe import SamplerRecipe as SamplerRecipe
from timm_lt.run.recipe import SchedulerRecipe as SchedulerRecipe
from timm_lt.run.recipe_checks import stage_heads as stage_heads
from timm_lt.run.setup import Run as Run
from timm_lt.run.setup import create_run as create_run
