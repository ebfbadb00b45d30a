"""The recipe: a complete experiment as typed data, from YAML and the command line.

Only ``train_lt.py`` and ``timm_lt/cli`` know recipes; everything below takes plain arguments.
"""

from timm_lt.fitting import DEFAULT_HEADS as DEFAULT_HEADS
from timm_lt.recipe.checks import stage_heads as stage_heads
from timm_lt.recipe.parse import DEFAULT_RECIPE as DEFAULT_RECIPE
from timm_lt.recipe.parse import create_parser as create_parser
from timm_lt.recipe.parse import find_recipe as find_recipe
from timm_lt.recipe.parse import load_recipe as load_recipe
from timm_lt.recipe.parse import parse_command_line as parse_command_line
from timm_lt.recipe.parse import parse_recipe as parse_recipe
from timm_lt.recipe.parse import recipe_choices as recipe_choices
from timm_lt.recipe.parse import shipped_recipes as shipped_recipes
from timm_lt.recipe.run import Run as Run
from timm_lt.recipe.run import create_run as create_run
from timm_lt.recipe.schema import DataRecipe as DataRecipe
from timm_lt.recipe.schema import FeaturesRecipe as FeaturesRecipe
from timm_lt.recipe.schema import LossRecipe as LossRecipe
from timm_lt.recipe.schema import ModelRecipe as ModelRecipe
from timm_lt.recipe.schema import OptimizerRecipe as OptimizerRecipe
from timm_lt.recipe.schema import Recipe as Recipe
from timm_lt.recipe.schema import RunOptions as RunOptions
from timm_lt.recipe.schema import SamplerRecipe as SamplerRecipe
from timm_lt.recipe.schema import SchedulerRecipe as SchedulerRecipe
